"""The search for a surrogate's best mixture within bounds and a guard.

Enters: a predictor, constraints, starting mixtures, a seed. Leaves: weights [D] that respect both,
or the error that names what clashes. `simulate` is the paper's (`simulation`); `exact` goes on from
there, by gradients where every member has them (`descent`), else by exchange (`exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.data.draws import drop_small
from regmix.data.mixtures import normalised
from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.descent import Aim, descend
from regmix.decision.searching.exchange import exchange
from regmix.decision.searching.guard import refusal
from regmix.decision.searching.predictor import Predictor
from regmix.decision.searching.simulation import NUM_AVERAGED, NUM_DRAWS, Drawn, draw

# Starts that are followed: gradients are cheap, exchanges take up to a second of trees each.
_DESCENTS, _EXCHANGES = 6, 2
# Steps of every descent; the best one goes on until it ends.
_FIRST_STEPS = 30
# Draws among the starts; no two starts are nearer than this in every weight.
_DRAWS_FOLLOWED, _APART = 4, 0.05
# Weights below it are specks that the gradient search leaves where a domain does not pay.
_NEGLIGIBLE = 1e-5
_NO_WORSE_NATS = 1e-9


@dataclass(frozen=True, eq=False)
class Found:
    """The best weights [D], and what a reader should know of how they came about."""

    weights: np.ndarray
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Pool:
    """Mixtures [S, D] within the bounds, their values [S] and by how much they break the guard."""

    weights: np.ndarray
    values: np.ndarray
    excess: np.ndarray

    @classmethod
    def of(cls, predictor: Predictor, limits: Constraints, weights: np.ndarray) -> _Pool:
        exact = np.stack([normalised(row) for row in weights])
        exact = exact[limits.satisfied(exact)]
        return cls(exact, *predictor.judge(exact))

    def best(self) -> int | None:
        """Return the place of the best that keeps the guard; None where none does."""
        kept = np.flatnonzero(self.excess == 0)
        return int(kept[self.values[kept].argmin()]) if len(kept) else None


def search(
    predictor: Predictor,
    limits: Constraints,
    *,
    centre: np.ndarray,
    starts: np.ndarray,
    method: str,
    seed: int,
) -> Found:
    """Return the best weights; draws come from Dirichlet(centre), `starts` [S, D] add to them.

    `exact` is never worse than `simulate` with the same arguments. Raises `ConstraintError` where
    nothing is found that keeps the guard.
    """
    drawn = draw(predictor, limits, centre, seed)
    if predictor.guard is not None:
        starts = np.vstack([predictor.guard.weights, starts])
    anchors = limits.moved_inside(starts)
    simulated = _simulated(predictor, limits, drawn, anchors)
    if method == "simulate":
        return simulated
    candidates = [simulated.weights, *_apart(drawn.draws, _DRAWS_FOLLOWED), *anchors]
    pool = _Pool.of(predictor, limits, np.stack(candidates))
    order = np.lexsort((pool.values, pool.excess))
    if predictor.is_smooth:
        starts = np.stack(_apart(pool.weights[order], _DESCENTS))
        found = _descended(predictor, limits, starts)
    else:
        kept = pool.weights[order[pool.excess[order] == 0]]
        found = [exchange(predictor, limits, row) for row in _apart(kept, _EXCHANGES)]
    return Found(_settled(predictor, limits, simulated.weights, np.stack(found)))


def _descended(predictor: Predictor, limits: Constraints, starts: np.ndarray) -> list[np.ndarray]:
    """Follow every start [S, D] for some steps, and the best of them to its end."""
    found = [descend(predictor, limits, row, most_steps=_FIRST_STEPS) for row in starts]
    pool = _Pool.of(predictor, limits, np.stack(found))
    first = np.lexsort((pool.values, pool.excess))[0]
    return [*found, descend(predictor, limits, pool.weights[first])]


def _simulated(
    predictor: Predictor, limits: Constraints, drawn: Drawn, anchors: np.ndarray
) -> Found:
    """Return the mean of the best draws; where the guard is against it, the next best thing."""
    average = drawn.average()
    if average is not None:
        pool = _Pool.of(predictor, limits, np.stack([average, drawn.draws[0]]))
        if pool.excess[0] > 0:
            remark = "The mean of the best draws breaks the guard: the best draw that keeps it"
            return Found(pool.weights[1], (remark,))
        few = f"{drawn.num_kept} draws of {NUM_DRAWS:,} are known to keep the guard: their mean"
        return Found(pool.weights[0], (few,) if drawn.num_kept < NUM_AVERAGED else ())
    pool = _Pool.of(predictor, limits, anchors)
    best = pool.best()
    if best is not None:
        remark = f"No draw of {NUM_DRAWS:,} keeps the guard: the best baseline that does"
        return Found(pool.weights[best], (remark,))
    remark = f"No draw of {NUM_DRAWS:,} keeps the guard: a mixture found for that alone"
    starts = np.vstack([anchors, drawn.draws[:_DRAWS_FOLLOWED]])
    return Found(_restored(predictor, limits, starts), (remark,))


def _apart(rows: np.ndarray, number: int) -> list[np.ndarray]:
    """Return the first rows [N, D] that differ, so that they may lead to different optima."""
    chosen: list[np.ndarray] = []
    for row in rows:
        if all(np.abs(row - other).max() > _APART for other in chosen):
            chosen.append(row)
        if len(chosen) == number:
            break
    return chosen


def _follow(predictor: Predictor, limits: Constraints, start: np.ndarray, aim: Aim) -> np.ndarray:
    walk = descend if predictor.is_smooth else exchange
    return walk(predictor, limits, start, aim)


def _restored(predictor: Predictor, limits: Constraints, starts: np.ndarray) -> np.ndarray:
    """Return a mixture that keeps the guard; the error, with the nearest one, where none does."""
    pool = _Pool.of(predictor, limits, starts)
    order = np.argsort(pool.excess, kind="stable")[:3]
    found = [_follow(predictor, limits, row, "excess") for row in pool.weights[order]]
    pool = _Pool.of(predictor, limits, np.vstack([pool.weights, *found]))
    best = pool.best()
    if best is not None:
        return pool.weights[best]
    assert predictor.guard is not None
    nearest = pool.weights[[int(pool.excess.argmin())]]
    raise refusal(predictor.guard, limits, predictor.losses(nearest)[0])


def _settled(
    predictor: Predictor, limits: Constraints, safe: np.ndarray, found: np.ndarray
) -> np.ndarray:
    """Return the best of `found` [S, D], without specks where they do not matter.

    `safe` keeps the guard: whatever breaks it is drawn back towards `safe` until it does not.
    """
    cleaned = drop_small(found, limits.lower, limits.upper, _NEGLIGIBLE)
    pool = _Pool.of(predictor, limits, np.vstack([safe, cleaned, found]))
    if pool.excess.any():
        broken = pool.weights[pool.excess > 0]
        shares = np.linspace(0.05, 1, 20)[:-1, None, None]
        between = (safe + shares * (broken - safe)).reshape(-1, len(safe))
        pool = _Pool.of(predictor, limits, np.vstack([pool.weights, between]))
    best = pool.best()
    assert best is not None
    tidy = drop_small(pool.weights[[best]], limits.lower, limits.upper, _NEGLIGIBLE)
    pool = _Pool.of(predictor, limits, np.vstack([safe, pool.weights[best], tidy]))
    enough = min(pool.values[0], pool.values[1] + _NO_WORSE_NATS)
    return pool.weights[-1 if pool.excess[-1] == 0 and pool.values[-1] <= enough else 1]
