"""What an executor tells while it trains stacks.

Enters and leaves: plain records, made by `executors.py`, read by the sweep and by displays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regmix.swarm.engine import StackJob


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
class Replaced:
    """A stack ran out of a GPU's memory; `parts` are trained in its place; `remark` says how."""

    job: StackJob
    parts: tuple[StackJob, ...]
    remark: str


@dataclass(frozen=True, kw_only=True)
class Retired:
    """A GPU is used no more in this run; `num_left` others are."""

    gpu: str
    what: str
    num_left: int

    def __str__(self) -> str:
        left = "no GPU is" if not self.num_left else f"{self.num_left} GPUs are"
        if self.num_left == 1:
            left = "1 GPU is"
        return f"GPU {self.gpu} is used no more: {self.what}; {left} left"


Event = Progress | Done | Failed | Replaced | Retired
