"""Mixtures that might be better than the optimum, if the surrogate is wrong as far as it may be.

Enters: mixtures, bounds, a seed. Leaves: allowed mixtures near them, at several distances, some
of them without the domains that the others hardly use. Judges nothing.
"""

from __future__ import annotations

import numpy as np

from regmix.decision.searching.constraints import Constraints

# Concentrations of the Dirichlet around a mixture: from a wide cloud to its very neighbours.
_CONCENTRATIONS = (8.0, 30.0, 120.0, 500.0)
# What a domain of no weight may get: without it none would ever come back.
_TRACE = 0.005
# Share of the traces that are kept: optima have few domains, so rivals must have few too.
_KEPT = 0.3
# The least share of its way that a mixture keeps when it is pulled towards another.
_LEAST_LEFT = 0.02


def around(
    mixtures: np.ndarray, number: int, limits: Constraints, rng: np.random.Generator
) -> np.ndarray:
    """Return up to `number` mixtures [N, D] near the given ones [S, D], within the bounds."""
    bases = mixtures[rng.integers(len(mixtures), size=number)]
    size = rng.choice(_CONCENTRATIONS, number)[:, None]
    drawn = rng.standard_gamma(size * (bases + _TRACE))
    unused = (bases < _TRACE) & (rng.random(drawn.shape) > _KEPT)
    drawn = np.where(unused, 0.0, drawn)
    total = drawn.sum(1)
    drawn = drawn[total > 0] / total[total > 0, None]
    return limits.moved_inside(drawn)


def pulled(weights: np.ndarray, towards: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return mixtures [N, D] moved most or little of their way to some of `towards` [S, D].

    A tight guard refuses all but the neighbours of what it allows.
    """
    share = _LEAST_LEFT ** rng.random((len(weights), 1))
    anchors = towards[rng.integers(len(towards), size=len(weights))]
    return np.asarray(share * weights + (1 - share) * anchors)
