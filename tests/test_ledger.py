"""The ledger: states, losses, and a refusal of what it cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from regmix.errors import StorageError, StudyError
from regmix.study import Training
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.ledger import Ledger


def job_of(training: Training, name: str, indices: tuple[int, ...]) -> StackJob:
    members = tuple(
        Member(name=str(i), weights={"a": 0.25, "b": 0.75}, data_seed=0, init_seed=0)
        for i in indices
    )
    return StackJob(
        name=name,
        members=members,
        training=training,
        targets=("a", "b"),
        shards="s",
        shards_checksum="c",
        folder="f",
    )


def result_of(losses: list[list[float | None]], failed: list[bool]) -> dict[str, object]:
    return {
        "losses": losses,
        "failed": failed,
        "evaluations": [[12, losses]],
        "seconds": 2.0,
        "tokens": 100,
    }


def test_a_stack_comes_back_as_it_was_stored(tmp_path: Path, tiny_training: Training) -> None:
    job = job_of(tiny_training, "one", (1, 2))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.pending_stacks() == [job]
        assert [row.state for row in ledger.proxies()] == ["pending", "pending"]


def test_a_stack_stored_before_checksums_were_is_read(tiny_training: Training) -> None:
    table = job_of(tiny_training, "stack-0000", (1,)).to_table()
    del table["shards_checksum"]
    assert StackJob.from_table(table).shards_checksum == ""


def test_losses_are_exported_to_the_last_bit(tmp_path: Path, tiny_training: Training) -> None:
    job = job_of(tiny_training, "one", (7, 2))
    value = 0.1 + 0.2
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
        ledger.finish_stack(job, result_of([[value, 2.0], [3.0, 4.0]], [False, False]))
        assert ledger.pending_stacks() == []
        assert ledger.export_losses(tmp_path / "losses.csv", ("a", "b")) == 2
        assert ledger.totals() == (2.0, 100)
    assert (tmp_path / "losses.csv").read_text() == (
        f"index,metric/a_val_loss,metric/b_val_loss\n2,3.0,4.0\n7,{value!r},2.0\n"
    )


@pytest.mark.parametrize(
    ("losses", "failed", "reason"),
    [([1.0, 2.0], True, "gradient"), ([None, 2.0], False, "not finite")],
)
def test_a_failed_proxy_has_a_reason_and_no_losses(
    tmp_path: Path,
    tiny_training: Training,
    losses: list[float | None],
    failed: bool,
    reason: str,
) -> None:
    job = job_of(tiny_training, "one", (1, 2))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
        ledger.finish_stack(job, result_of([losses, [3.0, 4.0]], [failed, False]))
        first, second = ledger.proxies()
        assert first.state == "failed"
        assert first.error is not None
        assert reason in first.error
        assert second.state == "done"
        assert ledger.export_losses(tmp_path / "losses.csv", ("a", "b")) == 1


def test_finishing_twice_counts_once(tmp_path: Path, tiny_training: Training) -> None:
    job = job_of(tiny_training, "one", (1,))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
        for _ in range(2):
            ledger.finish_stack(job, result_of([[1.0, 2.0]], [False]))
        assert ledger.export_losses(tmp_path / "losses.csv", ("a", "b")) == 1
        assert ledger.totals() == (2.0, 100)


def test_a_failed_transaction_leaves_nothing_behind(
    tmp_path: Path, tiny_training: Training
) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job_of(tiny_training, "one", (1,))])
        with pytest.raises(Exception, match="UNIQUE"):
            ledger.add_stacks(
                [job_of(tiny_training, "two", (2,)), job_of(tiny_training, "three", (1,))]
            )
        assert ledger.num_stacks() == 1


def test_a_corrupt_ledger_is_refused_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database" * 400)
    with pytest.raises(StudyError, match="the ledger is damaged"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger._db.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    with pytest.raises(StudyError, match="made by a newer version"):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_full_disk_is_named_with_its_cure(tmp_path: Path, tiny_training: Training) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger._db.execute("PRAGMA max_page_count = 6")
        with pytest.raises(StorageError, match="cannot be written"):
            ledger.add_stacks([job_of(tiny_training, "one", tuple(range(5000)))])
        assert ledger.num_stacks() == 0
