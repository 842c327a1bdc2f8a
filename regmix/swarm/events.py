"""What an executor tells while it trains stacks.

Enters and leaves: plain records, made by `dispatch.py`, read by the sweep and by displays. Every
`Started` is followed by one of `Done`, `Failed`, `Replaced`, `Requeued` and `Stopped` of its job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regmix.swarm.jobs import StackJob
from regmix.swarm.places import Place


@dataclass(frozen=True, kw_only=True)
class Started:
    """A worker began an attempt at a stack, at `step`; None where it did not get that far.

    worker: its place's id; machine, device: where that is; environment: what it says of itself.
    """

    job: StackJob
    worker: str
    machine: str
    device: str
    step: int | None
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stack is at `step`, its members' mean training loss is `loss_nats`."""

    job: StackJob
    step: int
    loss_nats: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """A stack is trained; `result` is the table that `worker.train_job` describes."""

    job: StackJob
    result: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A stack could not be trained."""

    job: StackJob
    what: str
    cure: str


@dataclass(frozen=True, kw_only=True)
class Requeued:
    """An attempt at a stack was broken off, and the stack waits again.

    outcome: "died" (its worker), "hung", "preempted", "lost" (its machine or GPU) or "failed".
    """

    job: StackJob
    outcome: str
    why: str

    def __str__(self) -> str:
        subject = {
            "died": "its worker died",
            "hung": "its worker hung",
            "preempted": "its worker was taken away",
            "lost": "its machine or GPU was lost",
            "failed": "its machine could not train it",
        }.get(self.outcome, self.outcome)
        return f"stack {self.job.name}: {subject} ({self.why}); it goes on from its checkpoint"


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A stack was told to stop, as everything was; it goes on from its checkpoint next time."""

    job: StackJob


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """A stack ran out of a GPU's memory; `parts` are trained in its place; `remark` says how."""

    job: StackJob
    parts: tuple[StackJob, ...]
    remark: str


@dataclass(frozen=True, kw_only=True)
class Retired:
    """A GPU is used no more in this run; `num_left` others are."""

    gpu: str
    machine: str
    what: str
    num_left: int

    def __str__(self) -> str:
        left = "no GPU is" if not self.num_left else f"{self.num_left} GPUs are"
        if self.num_left == 1:
            left = "1 GPU is"
        where = f" of {self.machine}" if self.machine else ""
        return f"GPU {self.gpu}{where} is used no more: {self.what}; {left} left"


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A place can be used from now on: its machine came while others worked."""

    place: Place

    def __str__(self) -> str:
        return f"{self.place.machine}: {self.place.id} takes part from now on"


@dataclass(frozen=True, kw_only=True)
class Left:
    """A place is used no more in this run: its machine went, or trains nothing any more."""

    place: Place
    why: str

    def __str__(self) -> str:
        return f"{self.place.machine}: {self.place.id} is used no more: {self.why}"


Event = Started | Progress | Done | Failed | Requeued | Stopped | Replaced | Retired | Joined | Left
