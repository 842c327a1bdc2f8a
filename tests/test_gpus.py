"""Proxies on GPUs, but for the GPUs: what is asked of them, what is planned, what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_workers import MODULE, FakeWorkers, make_fake_workers

from regmix import cli
from regmix.data.shards import ShardSet
from regmix.errors import StudyError
from regmix.study import Study, Training
from regmix.swarm import cost, gpus, sweep, worker
from regmix.swarm.drawing import SwarmRequest, add_mixtures, make_study
from regmix.swarm.executors import LocalExecutor
from regmix.swarm.gpus import Gpu, ProbeError, ask, find_gpus, visible_ids
from regmix.swarm.ledger import Ledger
from regmix.swarm.sweep import SweepOptions, run_sweep

GB = 1_000_000_000


def gpu(place: str, free_bytes: int = 79 * GB, name: str = "NVIDIA H100 80GB HBM3") -> Gpu:
    return Gpu(
        id=place,
        name=name,
        capability=(9, 0),
        total_bytes=80 * GB,
        free_bytes=free_bytes,
        torch="2.8.0",
        triton="3.4.0",
    )


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=6),
        training=tiny_training,
        objective={"animals": 1.0},
    )


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    """Sweeps with fake workers, on GPUs that are said to train 1000 tokens a second."""
    folder = tmp_path / "fake"
    folder.mkdir()
    executor = functools.partial(LocalExecutor, worker_module=MODULE)
    monkeypatch.setattr(sweep, "LocalExecutor", executor)
    monkeypatch.setattr(cost, "measure_on_gpu", lambda _job, _gpu: 1000.0)
    return make_fake_workers(folder, monkeypatch)


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["regmix-fast", *words])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("outer", "count", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("3,5", 2, ["3", "5"]),
        ("GPU-8f2c, GPU-11aa", 2, ["GPU-8f2c", "GPU-11aa"]),
        ("4,-1,2", 1, ["4"]),
        ("", 0, []),
    ],
)
def test_gpus_keep_the_names_that_the_outer_list_gives_them(
    outer: str | None, count: int, expected: list[str]
) -> None:
    environment = {} if outer is None else {"CUDA_VISIBLE_DEVICES": outer}
    assert visible_ids(count, environment) == expected


def test_more_gpus_than_there_are_is_one_line_with_its_cure(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_cli(monkeypatch, "proxies", str(study.path), "--gpus", "8") == 1
    errors = capfd.readouterr().err
    assert "--gpus 8: this machine has 0 GPUs" in errors
    assert "Leave --gpus out to train on the CPU" in errors
    assert "Traceback" not in errors


def answering(monkeypatch: pytest.MonkeyPatch, count: int, **answers: Any) -> None:
    """Make probes answer: `answers` by GPU, as `describe` would, or an error's text."""

    def answer(question: str, *, gpu: str | None = None, **_: Any) -> dict[str, Any]:
        if question == "count":
            return {"count": count, "cuda": "13.0"}
        found = answers[f"gpu_{gpu}"]
        if isinstance(found, str):
            raise ProbeError(found)
        return found

    monkeypatch.setattr(gpus, "ask", answer)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def described(**changes: Any) -> dict[str, Any]:
    table = dataclasses.asdict(gpu("0"))
    del table["id"]
    return {**table, "capability": [9, 0], **changes}


def test_one_gpu_where_two_are_asked_for_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 1)
    with pytest.raises(StudyError, match=r"--gpus 2: this machine has 1 GPU\. Use --gpus 1"):
        find_gpus(2)


def test_a_gpu_that_does_not_work_or_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, 2, gpu_0=described(), gpu_1="CUDA error: unknown error")
    assert [found.id for found in find_gpus(1)] == ["0"]
    with pytest.raises(StudyError, match=r"GPU 1 does not work: CUDA error: unknown error"):
        find_gpus(2)
    answering(monkeypatch, 1, gpu_0=described(name="Tesla T4", capability=[7, 5]))
    with pytest.raises(StudyError, match=r"GPU 0 \(Tesla T4\) has compute capability 7\.5"):
        find_gpus(1)


def test_a_probe_without_a_gpu_answers_with_its_error() -> None:
    with pytest.raises(ProbeError, match=r"\w"):
        ask("describe", gpu="no-such-gpu")
    with pytest.raises(ProbeError, match="no answer in 0 s"):
        ask("describe", gpu="no-such-gpu", seconds=0.01)


