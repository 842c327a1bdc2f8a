"""What a coordinator knows of a worker and of its present attempt at a job: is it alive?

Enters: its messages, and the coordinator's clock. Leaves: in words why it is taken to hang, or
None. Kills nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regmix.swarm.places import Worker

# A worker may go on for so many times the longest pause it has made before.
_PAUSES = 20.0


@dataclass(eq=False)
class Attempt:
    """A worker at work; times are the executor's clock.

    is_ready: it has spoken once, so its libraries are loaded; is_told: that the attempt began is
    known to others; first_step: where its job began; pulses, moved_at: what its training has done,
    and when that last changed; longest_pause: between two such changes.
    """

    worker: Worker
    heard_at: float
    environment: dict[str, Any] = field(default_factory=dict)
    is_ready: bool = False
    is_told: bool = False
    first_step: int | None = None
    pulses: int | None = None
    moved_at: float = 0.0
    longest_pause: float = 0.0

    def begin(self, now: float) -> None:
        """Expect another job's messages from now on."""
        self.is_told, self.first_step, self.pulses = False, None, None
        self.heard_at, self.moved_at, self.longest_pause = now, now, 0.0

    def hear(self, message: dict[str, Any], now: float) -> None:
        """Note that a message came."""
        self.heard_at, self.is_ready = now, True
        if isinstance(environment := message.get("environment"), dict):
            self.environment = environment
        pulses = message.get("beat", self.pulses)
        if pulses != self.pulses:
            if self.pulses is not None:
                self.longest_pause = max(self.longest_pause, now - self.moved_at)
            self.pulses, self.moved_at = pulses, now

    def excuse(self, now: float) -> None:
        """Count its silence from now on: the coordinator itself stood still."""
        self.heard_at = self.moved_at = now

    def why_hung(
        self, now: float, *, device: str, beat_patience_seconds: float, stall_seconds: float
    ) -> str | None:
        """Return why it is taken to hang, if it is; the limits are those of `Executor`."""
        silence, pause = now - self.heard_at, now - self.moved_at
        stall = max(stall_seconds, _PAUSES * self.longest_pause)
        # Libraries may lie far away; only a worker that has loaded them has a heart that beats.
        if silence > (beat_patience_seconds if self.is_ready else stall):
            return f"no sign of life for {silence:.0f} s"
        # A step of a large model may take hours on a CPU; how long is known after the first.
        if device == "cpu" and not self.longest_pause:
            return None
        if pause > stall:
            return f"its training stood still for {pause:.0f} s"
        return None
