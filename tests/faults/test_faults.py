"""Real sweeps, disturbed on purpose: nothing is lost, doubled or changed, and refusals say how.

The fast part of the fault suite, several faults to a sweep; `make faults` runs all of it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from regmix_bench.faults import hangs, ledger_faults, permissions
from regmix_bench.faults.fault import Fault
from regmix_bench.faults.hooks import COORDINATOR, WORKER, Rule
from regmix_bench.faults.proof import prove
from regmix_bench.faults.registry import every_fault
from regmix_bench.faults.stage import Size, Stage

SEED = 7
FAST = [fault for fault in every_fault() if fault.is_fast]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A study of 6 proxies in two stacks, and what it gives undisturbed."""
    return Stage(tmp_path_factory.mktemp("faults") / "stage", Size(num_steps=250, workers=1))


@pytest.mark.parametrize("fault", FAST, ids=[fault.folder_name for fault in FAST])
def test_a_fault_loses_doubles_and_changes_nothing(stage: Stage, fault: Fault) -> None:
    if reason := fault.needs():
        pytest.skip(reason)
    row = fault.run(stage, SEED)
    assert row.injected
    assert row.proof.is_clean, f"seed {SEED}: {row.proof}"
    assert row.proof.num_compared > 10


def test_kills_between_steps_that_belong_together_change_nothing(stage: Stage) -> None:
    places = (
        (WORKER, "rename", r"step-\d+\.safetensors$"),
        (COORDINATOR, "rename", r"steps/2\.npy$"),
        (WORKER, "rename", r"result\.json$"),
        (COORDINATOR, "open", r"losses\.csv"),
    )
    case = stage.case("kills")
    case.disturb(*(Rule(role=role, at=at, match=match, do="kill") for role, at, match in places))
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        codes.append(case.start().wait().code)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert case.struck("kill") == len(places)
    case.prove()


def test_a_hung_worker_jumping_clocks_and_noise_change_nothing(stage: Stage) -> None:
    case = stage.case("weather")
    fake = '{"done": "stack-0000", "result": {}}\n'
    case.disturb(
        hangs.IMPATIENT,
        Rule(role="any", at="start", do="jump", times=None),
        Rule(role=WORKER, at="step", match="@50@", do="print", value=("no newline", 99)),
        Rule(role=WORKER, at="step", match="@51@", do="write", value=(1, fake, 3)),
        Rule(role=WORKER, at="step", match="stack-0001@100@", do="stop"),
    )
    case.ends_well(case.start())
    assert [case.struck(do) for do in ("print", "write", "stop")] == [1, 1, 1]
    assert case.ledger_states() == {"done": 2, "hung": 1}


def test_refusals_say_what_is_wrong_and_change_nothing(stage: Stage) -> None:
    case = stage.half_done("refusals")
    ledger, manifest = case.study / "ledger.sqlite", case.shards / "manifest.json"
    before = case.snapshot()
    whole = ledger.read_bytes()
    ledger_faults.zeroed_page(ledger, random.Random(SEED))
    case.refused(case.start(), "ledger.sqlite", "ledger.backup.sqlite")
    ledger.write_bytes(whole)
    manifest.chmod(permissions.CLOSED)
    case.refused(case.start(**permissions.bound_by_permissions()), "manifest.json", "ermission")
    manifest.chmod(0o644)
    case.refuse_changes(before)
    first = case.start()
    case.in_the_middle(first, 1)
    os.kill(first.process.pid, signal.SIGSTOP)
    case.refused(case.start(), "in use", str(first.process.pid))
    os.kill(first.process.pid, signal.SIGCONT)
    case.ends_well(first)


def test_the_proof_sees_what_is_lost_doubled_and_changed(stage: Stage, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(stage.whole, tmp_path / name))

    assert prove(stage.whole, copy("same")).is_clean
    lost = copy("lost")
    (lost / "steps" / "1.npy").unlink()
    assert prove(stage.whole, lost).lost == ("steps/1.npy is missing",)
    doubled = copy("doubled")
    lines = (doubled / "losses.csv").read_text().splitlines(keepends=True)
    (doubled / "losses.csv").write_text("".join([*lines, lines[-1]]))
    assert prove(stage.whole, doubled).doubled == (f"losses.csv has 2 rows {lines[-1][0]}",)
    changed = copy("changed")
    path = changed / "steps" / "2.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert prove(stage.whole, changed).different == ("steps/2.npy",)
