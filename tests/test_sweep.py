"""The sweep: resumed after a kill, refused when twice, and honest about what failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regmix.data.shards import ShardSet
from regmix.errors import ModelError, StudyError
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, add_mixtures, make_study
from regmix.swarm.events import Done, Event, Progress
from regmix.swarm.executors import LocalExecutor, stack_jobs
from regmix.swarm.ledger import Ledger
from regmix.swarm.processes import worker_processes
from regmix.swarm.sweep import SweepOptions, Tally, run_sweep


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return new_study(tiny_shards, tiny_training, tmp_path / "study")


def new_study(shards: ShardSet, training: Training, path: Path) -> Study:
    return make_study(
        path,
        shards,
        swarm=SwarmRequest(num=6),
        training=training,
        objective={"animals": 1.0},
    )


@pytest.fixture(scope="module")
def undisturbed(
    tiny_shards_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The losses of a sweep that nothing disturbed, and its training losses by step."""
    study = new_study(
        ShardSet.open(tiny_shards_path),
        long_training(),
        tmp_path_factory.mktemp("undisturbed") / "study",
    )
    result = run_sweep(study, SweepOptions(num_workers=2, stack_size=3))
    assert (result.num_done, result.num_failed) == (6, 0)
    return outcome(study)


def long_training() -> Training:
    """Long enough to be killed in the middle: a second or two for a stack."""
    from regmix.model.optim import OptimConfig
    from regmix.model.presets import ModelShape

    return Training(
        shape=ModelShape(
            num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=320, seq_len=32
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, total_steps=300),
        batch_size=8,
        num_steps=300,
    )


def outcome(study: Study) -> dict[str, bytes]:
    files = {"losses.csv": study.losses_path.read_bytes()}
    for path in sorted(study.steps_path.glob("*.npy")):
        files[path.name] = path.read_bytes()
    return files


