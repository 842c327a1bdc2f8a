"""How wide an interval must be to hold what it promises.

Enters: true losses, held-out predictions and their standard deviations. Leaves: a factor per target
that makes 90% intervals hold 90% of held-out losses, and the share that they hold, counted without
the runs that set the factor. Predicts nothing.
"""

from __future__ import annotations

import numpy as np

CONFIDENCE = 0.9
# Standard deviations on either side of the mean that hold 90% of a normal distribution.
HALF_WIDTH = 1.6448536269514722
# Runs at which a target's own errors count as much as those of all targets together.
_OWN_WEIGHT_RUNS = 64


def widening(true: np.ndarray, predicted: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the factors [M] on standard deviations [K, M] that make 90% intervals hold.

    A 90% quantile of few runs is noisy, so each target's is drawn towards that of all targets.
    The level is that of conformal prediction, (K + 1) / K times 90%: the next run counts too.
    """
    sizes = np.abs(true - predicted) / np.maximum(sd, 1e-12)
    level = min(1.0, CONFIDENCE * (len(true) + 1) / len(true))
    own = np.log(np.maximum(np.quantile(sizes, level, axis=0), 1e-6))
    every = np.log(np.maximum(np.quantile(sizes, level), 1e-6))
    share = len(true) / (len(true) + _OWN_WEIGHT_RUNS)
    return np.asarray(np.exp(share * own + (1 - share) * every) / HALF_WIDTH)


def inside(true: np.ndarray, predicted: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the share [M] of losses inside their 90% intervals."""
    return np.asarray((np.abs(true - predicted) <= HALF_WIDTH * sd).mean(0))


def coverage(
    true: np.ndarray, predicted: np.ndarray, sd: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Return the share [M] inside, each fold's intervals widened by the other folds' errors."""
    widened = np.empty_like(sd)
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        widened[out] = sd[out] * widening(true[~out], predicted[~out], sd[~out])
    return inside(true, predicted, widened)
