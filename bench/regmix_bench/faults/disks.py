"""Disks that are full: a study on a small disk of its own, filled at one exact moment.

Enters: a stage. Leaves: rows. The disk is a tmpfs, which the kernel fills and refuses as any
other (ENOSPC); mounting one needs root. Without root, a limit on file sizes (EFBIG) stands in.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from regmix_bench.faults.fault import REFUSED, SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import COORDINATOR, WORKER, Rule, fill_disk
from regmix_bench.faults.stage import Case, Stage

# More than a sweep of a stage says that it needs, so that it is not refused before it starts.
DISK_BYTES = 48 << 20


def refuse_without_root() -> str | None:
    """Return why nothing can be mounted here."""
    if os.geteuid() != 0:
        return "mounting a disk needs root"
    return None if shutil.which("mount") else "there is no mount command"


def refuse_without_loop_devices() -> str | None:
    """Return why no image can be mounted here."""
    if reason := refuse_without_root():
        return reason
    if not shutil.which("mkfs.ext4"):
        return "there is no mkfs.ext4"
    return None if Path("/dev/loop-control").exists() else "there are no loop devices"


@contextlib.contextmanager
def small_disk(case: Case) -> Iterator[None]:
    """Put a case's study on a disk of its own."""
    aside = case.folder / "study.aside"
    case.study.rename(aside)
    case.study.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(case.study)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        shutil.copytree(aside, case.study, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(case.study)], check=True, capture_output=True)


def free(case: Case) -> None:
    """Remove what fills a case's disk."""
    for path in case.study.glob("ballast-*"):
        path.unlink()


def full_at(
    stage: Stage, _draw: random.Random, *, role: str, at: str, match: str, nth: int = 1
) -> Row:
    """Fill the disk as a process is about to write something."""
    case = stage.case(f"full-at-{role}-{at}-{''.join(filter(str.isalnum, match))}")
    with small_disk(case):
        case.disturb(Rule(role=role, at=at, match=match, nth=nth, do="fill", value=str(case.study)))
        run = case.start()
        if run.wait().code == 0:
            # A worker that ends its stack removes its checkpoints, perhaps just in time.
            sees, outcome = "nothing: a worker freed space just then", SAME_BITS
            struck, proof = case.struck("fill"), case.prove()
            return Row(injected=struck, sees=sees, outcome=outcome, proof=proof)
        sees = case.refused(run, "ree some space")
        struck = case.struck("fill")
        free(case)
        return Row(injected=struck, sees=sees, outcome=REFUSED, proof=case.ends_well())


def full_before(stage: Stage, _draw: random.Random) -> Row:
    """Start a sweep on a full disk."""
    case = stage.case("full-before")
    with small_disk(case):
        fill_disk(case.study)
        sees = case.refused(case.start(), "ree some space")
        free(case)
        return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


def files_limited(stage: Stage, _draw: random.Random) -> Row:
    """Let a worker write no file as large as a checkpoint."""
    case = stage.case("files-limited")
    case.disturb(Rule(role=WORKER, at="start", do="limit_files", value=50_000, times=None))
    sees = case.refused(case.start(), "File too large", "step-")
    return Row(injected=stage.size.workers, sees=sees, outcome=REFUSED, proof=case.ends_well())


def _full(name: str, role: str, at: str, match: str, nth: int = 1, **options: bool) -> Fault:
    return Fault(
        name=f"disk full {name}",
        inject=functools.partial(full_at, role=role, at=at, match=match, nth=nth),
        needs=refuse_without_root,
        **options,
    )


FAULTS = (
    Fault(name="disk full before the sweep", inject=full_before, needs=refuse_without_root),
    _full("at the worker's log", COORDINATOR, "open", r"logs/worker"),
    _full("at a checkpoint", WORKER, "open", r"step-\d+\.safetensors", 3),
    _full("at a stack's result", WORKER, "open", r"result\.json"),
    _full("at the ledger", COORDINATOR, "rename", r"steps/2\.npy$", is_fast=True),
    _full("at losses.csv", COORDINATOR, "open", r"losses\.csv"),
    _full("at sweep.json", COORDINATOR, "open", r"sweep\.json"),
    Fault(name="file size limited (EFBIG) at a checkpoint", inject=files_limited),
)
