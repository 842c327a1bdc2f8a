"""How well a regressor predicts runs that it has not seen.

Enters: a regressor, its fitted model and the runs, or true and predicted losses. Leaves: held-out
predictions with their standard deviations, Spearman rank correlation and RMSE per target. Chooses
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regmix.decision.runs import replicate_groups

if TYPE_CHECKING:
    from regmix.decision.regressors.interface import Model, Regressor

NUM_FOLDS = 10
# Leave-one-out in closed form keeps hyperparameters that have seen the run: within the published
# training runs its RMSE was 0.82 of the true one at 32 runs, 0.84 at 64, 0.86 at 104, 0.90 at 128,
# 0.94 at 160 and 1.03 at 192 (Gaussian process, mean of 3 to 8 subsets and 13 targets).
CLOSED_FORM_RUNS = 160
# Leaving out one run of several on its mixture is no test: beyond this share of such runs, folds.
_MOST_REPLICATES = 0.1


@dataclass(frozen=True, kw_only=True)
class Score:
    """Held-out error of one target: Spearman (None where it is undefined) and RMSE in nats."""

    target: str
    spearman: float | None
    rmse_nats: float


@dataclass(frozen=True, eq=False)
class HeldOut:
    """mean, sd [K, M]: each run's prediction by models that had not seen it; how: in words."""

    mean: np.ndarray
    sd: np.ndarray
    how: str


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


def scores(targets: tuple[str, ...], true: np.ndarray, predicted: np.ndarray) -> tuple[Score, ...]:
    """Return the score of predictions [N, M] of every target."""
    return tuple(score(name, true[:, j], predicted[:, j]) for j, name in enumerate(targets))


def fold_of_runs(num_runs: int, seed: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Return the fold [K] of each run: sizes differ by at most one, order random by seed."""
    folds = np.arange(num_runs) % min(num_folds, num_runs)
    return np.random.default_rng(seed).permutation(folds)


def fold_of_mixtures(weights: np.ndarray, seed: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Return the fold [K] of each run on weights [K, D]: replicates of a mixture share theirs.

    Runs that are all on one mixture are dealt out one by one. With replicates apart, 20 mixtures of
    3 runs each seemed to be predicted twice as well (RMSE 0.011 nats) as new mixtures were (0.022).
    """
    mixture = np.arange(len(weights))
    for group in replicate_groups(weights):
        mixture[list(group)] = group[0]
    distinct, mixture = np.unique(mixture, return_inverse=True)
    if len(distinct) == 1:
        return fold_of_runs(len(weights), seed, num_folds)
    return fold_of_runs(len(distinct), seed, num_folds)[mixture]


def hold_out(
    regressor: Regressor, model: Model, weights: np.ndarray, losses: np.ndarray, *, seed: int
) -> HeldOut:
    """Return held-out predictions of all runs: by folds, or above 160 runs in closed form.

    model: the regressor fitted to all runs; one without a closed form is refitted by folds. So is
    any where more than a tenth of the runs are replicates; a fold holds all runs of a mixture.
    """
    closed = getattr(model, "held_out", None)
    replicates = sum(len(group) for group in replicate_groups(weights))
    is_large = len(weights) > CLOSED_FORM_RUNS and replicates <= _MOST_REPLICATES * len(weights)
    if closed is not None and is_large:
        return HeldOut(closed, model.held_out_sd, "leave-one-out")  # type: ignore[attr-defined]
    num_folds = NUM_FOLDS if len(weights) <= CLOSED_FORM_RUNS else NUM_FOLDS // 2
    folds = fold_of_mixtures(weights, seed, num_folds)
    mean, sd = np.empty_like(losses), np.empty_like(losses)
    refit = getattr(regressor, "refit", None)
    for fold in range(int(folds.max()) + 1):
        inside = folds != fold
        part = (
            regressor.fit(weights[inside], losses[inside])
            if refit is None
            else refit(model, weights[inside], losses[inside])
        )
        mean[~inside], sd[~inside] = part.predict(weights[~inside])
    return HeldOut(mean, sd, f"{int(folds.max()) + 1}-fold cross-validation")
