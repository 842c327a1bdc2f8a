"""How sure a decision is: surfaces that the runs leave possible, and what differs between them.

Enters: a surrogate, an objective, mixtures. Leaves: draws of the losses of those mixtures from
their joint distribution, and the intervals made of them: on the gain over a baseline, on each
weight of the optimum, on what a better optimum might still save. Searches nothing by gradients.

The surfaces are the surrogate's mean plus draws of a Gaussian process given the runs, as wide as
the surrogate's held-out errors ask, correlated between targets as those errors are. A surrogate
without a Gaussian process of its own (trees, laws, linear) borrows the shape of its error from one
with length scales at their prior mean. Legend: S draws, N mixtures, M targets, D domains, K runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regmix.decision.calibration import CONFIDENCE, HALF_WIDTH
from regmix.decision.objective import Objective
from regmix.decision.parallel import in_threads
from regmix.decision.regressors.gp import GPModel, untrained
from regmix.decision.rivals import around, pulled
from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.predictor import Predictor
from regmix.decision.surrogate import Surrogate

NUM_DRAWS = 400
NUM_RIVALS = 300


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 90% interval, in the unit of what it is of."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: np.ndarray) -> Interval:
        """Return the interval of draws [S]."""
        low, high = np.quantile(draws, tails())
        return cls(mean=float(draws.mean()), low=float(low), high=float(high))

    def around(self, mean: float) -> Interval:
        """Return the same interval moved to another mean: draws have one of their own."""
        shift = mean - self.mean
        return Interval(mean=mean, low=self.low + shift, high=self.high + shift)


def tails() -> tuple[float, float]:
    """Return the quantiles that bound a 90% interval."""
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2


def target_correlation(model: Surrogate, columns: Sequence[int]) -> np.ndarray:
    """Return the correlation [M, M] of the held-out errors of these targets.

    Drawn a little towards independence, so that few runs of many targets leave it invertible.
    """
    errors = (model.held_out - model.losses)[:, list(columns)]
    num_runs, num_targets = errors.shape
    if num_targets == 1:
        return np.eye(1)
    scaled = (errors - errors.mean(0)) / np.maximum(errors.std(0), 1e-12)
    share = num_targets / (num_targets + num_runs)
    return np.asarray((1 - share) * (scaled.T @ scaled) / num_runs + share * np.eye(num_targets))


def error_process(model: Surrogate) -> tuple[GPModel, np.ndarray]:
    """Return a process whose covariance has the shape of the surrogate's error, and its factor [M].

    The factor scales its standard deviations to the surrogate's held-out errors.
    """
    member = model.member("gp")
    if member is not None and isinstance(member.model, GPModel):
        assert model.process_widening is not None
        return member.model, model.process_widening
    process = untrained(model.weights, model.losses)
    rmse = np.array([entry.rmse_nats for entry in model.scores])
    own = np.sqrt((process.held_out_sd**2).mean(0))
    return process, rmse / np.maximum(own, 1e-12)


def draw_surfaces(
    model: Surrogate,
    columns: Sequence[int],
    weights: np.ndarray,
    *,
    number: int = NUM_DRAWS,
    seed: int = 0,
) -> np.ndarray:
    """Return possible losses [S, N, M'] of these targets at mixtures [N, D], without seeds' noise.

    Jointly drawn: a difference between two mixtures is as sure as the runs make it.
    """
    chosen = list(columns)
    process, factor = error_process(model)
    part, factor = process.select(chosen), factor[chosen]
    mean = model.mean(weights)[:, chosen]
    normal = np.random.default_rng(seed).standard_normal((number, len(chosen), len(weights)))
    mixed = np.einsum("mq,sqn->smn", np.linalg.cholesky(target_correlation(model, chosen)), normal)

    def one(column: int) -> np.ndarray:
        root = _root(part.select([column]).covariance(weights)[0])
        return mean[:, column] + factor[column] * (mixed[:, column] @ root.T)

    return np.stack(in_threads(one, range(len(chosen))), axis=-1)


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return a square root [N, N]; mixtures next to each other make the matrix all but singular."""
    size = np.trace(covariance) / len(covariance)
    for jitter in (1e-9, 1e-7, 1e-5, 1e-3):
        try:
            return np.linalg.cholesky(covariance + jitter * size * np.eye(len(covariance)))
        except np.linalg.LinAlgError:
            continue
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def predicted_interval(
    model: Surrogate, objective: Objective, weights: np.ndarray
) -> tuple[Interval, float]:
    """Return the 90% interval of the objective of a new proxy on weights [D], and its sd, in nats.

    It holds what the surface leaves open and the noise between seeds.
    """
    mean, sd = model.predict(weights[None])
    value = float(objective.of_all(mean)[0])
    columns = list(objective.columns)
    own = sd[0, columns]
    if objective.worst:
        spread = float(own[int(mean[0, columns].argmax())])
    else:
        weighted = objective.shares * own
        spread = float(np.sqrt(weighted @ target_correlation(model, columns) @ weighted))
    width = HALF_WIDTH * spread
    return Interval(mean=value, low=value - width, high=value + width), spread


@dataclass(frozen=True, kw_only=True, eq=False)
class Sureness:
    """What draws of the surface say of an optimum.

    weights [D, 2]: between which 90% of the draws have their best mixture, the optimum included;
    gains: over each baseline, with the share of draws in which the optimum is better;
    shortfall_nats: by how much the best mixture of a draw beats the optimum there, on average.
    """

    weights: np.ndarray
    gains: tuple[Interval, ...]
    better: tuple[float, ...]
    shortfall_nats: float


def sureness(
    predictor: Predictor,
    model: Surrogate,
    limits: Constraints,
    optimum: np.ndarray,
    baselines: Sequence[np.ndarray],
    *,
    seed: int = 0,
) -> Sureness:
    """Judge the optimum [D] against the baselines, and against its rivals within the limits.

    Rivals are looked for near the optimum and the baselines, then near those that some draw of
    the surface likes best. The penalty and the guard of the predictor hold for them; gains are of
    the objective without the penalty.
    """
    rng = np.random.default_rng(seed)
    known = np.stack([optimum, *baselines])
    first = _allowed(predictor, around(known, NUM_RIVALS, limits, rng), optimum[None], rng)
    first = np.concatenate([optimum[None], first])
    values = _values(predictor, model, first, NUM_DRAWS // 4, seed)
    liked = first[np.unique((values + _penalty(predictor, first)).argmin(1))]
    second = _allowed(predictor, around(liked, NUM_RIVALS, limits, rng), liked, rng)
    rivals = np.concatenate([first, second])
    values = _values(predictor, model, np.concatenate([rivals, known[1:]]), NUM_DRAWS, seed + 1)
    gains = values[:, len(rivals) :] - values[:, :1]
    ours = values[:, : len(rivals)] + _penalty(predictor, rivals)
    low, high = np.quantile(rivals[ours.argmin(1)], tails(), axis=0)
    return Sureness(
        weights=np.stack([np.minimum(low, optimum), np.maximum(high, optimum)], axis=1),
        gains=tuple(Interval.of(gain) for gain in gains.T),
        better=tuple(float((gain > 0).mean()) for gain in gains.T),
        shortfall_nats=float((ours[:, 0] - ours.min(1)).mean()),
    )


def _allowed(
    predictor: Predictor, weights: np.ndarray, towards: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the mixtures that the guard allows, the others first pulled towards some that it does.

    A tight guard refuses nearly all: without the pull no rival would be left, and the optimum
    would look certain.
    """
    if predictor.guard is None:
        return weights
    refused = predictor.judge(weights)[1] > 0
    moved = pulled(weights[refused], towards, rng)
    kept = moved[predictor.judge(moved)[1] == 0] if len(moved) else moved
    return np.concatenate([weights[~refused], kept])


def _values(
    predictor: Predictor, model: Surrogate, weights: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """Return the objective without its penalty, drawn [S, N] for mixtures [N, D]."""
    objective = predictor.objective
    surfaces = draw_surfaces(model, objective.columns, weights, number=number, seed=seed)
    return np.stack([objective.value(surface) for surface in surfaces])


def _penalty(predictor: Predictor, weights: np.ndarray) -> np.ndarray:
    """Return the penalty [N] of mixtures, in nats: what is minimised is the objective plus it."""
    if predictor.penalty is None:
        return np.zeros(len(weights))
    return predictor.penalty.value(weights)
