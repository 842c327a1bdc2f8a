"""What a stack needs of a machine: memory of the host, of a GPU, and disk.

Enters: jobs. Leaves: bytes, by arithmetic on their shapes. Measures nothing and refuses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from regmix.swarm.jobs import StackJob
from regmix.swarm.placement import gpu_memory_bytes

# Python, torch and its allocator, before the first parameter (measured 330 MB on Linux x86_64).
WORKER_BASE_BYTES = 400_000_000
# The same with CUDA's libraries and pinned buffers. An estimate, not measured.
GPU_WORKER_BASE_BYTES = 3_000_000_000


def job_tokens(job: StackJob) -> int:
    """Return the tokens that all members of a job are trained on."""
    return job.training.tokens * len(job.members)


def job_host_bytes(job: StackJob) -> int:
    """Return the bytes of its machine's memory that a worker needs for a job."""
    training, members = job.training, len(job.members)
    shape = training.shape
    # Parameters, two moments, gradients of a few members, and a checkpoint being written.
    state = 7 * 4 * members * shape.num_parameters
    steps = 4 * members * training.num_steps
    if job.device != "cpu":
        return GPU_WORKER_BASE_BYTES + state + steps
    # Activations that stay for the backward: some 12 widths and 5 hiddens a layer, attention
    # weights, for the members that are trained at a time; and the head's chunk of logits.
    batch_tokens = training.batch_size * shape.seq_len
    per_token = shape.num_layers * (12 * shape.width + 5 * shape.hidden)
    per_token += shape.num_layers * shape.num_heads * shape.seq_len + 4 * shape.width
    activations = 4 * batch_tokens * per_token
    return WORKER_BASE_BYTES + state + activations + steps


def job_gpu_bytes(job: StackJob) -> int:
    """Return what a job takes of its GPU's memory; 0 on the CPU."""
    if job.device == "cpu":
        return 0
    training = job.training
    micro_batch = job.micro_batch or training.batch_size
    return gpu_memory_bytes(training.shape, len(job.members), micro_batch)


def memory_needed(jobs: Sequence[StackJob], num_workers: int) -> int:
    """Return the bytes of this machine's memory that all workers need at once."""
    needs = sorted((job_host_bytes(job) for job in jobs), reverse=True)
    return sum(needs[: max(1, num_workers)])


def disk_needed(jobs: Sequence[StackJob], num_workers: int) -> int:
    """Return the bytes of checkpoints on disk at once: two kept and one being written."""
    needs = sorted(
        (9 * 4 * len(job.members) * job.training.shape.num_parameters for job in jobs),
        reverse=True,
    )
    return sum(needs[: max(1, num_workers)])