def start_cli(study: Study, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "regmix.cli", "proxies", str(study.path), "--workers", "2",
         "--stack-size", "3", "--checkpoint-seconds", "0.05", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_checkpoints(study: Study, num: int) -> None:
    """Wait until `num` checkpoints were seen: then the sweep is in the middle of its stacks."""
    deadline = time.monotonic() + 120
    seen: set[Path] = set()
    while time.monotonic() < deadline:
        seen |= set(study.stacks_path.glob("*/step-*.safetensors"))
        if len(seen) >= num:
            return
        time.sleep(0.01)
    raise AssertionError("the sweep wrote no checkpoint")


@pytest.mark.parametrize("num_checkpoints", [1, 7])
def test_a_sweep_killed_at_any_moment_ends_with_the_same_bits(
    tiny_shards: ShardSet, tmp_path: Path, undisturbed: dict[str, bytes], num_checkpoints: int
) -> None:
    study = new_study(tiny_shards, long_training(), tmp_path / "study")
    process = start_cli(study)
    wait_for_checkpoints(study, num_checkpoints)
    process.kill()
    process.communicate()
    assert not study.losses_path.exists()
    result = run_sweep(study, SweepOptions(num_workers=2, stack_size=3))
    assert (result.num_done, result.num_failed) == (6, 0)
    assert outcome(study) == undisturbed


def test_sigterm_stops_cleanly_and_says_how_to_go_on(
    tiny_shards: ShardSet, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = new_study(tiny_shards, long_training(), tmp_path / "study")
    process = start_cli(study)
    wait_for_checkpoints(study, 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Run the same command again" in errors
    assert b"Traceback" not in errors
    assert not study.losses_path.exists()
    run_sweep(study, SweepOptions(num_workers=2, stack_size=3))
    assert outcome(study) == undisturbed


def test_a_killed_worker_is_replaced_and_its_stack_goes_on(
    tiny_shards: ShardSet, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = new_study(tiny_shards, long_training(), tmp_path / "study")
    killed = []

    def kill_one(event: Event, _tally: Tally) -> None:
        if isinstance(event, Progress) and not killed:
            killed.append(worker_processes(os.getpid())[0])
            os.kill(killed[0], signal.SIGKILL)

    result = run_sweep(study, SweepOptions(num_workers=2, stack_size=3), on_event=kill_one)
    assert killed
    assert (result.num_done, result.num_failed) == (6, 0)
    assert outcome(study) == undisturbed


def test_results_do_not_depend_on_the_number_of_workers(
    tiny_shards: ShardSet, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = new_study(tiny_shards, long_training(), tmp_path / "study")
    run_sweep(study, SweepOptions(num_workers=1, stack_size=3))
    assert outcome(study) == undisturbed


def test_a_finished_sweep_trains_nothing_again(study: Study) -> None:
    options = SweepOptions(num_workers=1)
    assert run_sweep(study, options).trained_now == 6
    before = outcome(study)
    assert run_sweep(study, options).trained_now == 0
    assert outcome(study) == before


def test_added_mixtures_are_trained_alone(study: Study) -> None:
    options = SweepOptions(num_workers=1)
    run_sweep(study, options)
    before = study.losses_path.read_text().splitlines()
    add_mixtures(study, SwarmRequest(num=2, seed=5))
    assert run_sweep(study, options).trained_now == 2
    assert study.losses_path.read_text().splitlines()[: len(before)] == before


def test_a_mixture_changed_after_its_proxy_is_refused(study: Study) -> None:
    options = SweepOptions(num_workers=1)
    run_sweep(study, options)
    lines = study.mixtures_path.read_text().splitlines()
    lines[2] = f"{lines[2].split(',')[0]},0.25,0.5,0.25"
    study.mixtures_path.write_text("\n".join(lines) + "\n")
    with pytest.raises(StudyError, match="not the one its proxy was trained on"):
        run_sweep(study, options)


def test_a_stack_that_cannot_be_trained_is_reported(study: Study, tiny_training: Training) -> None:
    from regmix.swarm.events import Failed
    from regmix.swarm.sweep import stack_job, study_member

    member = study_member(study, "1", {"no such domain": 1.0})
    job = stack_job(study, "bad", (member,), tiny_training, 1)
    events: list[Event] = []
    LocalExecutor(num_workers=1, threads=1, logs=study.logs_path).run([job], events.append)
    event = events[-1]
    assert isinstance(event, Failed)
    assert "no such domain" in event.what


def test_a_dry_run_stores_no_plan(study: Study) -> None:
    class EnoughError(Exception):
        pass

    def stop(_cost: object, _tally: object) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        run_sweep(study, SweepOptions(num_workers=1), on_start=stop)
    with Ledger(study.ledger_path) as ledger:
        assert ledger.num_stacks() == 0


def test_too_little_memory_is_refused_before_anything_starts(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*_: object) -> float:
        raise AssertionError("something was trained before the refusal")

    monkeypatch.setattr("regmix.swarm.cost.measure_tokens_per_second", probe)
    monkeypatch.setattr("regmix.swarm.cost.available_memory_bytes", lambda: 10_000)
    with pytest.raises(StudyError, match=r"10\.0 kB are free"):
        run_sweep(study, SweepOptions(num_workers=1))


@pytest.mark.parametrize(
    ("num", "workers", "size", "expected"),
    [
        (64, 2, None, [16, 16, 16, 16]),
        (9, 2, None, [5, 4]),
        (1, 2, None, [1]),
        (33, 2, None, [9, 8, 8, 8]),
        (10, 2, 4, [4, 3, 3]),
    ],
)
def test_stacks_are_equal_and_give_every_worker_the_same_number(
    num: int, workers: int, size: int | None, expected: list[int]
) -> None:
    stacks = stack_jobs(range(num), num_workers=workers, stack_size=size, largest=16)
    assert [len(stack) for stack in stacks] == expected
    assert [member for stack in stacks for member in stack] == list(range(num))


def test_done_events_carry_every_loss(study: Study) -> None:
    events: list[Event] = []
    run_sweep(study, SweepOptions(num_workers=1), on_event=lambda e, _: events.append(e))
    done = [event for event in events if isinstance(event, Done)]
    assert sum(len(event.result["losses"]) for event in done) == 6


def test_what_another_sweep_left_in_a_stacks_folder_is_not_taken_for_a_result(
    study: Study, tiny_training: Training
) -> None:
    from regmix.swarm.sweep import stack_job, study_member
    from regmix.swarm.worker import train_job

    weights = [{"animals": 1.0}, {"numbers": 1.0}]
    first, second = (study_member(study, str(i), w) for i, w in enumerate(weights))
    train_job(stack_job(study, "stack-0000", (first, second), tiny_training, 1))
    with pytest.raises(ModelError, match="another stack"):
        train_job(stack_job(study, "stack-0000", (second, first), tiny_training, 1))


@pytest.mark.parametrize("moment", ["steps", "ledger", "export", "folder"])
def test_a_kill_while_a_stack_is_collected_loses_and_doubles_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from regmix.swarm import sweep

    class KilledError(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    options = SweepOptions(num_workers=1, stack_size=6)
    with monkeypatch.context() as patch:
        if moment == "steps":
            patch.setattr(sweep.os, "replace", killed)
        elif moment == "ledger":
            patch.setattr(Ledger, "finish_stack", killed)
        elif moment == "export":
            patch.setattr(Ledger, "export_losses", killed)
        else:
            patch.setattr(sweep.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            run_sweep(study, options)
    result = run_sweep(study, options)
    assert (result.num_done, result.num_failed, result.num_pending) == (6, 0, 0)
    assert list(study.stacks_path.iterdir()) == []
    other = new_study(study.open_shards(), study.config.proxy, tmp_path / "other")
    run_sweep(other, options)
    assert outcome(study) == outcome(other)
