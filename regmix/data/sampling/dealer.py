"""Which sequences a step holds, for a run whose mixture may change at given steps.

Enters: a table of `order.py` for each segment, the step each begins at, and a backend. Leaves, for
any step in any order, the domain and sequence of every row, and the counts before it. Reads no
token and knows no domain by name.

A segment is a stretch of steps with one mixture. The next one resets what is owed to each domain,
but not how far each domain has been read, so nothing is lost or repeated where the mixture changes.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regmix.data.sampling.backends import Backend
from regmix.data.sampling.order import COUNT, mix_key, start_dealing
from regmix.errors import ConfigError

# Going back replays at most this many steps; a snapshot is 16 bytes per domain.
SNAPSHOT_STEPS = 256

Counts = NDArray[np.int64]


class Dealer:
    """Deals the sequences of a run; `tables` [6, D] hold one segment each, from `first_steps` on.

    `domains` and `sequences`, [B] each, are those of the step ordered last.
    """

    def __init__(
        self,
        tables: Sequence[NDArray[np.int64]],
        first_steps: Sequence[int],
        *,
        batch_size: int,
        step_key: int,
        backend: Backend,
    ) -> None:
        self.tables, self.first_steps = tuple(tables), tuple(first_steps)
        self.batch_size, self.step_key = batch_size, step_key
        self.domains = np.empty(batch_size, dtype=np.int64)
        self.sequences = np.empty(batch_size, dtype=np.int64)
        self._backend = backend
        self._snapshot_steps: list[int] = []
        self._snapshots: list[tuple[Counts, Counts]] = []
        self._last_step: int | None = None
        none = np.zeros(self.tables[0].shape[1], dtype=np.int64)
        self.restore(0, none, none)

    def copy(self) -> Dealer:
        """Return a dealer at the same place, which then goes its own way."""
        twin = Dealer(
            self.tables,
            self.first_steps,
            batch_size=self.batch_size,
            step_key=self.step_key,
            backend=self._backend,
        )
        twin.restore(self._position, self._dealing[COUNT], self._begun)
        return twin

    def segment(self, step: int) -> int:
        """Return the number of the segment that `step` belongs to."""
        return bisect.bisect_right(self.first_steps, step) - 1

    def order(self, step: int) -> None:
        """Put the rows of `step` into `domains` and `sequences`, in batch order."""
        step = operator.index(step)  # a NumPy integer would overflow in the key
        if step == self._last_step:
            return
        self._seek(step)
        self._begin_due_segment()
        self._last_step = None  # a failure below must not leave half-written rows under a step
        key = mix_key(self.step_key, step)
        table = self.tables[self._segment]
        first = self._next_sequence()
        self._backend.order(table, self._dealing, first, key, self.domains, self.sequences)
        self._last_step = step
        self._arrive(step + 1)

    def counts(self, step: int) -> tuple[Counts, Counts]:
        """Return the sequences dealt of each domain before `step`, and before the segment that
        step - 1 belongs to: what `restore` takes, whatever is to be dealt from `step` on."""
        self._seek(operator.index(step))
        return self._dealing[COUNT].copy(), self._begun.copy()

    def dealing(self, step: int) -> tuple[NDArray[np.int64], int]:
        """Return the dealing [5, D] at the start of `step`, and its first sequence's number."""
        self._seek(operator.index(step))
        twin = self.copy()  # this one stays in the segment of the steps before
        twin._begin_due_segment()
        return twin._dealing, twin._next_sequence()

    def fresh(self, segment: int) -> NDArray[np.int64]:
        """Return the dealing [5, D] that begins a segment; its counts are to be set."""
        table = self.tables[segment]
        return start_dealing(table, np.zeros(table.shape[1], dtype=np.int64))

    def restore(self, step: int, counts: Counts, begun: Counts) -> None:
        """Stand at the start of `step` with what `counts` gave for it."""
        self._enter(step, counts.copy(), begun.copy())
        self._remember()

    def _next_sequence(self) -> int:
        return (self._position - self.first_steps[self._segment]) * self.batch_size + 1

    def _seek(self, step: int) -> None:
        """Stand at the start of `step`, by replay from the nearest place before it."""
        if step == self._position:
            return
        if step < 0:
            raise ConfigError(f"step is {step}", cure="Steps count from 0")
        near = bisect.bisect_right(self._snapshot_steps, step) - 1
        if not self._snapshot_steps[near] <= self._position <= step:
            self._enter(self._snapshot_steps[near], *self._snapshots[near])
        while self._position < step:
            self._begin_due_segment()
            halts = [step, self._position - self._position % SNAPSHOT_STEPS + SNAPSHOT_STEPS]
            ahead = min(halts + self._later_first_steps()[:1])
            num = (ahead - self._position) * self.batch_size
            table = self.tables[self._segment]
            self._backend.advance(table, self._dealing, self._next_sequence(), num)
            self._arrive(ahead)

    def _later_first_steps(self) -> list[int]:
        return list(self.first_steps[self._segment + 1 :])

    def _arrive(self, step: int) -> None:
        self._position = step
        if step % SNAPSHOT_STEPS == 0:
            self._remember()

    def _enter(self, step: int, counts: Counts, begun: Counts) -> None:
        self._position, self._begun = step, begun
        self._segment = self.segment(max(step - 1, 0))
        self._dealing = start_dealing(self.tables[self._segment], counts - begun)
        self._dealing[COUNT] = counts

    def _begin_due_segment(self) -> None:
        """Go over to the segment of the present step, which owes nothing to any domain yet."""
        if self._position in self._later_first_steps():
            self._segment = self.segment(self._position)
            self._begun = self._dealing[COUNT].copy()
            self._dealing = self.fresh(self._segment)
            self._dealing[COUNT] = self._begun

    def _remember(self) -> None:
        place = bisect.bisect_left(self._snapshot_steps, self._position)
        if place == len(self._snapshot_steps) or self._snapshot_steps[place] != self._position:
            self._snapshot_steps.insert(place, self._position)
            self._snapshots.insert(place, (self._dealing[COUNT].copy(), self._begun.copy()))
