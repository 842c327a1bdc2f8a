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

    Raises `StudyError` or `StorageError`, before anything large is allocated, where this machine's
    memory or disk cannot hold the run.

    kept_bytes: bytes per model that stay on disk after the run.
    """
    tokens = sum(job.training.tokens * len(job.members) for job in jobs)
    num_models = sum(len(job.members) for job in jobs)
    if not jobs:
        return Cost(num_models=0, tokens=0, seconds=0.0, memory_bytes=0, disk_bytes=0)
    cost = Cost(
        num_models=num_models,
        tokens=tokens,
        seconds=0.0,
        memory_bytes=memory_needed(jobs, num_workers),
        disk_bytes=disk_needed(jobs, num_workers) + num_models * kept_bytes,
    )
    # Before the probe: it is a small stack, but of the same shape and batch.
    refuse_if_too_large(cost, Path(jobs[0].folder))
    rate = measure_tokens_per_second(jobs[0], shards) * min(num_workers, len(jobs))
    return dataclasses.replace(cost, seconds=tokens / rate)


def memory_needed(jobs: Sequence[StackJob], num_workers: int) -> int:
    """Return the bytes that all workers need at once."""
    needs = []
    for job in jobs:
        training, members = job.training, len(job.members)
        shape = training.shape
        # Parameters, two moments, gradients of a few members, and a checkpoint being written.
        state = 7 * 4 * members * shape.num_parameters
        # Activations that stay for the backward: some 12 widths and 5 hiddens a layer, attention
        # weights, for the members that are trained at a time; and the head's chunk of logits.
        batch_tokens = training.batch_size * shape.seq_len
        per_token = shape.num_layers * (12 * shape.width + 5 * shape.hidden)
        per_token += shape.num_layers * shape.num_heads * shape.seq_len + 4 * shape.width
        activations = 4 * batch_tokens * per_token
        steps = 4 * members * training.num_steps
        needs.append(state + activations + steps)
    needs.sort(reverse=True)
    return sum(WORKER_BASE_BYTES + need for need in needs[: max(1, num_workers)])


def disk_needed(jobs: Sequence[StackJob], num_workers: int) -> int:
    """Return the bytes of checkpoints on disk at once: two kept and one being written."""
    needs = sorted(
        (9 * 4 * len(job.members) * job.training.shape.num_parameters for job in jobs),
        reverse=True,
    )
    return sum(needs[: max(1, num_workers)])


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
