"""What a sweep does at this moment, in a file that `status` reads.

Enters: the events of an executor. Leaves: `progress.json`, whole, replaced every second or two and
removed when the sweep ends. It is for people: nothing is computed from it, and what it says of a
sweep that was killed is simply old.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.config import build
from regmix.errors import RegmixError
from regmix.files import atomic_open

if TYPE_CHECKING:
    from regmix.swarm.events import Event
    from regmix.swarm.tally import Tally

PROGRESS_VERSION = 1
LARGEST_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RunningStack:
    """A stack in training: `worker` on `machine` is at `step` of `num_steps`.

    loss_nats: mean training loss of its proxies; None before the first step that was reported.
    """

    stack: str
    proxies: tuple[int, ...]
    worker: str
    machine: str
    device: str
    num_steps: int
    step: int = 0
    loss_nats: float | None = None
    tokens_per_second: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SweepProgress:
    """How far a sweep is, as its coordinator wrote it at `updated` (UTC, for people).

    token: of the lease that the coordinator holds. expected_seconds: from then to the end; None
    where it cannot be said yet.
    """

    token: str
    updated: str
    tokens: int
    total_tokens: int
    tokens_per_second: float
    running: tuple[RunningStack, ...] = ()
    expected_seconds: float | None = None
    expected_end: str | None = None
    version: int = PROGRESS_VERSION


def read_progress(path: Path) -> SweepProgress | None:
    """Return what a sweep said of itself last; None where there is nothing that makes sense."""
    try:
        with open(path, "rb") as stream:
            return build(SweepProgress, json.loads(stream.read(LARGEST_BYTES)), where=str(path))
    except (OSError, ValueError, TypeError, RecursionError, RegmixError):
        return None


class ProgressFile:
    """Keeps `progress.json` of one sweep. A disk that is full ends the sweep, but not here."""

    def __init__(self, path: Path, token: str, tally: Tally) -> None:
        self._path, self._token, self._tally = path, token, tally
        self._running: dict[str, dict[str, Any]] = {}

    def add(self, event: Event) -> None:
        """Take one event into account."""
        from regmix.swarm import events

        if isinstance(event, events.Started):
            self._running[event.job.name] = {
                "stack": event.job.name,
                "proxies": [int(member.name) for member in event.job.members],
                "worker": event.worker,
                "machine": event.machine,
                "device": event.device,
                "num_steps": event.job.training.num_steps,
                "step": event.step or 0,
                "loss_nats": None,
                "tokens_per_second": 0.0,
            }
        elif isinstance(event, events.Progress):
            if event.job.name in self._running:
                loss = event.loss_nats if math.isfinite(event.loss_nats) else None
                self._running[event.job.name].update(
                    step=event.step, loss_nats=loss, tokens_per_second=event.tokens_per_second
                )
        elif isinstance(
            event,
            events.Done | events.Failed | events.Requeued | events.Stopped | events.Replaced,
        ):
            self._running.pop(event.job.name, None)

    def write(self) -> None:
        """Replace the file. It need not survive a power cut, so it waits for no disk."""
        with contextlib.suppress(RegmixError), atomic_open(self._path, "w", durable=False) as out:
            json.dump(self._table(), out, allow_nan=False)

    def remove(self) -> None:
        """Remove the file: the sweep has ended. That of a sweep which took the study over stays."""
        found = read_progress(self._path)
        if found is None or found.token == self._token:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _table(self) -> dict[str, Any]:
        now = datetime.now(UTC)
        speed, left = self._tally.tokens_per_second, self._tally.total_tokens - self._tally.tokens
        expected = None
        if speed > 0:
            seconds = max(0.0, left / speed)
            end = now + timedelta(seconds=min(seconds, 1e9))
            expected = {
                "expected_seconds": seconds,
                "expected_end": end.isoformat(timespec="seconds"),
            }
        return {
            "version": PROGRESS_VERSION,
            "token": self._token,
            "updated": now.isoformat(timespec="seconds"),
            "tokens": self._tally.tokens,
            "total_tokens": self._tally.total_tokens,
            "tokens_per_second": speed,
            **(expected or {}),
            "running": list(self._running.values()),
        }