def test_a_probe_measures_the_stack_that_is_planned(
    study: Study, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = sweep.study_member(study, "1", {"animals": 1.0})
    job = sweep.stack_job(study, "stack", (member,), study.config.proxy, 1)
    # Of the CPU here; what is measured is the same.
    assert gpus.measure_tokens_per_second(job, gpu("no-such-gpu")) > 0
    other = dataclasses.replace(member, weights={"no-such-domain": 1.0})
    wrong = dataclasses.replace(job, members=(other,))
    with pytest.raises(ProbeError, match="no-such-domain"):
        gpus.measure_tokens_per_second(wrong, gpu("0"))


@pytest.mark.parametrize(("num_gpus", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 2, 1, 1])])
def test_new_stacks_are_planned_for_the_gpus_and_stored(
    study: Study, fakes: FakeWorkers, num_gpus: int, sizes: list[int]
) -> None:
    options = SweepOptions(num_workers=1, gpus=tuple(gpu(str(i)) for i in range(num_gpus)))
    result = run_sweep(study, options)
    assert (result.num_done, result.remarks) == (6, [])
    with Ledger(study.ledger_path) as ledger:
        assert [len(job.members) for job in ledger.stacks()] == sizes
        assert {(job.device, job.micro_batch) for job in ledger.stacks()} == {("cuda", 4)}
    assert json.loads((study.path / "sweep.json").read_text())["workers"] == num_gpus


def test_a_sweep_survives_a_lost_gpu_and_memory_that_runs_out(
    study: Study, fakes: FakeWorkers
) -> None:
    fakes.rule(lost=["1"], fitting_members=2, fitting_micro_batch=4)
    options = SweepOptions(num_workers=1, gpus=(gpu("0"), gpu("1"), gpu("2")), stack_size=6)
    result = run_sweep(study, options)
    assert (result.num_done, result.num_failed, result.num_pending) == (6, 0, 0)
    lines = study.losses_path.read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == [f"{1.0 + i}" for i in range(1, 7)]
    assert any("ran out of its GPU's memory" in remark for remark in result.remarks)
    # A sweep that is done touches nothing again.
    before = len(fakes.given)
    assert run_sweep(study, options).trained_now == 0
    assert len(fakes.given) == before


def test_a_smaller_micro_batch_is_remembered_and_shown(study: Study, fakes: FakeWorkers) -> None:
    fakes.rule(fitting_members=1, fitting_micro_batch=2)
    run_sweep(study, SweepOptions(num_workers=1, gpus=(gpu("0"),)))
    shown = CliRunner().invoke(cli.cli, ["status", str(study.path)])
    assert "proxy 1: trained with a micro-batch of 2 sequences instead of 4" in shown.output
    table = json.loads(CliRunner().invoke(cli.cli, ["status", str(study.path), "--json"]).output)
    assert [index for index, _ in table["remarks"]] == [1, 2, 3, 4, 5, 6]
    # Later proxies are made like those before them.
    add_mixtures(study, SwarmRequest(num=2, seed=3))
    run_sweep(study, SweepOptions(num_workers=1, gpus=(gpu("0"),)))
    with Ledger(study.ledger_path) as ledger:
        assert {job.micro_batch for job in ledger.stacks()} == {2}
        assert len(ledger.remarks()) == 6


class EnoughError(Exception):
    """Ends a sweep once its plan is stored."""


def interrupted(study: Study, options: SweepOptions, patch: pytest.MonkeyPatch) -> None:
    """Plan a study's stacks and train none of them."""

    def stop(*_: object, **__: object) -> None:
        raise EnoughError

    with patch.context() as inner:
        inner.setattr(LocalExecutor, "run", stop)
        with pytest.raises(EnoughError):
            run_sweep(study, options)


