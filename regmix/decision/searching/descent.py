"""Gradient search on a smooth surrogate, within bounds and a guard.

Enters: a predictor whose members have gradients, constraints, a start [D]. Leaves: weights [D]
within the bounds; whether the guard holds there is for the caller to judge.

The search runs over q = sqrt(p), on the unit sphere: a Gaussian process on sqrt(p) has an infinite
slope in p at 0 and a finite one in q. Sequential quadratic programming then took 9 to 20 steps to
the values that it took 24 to 150 to reach in p (published runs, 12 cases of 5 starts). The worst
target and the guard's excess are the smooth problem: minimise t where no loss is above t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from regmix.decision.parallel import one_thread
from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.predictor import Predictor

Aim = Literal["value", "excess"]
# Weights are kept off 0, where a slope in q vanishes, and starts further: as far as this.
_FLOOR, _START_FLOOR = 1e-6, 1e-4
# The guard is kept with this to spare, so that rounding does not break it.
_SPARE_NATS = 1e-7
_PRECISION_NATS = 1e-9
MOST_STEPS = 100


@dataclass(eq=False)
class _Problem:
    """The functions of x = [q, t]: t is the highest loss (`worst`) or the guard's excess."""

    predictor: Predictor
    aim: Aim
    _known: dict[str, tuple[bytes, np.ndarray]] = field(default_factory=dict)

    @property
    def is_epigraph(self) -> bool:
        return self.aim == "excess" or self.predictor.objective.worst

    def losses(self, x: np.ndarray) -> np.ndarray:
        """Return the losses [U]."""
        return self._remembered("losses", x, lambda p: self.predictor.losses(p[None])[0])

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Return the slopes [U, D] of the losses by q."""
        return self._remembered("slopes", x, self.predictor.slopes) * (2 * x[:-1])

    def _remembered(
        self, what: str, x: np.ndarray, judge: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return judge(p); the last place is remembered, since every function asks for it."""
        place = x[:-1].tobytes()
        if self._known.get(what, (b"",))[0] != place:
            self._known[what] = place, judge(x[:-1] ** 2)
        return self._known[what][1]

    def value(self, x: np.ndarray) -> float:
        if self.aim == "excess":
            return float(x[-1])
        weights = x[None, :-1] ** 2
        penalty = self.predictor.penalty
        added = 0.0 if penalty is None else float(penalty.value(weights)[0])
        if self.is_epigraph:
            return float(x[-1]) + added
        return float(self.predictor.value_of(self.losses(x)[None], weights)[0])

    def slope(self, x: np.ndarray) -> np.ndarray:
        slope = np.zeros(len(x))
        roots, penalty = x[:-1], self.predictor.penalty
        if self.is_epigraph:
            slope[-1] = 1.0
        else:
            slope[:-1] = self.predictor.objective.shares @ self.slopes(x)[self.predictor.places]
        if penalty is not None and self.aim == "value":
            slope[:-1] += 2 * roots * penalty.slope(roots * roots)
        return slope

    def ceilings(self) -> list[tuple[list[int], np.ndarray, float]]:
        """Return (targets, ceilings, how much t raises them): constraints on the losses."""
        found: list[tuple[list[int], np.ndarray, float]] = []
        guard, places = self.predictor.guard, self.predictor.places
        if guard is not None:
            every = list(range(len(guard.ceilings)))
            spare = guard.ceilings - _SPARE_NATS
            found.append((every, spare, 1.0 if self.aim == "excess" else 0.0))
        if self.aim == "value" and self.predictor.objective.worst:
            found.append((places, np.zeros(len(places)), 1.0))
        return found

    def constraints(self) -> list[dict[str, Any]]:
        """Return the constraints as scipy wants them: on the sphere, under the ceilings."""
        found: list[dict[str, Any]] = [
            {
                "type": "eq",
                "fun": lambda x: x[:-1] @ x[:-1] - 1,
                "jac": lambda x: np.append(2 * x[:-1], 0.0),
            }
        ]
        for rows, ceiling, raised in self.ceilings():
            found.append(
                {
                    "type": "ineq",
                    "fun": lambda x, r=rows, c=ceiling, t=raised: c + t * x[-1] - self.losses(x)[r],
                    "jac": lambda x, r=rows, t=raised: np.hstack(
                        [-self.slopes(x)[r], np.full((len(r), 1), t)]
                    ),
                }
            )
        return found


def descend(
    predictor: Predictor,
    limits: Constraints,
    start: np.ndarray,
    aim: Aim = "value",
    most_steps: int = MOST_STEPS,
) -> np.ndarray:
    """Return a local minimum [D] of the value, or of the guard's excess, near `start` [D]."""
    from scipy.optimize import minimize

    low = np.sqrt(np.maximum(limits.lower, np.minimum(_FLOOR, limits.upper)))
    high = np.sqrt(limits.upper)
    inside = limits.moved_inside(np.maximum(start, _START_FLOOR)[None])
    roots = np.clip(np.sqrt(inside[0] if len(inside) else start), low, high)
    problem = _Problem(predictor, aim)
    first = np.append(roots, 0.0)
    losses = problem.losses(first)
    gaps = [
        (losses[rows] - ceiling).max() for rows, ceiling, raised in problem.ceilings() if raised
    ]
    first[-1] = max(gaps, default=0.0)
    # A step solves for 17 or so unknowns: threads would cost more than they save.
    with one_thread():
        found = minimize(
            problem.value,
            first,
            jac=problem.slope,
            method="SLSQP",
            bounds=[*zip(low, high, strict=True), (None, None) if gaps else (0.0, 0.0)],
            constraints=problem.constraints(),
            options={"maxiter": most_steps, "ftol": _PRECISION_NATS},
        )
    weights = np.clip(found.x[:-1] ** 2, limits.lower, limits.upper)
    if not np.isfinite(weights).all():
        return start
    moved = limits.moved_inside(weights[None] / weights.sum())
    return moved[0] if len(moved) else start
