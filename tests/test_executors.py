"""The executor on GPUs: every job ends once, whatever happens to a worker, a GPU or the memory.

The workers are fake (`fake_workers.py`), so that GPUs can be lost here; the last test's is real.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_workers import MODULE, FakeWorkers, make_fake_workers

from regmix.study import Training
from regmix.swarm.events import Done, Event, Failed, Replaced, Retired
from regmix.swarm.executors import LocalExecutor
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.processes import worker_environment
from regmix.swarm.shrinking import replace_stack


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    folder = tmp_path / "fake"
    folder.mkdir()
    return make_fake_workers(folder, monkeypatch)


def jobs_of(
    training: Training, folder: Path, *, num: int = 6, size: int = 1, device: str = "cuda"
) -> list[StackJob]:
    jobs = []
    for number in range(num):
        members = tuple(
            Member(name=str(number * size + i), weights={"a": 1.0}, data_seed=0, init_seed=0)
            for i in range(size)
        )
        name = f"{device}-{number:04d}"
        jobs.append(
            StackJob(
                name=name,
                members=members,
                training=training,
                targets=("a",),
                shards="none",
                shards_checksum="none",
                folder=str(folder / "stacks" / name),
                device=device,
            )
        )
    return jobs


def executor(tmp_path: Path, gpus: list[str], num_workers: int = 1) -> LocalExecutor:
    return LocalExecutor(
        num_workers=num_workers, threads=1, logs=tmp_path / "logs", gpus=gpus, worker_module=MODULE
    )


def run(tmp_path: Path, gpus: list[str], jobs: list[StackJob], **options: int) -> list[Event]:
    events: list[Event] = []
    executor(tmp_path, gpus, **options).run(jobs, events.append)
    return events


def ended(events: list[Event]) -> dict[str, str]:
    """Job -> how it ended; a job that ends twice is an error."""
    found: dict[str, str] = {}
    for event in events:
        if isinstance(event, Done | Failed):
            assert event.job.name not in found
            found[event.job.name] = type(event).__name__
    return found


def retired(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.gpu, event.num_left) for event in events if isinstance(event, Retired)]


def test_a_worker_sees_one_gpu_and_no_other(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(slow={"GPU-a": 0.3, "GPU-b": 0.3}, environment=["OMP_NUM_THREADS"])
    events = run(tmp_path, ["GPU-a", "GPU-b"], jobs_of(tiny_training, tmp_path, num=4))
    assert set(ended(events).values()) == {"Done"}
    pairs = {(entry["pid"], entry["gpu"]) for entry in workers.given}
    assert sorted(gpu for _, gpu in pairs) == ["GPU-a", "GPU-b"]
    assert all(entry["environment"] == {"OMP_NUM_THREADS": "1"} for entry in workers.given)


def test_a_worker_of_the_cpu_keeps_its_environment() -> None:
    outer = {"CUDA_VISIBLE_DEVICES": "3", "PATH": "p"}
    assert worker_environment(1, None, outer)["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUBLAS_WORKSPACE_CONFIG" not in worker_environment(1, None, outer)
    assert worker_environment(1, "GPU-b", outer)["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert worker_environment(1, "GPU-b", outer)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_work_goes_to_whoever_is_free(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(slow={"0": 1.5})
    events = run(tmp_path, ["0", "1"], jobs_of(tiny_training, tmp_path, num=8))
    assert set(ended(events).values()) == {"Done"}
    assert sum(entry["gpu"] == "0" for entry in workers.given) < 4


def test_a_lost_gpu_does_not_lose_the_sweep(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(lost=["1"])
    jobs = jobs_of(tiny_training, tmp_path)
    events = run(tmp_path, ["0", "1", "2"], jobs)
    assert ended(events) == {job.name: "Done" for job in jobs}
    assert retired(events) == [("1", 2)]
    (event,) = (event for event in events if isinstance(event, Retired))
    assert "uncorrectable ECC error" in str(event)
    assert "2 GPUs are left" in str(event)


def test_a_gpu_on_which_workers_die_is_retired(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(dying=["0"], slow={"1": 0.2})
    jobs = jobs_of(tiny_training, tmp_path)
    events = run(tmp_path, ["0", "1"], jobs)
    assert ended(events) == {job.name: "Done" for job in jobs}
    assert retired(events) == [("0", 1)]
    assert sum(entry["gpu"] == "0" for entry in workers.given) == 2


def test_deaths_on_a_lost_gpu_do_not_count_against_the_job(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(dying=["0", "1"], slow={"2": 2.0})
    jobs = jobs_of(tiny_training, tmp_path, num=3)
    events = run(tmp_path, ["2", "0", "1"], jobs)
    assert ended(events) == {job.name: "Done" for job in jobs}
    # Two of them died on both GPUs, and were begun a third time on the one that works.
    assert len(workers.given) == 7


def test_the_last_job_waits_for_a_gpu_that_works(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(dying=["0", "1"], slow={"2": 0.5})
    blocker, job = jobs_of(tiny_training, tmp_path, num=2)
    events = run(tmp_path, ["2", "0", "1"], [blocker, job])
    assert set(ended(events).values()) == {"Done"}
    assert [entry["gpu"] for entry in workers.given if entry["job"] == job.name][2:] == ["2"]


def test_one_gpu_that_kills_its_workers_ends_the_run(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(dying=["0"])
    (job,) = jobs_of(tiny_training, tmp_path, num=1)
    events = run(tmp_path, ["0"], [job])
    assert ended(events) == {job.name: "Failed"}
    assert retired(events) == [("0", 0)]
    assert len(workers.given) == 2


def test_without_any_gpu_left_the_rest_fails_with_a_cure(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(lost=["0"], dying=["1"])
    jobs = jobs_of(tiny_training, tmp_path)
    events = run(tmp_path, ["0", "1"], jobs)
    assert ended(events) == {job.name: "Failed" for job in jobs}
    failed = [event for event in events if isinstance(event, Failed)]
    assert all("no GPU is left that works" in event.what for event in failed)
    assert all("CUDA_VISIBLE_DEVICES" in event.cure for event in failed)
    assert sorted(gpu for gpu, _ in retired(events)) == ["0", "1"]


def test_a_job_that_kills_workers_everywhere_ends_and_costs_no_gpu(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    jobs = jobs_of(tiny_training, tmp_path, num=8)
    workers.rule(killers=[jobs[0].name], slow={"0": 0.1, "1": 0.1, "2": 0.1})
    events = run(tmp_path, ["0", "1", "2"], jobs)
    assert ended(events) == {job.name: "Done" for job in jobs} | {jobs[0].name: "Failed"}
    assert retired(events) == []
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert "died 3 times (exit code 7)" in failed.what


def test_deaths_after_a_finished_step_are_not_held_against_the_gpu(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    blocker, job = jobs_of(tiny_training, tmp_path, num=2)
    workers.rule(late_killers=[job.name], slow={"0": 2.0})
    events = run(tmp_path, ["0", "1"], [blocker, job])
    assert ended(events) == {blocker.name: "Done", job.name: "Failed"}
    assert retired(events) == []
    # Nothing speaks against the GPU, so the job need not wait for the other one.
    assert [entry["gpu"] for entry in workers.given if entry["job"] == job.name] == ["1"] * 3


def test_a_job_that_three_gpus_are_lost_with_ends(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(lost=["0", "1", "2", "3"])
    (job,) = jobs_of(tiny_training, tmp_path, num=1)
    events = run(tmp_path, ["0", "1", "2", "3"], [job])
    assert ended(events) == {job.name: "Failed"}
    assert len(retired(events)) == 3


def test_every_job_is_trained_on_its_own_device(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    jobs = jobs_of(tiny_training, tmp_path, num=3)
    jobs += jobs_of(tiny_training, tmp_path, num=3, device="cpu")
    events = run(tmp_path, ["7"], jobs)
    assert set(ended(events).values()) == {"Done"}
    assert all((entry["gpu"] == "7") == entry["job"].startswith("cuda") for entry in workers.given)


def test_out_of_memory_halves_the_stack_and_then_the_micro_batch(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(fitting_members=2, fitting_micro_batch=4)
    jobs = jobs_of(tiny_training, tmp_path, num=2, size=5)
    events: list[Event] = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks(jobs)
        executor(tmp_path, ["0", "1"]).run(
            jobs, events.append, lambda job: replace_stack(ledger, job)
        )
        assert ledger.remarks() == []
        trained = [event.job for event in events if isinstance(event, Done)]
        assert {job.name: len(job.members) for job in trained} == {
            name: size
            for number in range(2)
            for name, size in (
                (f"cuda-{number:04d}-0-0", 2),
                (f"cuda-{number:04d}-0-1", 1),
                (f"cuda-{number:04d}-1", 2),
            )
        }
        assert sorted(ledger.pending_stacks(), key=lambda job: job.name) == sorted(
            trained, key=lambda job: job.name
        )
        assert {row.stack for row in ledger.proxies()} == {job.name for job in trained}
    assert sum(isinstance(event, Replaced) for event in events) == 4


def test_a_proxy_alone_that_runs_out_of_memory_gets_a_smaller_micro_batch(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(fitting_members=1, fitting_micro_batch=1)
    jobs = jobs_of(tiny_training, tmp_path, num=1, size=2)
    events: list[Event] = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks(jobs)
        executor(tmp_path, ["0"]).run(jobs, events.append, lambda job: replace_stack(ledger, job))
        remarks = ledger.remarks()
    done = sorted(event.job.name for event in events if isinstance(event, Done))
    assert done == ["cuda-0000-0-m2-m1", "cuda-0000-1-m2-m1"]
    assert [proxy for proxy, _ in remarks] == [0, 0, 1, 1]
    assert "micro-batch of 1 sequences instead of 2, from step 0" in remarks[1][1]


def test_a_proxy_that_fits_no_way_fails_with_a_cure(
    tmp_path: Path, tiny_training: Training, workers: FakeWorkers
) -> None:
    workers.rule(fitting_members=0)
    jobs = jobs_of(tiny_training, tmp_path, num=1)
    events: list[Event] = []
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_stacks(jobs)
        executor(tmp_path, ["0"]).run(jobs, events.append, lambda job: replace_stack(ledger, job))
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert "micro-batch of one sequence does not fit" in failed.what
    assert "--seq-len" in failed.cure


def test_a_real_worker_without_its_gpu_says_so(tmp_path: Path, tiny_training: Training) -> None:
    (job,) = jobs_of(tiny_training, tmp_path, num=1)
    events: list[Event] = []
    LocalExecutor(num_workers=0, threads=1, logs=tmp_path / "logs", gpus=["no-such-gpu"]).run(
        [job], events.append
    )
    assert ended(events) == {job.name: "Failed"}
    (event,) = (event for event in events if isinstance(event, Retired))
    assert event.what == "CUDA error: no GPU can be used"
