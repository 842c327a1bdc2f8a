"""Which proxies a sweep trains: some of them, failed ones again, none that were taken out."""

from __future__ import annotations

import threading
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sweep_cases import FakeExecutor, new_study, result_of

from regmix.cli import cli
from regmix.cli.proxy_selection import parse_indices
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, StudyError
from regmix.study import Study, Training
from regmix.swarm import stop_request
from regmix.swarm.engine import StoppedError
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.selection import cancel_proxies
from regmix.swarm.stop_request import ask_to_stop
from regmix.swarm.sweep import run_sweep
from regmix.swarm.worker import train_job


def states(study: Study) -> dict[int, str]:
    with Ledger.read(study.ledger_path) as ledger:
        return {row.index: row.state for row in ledger.proxies()}


def members(jobs: list[StackJob]) -> list[list[int]]:
    return [[int(member.name) for member in job.members] for job in jobs]


def outcome(study: Study) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in study.steps_path.glob("*.npy")}
    return {**files, "losses.csv": study.losses_path.read_bytes()}


def trained(job: StackJob) -> dict[str, Any]:
    return train_job(job)


def test_only_some_are_trained_and_the_others_wait(study: Study) -> None:
    fake = FakeExecutor()
    result = run_sweep(study, fake.options(only=frozenset({2, 5}), stack_size=3))
    assert members(fake.given) == [[2, 5]]
    assert (result.num_done, result.num_pending, result.num_left) == (2, 0, 4)
    result = run_sweep(study, fake.options(stack_size=3))
    assert members(fake.given[1:]) == [[1, 3], [4, 6]]
    assert (result.num_done, result.num_left) == (6, 0)


def test_a_stack_that_is_parted_goes_on_from_its_checkpoint_to_the_same_bits(
    study: Study, tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    other = new_study(tiny_shards, tiny_training, tmp_path / "other")
    run_sweep(other, FakeExecutor(trained).options(stack_size=6))

    def stop_on_the_way(job: StackJob) -> Any:
        answers = iter([False] * 4 + [True])
        with pytest.raises(StoppedError):
            train_job(job, should_stop=answers.__next__)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(stop_on_the_way).options(stack_size=6))
    checkpoints: list[list[str]] = []

    def resumed(job: StackJob) -> Any:
        checkpoints.append(sorted(path.name for path in Path(job.folder).iterdir()))
        return train_job(job)

    fake = FakeExecutor(resumed)
    run_sweep(study, fake.options(only=frozenset({1, 4})))
    run_sweep(study, fake.options())
    assert members(fake.given) == [[1, 4], [2, 3, 5, 6]]
    assert checkpoints == [["step-00000005.safetensors"]] * 2
    assert outcome(study) == outcome(other)
    assert list(study.stacks_path.iterdir()) == []


def test_a_stack_that_is_trained_and_not_yet_collected_is_not_parted(study: Study) -> None:
    def killed_after_its_result(job: StackJob) -> Any:
        train_job(job)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(killed_after_its_result).options(stack_size=6))
    for attempt in (
        lambda: run_sweep(study, FakeExecutor().options(only=frozenset({1}))),
        lambda: CliRunner().invoke(
            cli,
            ["proxies", str(study.path), "--cancel", "--only", "1"],
            catch_exceptions=False,
        ),
    ):
        with pytest.raises(StudyError, match="not yet in the ledger"):
            attempt()
    fake = FakeExecutor(trained)
    assert run_sweep(study, fake.options()).num_done == 6
    assert members(fake.given) == [[1, 2, 3, 4, 5, 6]]


def test_no_proxy_is_taken_out_of_a_study_whose_ledger_is_lost(study: Study) -> None:
    run_sweep(study, FakeExecutor().options())
    study.ledger_path.unlink()
    before = study.losses_path.read_bytes(), study.ledger_copy_path.read_bytes()
    command = ["proxies", str(study.path), "--cancel", "--only", "1"]
    with pytest.raises(StudyError, match="ledger is missing"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert not study.ledger_path.exists()
    assert (study.losses_path.read_bytes(), study.ledger_copy_path.read_bytes()) == before


def test_a_dry_run_parts_and_revives_nothing(study: Study) -> None:
    class EnoughError(Exception):
        pass

    def enough(*_: object) -> None:
        raise EnoughError

    def stopped(_: StackJob) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(stopped).options(stack_size=3))
    options = FakeExecutor().options(only=frozenset({2}), retry_failed=True)
    with pytest.raises(EnoughError):
        run_sweep(study, options, on_start=enough)
    with Ledger.read(study.ledger_path) as ledger:
        assert [job.name for job in ledger.stacks()] == ["stack-0000", "stack-0001"]
        assert {row.state for row in ledger.proxies()} == {"retried", "pending"}


def test_failed_proxies_are_trained_again_with_their_seeds(study: Study) -> None:
    def fails(job: StackJob) -> Any:
        return result_of(job, failed=(2, 5))

    first = FakeExecutor(fails)
    assert run_sweep(study, first.options(stack_size=3)).num_failed == 2
    # A plain run leaves them alone.
    again = FakeExecutor()
    assert run_sweep(study, again.options()).num_failed == 2
    assert again.given == []
    result = run_sweep(study, again.options(retry_failed=True, only=frozenset({5})))
    # Of those that were asked for; the other one is still there to be trained.
    assert (result.num_done, result.num_failed) == (5, 0)
    result = run_sweep(study, again.options(retry_failed=True))
    assert (result.num_done, result.num_failed) == (6, 0)
    assert [job.name for job in again.given] == ["stack-0002", "stack-0003"]
    assert members(again.given) == [[5], [2]]
    seeds = {m.name: (m.data_seed, m.init_seed) for job in first.given for m in job.members}
    for job in again.given:
        assert all(seeds[m.name] == (m.data_seed, m.init_seed) for m in job.members)
    with Ledger.read(study.ledger_path) as ledger:
        attempts = {row.index: row.attempts for row in ledger.proxies()}
        assert {row.error for row in ledger.proxies()} == {None}
    assert attempts == {1: 1, 2: 2, 3: 1, 4: 1, 5: 2, 6: 1}
    assert len(study.losses_path.read_text().splitlines()) == 7


