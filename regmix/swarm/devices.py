"""Which device the stacks of a study are trained on, run after run.

Enters: the stacks that are stored, and the GPUs of this run. Leaves: how new proxies are laid on
them, what a person should know, or a refusal. A stack stays on the device that it was planned
for: its numbers depend on it. Trains nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from regmix.errors import StudyError
from regmix.study import Training
from regmix.swarm.gpus import Gpu
from regmix.swarm.jobs import StackJob
from regmix.swarm.placement import Placement, place


def refuse_without_gpus(waiting: Sequence[StackJob], gpus: Sequence[Gpu]) -> None:
    """Raise `StudyError` where stacks that were planned for a GPU would have none."""
    held = sum(len(job.members) for job in waiting if job.device != "cpu")
    if held and not gpus:
        raise StudyError(
            f"{held} proxies of this study are planned for a GPU, and their numbers depend on it",
            cure="Give --gpus as before; to train on the CPU instead, draw the study again",
        )


def place_like(
    stored: Sequence[StackJob],
    training: Training,
    gpus: Sequence[Gpu],
    *,
    num_proxies: int,
    stack_size: int | None,
    micro_batch: int | None,
) -> Placement:
    """Return how new proxies are laid on the GPUs, with the micro-batch of most that are stored.

    So all losses of a study are made alike, whatever the memory that is free today; a micro-batch
    that the user chose goes before.
    """
    before = Counter(job.micro_batch for job in stored if job.device != "cpu" for _ in job.members)
    kept = before.most_common(1)[0][0] if before else None
    return place(
        training.shape,
        training.batch_size,
        num_proxies=num_proxies,
        num_gpus=len(gpus),
        free_bytes=min(gpu.free_bytes for gpu in gpus),
        stack_size=stack_size,
        micro_batch=micro_batch or kept,
    )


def device_remarks(
    stored: Sequence[StackJob],
    waiting: Sequence[StackJob],
    planned: Sequence[StackJob],
    gpus: Sequence[Gpu],
) -> list[str]:
    """Return what a person should know where one study's proxies are on the CPU and on GPUs."""
    remarks = []
    held = sum(len(job.members) for job in waiting if job.device == "cpu")
    if held and gpus:
        remarks.append(
            f"{held} proxies were planned for the CPU before and are trained there, so that their "
            "losses are those they would have had"
        )
    if planned and len({job.device for job in (*stored, *planned)}) > 1:
        remarks.append(
            "Some proxies of this study are trained on the CPU in float32, others on a GPU in "
            "bfloat16: their losses compare within the noise of bfloat16 only"
        )
    return remarks
