"""How well a regressor predicts runs that it has not seen.

Enters: a regressor and runs, or true and predicted losses. Leaves: held-out predictions by k-fold
cross-validation, Spearman rank correlation and RMSE per target. Chooses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from regmix.decision.regressors.interface import Regressor

NUM_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out error of one target: Spearman (None where it is undefined) and RMSE in nats."""

    target: str
    spearman: float | None
    rmse_nats: float


def spearman(true: np.ndarray, predicted: np.ndarray) -> float | None:
    """Return the rank correlation; None where either side is constant or under 3 long."""
    from scipy.stats import spearmanr

    if len(true) < 3 or np.ptp(true) == 0 or np.ptp(predicted) == 0:
        return None
    return float(spearmanr(true, predicted).statistic)


def score(target: str, true: np.ndarray, predicted: np.ndarray) -> Score:
    """Return the score of predictions [N] of one target."""
    rmse = float(np.sqrt(np.mean((np.asarray(true) - predicted) ** 2)))
    return Score(target=target, spearman=spearman(true, predicted), rmse_nats=rmse)


def fold_of_runs(num_runs: int, seed: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Return the fold [K] of each run: sizes differ by at most one, order random by seed."""
    folds = np.arange(num_runs) % min(num_folds, num_runs)
    return np.random.default_rng(seed).permutation(folds)


def held_out_predictions(
    regressor: Regressor, weights: np.ndarray, losses: np.ndarray, *, seed: int
) -> np.ndarray:
    """Return predictions [K, M], each run's by a model fitted without the run's fold."""
    folds = fold_of_runs(len(weights), seed)
    predicted = np.empty_like(losses)
    # The models' own error estimate is not wanted here, and costs a cross-validation on trees.
    unused_scale = np.zeros(losses.shape[1])
    for fold in range(int(folds.max()) + 1):
        inside = folds != fold
        model = regressor.fit(weights[inside], losses[inside], unused_scale)
        predicted[~inside] = model.mean(weights[~inside])
    return predicted
