"""A run that processes share: begun, stopped, killed and gone on with from the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from large_cases import losses_in, training_of

from regmix import cli
from regmix.data.shards import ShardSet
from regmix.errors import ModelError, StudyError
from regmix.files import read_table, write_json
from regmix.large.distributed import launch
from regmix.large.distributed.job import TrainJob
from regmix.large.distributed.launch import LargeRequest, large_jobs, prepare, run_large
from regmix.large.distributed.loop import LargeTrainer
from regmix.large.distributed.metrics import TRACKERS, MetricsLog, refuse_missing_trackers
from regmix.large.distributed.parallel import Place
from regmix.large.distributed.plan import Device, plan_run
from regmix.large.distributed.rank import StopSign, describe_ranks, failure_of
from regmix.large.evaluate import evaluate_model
from regmix.large.train import TrainRequest, resolve_recipes, run_training
from regmix.study import Study
from regmix.swarm.drawing import SwarmRequest, make_study

TOML = "num_layers = 1\nwidth = 32\nnum_heads = 2\nhidden = 32\nseq_len = 32\n"
PATIENCE_SECONDS = 120.0


@pytest.fixture
def study(tiny_shards: ShardSet, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=4),
        training=training_of(12),
        objective={"animals": 0.5, "numbers": 0.5},
    )


def request_of(
    study: Study, num_ranks: int, *, num_steps: int = 12, **changes: Any
) -> LargeRequest:
    plan = plan_run(
        training_of(num_steps),
        Device(name="cpu", free_bytes=None, flops=None),
        num_ranks=num_ranks,
        folder=study.path,
        parallel="fsdp" if num_ranks > 1 else None,
    )
    recipes = resolve_recipes(study, ["natural"])
    return LargeRequest(mixtures=recipes, replicates=1, plan=plan, **changes)


def test_two_processes_leave_a_model_as_any_other(study: Study) -> None:
    lines: list[int] = []
    request = request_of(study, 2)
    names = run_large(study, request, on_line=lambda _, line: lines.append(line["step"]))
    assert names == ["natural-0"]
    assert lines == list(range(1, 13))
    folder = study.models_path / "natural-0"
    assert not list(study.stacks_path.glob("large-*"))
    assert len(losses_in(folder)) == 12
    summary = read_table(folder / "summary.json")
    assert summary["distributed"]["parallel"] == "fsdp"
    assert summary["tokens"] == request.plan.training.tokens
    stored, again = read_table(folder / "evaluation.json"), evaluate_model(study, folder)
    for name, cell in stored["targets"].items():
        assert again["targets"][name] == pytest.approx(cell, rel=1e-6)
    # Neither way trains it once more.
    assert large_jobs(study, request)[1] == []
    stacks = TrainRequest(
        mixtures=request.mixtures,
        replicates=1,
        training=request.plan.training,
        num_workers=1,
        threads=1,
    )
    started: list[object] = []
    run_training(study, stacks, on_start=lambda cost, _: started.append(cost))
    assert started == []


def test_a_run_that_is_stopped_and_killed_ends_as_an_undisturbed_one(
    study: Study, tmp_path: Path
) -> None:
    shape = tmp_path / "tiny.toml"
    shape.write_text(TOML)
    words = ["train", str(study.path), "--mixture", "natural", "--model", str(shape)]
    words += ["--tokens", "200k", "--batch-size", "8", "--processes", "1"]
    folder = study.stacks_path / "large-natural-0"
    command = [sys.executable, "-m", "regmix.cli", *words, "--checkpoint-seconds", "0.3"]

    def on_one_core() -> None:
        # One thread: the sums of a matrix product depend on their number.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def begun(until: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, preexec_fn=on_one_core
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while _num_lines(folder) < until and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    process = begun(30)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, shown
    assert "Run the same command again to go on" in shown
    assert f"natural-0: stopped after step {_num_lines(folder)} of" in shown
    job = TrainJob.from_table(read_table(folder / "job.json"))
    at = _num_lines(folder)
    assert 30 <= at < job.training.num_steps
    assert (folder / f"step-{at:08d}" / "index.json").is_file()

    process = begun(at + 100)
    process.kill()
    process.communicate()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, preexec_fn=on_one_core
    )
    assert done.returncode == 0, done.stderr
    losses = losses_in(study.models_path / "natural-0")

    assert job.threads == 1
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = dataclasses.replace(job, folder=str(tmp_path / "undisturbed"))
    LargeTrainer(alone, study.open_shards(), Place(0, 1, torch.device("cpu"))).run()
    torch.set_num_threads(before)
    assert losses == losses_in(alone.folder)


def _num_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@dataclasses.dataclass
class FakeRanks:
    """Stands for `launch._run`: each call plays the next entry, (steps reached, what it told)."""

    plays: list[tuple[int, dict[str, Any] | None]]
    calls: int = 0

    def __call__(self, job: TrainJob, *arguments: Any) -> int:
        follower = arguments[4]
        follower.step, told = self.plays[self.calls]
        self.calls += 1
        if told is not None:
            write_json(Path(job.folder) / "outcome.json", told)
        return -9


@pytest.mark.parametrize(
    ("plays", "expected", "num_calls"),
    [
        ([(0, None)] * 3, "ended with code -9, 3 times in a row", 3),
        ([(5, None), (5, None), (9, None), (9, None), (9, None)], "3 times in a row", 5),
        ([(3, {"failed": {"what": "it burns", "cure": "Use water"}})], "it burns. Use water", 1),
    ],
)
def test_ranks_that_die_are_started_again_while_they_get_further(
    study: Study,
    monkeypatch: pytest.MonkeyPatch,
    plays: list[tuple[int, dict[str, Any] | None]],
    expected: str,
    num_calls: int,
) -> None:
    ranks = FakeRanks(plays)
    monkeypatch.setattr(launch, "_run", ranks)
    with pytest.raises(ModelError, match=expected):
        run_large(study, request_of(study, 2))
    assert ranks.calls == num_calls


def test_ranks_that_were_stopped_stop_the_command(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_run", FakeRanks([(3, {"stopped": True})]))
    with pytest.raises(KeyboardInterrupt):
        run_large(study, request_of(study, 2))


def test_several_machines_get_one_command_and_the_job_it_names(study: Study) -> None:
    (command,) = prepare(study, request_of(study, 4, num_nodes=2))
    assert "torchrun --nnodes 2 --nproc-per-node 2" in command
    job = TrainJob.from_table(read_table(Path(command.split()[-1])))
    assert job.name == "natural-0"
    assert job.parallel == "fsdp"


def test_ranks_started_by_slurm_know_their_place() -> None:
    several = {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    environment = {**several, "SLURM_NNODES": "2", "MASTER_ADDR": "first"}
    describe_ranks(environment)
    assert [environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["9", "16", "1"]
    assert environment["MASTER_PORT"] == "29500"
    with pytest.raises(StudyError, match="MASTER_ADDR"):
        describe_ranks({**several, "SLURM_NNODES": "2"})
    # torchrun's own variables come first, and one task is one rank alone.
    for given in ({**several, "RANK": "0"}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}):
        left = dict(given)
        describe_ranks(left)
        assert left == given


class FakeTracker(types.ModuleType):
    """Stands for wandb and for TensorBoard's writer: keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.logged: list[tuple[object, ...]] = []

    def init(self, **_: object) -> FakeTracker:
        return self

    def SummaryWriter(self, _folder: str) -> FakeTracker:
        return self

    def log(self, numbers: dict[str, object], *, step: int) -> None:
        self.logged.append((step, numbers["loss_nats"]))

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.logged.append((step, key, value))

    def finish(self) -> None:
        self.logged.append(("closed",))

    close = finish


