"""What a search asks of a surrogate: a mixture's value, its slopes, and whether the guard holds.

Enters: a surrogate, an objective, a penalty, a guard. Leaves: values and losses of mixtures
[N, D], from the members' predictions of the targets that matter alone. Searches nothing.
"""

from __future__ import annotations

import numpy as np

from regmix.decision.objective import Objective
from regmix.decision.regressors.interface import SmoothModel
from regmix.decision.searching.guard import SLACK_NATS, Guard
from regmix.decision.searching.penalty import Penalty
from regmix.decision.surrogate import Surrogate, blended_mean


class Predictor:
    """The value to minimise: objective plus penalty; and the guard's excess over its ceilings.

    U targets are used: the objective's, or all where a guard looks at all.
    """

    def __init__(
        self,
        model: Surrogate,
        objective: Objective,
        penalty: Penalty | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.objective, self.penalty, self.guard = objective, penalty, guard
        own = tuple(objective.columns)
        used = own if guard is None else tuple(range(len(model.targets)))
        self._own = model.select(own)
        self._used = self._own if used == own else model.select(used)
        self._costly = [
            member for member in self._used if getattr(member.model, "is_costly", False)
        ]
        self._cheap = [member for member in self._used if member not in self._costly]
        self.places = [used.index(column) for column in own]
        self.num_own, self.num_used = len(own), len(used)
        self.is_smooth = all(isinstance(member.model, SmoothModel) for member in self._own)

    def value(self, weights: np.ndarray) -> np.ndarray:
        """Return the values [N]."""
        return self._penalised(self.objective.value(blended_mean(self._own, weights)), weights)

    def losses(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, U]."""
        return blended_mean(self._used, weights)

    @property
    def is_costly(self) -> bool:
        """Whether judging 100,000 mixtures would take more than a second."""
        return bool(self._costly)

    def cheap_part(self, weights: np.ndarray) -> np.ndarray:
        """Return what the cheap members add to the losses [N, U]."""
        if not self._cheap:
            return np.zeros((len(weights), self.num_used))
        return blended_mean(self._cheap, weights)

    def costly_part(self, weights: np.ndarray) -> np.ndarray:
        """Return what the costly members add to the losses [N, U]; only where `is_costly`."""
        return blended_mean(self._costly, weights)

    def value_of(self, losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the values [N] of mixtures whose losses [N, U] are known."""
        return self._penalised(self.objective.value(losses[:, self.places]), weights)

    def excess_of(self, losses: np.ndarray) -> np.ndarray:
        """Return by how much losses [N, U] break the guard [N]: 0 where they keep it."""
        if self.guard is None:
            return np.zeros(len(losses))
        excess = self.guard.excess(losses)
        return np.where(excess > SLACK_NATS, excess, 0.0)

    def judge(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the values [N] and by how much the guard is broken [N]."""
        if self.guard is None:
            return self.value(weights), np.zeros(len(weights))
        losses = self.losses(weights)
        return self.value_of(losses, weights), self.excess_of(losses)

    def slopes(self, weights: np.ndarray) -> np.ndarray:
        """Return the slopes [U, D] of the losses at one mixture [D]; only where `is_smooth`."""
        parts = [
            member.share * member.model.gradient(weights[None])[0]  # type: ignore[attr-defined]
            for member in self._used
        ]
        return np.sum(parts, axis=0)

    def _penalised(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return values if self.penalty is None else values + self.penalty.value(weights)
