"""Files and folders that may not be read or written.

Enters: a stage. Leaves: rows. Permissions do not bind root, so as root the command is started
without the capabilities that lift them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
from typing import Any

from regmix_bench.faults.fault import REFUSED, Fault, Row
from regmix_bench.faults.stage import Stage

READ_ONLY, CLOSED = 0o555, 0o000
_PR_CAPBSET_DROP = 24
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: to write and to read whatever the permissions say.
_CAPABILITIES = (1, 2)


def bound_by_permissions() -> dict[str, Any]:
    """Return how to start a command that permissions bind, whoever this process is."""
    return {"preexec_fn": _drop_capabilities} if os.geteuid() == 0 else {}


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in _CAPABILITIES:
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "a capability cannot be dropped")


def closed(stage: Stage, _draw: random.Random, *, part: str, mode: int, word: str) -> Row:
    """Take the permissions of one part of a study that is half trained."""
    case = stage.half_done(f"closed-{part.replace('/', '-')}")
    path = case.folder / part
    mode_before, before = path.stat().st_mode, case.snapshot()
    path.chmod(mode)
    try:
        sees = case.refused(case.start(**bound_by_permissions()), word, "ermission")
    finally:
        path.chmod(mode_before)
    if mode == CLOSED and path.is_file():
        case.refuse_changes(before)
    return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


def _closed(part: str, mode: int, word: str) -> Fault:
    what = "may not be written" if mode == READ_ONLY else "may not be read"
    return Fault(
        name=f"{part} {what}",
        inject=functools.partial(closed, part=part, mode=mode, word=word),
    )


FAULTS = (
    _closed("study", READ_ONLY, "study"),
    _closed("study/ledger.sqlite", CLOSED, "ledger.sqlite"),
    _closed("study/stacks/stack-0001", READ_ONLY, "stack-0001"),
    _closed("study/steps", READ_ONLY, "steps"),
    _closed("study/logs", CLOSED, "logs"),
    _closed("study/mixtures.csv", CLOSED, "mixtures.csv"),
    _closed("shards/train/animals-0.tokens", CLOSED, "animals-0.tokens"),
    _closed("shards/manifest.json", CLOSED, "manifest.json"),
)
