"""The search for a surrogate's best mixture within bounds.

Enters: a predictor of the objective, constraints, starting mixtures, a seed. Leaves: weights [D]
within the bounds. `simulate` is the paper's; `exact` starts from it, follows gradients where every
member has them, and moves weight between pairs of domains otherwise.
"""

from __future__ import annotations

import numpy as np

from regmix.data.draws import drop_small, scale_into_bounds
from regmix.decision.constraints import Constraints
from regmix.decision.objective import Objective
from regmix.decision.surrogate import Surrogate, sum_of

NUM_DRAWS = 100_000
NUM_AVERAGED = 128
# Trees judge every draw by a tenth of their rounds, and the best tenth in full: on the published
# runs that keeps 99-100 % of the best 128 (4 targets, 2 concentrations), at a fifth of the time.
_SCREENED = NUM_DRAWS // 10
# Evaluations of one target at one mixture that the exchange may spend: 1-2 s of trees.
_EXCHANGE_BUDGET = 60_000
_NEGLIGIBLE = 1e-6


class Predictor:
    """The objective of mixtures [N, D], from the members' predictions of its targets alone."""

    def __init__(self, model: Surrogate, objective: Objective) -> None:
        self.objective = objective
        self.num_targets = len(objective.columns)
        self._members = model.select(objective.columns)
        self.has_trees = any(hasattr(m.model, "coarse_mean") for m in self._members)
        self.is_smooth = not objective.worst and all(
            hasattr(member.model, "gradient") for member in self._members
        )

    def value(self, weights: np.ndarray) -> np.ndarray:
        """Return the objective [N]."""
        parts = [member.share * member.model.mean(weights) for member in self._members]
        return self.objective.value(sum_of(parts))

    def coarse_value(self, weights: np.ndarray) -> np.ndarray:
        """Return the objective [N] with the trees' cheap estimate."""
        parts = []
        for member in self._members:
            estimate = getattr(member.model, "coarse_mean", member.model.mean)
            parts.append(member.share * estimate(weights))
        return self.objective.value(sum_of(parts))

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [D] at one mixture [D]; only where `is_smooth`."""
        total = np.zeros(len(weights))
        for member in self._members:
            slopes = member.model.gradient(weights[None])[0]  # type: ignore[attr-defined]
            total += member.share * (self.objective.shares @ slopes)
        return total


def search(
    predictor: Predictor,
    limits: Constraints,
    *,
    centre: np.ndarray,
    starts: np.ndarray,
    method: str,
    seed: int,
) -> np.ndarray:
    """Return the best weights [D]; draws come from Dirichlet(centre), `starts` [S, D] add to them.

    `exact` is never worse than `simulate` with the same arguments.
    """
    averaged, best_draws = _simulate(predictor, limits, centre, seed)
    if method == "simulate":
        return averaged
    candidates = [averaged, *best_draws[:4], *into_bounds(starts, limits)]
    values = predictor.value(np.stack(candidates))
    order = np.argsort(values, kind="stable")
    if predictor.is_smooth:
        for place in order[:6]:
            candidates.append(_descend(predictor, limits, candidates[place]))
    else:
        for place in order[:2]:
            candidates.append(_exchange(predictor, limits, candidates[place], values[place]))
    found = np.stack(candidates)
    cleaned = drop_small(found, limits.lower, limits.upper, _NEGLIGIBLE)
    # Cleaned ones first: where they are as good, an optimum without specks of weight is returned.
    every = np.concatenate([cleaned, found])
    every = every[limits.satisfied(every) & (np.abs(every.sum(1) - 1) < 1e-9)]
    return every[int(predictor.value(every).argmin())]


def into_bounds(weights: np.ndarray, limits: Constraints) -> np.ndarray:
    """Return the mixtures [N, D] moved within the bounds; those that cannot be are left out."""
    outside = ~limits.satisfied(weights)
    if not outside.any():
        return weights
    moved = weights.copy()
    # A trace in every domain lets the others take up what a bound cuts off.
    touched = np.where(weights > 0, weights, 1e-9)[outside]
    moved[outside] = scale_into_bounds(touched, limits.lower, limits.upper)
    return moved[limits.satisfied(moved)]


def _simulate(
    predictor: Predictor, limits: Constraints, centre: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the best draws [D], and these draws [128, D], best first."""
    rng = np.random.default_rng(seed)
    draws = rng.dirichlet(centre, NUM_DRAWS)
    draws = draws[np.isfinite(draws).all(1)]
    draws = into_bounds(draws, limits)
    if predictor.has_trees:
        coarse = predictor.coarse_value(draws)
        draws = draws[np.argsort(coarse, kind="stable")[:_SCREENED]]
    order = np.argsort(predictor.value(draws), kind="stable")
    best = draws[order[:NUM_AVERAGED]]
    return best.mean(0), best


def _descend(predictor: Predictor, limits: Constraints, start: np.ndarray) -> np.ndarray:
    """Follow the gradient within the bounds by sequential quadratic programming."""
    from scipy.optimize import minimize

    found = minimize(
        lambda weights: float(predictor.value(weights[None])[0]),
        start,
        jac=predictor.gradient,
        method="SLSQP",
        bounds=list(zip(limits.lower, limits.upper, strict=True)),
        constraints={
            "type": "eq",
            "fun": lambda weights: weights.sum() - 1.0,
            "jac": np.ones_like,
        },
        options={"maxiter": 300, "ftol": 1e-10},
    )
    inside = np.clip(found.x, limits.lower, limits.upper)
    moved = into_bounds(inside[None] / inside.sum(), limits)
    return moved[0] if len(moved) else start


def _exchange(
    predictor: Predictor, limits: Constraints, start: np.ndarray, value: float
) -> np.ndarray:
    """Move weight from one domain to another, the best pair at a time, in ever smaller amounts."""
    num_domains = len(start)
    if num_domains == 1:
        return start
    givers, takers = np.nonzero(~np.eye(num_domains, dtype=bool))
    pairs = np.arange(len(givers))
    current, best = start.copy(), float(value)
    spent = 0
    for amount in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        while spent < _EXCHANGE_BUDGET // 2:
            room = np.minimum(
                (current - limits.lower)[givers],
                (limits.upper - current)[takers],
            )
            moved = np.minimum(amount, np.maximum(room, 0.0))
            trial = np.repeat(current[None], len(pairs), axis=0)
            trial[pairs, givers] -= moved
            trial[pairs, takers] += moved
            values = predictor.value(trial)
            spent += len(pairs) * predictor.num_targets
            winner = int(values.argmin())
            if not values[winner] < best - 1e-9:
                break
            current, best = trial[winner], float(values[winner])
    return current
