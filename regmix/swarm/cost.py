"""What training some stacks will cost, before it starts.

Enters: the jobs, the number of workers and the GPUs. Leaves: tokens, time, memory and disk, and a
refusal where memory or disk cannot fit. The speed is measured on a few steps of the first stack's
own shape, on this machine, just before; on a GPU in a process of its own, and where that fails it
is predicted, and said to be.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regmix.display import count, duration, size
from regmix.errors import StorageError, StudyError
from regmix.files import free_bytes
from regmix.model.peaks import peak_of
from regmix.swarm.engine import StackTrainer
from regmix.swarm.gpus import Gpu, ProbeError
from regmix.swarm.gpus import measure_tokens_per_second as measure_on_gpu
from regmix.swarm.jobs import StackJob
from regmix.swarm.needs import disk_needed, job_gpu_bytes, job_tokens, memory_needed

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet

PROBE_MEMBERS = 4
PROBE_SECONDS = 1.0

# For predictions: the part of a GPU's peak that is assumed to be reached, and the least time of a
# step, in which a GPU starts its kernels. Neither is measured.
_ASSUMED_PART = 0.3
_LEAST_STEP_SECONDS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Cost:
    """tokens over all models; seconds expected; memory and disk bytes needed at once.

    seconds: None where it could be neither measured nor predicted; is_predicted: it was not
    measured. gpu_memory_bytes: of each GPU, 0 without one. remarks: what a person should know.
    """

    num_models: int
    tokens: int
    seconds: float | None
    memory_bytes: int
    disk_bytes: int
    gpu_memory_bytes: int = 0
    is_predicted: bool = False
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        time_ = "an unknown time" if self.seconds is None else f"about {duration(self.seconds)}"
        if self.is_predicted and self.seconds is not None:
            time_ += " (predicted, not measured)"
        gpu = f"{size(self.gpu_memory_bytes)} of each GPU, " if self.gpu_memory_bytes else ""
        return (
            f"{self.num_models} models, {count(self.tokens)} tokens, {time_}, {gpu}"
            f"{size(self.memory_bytes)} of memory, {size(self.disk_bytes)} of disk"
        )


def estimate(
    jobs: Sequence[StackJob],
    shards: ShardSet,
    *,
    num_workers: int,
    kept_bytes: int = 0,
    gpus: Sequence[Gpu] = (),
    is_remote: bool = False,
) -> Cost:
    """Return what `jobs` will cost; the speed is measured for some seconds.

    Raises `StudyError` or `StorageError`, before anything large is allocated, where this machine's
    memory or disk cannot hold the run.

    num_workers: processes for jobs of the CPU. kept_bytes: bytes per model that stay on disk after
    the run. is_remote: the workers are on other machines, whose memory is not asked here.
    """
    num_models = sum(len(job.members) for job in jobs)
    if not jobs:
        return Cost(num_models=0, tokens=0, seconds=0.0, memory_bytes=0, disk_bytes=0)
    on_cpu = [job for job in jobs if job.device == "cpu"]
    on_gpu = [job for job in jobs if job.device != "cpu"]
    cost = Cost(
        num_models=num_models,
        tokens=_tokens(jobs),
        seconds=0.0,
        memory_bytes=memory_needed(on_cpu, num_workers) + memory_needed(on_gpu, len(gpus)),
        disk_bytes=disk_needed(on_cpu, num_workers)
        + disk_needed(on_gpu, len(gpus))
        + num_models * kept_bytes,
        gpu_memory_bytes=max((job_gpu_bytes(job) for job in on_gpu), default=0),
    )
    # Before the probe: it is a small stack, but of the same shape and batch.
    refuse_if_too_large(cost, Path(jobs[0].folder), is_remote=is_remote)
    seconds, is_predicted, remarks = _gpu_seconds(on_gpu, gpus)
    if on_cpu:
        rate = measure_tokens_per_second(on_cpu[0], shards) * min(num_workers, len(on_cpu))
        # Both go on at the same time.
        seconds = None if seconds is None else max(seconds, _tokens(on_cpu) / rate)
    return dataclasses.replace(cost, seconds=seconds, is_predicted=is_predicted, remarks=remarks)


def _tokens(jobs: Sequence[StackJob]) -> int:
    return sum(job_tokens(job) for job in jobs)


def _gpu_seconds(
    jobs: Sequence[StackJob], gpus: Sequence[Gpu]
) -> tuple[float | None, bool, tuple[str, ...]]:
    """Return the seconds that jobs take on the GPUs, whether predicted, and remarks."""
    if not jobs or not gpus:
        return 0.0, False, ()
    rate: float | None
    remarks: tuple[str, ...] = ()
    try:
        rate = measure_on_gpu(jobs[0], gpus[0])
    except ProbeError as error:
        rate = predicted_tokens_per_second(jobs[0], gpus[0])
        remarks = (f"The speed could not be measured: {error}",)
    if rate is None:
        return None, True, remarks
    return _tokens(jobs) / (rate * min(len(gpus), len(jobs))), bool(remarks), remarks


def predicted_tokens_per_second(job: StackJob, gpu: Gpu) -> float | None:
    """Return what a GPU may reach; None where it is none of those that are known.

    A part of its peak, but no step in less than a millisecond for each of its micro-steps.
    """
    peak = peak_of(gpu.name)
    if peak is None:
        return None
    training = job.training
    tokens = len(job.members) * training.batch_size * training.shape.seq_len
    num_micro_steps = training.batch_size // (job.micro_batch or training.batch_size)
    seconds = tokens * training.shape.flops_per_token() / (_ASSUMED_PART * peak.bf16_flops)
    return tokens / (seconds + num_micro_steps * _LEAST_STEP_SECONDS)


def measure_tokens_per_second(job: StackJob, shards: ShardSet) -> float:
    """Train a small stack of the job's shape for about a second; nothing of it is kept."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        probe = dataclasses.replace(
            job,
            members=job.members[:PROBE_MEMBERS],
            training=dataclasses.replace(job.training, eval_every=None, eval_steps=None),
        )
        trainer = StackTrainer(probe, shards)
        training = probe.training
        trainer.train_step()
        started, first = time.monotonic(), trainer.step
        while time.monotonic() - started < PROBE_SECONDS and trainer.step < training.num_steps:
            trainer.train_step()
        elapsed = max(time.monotonic() - started, 1e-6)
        steps = max(trainer.step - first, 1)
        return steps * len(probe.members) * training.batch_size * training.shape.seq_len / elapsed
    finally:
        torch.set_num_threads(threads)


def refuse_if_too_large(cost: Cost, folder: Path, *, is_remote: bool = False) -> None:
    """Raise where this machine's memory or the folder's disk cannot hold the run."""
    available = None if is_remote else available_memory_bytes()
    if available is not None and cost.memory_bytes > available:
        raise StudyError(
            f"this needs {size(cost.memory_bytes)} of memory and {size(available)} are free",
            cure="Use fewer --workers, a smaller --stack-size or a smaller model",
        )
    free = free_bytes(folder)
    if cost.disk_bytes > free:
        raise StorageError(
            f"{folder}: this needs {size(cost.disk_bytes)} of disk and {size(free)} are free",
            cure="Free some space, or move the study to another disk",
        )


def available_memory_bytes() -> int | None:
    """Return the memory that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
