"""Whether a run's loss is still that of a run that learns.

Enters: each step's loss and gradient norm, the same on all ranks. Leaves: what to do with the
step, and when to stop. Pure: the same losses give the same verdicts, on every rank and after a
resume. Stops nothing itself.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal

WINDOW = 50
# Before as many steps a loss has no usual value.
FEWEST = 20
# Above the window's median by so many nats at least, and so many times its usual deviation.
SPIKE_NATS = 1.0
SPIKE_DEVIATIONS = 10.0
# Steps in a row. One overflow is skipped and forgotten; a spike mostly comes down by itself within
# some steps, and a run that stays above for so long has diverged.
MOST_NOT_FINITE = 3
MOST_SPIKES = 20

Verdict = Literal["fine", "skip", "spike"]


class LossWatch:
    """Judges steps; `recent` are the last usual losses, which a checkpoint keeps."""

    def __init__(self, recent: Sequence[float] = ()) -> None:
        self._recent = deque(recent, maxlen=WINDOW)
        self.num_not_finite = self.num_spikes = 0

    @property
    def recent(self) -> list[float]:
        """The last usual losses, oldest first."""
        return list(self._recent)

    @property
    def is_troubled(self) -> bool:
        """Whether the last step was not as usual: what it left is no state to go back to."""
        return bool(self.num_not_finite or self.num_spikes)

    @property
    def should_stop(self) -> bool:
        """Whether too many steps in a row were not as usual."""
        return self.num_not_finite >= MOST_NOT_FINITE or self.num_spikes >= MOST_SPIKES

    def forget(self) -> None:
        """Take no loss for usual: from this step on another mixture is read."""
        self._recent.clear()
        self.num_spikes = 0

    def judge(self, loss: float, norm: float) -> Verdict:
        """Return what to do with a step: update, skip the update, or update and beware."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.num_not_finite += 1
            return "skip"
        self.num_not_finite = 0
        if loss > self._limit():
            self.num_spikes += 1
            return "spike"
        self.num_spikes = 0
        self._recent.append(loss)
        return "fine"

    def reason(self) -> str:
        """Return why the run stops, in words."""
        if self.num_not_finite:
            return f"loss or gradient was not finite for {self.num_not_finite} steps in a row"
        usual = statistics.median(self._recent)
        return (
            f"the loss was above {self._limit():.2f} nats for {self.num_spikes} steps in a row, "
            f"where {usual:.2f} was usual"
        )

    def _limit(self) -> float:
        if len(self._recent) < FEWEST:
            return math.inf
        usual = statistics.median(self._recent)
        deviation = statistics.median(abs(loss - usual) for loss in self._recent)
        return usual + max(SPIKE_NATS, SPIKE_DEVIATIONS * deviation)
