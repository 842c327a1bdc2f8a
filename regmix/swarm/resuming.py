"""What a checkpoint in a job's folder is good for: the job's own, another's, or a part's.

Enters: jobs and their folders. Leaves: a refusal that says what to remove, or the checkpoint of a
stack shared out among its parts. Loads nothing into a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from regmix.errors import ModelError
from regmix.swarm.checkpoint import load_newest, save_checkpoint
from regmix.swarm.jobs import StackJob


def split_checkpoint(job: StackJob, parts: Sequence[StackJob]) -> None:
    """Give each part of a stack its rows of the newest checkpoint, if there is one.

    parts: jobs with some of the members each, and all else as in `job`, but name and folder.
    """
    found = load_newest(Path(job.folder))
    if found is None:
        return
    tensors, state = found
    place = {member.name: row for row, member in enumerate(job.members)}
    with refusing_another_checkpoint(job):
        refuse_another_job(job, state["job"])
        for part in parts:
            rows = torch.tensor([place[member.name] for member in part.members])
            own = {
                name: value[:, rows] if name == "train_losses" else value[rows]
                for name, value in tensors.items()
            }
            samplers = [state["samplers"][row] for row in rows.tolist()]
            kept = {"job": part.identity(), "samplers": samplers}
            save_checkpoint(Path(part.folder), state["step"], own, kept)


@contextlib.contextmanager
def refusing_another_checkpoint(job: StackJob) -> Iterator[None]:
    """Turn what a checkpoint that is whole but of another kind would raise into `ModelError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and job.device != "cpu":
            # It may be the GPU's own, which the worker tells apart.
            raise
        raise ModelError(
            f"{job.folder}: its checkpoint is none of '{job.name}' ({error})",
            cure="Remove that folder to train the stack from its first step",
        ) from error


def refuse_another_job(job: StackJob, found: object) -> None:
    """Raise `ModelError` where what lies in the job's folder was made by another job."""
    if found != job.identity():
        raise ModelError(
            f"{job.folder}: what it holds belongs to another stack than '{job.name}'",
            cure="Remove that folder to train the stack from its first step",
        )
