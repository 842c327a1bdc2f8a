"""How often something is done that costs time on the side, such as writing a table again.

Enters: what to do. Leaves: it done, now and then, for a small part of the time that passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.01


class Pace:
    """Does something when it is due: at most every `least_seconds`, and for `SHARE` of the time.

    is_wanted: set where there is something new; it is then done once it is due.
    What is done with all that a sweep has so far takes longer the more there is. After each stack
    it would grow with the square of their number; like this it stays a hundredth of the sweep.
    """

    def __init__(
        self,
        action: Callable[[], None],
        *,
        least_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._action, self._least_seconds, self._clock = action, least_seconds, clock
        self._due = clock() if least_seconds == 0 else clock() + least_seconds
        self.is_wanted = False

    def tick(self) -> None:
        """Do it now if it is wanted and due."""
        if self.is_wanted and self._clock() >= self._due:
            self.now()

    def now(self) -> None:
        """Do it now, due or not."""
        started = self._clock()
        self._action()
        ended = self._clock()
        self.is_wanted = False
        self._due = ended + max(self._least_seconds, (ended - started) * (1 / SHARE - 1))
