"""The ledger: states, losses, and a refusal of what it cannot read."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from regmix.errors import StorageError, StudyError
from regmix.study import Training
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.ledger import Ledger, LedgerReader

# Made by the code that wrote version 1: a stack that is done, with a failed proxy, and two others.
FIXTURE = Path(__file__).parent / "fixtures" / "ledger-v1.sqlite"


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


def begin(ledger: Ledger, job: StackJob, worker: str = "worker-0", step: int | None = 0) -> None:
    ledger.begin_attempt(
        job,
        worker=worker,
        machine="node-1",
        device="cpu",
        step=step,
        environment={"versions": {"torch": "2.13.0"}},
    )


def states(ledger: LedgerReader) -> list[str]:
    return [row.state for row in ledger.proxies()]


def test_a_version_1_ledger_is_upgraded_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copyfile(FIXTURE, path)
    # A reader sees all of it, and writes nothing.
    with Ledger.read(path) as reader:
        read = (reader.proxies(), reader.final_losses(), reader.remarks(), reader.stacks())
    assert path.read_bytes() == FIXTURE.read_bytes()
    with Ledger(path) as ledger:
        assert (ledger.proxies(), ledger.final_losses(), ledger.remarks(), ledger.stacks()) == read
        assert states(ledger) == ["done", "failed", "pending", "pending"]
        assert [job.name for job in ledger.pending_stacks()] == ["stack-0002", "stack-0001-m2"]
        assert ledger.final_losses() == {1: {"a": 0.1 + 0.2, "b": 2.0}}
        assert ledger.totals() == (2.0, 100)
        assert ledger.remarks()[0][0] == 3
        assert ledger.next_stack_number() == 3
        ledger.export_trajectories(tmp_path / "trajectories.csv", ("a", "b"))
    lines = (tmp_path / "trajectories.csv").read_text().splitlines()
    assert lines[1:] == ["1,6,1.5,", f"1,12,{0.1 + 0.2!r},2.0"]
    with Ledger(path) as ledger:
        ledger.finish_stack(ledger.pending_stacks()[0], result_of([[1.0, 2.0]], [False]))
        assert states(ledger) == ["done", "failed", "pending", "done"]


def test_a_stack_goes_through_its_states(tmp_path: Path, tiny_training: Training) -> None:
    job = job_of(tiny_training, "stack-0000", (1, 2))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
        begin(ledger, job)
        assert states(ledger) == ["running", "running"]
        ledger.break_off_attempt(job, "died", "exit code -9")
        assert states(ledger) == ["retried", "retried"]
        begin(ledger, job, "worker-1", 7)
        ledger.finish_stack(job, result_of([[1.0, 2.0], [None, 4.0]], [False, False]))
        assert states(ledger) == ["done", "failed"]
        first, second = ledger.attempts()
        assert [row.attempts for row in ledger.proxies()] == [2, 2]
        assert (first.number, first.state, first.reason) == (1, "died", "exit code -9")
        assert (second.number, second.state, second.first_step) == (2, "done", 7)
        assert (second.worker, second.machine, second.device) == ("worker-1", "node-1", "cpu")
        assert second.environment == {"versions": {"torch": "2.13.0"}}
        assert second.seconds is not None
        assert ledger._rows("SELECT count(*) FROM environments") == [(1,)]


def test_what_a_killed_coordinator_left_running_is_tried_again(
    tmp_path: Path, tiny_training: Training
) -> None:
    one, two = (job_of(tiny_training, f"stack-000{i}", (i,)) for i in (1, 2))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([one, two])
        begin(ledger, one)
    with Ledger.read(tmp_path / "ledger.sqlite") as reader:
        assert states(reader) == ["running", "pending"]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert states(ledger) == ["retried", "pending"]
        (attempt,) = ledger.attempts()
        assert (attempt.state, attempt.seconds) == ("lost", None)
        assert "killed" in str(attempt.reason)
        begin(ledger, one)
        assert [row.number for row in ledger.attempts()] == [1, 2]


def test_a_stack_that_could_not_be_trained_keeps_its_reason(
    tmp_path: Path, tiny_training: Training
) -> None:
    job = job_of(tiny_training, "stack-0000", (1, 2))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks([job])
        begin(ledger, job)
        ledger.fail_stack(job, "no GPU is left. Mend one.")
        (row,) = ledger.stack_rows()
        assert (row.state, row.reason) == ("failed", "no GPU is left. Mend one.")
        assert {row.error for row in ledger.proxies()} == {"no GPU is left. Mend one."}
        # The next run takes it up.
        assert ledger.pending_stacks() == [job]
        ledger.queue([job])
        assert states(ledger) == ["retried", "retried"]
        assert {row.error for row in ledger.proxies()} == {None}


def test_a_writer_that_was_killed_in_a_transaction_is_read_around(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copyfile(FIXTURE, path)
    script = (
        "import os, sys; from pathlib import Path; from regmix.swarm.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); db = ledger._db\n"
        "db.execute('PRAGMA cache_size = 1'); db.execute('BEGIN IMMEDIATE')\n"
        "db.execute(\"UPDATE proxies SET state = 'done'\")\n"
        "for i in range(2000): db.execute('INSERT INTO remarks VALUES (1, ?, NULL)', ['x' * 99])\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)
    journal = Path(f"{path}-journal")
    before = path.read_bytes(), journal.read_bytes()
    with Ledger.read(path) as reader:
        assert states(reader) == ["done", "failed", "pending", "pending"]
        assert len(reader.remarks()) == 1
    assert (path.read_bytes(), journal.read_bytes()) == before
    with Ledger(path) as ledger:
        assert states(ledger) == ["done", "failed", "pending", "pending"]
    assert not journal.exists()


def test_a_reader_keeps_no_writer_waiting(tmp_path: Path, tiny_training: Training) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add_stacks([job_of(tiny_training, "stack-0000", (1,))])
        with Ledger.read(path) as reader:
            ledger._db.execute("PRAGMA busy_timeout = 0")
            ledger.add_stacks([job_of(tiny_training, "stack-0001", (2,))])
            assert len(reader.proxies()) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ledger.sqlite"]


def everything(path: Path) -> object:
    with Ledger.read(path) as reader:
        parts = (reader.proxies(), reader.stack_rows(), reader.attempts(), reader.remarks())
        return (*parts, reader.job_tables(), reader.final_losses(), reader.totals())


def test_a_flipped_bit_is_refused_or_changes_nothing(
    tmp_path: Path, tiny_training: Training
) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        job = job_of(tiny_training, "stack-0000", (1, 2))
        ledger.add_stacks([job])
        begin(ledger, job)
        ledger.finish_stack(job, result_of([[1.5, 2.5], [3.5, None]], [False, False]))
    whole, expected = path.read_bytes(), everything(path)
    draw = random.Random(7)
    num_refused = 0
    for _ in range(400):
        bit = draw.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = everything(path)
        except (StudyError, StorageError):
            num_refused += 1
        else:
            assert found == expected, f"bit {bit}"
    assert num_refused > 5


def test_a_changed_number_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copyfile(FIXTURE, path)
    with Ledger(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE stacks SET seconds = 3.0 WHERE name = 'stack-0000'")
    for open_ledger in (Ledger, Ledger.read):
        with pytest.raises(StudyError, match="stacks does not match its checksum"):
            open_ledger(path)


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0", None])
def test_a_cut_ledger_is_refused_when_it_is_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(FIXTURE.read_bytes()[:9000] if content is None else content)
    with pytest.raises(StudyError, match="the ledger is damaged"):
        Ledger.read(path)


def test_a_damaged_ledger_names_its_copy_and_never_replaces_it(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.sqlite", tmp_path / "ledger.backup.sqlite"
    shutil.copyfile(FIXTURE, path)
    with Ledger(path) as ledger:
        ledger.copy_to(copy)
        kept = copy.read_bytes()
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("UPDATE proxies SET error = 'x' WHERE proxy = 1")
        with pytest.raises(StudyError, match=r"cp ledger\.backup\.sqlite ledger\.sqlite"):
            ledger.copy_to(copy)
    assert copy.read_bytes() == kept
    shutil.copyfile(copy, path)
    with Ledger(path) as ledger:
        assert states(ledger) == ["done", "failed", "pending", "pending"]
    assert not list(tmp_path.glob(".*"))


def test_a_ledger_with_tables_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger._db.execute("CREATE TRIGGER more AFTER INSERT ON stacks BEGIN SELECT 1; END")
    with pytest.raises(StudyError, match="not those of its version"):
        Ledger.read(path)
