"""What a sweep writes down while it runs: attempts, tables, a copy of the ledger, progress."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sweep_cases import FakeExecutor, result_of

from regmix.cli import cli
from regmix.errors import StorageError, StudyError
from regmix.files import read_json
from regmix.study import Study
from regmix.swarm import sweep
from regmix.swarm.events import Failed, Requeued
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.pace import Pace
from regmix.swarm.sweep import run_sweep


def test_every_attempt_enters_the_ledger(study: Study) -> None:
    outcomes = iter(["died", "hung", None, None])

    def becomes(job: StackJob) -> Any:
        outcome = next(outcomes)
        return outcome and Requeued(job=job, outcome=outcome, why="exit code -9")

    result = run_sweep(study, FakeExecutor(becomes).options(stack_size=3))
    assert (result.num_done, result.num_pending) == (6, 0)
    with Ledger.read(study.ledger_path) as ledger:
        rows = [(row.stack, row.number, row.state, row.reason) for row in ledger.attempts()]
        assert rows == [
            ("stack-0000", 1, "died", "exit code -9"),
            ("stack-0000", 2, "hung", "exit code -9"),
            ("stack-0000", 3, "done", None),
            ("stack-0001", 1, "done", None),
        ]
        assert [row.attempts for row in ledger.proxies()] == [3, 3, 3, 1, 1, 1]


def test_a_stack_that_could_not_be_trained_is_stored_and_tried_again(study: Study) -> None:
    def fails(job: StackJob) -> Any:
        if job.name == "stack-0001":
            return Failed(job=job, what="no GPU is left", cure="Mend one")
        return None

    result = run_sweep(study, FakeExecutor(fails).options(stack_size=2))
    assert (result.num_done, result.num_failed, result.num_pending) == (4, 0, 2)
    assert result.failures == [("stack-0001", "no GPU is left. Mend one.")]
    mended = FakeExecutor()
    result = run_sweep(study, mended.options())
    assert (result.num_done, result.num_pending, result.failures) == (6, 0, [])
    assert [job.name for job in mended.given] == ["stack-0001"]


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, "kill"])
def test_with_the_copy_in_its_place_nothing_is_lost_or_trained_twice(
    study: Study, ended_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    trained: list[str] = []

    def becomes(job: StackJob) -> Any:
        if len(trained) == 4:
            raise KilledError if ended_by == "kill" else KeyboardInterrupt
        trained.append(job.name)
        return None

    with pytest.raises(KilledError if ended_by == "kill" else KeyboardInterrupt):
        run_sweep(study, FakeExecutor(becomes).options(stack_size=1))
    damaged = bytearray(study.ledger_path.read_bytes())
    damaged[5000:9000] = b"\x00" * 4000
    study.ledger_path.write_bytes(damaged)
    with pytest.raises(StudyError, match=r"cp ledger\.backup\.sqlite ledger\.sqlite"):
        run_sweep(study, FakeExecutor().options())
    shutil.copyfile(study.ledger_copy_path, study.ledger_path)
    again: list[str] = []

    def counts(job: StackJob) -> Any:
        if not (Path(job.folder) / "result.json").is_file():
            again.append(job.name)
        return None

    result = run_sweep(study, FakeExecutor(counts).options())
    assert (result.num_done, result.num_pending) == (6, 0)
    assert not set(trained) & set(again)
    assert len(trained) + len(again) == 6
    assert list(study.stacks_path.iterdir()) == []
    assert len(list(study.steps_path.glob("*.npy"))) == 6


def test_a_full_disk_while_a_stack_is_collected_ends_the_sweep_and_loses_nothing(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).parent == study.steps_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    first = FakeExecutor()
    with monkeypatch.context() as patch:
        patch.setattr(sweep.os, "replace", full)
        with pytest.raises(StorageError, match="Free some space"):
            run_sweep(study, first.options(stack_size=3))
    assert [job.name for job in first.given] == ["stack-0000"]
    kept = study.stacks_path / "stack-0000" / "result.json"
    before = kept.stat().st_mtime_ns

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0000":
            # A worker reads it, and trains nothing.
            assert kept.stat().st_mtime_ns == before
        return None

    result = run_sweep(study, FakeExecutor(becomes).options())
    assert (result.num_done, result.num_pending) == (6, 0)
    assert len(list(study.steps_path.glob("*.npy"))) == 6


@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_ledger_is_refused_where_proxies_were_trained(
    study: Study, content: bytes | None
) -> None:
    run_sweep(study, FakeExecutor().options())
    before = study.losses_path.read_bytes()
    study.ledger_path.unlink()
    if content is not None:
        study.ledger_path.write_bytes(content)
    with pytest.raises(StudyError, match=r"cp .*ledger\.backup\.sqlite"):
        run_sweep(study, FakeExecutor().options())
    study.ledger_copy_path.unlink()
    with pytest.raises(StudyError, match=r"remove losses\.csv and steps/"):
        run_sweep(study, FakeExecutor().options())
    assert study.losses_path.read_bytes() == before


def test_losses_stream_and_fit_works_on_a_sweep_that_runs(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0005":
            seen.append(len(study.losses_path.read_text().splitlines()) - 1)
            words = ["fit", str(study.path), "--partial", "--no-curve", "--regressor", "linear"]
            shown = CliRunner().invoke(cli, words)
            assert shown.exit_code == 0, shown.output
            assert (study.surrogate_path / "fit.json").is_file()
        return None

    # Due at once, whatever the tables take on a busy machine.
    monkeypatch.setattr(Pace, "tick", lambda pace: pace.now() if pace.is_wanted else None)
    run_sweep(study, FakeExecutor(becomes).options(stack_size=1))
    assert seen == [5]


def test_a_stopped_sweep_leaves_its_tables_up_to_date(study: Study) -> None:
    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0002":
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(becomes).options(stack_size=1))
    assert [line.split(",")[0] for line in study.losses_path.read_text().splitlines()[1:]] == [
        "1",
        "2",
    ]
    assert not study.progress_path.exists()
    with Ledger.read(study.ledger_path) as ledger:
        assert ledger.attempts()[-1].state == "stopped"
        assert [row.state for row in ledger.proxies()][:4] == ["done", "done", "retried", "pending"]


def test_progress_says_what_runs(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "tick", lambda pace: pace.now() if pace.is_wanted else None)
    tables: list[dict[str, Any]] = []

    def becomes(job: StackJob) -> Any:
        tables.append(read_json(study.progress_path))
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=3))
    first, second = tables
    assert first["total_tokens"] == 6 * study.config.proxy.tokens
    assert first["token"]
    (running,) = first["running"]
    assert (running["stack"], running["proxies"]) == ("stack-0000", [1, 2, 3])
    assert (running["step"], running["loss_nats"], running["worker"]) == (3, 2.5, "worker-0")
    assert [stack["stack"] for stack in second["running"]] == ["stack-0001"]
    assert not study.progress_path.exists()
    assert not study.stop_path.exists()


def test_a_failed_proxy_is_no_failed_stack(study: Study) -> None:
    result = run_sweep(
        study, FakeExecutor(lambda job: result_of(job, failed=(2,))).options(stack_size=3)
    )
    assert (result.num_done, result.num_failed, result.num_pending) == (5, 1, 0)
    assert result.failures == [("proxy 2", "its gradient was not finite, so it was frozen")]


def test_what_costs_more_is_done_less_often() -> None:
    now, times = 0.0, []

    def action() -> None:
        nonlocal now
        now += 2.0
        times.append(now)

    pace = Pace(action, clock=lambda: now)
    for _ in range(2000):
        pace.is_wanted = True
        pace.tick()
        now += 1.0
    assert len(times) * 2.0 <= 0.011 * now + 2.0
    assert len(times) > 5
    pace = Pace(action, least_seconds=60.0, clock=lambda: now)
    pace.is_wanted = True
    pace.tick()
    assert pace.is_wanted
    now += 60.0
    pace.tick()
    assert not pace.is_wanted


def test_a_coordinator_that_was_overtaken_ends_and_spoils_nothing(study: Study) -> None:
    copies: list[bytes] = []

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0001":
            # Another machine takes the study over while this one stands still.
            with Ledger(study.ledger_path) as other:
                assert [row.state for row in other.proxies()].count("retried") == 2
            copies.append(study.ledger_path.read_bytes())
        return None

    with pytest.raises(StudyError, match="took the study over"):
        run_sweep(study, FakeExecutor(becomes).options(stack_size=2))
    assert [study.ledger_path.read_bytes()] == copies
    result = run_sweep(study, FakeExecutor().options())
    assert (result.num_done, result.num_pending) == (6, 0)
