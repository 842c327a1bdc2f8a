"""The Pareto guard: no target may be predicted worse than at a reference mixture.

Enters: a surrogate, a reference, a tolerance in nats. Leaves: a `Guard` that says by how much
predicted losses go beyond it, and the error where no mixture keeps it. Searches nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from regmix.decision.baselines import Baseline
from regmix.decision.searching.constraints import UNSEEN, Constraints
from regmix.decision.surrogate import Surrogate
from regmix.errors import ConfigError, ConstraintError

# Rounding in a prediction, far below any loss that can be measured.
SLACK_NATS = 1e-9
# What a guard tolerates unless told otherwise.
TOLERANCE_NATS = 0.01


@dataclass(frozen=True, eq=False)
class Guard:
    """weights [D]: the reference; losses [M]: predicted there, of every target of the surrogate."""

    name: str
    targets: tuple[str, ...]
    weights: np.ndarray
    losses: np.ndarray
    tolerance_nats: float

    @property
    def ceilings(self) -> np.ndarray:
        """Return the highest losses [M] that it allows."""
        return self.losses + self.tolerance_nats

    def excess(self, losses: np.ndarray) -> np.ndarray:
        """Return [N]: by how much the worst target of losses [N, M] is above its ceiling."""
        return np.asarray((losses - self.ceilings).max(1))

    def changes(self, losses: np.ndarray) -> dict[str, float]:
        """Return target -> nats above the reference, of the losses [M] of one mixture."""
        return dict(zip(self.targets, (losses - self.losses).tolist(), strict=True))


def make_guard(model: Surrogate, reference: Baseline, tolerance_nats: float) -> Guard:
    """Return the guard; `ConfigError` for a tolerance that is none."""
    if not (np.isfinite(tolerance_nats) and tolerance_nats >= 0):
        raise ConfigError(
            f"guard_tolerance is {tolerance_nats:g}", cure="Give 0 nats or more, for example 0.01"
        )
    losses = model.mean(reference.weights)[0]
    return Guard(reference.name, model.targets, reference.weights, losses, float(tolerance_nats))


def refusal(guard: Guard, limits: Constraints, losses: np.ndarray) -> ConstraintError:
    """Return the error for a guard that nothing keeps; losses [M]: of the least violation found."""
    worst = int((losses - guard.ceilings).argmax())
    above = float(losses[worst] - guard.losses[worst])
    beyond = above - guard.tolerance_nats
    outside = limits.outside(guard.weights)
    within = f", which asks for {'; '.join(outside)}" if outside else ""
    enough = math.ceil(above * 1e4) / 1e4
    cures = [f"Allow {enough:.4f} nats (--guard-tolerance)", "guard against another mixture"]
    if outside:
        cures.insert(1, "loosen those limits")
    if any(UNSEEN in reason for reason in outside):
        cures.insert(-1, "allow more than any run had (--extrapolate)")
    return ConstraintError(
        f"no mixture was found that keeps every target within {guard.tolerance_nats:g} nats of "
        f"'{guard.name}'{within}. The nearest is predicted {above:.4f} nats worse on "
        f"'{guard.targets[worst]}', {beyond:.4f} beyond the guard",
        cure=", ".join(cures[:-1]) + ", or " + cures[-1],
    )
