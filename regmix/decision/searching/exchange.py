"""Search without gradients: weight moves from one domain to another while that helps.

Enters: a predictor, constraints, a start [D] within them. Leaves: weights [D], no worse. For
surrogates with a member that is no smooth function, such as trees.
"""

from __future__ import annotations

import numpy as np

from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.descent import Aim
from regmix.decision.searching.predictor import Predictor

# Evaluations of one target at one mixture that one exchange may spend: up to a second of trees.
_BUDGET = 30_000
_AMOUNTS = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
_LEAST_GAIN = 1e-9
# Improvements whose guard is judged at once, the best ones first.
_CHECKED = 16


def exchange(
    predictor: Predictor, limits: Constraints, start: np.ndarray, aim: Aim = "value"
) -> np.ndarray:
    """Move weight between the best pair of domains at a time, in ever smaller amounts.

    Minimises the value among mixtures that keep the guard, as `start` does, or the guard's excess.
    """
    num_domains = len(start)
    if num_domains == 1:
        return start
    givers, takers = np.nonzero(~np.eye(num_domains, dtype=bool))
    pairs = np.arange(len(givers))
    current = start.copy()
    best = float(_values(predictor, current[None], aim)[0])
    width = predictor.num_own if aim == "value" else predictor.num_used
    spent = 0
    for amount in _AMOUNTS:
        while spent < _BUDGET:
            room = np.minimum((current - limits.lower)[givers], (limits.upper - current)[takers])
            moved = np.minimum(amount, np.maximum(room, 0.0))
            trial = np.repeat(current[None], len(pairs), axis=0)
            trial[pairs, givers] -= moved
            trial[pairs, takers] += moved
            values = _values(predictor, trial, aim)
            spent += len(pairs) * width
            order = np.argsort(values, kind="stable")
            better = order[values[order] < best - _LEAST_GAIN]
            winner, checked = _first_kept(predictor, trial, better, aim)
            spent += checked * predictor.num_used
            if winner is None:
                break
            current, best = trial[winner], float(values[winner])
    return current


def _values(predictor: Predictor, weights: np.ndarray, aim: Aim) -> np.ndarray:
    return predictor.value(weights) if aim == "value" else predictor.judge(weights)[1]


def _first_kept(
    predictor: Predictor, trial: np.ndarray, better: np.ndarray, aim: Aim
) -> tuple[int | None, int]:
    """Return the first of the rows `better` that keeps the guard, and how many were judged."""
    if predictor.guard is None or aim == "excess":
        return (int(better[0]) if len(better) else None), 0
    for start in range(0, len(better), _CHECKED):
        rows = better[start : start + _CHECKED]
        kept = predictor.judge(trial[rows])[1] == 0
        if kept.any():
            return int(rows[kept.argmax()]), start + len(rows)
    return None, len(better)
