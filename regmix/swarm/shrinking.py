"""What becomes of a stack that ran out of a GPU's memory.

Enters: its job. Leaves: the jobs in its place, stored, with what was trained so far where that
can be kept. Only the number of proxies shrinks while there is more than one: no number of a proxy
depends on it, so its two halves go on from the checkpoint. A proxy alone gets a smaller
micro-batch: its sums then round otherwise, so it starts again, and the ledger says so.

The order makes a kill harmless at any instant: checkpoints of the parts, then the ledger, in one
transaction, then the old folder goes. Killed before the transaction, the old stack is as it was
and the parts' folders are leftovers; after it, the old folder is one.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from regmix.errors import StudyError
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.placement import smaller_micro_batch
from regmix.swarm.resuming import split_checkpoint


def replace_stack(ledger: Ledger, job: StackJob) -> tuple[Sequence[StackJob], str]:
    """Store smaller jobs in the place of one; return them and a remark that says how.

    Raises `StudyError` where it cannot get smaller.
    """
    halves = halved(job)
    if halves:
        split_checkpoint(job, halves)
        ledger.replace_stack(job, halves)
        sizes = " and ".join(str(len(half.members)) for half in halves)
        remark = f"split into stacks of {sizes}; they go on where it was"
    else:
        halves = [with_smaller_micro_batch(job)]
        before, now = job.micro_batch or job.training.batch_size, halves[0].micro_batch
        kept = f"trained with a micro-batch of {now} sequences instead of {before}"
        ledger.replace_stack(job, halves, f"{kept}, from step 0: the GPU's memory ran out")
        remark = f"its proxy is {kept}, from step 0"
    shutil.rmtree(job.folder, ignore_errors=True)
    return halves, f"stack {job.name} ran out of its GPU's memory: {remark}"


def halved(job: StackJob) -> list[StackJob]:
    """Return two stacks with half the members each; none where there is one member only."""
    if len(job.members) == 1:
        return []
    middle = (len(job.members) + 1) // 2
    return [
        _renamed(dataclasses.replace(job, members=members), f"{job.name}-{part}")
        for part, members in enumerate((job.members[:middle], job.members[middle:]))
    ]


def with_smaller_micro_batch(job: StackJob) -> StackJob:
    """Return the job with about half the micro-batch, or raise `StudyError` at one sequence."""
    batch_size = job.training.batch_size
    micro_batch = smaller_micro_batch(job.micro_batch or batch_size, batch_size)
    if micro_batch is None:
        raise StudyError(
            f"stack {job.name}: one proxy with a micro-batch of one sequence does not fit the "
            "GPU's memory",
            cure="Free the GPU of other programs (nvidia-smi shows them), or draw the study with "
            "a smaller model or --seq-len",
        )
    # Its checkpoints are of another job, so it gets a folder of its own.
    smaller = dataclasses.replace(job, micro_batch=micro_batch)
    return _renamed(smaller, f"{job.name}-m{micro_batch}")


def _renamed(job: StackJob, name: str) -> StackJob:
    return dataclasses.replace(job, name=name, folder=str(Path(job.folder).parent / name))