def test_a_proxy_that_was_taken_out_waits_until_it_is_named(study: Study) -> None:
    def stopped(_: StackJob) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(stopped).options(stack_size=3, only=frozenset({1, 2, 3})))
    with Ledger(study.ledger_path) as ledger:
        # One in a stack with others, one that no stack holds yet.
        assert cancel_proxies(study, ledger, {2, 6}) == 2
        assert cancel_proxies(study, ledger, {2, 6}) == 0
    fake = FakeExecutor()
    result = run_sweep(study, fake.options())
    assert sorted(chain.from_iterable(members(fake.given))) == [1, 3, 4, 5]
    assert (result.num_done, result.num_cancelled, result.num_pending) == (4, 2, 0)
    for words in ({}, {"retry_failed": True}):
        run_sweep(study, fake.options(**words))
    assert states(study) == {
        1: "done", 2: "cancelled", 3: "done", 4: "done", 5: "done", 6: "cancelled"
    }  # fmt: skip
    with pytest.raises(StudyError, match="--retry-failed"):
        run_sweep(study, fake.options(only=frozenset({2})))
    result = run_sweep(study, fake.options(retry_failed=True, only=frozenset({2, 6})))
    assert (result.num_done, result.num_cancelled) == (6, 0)
    assert sorted(chain.from_iterable(members(fake.given))) == [1, 2, 3, 4, 5, 6]


def test_what_is_trained_cannot_be_taken_out(study: Study) -> None:
    run_sweep(study, FakeExecutor().options())
    with (
        Ledger(study.ledger_path) as ledger,
        pytest.raises(StudyError, match="proxy 3 is trained already"),
    ):
        cancel_proxies(study, ledger, {3})


def test_a_proxy_that_there_is_not_is_named(study: Study) -> None:
    with pytest.raises(StudyError, match="no proxy 7"):
        run_sweep(study, FakeExecutor().options(only=frozenset({1, 7})))


def test_a_request_from_elsewhere_stops_the_sweep_cleanly(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_request, "POLL_SECONDS", 0.01)
    asked = threading.Event()
    answers: list[object] = []

    def ask() -> None:
        answers.append(ask_to_stop(study, on_asked=asked.set))

    thread = threading.Thread(target=ask)

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0001":
            thread.start()
            # Ends by the interrupt, as a queue that is waited for would.
            threading.Event().wait(60)
            pytest.fail("the sweep was not interrupted")
        return None

    with pytest.raises(KeyboardInterrupt):
        run_sweep(study, FakeExecutor(becomes).options(stack_size=2))
    thread.join(60)
    assert asked.is_set()
    assert len(answers) == 1
    assert states(study) == {
        1: "done",
        2: "done",
        3: "retried",
        4: "retried",
        5: "pending",
        6: "pending",
    }
    assert not study.stop_path.exists()
    with pytest.raises(StudyError, match="no sweep runs"):
        ask_to_stop(study)


def test_another_command_is_not_stopped(study: Study) -> None:
    with study.lock(), pytest.raises(StudyError, match="another command"):
        ask_to_stop(study)


def test_indices_are_read_as_people_write_them() -> None:
    assert parse_indices(None) is None
    assert parse_indices("3") == {3}
    assert parse_indices("3, 5-8,1000001") == {3, 5, 6, 7, 8, 1_000_001}


@pytest.mark.parametrize(
    "text", ["", "a", "3,", "5-3", "-3", "3-", "1-99999999999", "³", "1e3", "3--5"]
)
def test_indices_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--only"):
        parse_indices(text)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cancel", "--gpus", "1"], "--gpus has no use with --cancel"),
        (["--cancel", "--retry-failed", "--only", "1"], "--retry-failed has no use with --cancel"),
        (["--only", "1", "--rounds", "2"], "--only and --rounds contradict"),
        (["--retry-failed", "--rounds", "2"], "--retry-failed and --rounds contradict"),
        (["--micro-batch", "2"], "without --gpus"),
        (["--rule", "lcb"], "--rule has no use without --rounds"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    study: Study, words: list[str], told: str
) -> None:
    shown = CliRunner().invoke(cli, ["proxies", str(study.path), *words])
    assert isinstance(shown.exception, ConfigError)
    assert told in str(shown.exception)


def test_cancel_says_how_to_go_on(study: Study) -> None:
    run = CliRunner().invoke
    shown = run(cli, ["proxies", str(study.path), "--cancel", "--only", "2,4"])
    assert shown.exit_code == 0, shown.output
    assert f"proxies {study.path} --retry-failed --only 2,4" in shown.output
    assert states(study) == {2: "cancelled", 4: "cancelled"}
    with study.lock():
        shown = run(cli, ["proxies", str(study.path), "--cancel", "--only", "1"])
    assert isinstance(shown.exception, StudyError)
    assert "--cancel" in str(shown.exception)