def test_trackers_get_the_numbers_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = {kind: FakeTracker(module) for kind, module in TRACKERS.items()}
    for kind, module in TRACKERS.items():
        monkeypatch.setitem(sys.modules, module, fakes[kind])
    refuse_missing_trackers([*TRACKERS])
    log = MetricsLog(tmp_path / "stacks" / "run", 0, name="m", trackers=[*TRACKERS])
    log.add({"step": 1, "loss_nats": 2.5, "epochs": {"web": 0.5}})
    log.close()
    assert fakes["wandb"].logged == [(1, 2.5), ("closed",)]
    assert fakes["tensorboard"].logged == [(1, "loss_nats", 2.5), ("closed",)]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModelError, match="pip install wandb"):
        refuse_missing_trackers(["wandb"])


def test_memory_that_ran_out_is_told_and_not_tried_again() -> None:
    told = failure_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert told is not None
    assert "--micro-batch" in told.cure
    assert failure_of(RuntimeError("NCCL error: a link is down")) is None


def test_a_signal_or_a_file_tells_a_rank_to_stop(tmp_path: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        sign = StopSign(tmp_path)
        assert not sign()
        os.kill(os.getpid(), signal.SIGTERM)
        assert sign()
        (tmp_path / "stop").touch()
        assert StopSign(tmp_path)()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_dry_run_says_what_it_takes_and_starts_nothing(study: Study) -> None:
    words = ["train", str(study.path), "--mixture", "natural", "--model", "60m", "--tokens", "1B"]
    words += [
        "--global-batch-tokens",
        "100k",
        "--processes",
        "2",
        "--dry-run",
        "--json",
        "--seq-len",
        "1024",
    ]
    shown = CliRunner().invoke(cli.cli, words)
    assert shown.exit_code == 0, shown.output
    assert "A step has 98 sequences of 1024: 100,352 tokens" in shown.stderr
    table = json.loads(shown.stdout)
    assert "Learning rate 0.0004, for a model of this size" in shown.stderr
    assert table["num_ranks"] == 2
    assert table["tokens_per_second"] > 0
    assert table["assumed_mfu"] == 0.4
    assert "an assumption, not measured" in shown.stderr
    assert not list(study.stacks_path.glob("large-*"))
    assert not study.models_path.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--micro-batch", "2"], "--micro-batch has no use without --gpus or --processes"),
        (["--processes", "2", "--gpus", "1"], "exclude each other"),
        (["--processes", "3"], "Use 2 processes, or a batch of 18 sequences"),
        (["--processes", "2", "--micro-batch", "3"], "--micro-batch that does: 1, 2, 4, 8"),
        (
            ["--processes", "2", "--global-batch-tokens", "8k", "--batch-size", "4"],
            "both say how large a step is",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_with_what_would(
    study: Study, tmp_path: Path, words: list[str], expected: str
) -> None:
    shape = tmp_path / "tiny.toml"
    shape.write_text(TOML)
    given = ["train", str(study.path), "--mixture", "natural", "--model", str(shape), *words]
    shown = CliRunner().invoke(cli.cli, given)
    assert expected in str(shown.exception)
