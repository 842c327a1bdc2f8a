"""Real sweeps, disturbed on purpose: nothing is lost, doubled or changed, and refusals say how.

The fast part of the fault suite; `make faults` runs all of it.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from regmix_bench.faults import kills
from regmix_bench.faults.fault import Row
from regmix_bench.faults.hooks import COORDINATOR, WORKER
from regmix_bench.faults.registry import every_fault
from regmix_bench.faults.stage import Size, Stage

SEED = 7
FAST = [fault for fault in every_fault() if fault.is_fast]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A study of 6 proxies and what it gives undisturbed, for all tests of this module."""
    return Stage(tmp_path_factory.mktemp("faults") / "stage", Size(num_steps=250))


def check(row: Row, times: int = 1) -> None:
    assert row.injected >= times
    assert row.proof.is_clean, f"seed {SEED}: {row.proof}"
    assert row.proof.num_compared > 10


@pytest.mark.parametrize("fault", FAST, ids=[fault.folder_name for fault in FAST])
def test_a_fault_loses_doubles_and_changes_nothing(stage: Stage, fault) -> None:
    if reason := fault.needs():
        pytest.skip(reason)
    check(fault.run(stage, SEED))


def test_kills_at_random_moments_lose_double_and_change_nothing(stage: Stage) -> None:
    draw = random.Random(SEED)
    check(kills.coordinators_killed(stage, draw, kills=2), 2)
    check(kills.workers_killed(stage, draw, kills=2), 2)


@pytest.mark.parametrize(
    ("role", "places"),
    [(COORDINATOR, kills.COORDINATOR_PLACES[1:3]), (WORKER, kills.WORKER_PLACES[2:5:2])],
)
def test_kills_between_two_steps_that_belong_together_change_nothing(
    stage: Stage, role: str, places: tuple[tuple[str, str], ...]
) -> None:
    inject = functools.partial(kills.killed_at_places, role=role, places=places)
    check(inject(stage, random.Random(SEED)), 2)


def test_the_proof_sees_what_is_lost_doubled_and_changed(stage: Stage, tmp_path: Path) -> None:
    import shutil

    from regmix_bench.faults.proof import prove

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