def test_stacks_keep_the_device_that_they_were_planned_for(
    study: Study, fakes: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(study, SweepOptions(num_workers=1, stack_size=3), monkeypatch)
    add_mixtures(study, SwarmRequest(num=2, seed=3))
    costs: list[cost.Cost] = []
    result = run_sweep(
        study,
        SweepOptions(num_workers=1, gpus=(gpu("0"),)),
        on_start=lambda found, _: costs.append(found),
    )
    assert result.num_done == 8
    on_gpu = {entry["job"]: entry["gpu"] for entry in fakes.given}
    assert on_gpu == {"stack-0000": None, "stack-0001": None, "stack-0002": "0"}
    assert "6 proxies were planned for the CPU before" in costs[0].remarks[0]
    assert "within the noise of bfloat16 only" in costs[0].remarks[1]


def test_stacks_planned_for_a_gpu_are_refused_without_one(
    study: Study, fakes: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(study, SweepOptions(num_workers=1, gpus=(gpu("0"),)), monkeypatch)
    with pytest.raises(StudyError, match=r"6 proxies .* planned for a GPU.* Give --gpus as before"):
        run_sweep(study, SweepOptions(num_workers=1))
    # On another GPU they are the same jobs, whatever is free there.
    small = gpu("5", free_bytes=3 * GB)
    assert run_sweep(study, SweepOptions(num_workers=1, gpus=(small,))).num_done == 6


def test_a_time_that_is_not_measured_is_called_a_prediction(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise ProbeError("it has no compiler")

    monkeypatch.setattr(cost, "measure_on_gpu", fail)
    costs: list[cost.Cost] = []

    def stop(found: cost.Cost, _tally: object) -> None:
        costs.append(found)
        raise EnoughError

    for name in ("NVIDIA H200", "A GPU of the future"):
        options = SweepOptions(num_workers=1, gpus=(gpu("0", name=name),))
        with pytest.raises(EnoughError):
            run_sweep(study, options, on_start=stop)
    assert "(predicted, not measured)" in str(costs[0])
    assert costs[0].remarks == ("The speed could not be measured: it has no compiler",)
    assert costs[1].seconds is None
    assert "an unknown time" in str(costs[1])
    assert "of each GPU" in str(costs[1])


def test_a_dry_run_on_gpus_says_what_it_will_cost(
    study: Study, fakes: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, 2, gpu_0=described(), gpu_1=described())
    words = ["proxies", str(study.path), "--gpus", "2", "--dry-run", "--json"]
    shown = CliRunner().invoke(cli.cli, words)
    assert shown.exit_code == 0, shown.output
    table = json.loads(shown.stdout.splitlines()[-1])
    assert table["seconds"] == pytest.approx(table["tokens"] / 2000)
    assert "2 x NVIDIA H100 80GB HBM3" in shown.stderr
    assert fakes.given == []


def test_a_sweep_on_gpus_shows_how_many_are_in_use(
    study: Study, fakes: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regmix.display.PLAIN_INTERVAL_SECONDS", 0.0)
    answering(monkeypatch, 2, gpu_0=described(), gpu_1=described())
    fakes.rule(lost=["1"])
    shown = CliRunner().invoke(cli.cli, ["proxies", str(study.path), "--gpus", "2"])
    assert shown.exit_code == 0, shown.output
    assert "GPU 1 is used no more: CUDA error: uncorrectable ECC error" in shown.stderr
    assert "GPUs 1" in shown.stderr
    assert "6 proxies have their losses" in shown.stdout


def test_a_micro_batch_without_a_gpu_is_refused(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "proxies", str(study.path), "--micro-batch", "2") == 1
    assert "--micro-batch has no use without --gpus" in capfd.readouterr().err


def test_large_models_are_planned_on_gpus_and_refused_where_there_are_fewer(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, 2, gpu_0=described(), gpu_1=described())
    words = ["train", str(study.path), "--mixture", "natural", "--dry-run", "--gpus"]
    assert run_cli(monkeypatch, *words, "2") == 0
    shown = capfd.readouterr().err
    assert "2 x NVIDIA H100 80GB HBM3, DDP" in shown
    assert "bfloat16" in shown
    assert "assumes 40% of 989 TFLOP/s, its datasheet's: an assumption, not measured" in shown
    assert run_cli(monkeypatch, *words, "8") == 1
    assert "--gpus 8: this machine has 2 GPUs" in capfd.readouterr().err


def raised(error: Exception, during: Exception | None = None) -> Exception:
    """Return an error as it is caught, perhaps one that came up while another was handled."""
    try:
        try:
            if during is not None:
                raise during
        finally:
            raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised(torch.OutOfMemoryError("Tried to allocate 2 GiB")), "out_of_memory"),
        (raised(RuntimeError("Triton Error [CUDA]: out of memory")), "out_of_memory"),
        (raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")), "out_of_memory"),
        (
            raised(RuntimeError("CUDA error: operation failed"), torch.OutOfMemoryError("2 GiB")),
            "out_of_memory",
        ),
        (raised(RuntimeError("CUDA error: uncorrectable ECC error encountered")), "lost"),
        (raised(torch.AcceleratorError("CUDA error: an illegal memory access")), "broken"),
        (raised(RuntimeError("Triton Error [CUDA]: misaligned address")), "broken"),
        (raised(ValueError("a defect")), None),
        (raised(RuntimeError("out of memory on the host")), None),
    ],
)
def test_a_worker_tells_errors_of_its_gpu_apart(
    study: Study, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str | None
) -> None:
    said: list[dict[str, Any]] = []

    def say_last(message: dict[str, Any]) -> None:
        said.append(message)
        raise EnoughError

    monkeypatch.setattr(worker, "_say_last", say_last)
    job = sweep.stack_job(study, "stack", (), study.config.proxy, 1)
    if expected is None:
        worker.leave_where_the_gpu_failed(job, error)
        assert said == []
        return
    with pytest.raises(EnoughError):
        worker.leave_where_the_gpu_failed(job, error)
    (message,) = said
    kind = "lost" if message.get("lost") else next(iter(message))
    assert kind == expected
