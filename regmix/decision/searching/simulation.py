"""The paper's search: 100,000 draws from a Dirichlet, of which the best count.

Enters: a predictor, constraints, the centre of the draws, a seed. Leaves: the best draws, judged
in full, best first. Follows no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.predictor import Predictor
from regmix.decision.searching.stand_in import StandIn

NUM_DRAWS = 100_000
NUM_AVERAGED = 128
# Draws that costly members judge in full: random ones, then those that a stand-in picks.
_SAMPLED, _PICKED, _ROUNDS = 2000, 2000, 2
# What an error at a draw far from the best counts, in the fit of the stand-in.
_UNIMPORTANT = 0.02


@dataclass(frozen=True, eq=False)
class Drawn:
    """draws [S, D], those that keep the guard first and by value, the others by how they break it.

    num_kept: how many of them keep it.
    """

    draws: np.ndarray
    num_kept: int

    def average(self) -> np.ndarray | None:
        """Return the mean [D] of the best 128 draws that keep the guard; None where none does."""
        best = self.draws[: min(NUM_AVERAGED, self.num_kept)]
        return best.mean(0) if len(best) else None


def all_draws(limits: Constraints, centre: np.ndarray, seed: int) -> np.ndarray:
    """Return 100,000 draws [N, D] from Dirichlet(centre), moved into the bounds."""
    draws = np.random.default_rng(seed).dirichlet(centre, NUM_DRAWS)
    return limits.moved_inside(draws[np.isfinite(draws).all(1)])


def draw(predictor: Predictor, limits: Constraints, centre: np.ndarray, seed: int) -> Drawn:
    """Return the best of all draws."""
    draws = all_draws(limits, centre, seed)
    chosen, losses = _judged(predictor, draws)
    best = draws[chosen]
    excess = predictor.excess_of(losses)
    order = np.lexsort((predictor.value_of(losses, best), excess))
    return Drawn(best[order], int((excess == 0).sum()))


def _judged(predictor: Predictor, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places [S] of the draws worth judging, and their losses [S, U].

    All of them, unless a member is costly: then a stand-in for it picks them.
    """
    if not predictor.is_costly or len(draws) <= _SAMPLED + _ROUNDS * _PICKED:
        return np.arange(len(draws)), predictor.losses(draws)
    cheap = predictor.cheap_part(draws)
    chosen = np.arange(_SAMPLED)
    costly = predictor.costly_part(draws[chosen])
    importance = np.ones(len(chosen))
    for _ in range(_ROUNDS):
        estimated = cheap + StandIn.fit(draws[chosen], costly, importance).losses(draws)
        order = _ranking(predictor, estimated, draws)
        fresh = order[np.isin(order, chosen, invert=True)][:_PICKED]
        chosen = np.concatenate([chosen, fresh])
        costly = np.concatenate([costly, predictor.costly_part(draws[fresh])])
        importance = np.full(len(chosen), _UNIMPORTANT)
        known = _ranking(predictor, cheap[chosen] + costly, draws[chosen])
        importance[known[:_PICKED]] = 1.0
    return chosen, cheap[chosen] + costly


def _ranking(predictor: Predictor, losses: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return np.lexsort((predictor.value_of(losses, draws), predictor.excess_of(losses)))
