"""Where a worker runs, and what its coordinator can do with it.

Enters and leaves: plain records and protocols, shared by the scheduler and all executors.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one worker runs: a share of a machine's cores, or one GPU.

    id: unique in a run; machine: what a person calls it; device: "cpu" or "cuda"; gpu: what
    `CUDA_VISIBLE_DEVICES` calls it on its machine. host_bytes: memory that all places of the
    machine share; gpu_bytes: memory of the GPU; None where neither limits what runs there.
    """

    id: str
    machine: str
    device: str
    gpu: str | None = None
    host_bytes: int | None = None
    gpu_bytes: int | None = None


class Worker(Protocol):
    """A process that serves jobs, one after another; its messages come by the inbox."""

    @property
    def log_path(self) -> Path | str:
        """Where its stderr goes."""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; nothing happens where the worker is gone: the inbox says so."""

    def wait(self, patience_seconds: float = ...) -> int | None:
        """Return the exit code of a worker that ends, killed where it takes too long, or None."""

    def kill(self) -> int | None:
        """Kill the worker and return its exit code; None where not even that ends it."""


# (worker, message): what a worker said. (worker, None): it is gone.
# (None, {"joined": Place}), (None, {"left": place id, "why": words}): a machine came or went.
Inbox = queue.Queue[tuple[Worker | None, dict[str, Any] | None]]
