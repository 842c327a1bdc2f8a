"""The search for the best schedule that a chain of transitions predicts, within bounds.

Enters: a chain, an objective, what every segment and the whole run must respect. Leaves: the best
schedule [N, D] and the best constant mixture [D] found, the first never worse than the second.

Legend: N segments, D domains, M targets, C schedules.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regmix.data.mixtures import normalised
from regmix.decision.objective import Objective
from regmix.decision.schedules.histories import Histories
from regmix.decision.schedules.transitions import Chain
from regmix.decision.searching.constraints import Constraints
from regmix.errors import ConstraintError

_CANDIDATES, _STARTS = 2000, 4
_FLOOR, _MOST_STEPS, _PRECISION = 1e-6, 100, 1e-9
_NEGLIGIBLE = 1e-4


class ScheduleSearch:
    """The search over schedules [N, D] and over constant mixtures, which are schedules too."""

    def __init__(
        self,
        chain: Chain,
        histories: Histories,
        objective: Objective,
        bounds: Constraints,
        whole: Constraints,
        extrapolate: bool,
    ) -> None:
        self.chain, self.histories, self.objective = chain, histories, objective
        self.shares, self.whole = histories.shares, whole
        seen = histories.weights.max(0)
        self.lower = np.tile(bounds.lower, (len(seen), 1))
        self.upper = np.tile(bounds.upper, (len(seen), 1))
        if not extrapolate:
            limited = np.maximum(np.minimum(self.upper, seen), self.lower)
            self.upper = np.where((limited.sum(1) >= 1)[:, None], limited, self.upper)

    def best(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best schedule [N, D] and the best constant mixture [D] that are found."""
        rng = np.random.default_rng(seed)
        constants = self._constants(rng)
        constant = self._improved(constants[self._order(constants)[:_STARTS]], tied=True)
        drawn = self._schedules(constant, rng)
        starts = np.concatenate([constant[None], drawn[self._order(drawn)[:_STARTS]]])
        return self._improved(starts, tied=False), constant[0]

    def value(self, schedules: np.ndarray) -> np.ndarray:
        """Return the predicted final objective [C] of schedules [C, N, D]."""
        return self.objective.value(self.chain.losses(schedules))

    def _order(self, schedules: np.ndarray) -> np.ndarray:
        return np.argsort(self.value(schedules), kind="stable")

    def _allowed(self, schedules: np.ndarray) -> np.ndarray:
        """Return the schedules within the bounds of every segment and of the whole run."""
        slack = 1e-9
        inside = (schedules >= self.lower - slack) & (schedules <= self.upper + slack)
        means = np.einsum("n,cnd->cd", self.shares, schedules)
        return schedules[inside.all((1, 2)) & self.whole.satisfied(means)]

    def _constants(self, rng: np.random.Generator) -> np.ndarray:
        """Return constant mixtures within all bounds, as schedules [C, N, D]."""
        limits = Constraints(
            self.whole.domains,
            np.maximum(self.lower.max(0), self.whole.lower),
            np.minimum(self.upper.min(0), self.whole.upper),
        )
        if limits.lower.sum() > 1 or limits.upper.sum() < 1:
            raise ConstraintError(
                "no constant mixture respects the bounds and the limit on epochs with weights "
                "that proxies had",
                cure="Loosen the bounds, allow more epochs, or allow weights beyond the proxies': "
                "--extrapolate",
            )
        rows = self.histories.weights.reshape(-1, len(limits.lower))
        centre = rows.mean(0) * 5 * rng.uniform(0.2, 2, (_CANDIDATES, 1))
        drawn = np.stack([rng.dirichlet(np.maximum(row, 1e-3)) for row in centre])
        inside = limits.moved_inside(np.concatenate([rows, drawn]))
        exact = np.stack([normalised(row) for row in inside])
        return np.repeat(exact[:, None], len(self.shares), axis=1)

    def _schedules(self, constant: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return schedules around the best constant one: some segments drawn, drawn in to fit."""
        every = zip(self.lower, self.upper, strict=True)
        parts = [self._mixtures(low, high, rng) for low, high in every]
        fewest = min(len(part) for part in parts)
        drawn = np.stack([part[rng.permutation(len(part))[:fewest]] for part in parts], axis=1)
        pull = rng.uniform(0, 1, (fewest, 1, 1))
        kept = self._allowed(constant + pull * (drawn - constant))
        return np.concatenate([constant[None], kept])

    def _mixtures(
        self, lower: np.ndarray, upper: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return mixtures [C, D] all over one segment's bounds."""
        sparse, even = (rng.dirichlet(np.full(len(lower), a), _CANDIDATES // 2) for a in (0.3, 1.0))
        limits = Constraints(self.whole.domains, lower, upper)
        inside = limits.moved_inside(np.concatenate([sparse, even]))
        return np.stack([normalised(row) for row in inside])

    def _improved(self, starts: np.ndarray, *, tied: bool) -> np.ndarray:
        """Return the best schedule [N, D] that gradient search reaches from the starts."""
        found = [self._descended(start, tied=tied) for start in starts]
        tidied = np.stack([_without_specks(row) for row in found])
        candidates = self._allowed(np.concatenate([starts, np.stack(found), tidied]))
        return np.asarray(candidates[int(self.value(candidates).argmin())])

    def _descended(self, start: np.ndarray, *, tied: bool) -> np.ndarray:
        """Follow the slopes from one schedule [N, D]; tied: all segments move as one.

        Over roots of the weights, where a Gaussian process on roots has finite slopes at 0.
        """
        from scipy.optimize import minimize

        number, size = start.shape
        own = 1 if tied else number
        lower = np.maximum(self.lower, np.minimum(_FLOOR, self.upper))
        low = np.sqrt(lower.max(0, keepdims=True) if tied else lower).ravel()
        high = np.sqrt(self.upper.min(0, keepdims=True) if tied else self.upper).ravel()
        shares = np.ones(1) if tied else self.shares
        row_of = np.kron(np.eye(own), np.ones(size))

        def schedule_of(roots: np.ndarray) -> np.ndarray:
            return np.broadcast_to((roots * roots).reshape(own, size), (number, size))

        def value(roots: np.ndarray) -> float:
            return float(self.value(schedule_of(roots)[None])[0])

        def slope(roots: np.ndarray) -> np.ndarray:
            schedule = schedule_of(roots)
            slopes = self.chain.slopes(schedule, self._pull(schedule))
            return (slopes.sum(0) if tied else slopes).ravel() * 2 * roots

        constraints: list[dict[str, Any]] = [
            {
                "type": "eq",
                "fun": lambda roots: row_of @ (roots * roots) - 1,
                "jac": lambda roots: row_of * (2 * roots),
            }
        ]
        if self.whole.budget_tokens is not None:
            mean_of = np.kron(shares, np.eye(size))
            constraints.append(
                {
                    "type": "ineq",
                    "fun": lambda roots: self.whole.upper - mean_of @ (roots * roots),
                    "jac": lambda roots: -mean_of * (2 * roots),
                }
            )
        first = np.clip(np.sqrt(start[:own]).ravel(), low, high)
        found = minimize(
            value,
            first,
            jac=slope,
            method="SLSQP",
            bounds=list(zip(low, high, strict=True)),
            constraints=constraints,
            options={"maxiter": _MOST_STEPS, "ftol": _PRECISION},
        )
        if not np.isfinite(found.x).all():
            return start
        reached = np.stack([normalised(row) for row in (found.x**2).reshape(own, size)])
        moved = np.broadcast_to(reached, (number, size))
        # A step beyond a bound by rounding is drawn back towards the start, which is within all.
        for share in (1.0, 0.999, 0.99, 0.9, 0.5):
            back = start + share * (moved - start)
            if len(self._allowed(back[None])):
                return np.asarray(back)
        return start

    def _pull(self, schedule: np.ndarray) -> np.ndarray:
        """Return the derivatives [M'] of the objective by the final losses."""
        if not self.objective.worst:
            return self.objective.shares
        losses = self.chain.losses(schedule[None])[0]
        return np.asarray((np.arange(len(losses)) == losses.argmax()).astype(float))


def _without_specks(schedule: np.ndarray) -> np.ndarray:
    """Return the schedule with the weights that a search only left there set to 0."""
    cleaned = np.where(schedule < _NEGLIGIBLE, 0.0, schedule)
    return np.stack([normalised(row) for row in cleaned])
