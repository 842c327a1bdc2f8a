"""What training some stacks will cost, before it starts.

Enters: the jobs and the number of workers. Leaves: tokens, time, memory and disk, and a refusal
where memory or disk cannot fit. The speed is measured on a few steps of the first stack's own
shape, on this machine, just before.
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
from regmix.swarm.engine import StackJob, StackTrainer

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet

# Python, torch and its allocator, before the first parameter (measured 330 MB on Linux x86_64).
WORKER_BASE_BYTES = 400_000_000
PROBE_MEMBERS = 4
PROBE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Cost:
    """tokens over all models; seconds expected; memory and disk bytes needed at once."""

    num_models: int
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.num_models} models, {count(self.tokens)} tokens, "
            f"about {duration(self.seconds)}, {size(self.memory_bytes)} of memory, "
            f"{size(self.disk_bytes)} of disk"
        )


def estimate(
    jobs: Sequence[StackJob], shards: ShardSet, *, num_workers: int, kept_bytes: int = 0
) -> Cost:
    """Return what `jobs` will cost; the speed is measured for about a second.

    kept_bytes: bytes per model that stay on disk after the run.
    """
    tokens = sum(job.training.tokens * len(job.members) for job in jobs)
    num_models = sum(len(job.members) for job in jobs)
    if not jobs:
        return Cost(num_models=0, tokens=0, seconds=0.0, memory_bytes=0, disk_bytes=0)
    state_bytes = 4 * jobs[0].training.shape.num_parameters
    largest = max(len(job.members) for job in jobs)
    busy = min(num_workers, len(jobs))
    # Parameters, gradients, two moments, and a checkpoint being written.
    memory = busy * (WORKER_BASE_BYTES + 7 * largest * state_bytes)
    # Two checkpoints of parameters and moments, and one being written.
    disk = busy * 9 * largest * state_bytes + num_models * kept_bytes
    rate = measure_tokens_per_second(jobs[0], shards) * busy
    return Cost(
        num_models=num_models,
        tokens=tokens,
        seconds=tokens / rate,
        memory_bytes=memory,
        disk_bytes=disk,
    )


def measure_tokens_per_second(job: StackJob, shards: ShardSet) -> float:
    """Train a small stack of the job's shape for about a second; nothing of it is kept."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    try:
        probe = dataclasses.replace(
            job,
            members=job.members[:PROBE_MEMBERS],
            training=dataclasses.replace(job.training, eval_every=None),
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


def refuse_if_too_large(cost: Cost, folder: Path) -> None:
    """Raise where this machine's memory or the folder's disk cannot hold the run."""
    available = available_memory_bytes()
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
