"""What a fault is to the suite, and what is reported of one.

Enters: a function that injects it on a stage. Leaves: a `Row`, or what the function raised. Draws
nothing but from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from regmix_bench.faults.proof import Proof
from regmix_bench.faults.stage import Stage

SAME_BITS = "ends with the undisturbed bits"
REFUSED = "refused; after the cure the same command ends with the undisturbed bits"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    injected: times; sees: what the user sees, in words or as printed; outcome: how it ended;
    proof: the study at the end, against the undisturbed one.
    """

    injected: int
    sees: str
    outcome: str
    proof: Proof


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault: `inject` does it on a stage, with a generator for all that is random.

    name: what the table calls it. is_fast: part of what runs with every change. is_long: needs the
    stage whose sweeps last. needs: returns why it cannot be injected here, or None.
    """

    name: str
    inject: Callable[[Stage, random.Random], Row]
    is_fast: bool = False
    is_long: bool = False
    needs: Callable[[], str | None] = lambda: None

    @property
    def folder_name(self) -> str:
        """Its name as that of a folder."""
        return "".join(c if c.isalnum() else "-" for c in self.name)

    def run(self, stage: Stage, seed: int) -> Row:
        """Inject it; the same seed draws the same moments and places."""
        return self.inject(stage, random.Random(f"{seed}/{self.name}"))
