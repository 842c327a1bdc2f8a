"""Transitions: from the losses before a segment and its mixture to the losses after it.

Enters: histories, the trainings of proxies cut into segments. Leaves: a `Chain` of one regression
per segment, which predicts the final losses of any schedule, with slopes and with draws of the
surfaces that the proxies leave possible. Searches nothing.

After RegMix-D (arXiv 2606.18663), with two changes. A regression per segment stands in the place
of one over all times: losses fall at a pace that the learning rate sets. And a segment's inputs
hold the mixture so far too, for a few losses do not tell all that a model has learned: where
learning adds up over the run that took two fifths off the held-out error (docs/decisions.md).
Legend: K proxies, N segments, D domains, M targets, R numbers of a state, C schedules, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regmix.decision.calibration import widening
from regmix.decision.regressors.gp import GaussianProcess, GPModel
from regmix.decision.schedules.histories import Histories
from regmix.decision.validation import fold_of_runs

_FOLDS = 5
# Chains that are fitted for a calibrated one.
NUM_FITS = 1 + _FOLDS
# A state is at most 6 directions of the log losses, those with over 1% of their variance.
_MOST_NUMBERS, _LEAST_VARIANCE = 6, 0.01
# As spread out as the roots of weights, which the process's prior on length scales is made for.
_CENTRE, _SPREAD, _LOW, _HIGH = 0.5, 0.15, 0.02, 0.98


@dataclass(frozen=True, eq=False)
class State:
    """Losses [N, M] as a few numbers [N, R] within 0 and 1: standardised directions of their logs.

    Beyond what the proxies showed they end at the edge: nothing is known of such states.
    """

    centre: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, losses: np.ndarray) -> State:
        """Return the directions in which losses [K, M] differ."""
        logs = np.log(losses)
        centre = logs.mean(0)
        _, sizes, directions = np.linalg.svd(logs - centre, full_matrices=False)
        kept = (sizes**2 > _LEAST_VARIANCE * (sizes**2).sum())[:_MOST_NUMBERS]
        number = max(1, int(kept.sum()))
        deviations = np.maximum(sizes[:number], 1e-12) / len(losses) ** 0.5
        return cls(centre, directions[:number].T * (_SPREAD / deviations))

    def __call__(self, losses: np.ndarray) -> np.ndarray:
        """Return the states [N, R] of losses [N, M]."""
        return np.clip(_CENTRE + (np.log(losses) - self.centre) @ self.axes, _LOW, _HIGH)

    def slopes(self, losses: np.ndarray) -> np.ndarray:
        """Return the derivatives [R, M] of the state by losses [M]."""
        state = self(losses[None])[0]
        inside = (state > _LOW) & (state < _HIGH)
        return np.asarray(inside[:, None] * self.axes.T / losses)


@dataclass(frozen=True, eq=False)
class Chain:
    """models[i]: the losses after segment i from its mixture, that so far, and states[i] before it.

    The last gives the objective's targets only. factors[i] [M]: what makes the deviations of
    models[i] as wide as its held-out errors ask; correlations[i] [M, M]: of those errors.
    """

    shares: np.ndarray
    models: tuple[GPModel, ...]
    states: tuple[State | None, ...]
    factors: tuple[np.ndarray, ...] = ()
    correlations: tuple[np.ndarray, ...] = ()

    def losses(self, schedules: np.ndarray) -> np.ndarray:
        """Return the final losses [C, M'] of the objective's targets, for schedules [C, N, D]."""
        losses = np.empty((0, 0))
        for number, (model, state) in enumerate(zip(self.models, self.states, strict=True)):
            losses = model.mean(_inputs(schedules, number, self.shares, state, losses))
        return losses

    def slopes(self, schedule: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, D] of shares [M'] @ final losses at one schedule [N, D]."""
        num_domains = schedule.shape[1]
        inputs, befores = [], []
        losses = np.empty((1, 0))
        for number, (model, state) in enumerate(zip(self.models, self.states, strict=True)):
            befores.append(losses[0])
            inputs.append(_inputs(schedule[None], number, self.shares, state, losses))
            losses = model.mean(inputs[-1])
        found, pull = np.zeros_like(schedule), shares
        for number in range(len(self.models) - 1, -1, -1):
            by_input = pull @ self.models[number].gradient(inputs[number])[0]
            found[number] += by_input[:num_domains]
            state = self.states[number]
            if state is not None:
                so_far, by_state = np.split(by_input[num_domains:], [num_domains])
                found[:number] += np.outer(_past_shares(self.shares, number), so_far)
                pull = by_state @ state.slopes(befores[number])
        return found

    def draws(self, schedules: np.ndarray, number: int, seed: int) -> np.ndarray:
        """Return possible final losses [S, C, M'] of schedules [C, N, D], without seeds' noise.

        Segment by segment, each from the states that its own draw has led to; jointly over the
        schedules, so that a difference between two is as sure as the proxies make it.
        """
        rng = np.random.default_rng(seed)
        count = len(schedules)
        losses = np.empty((0, 0))
        for place, (model, state) in enumerate(zip(self.models, self.states, strict=True)):
            repeated = np.tile(schedules, (number, 1, 1))
            inputs = _inputs(repeated, place, self.shares, state, losses)
            mean = model.mean(inputs)
            root = np.linalg.cholesky(self.correlations[place])
            normal = rng.standard_normal((number, count, mean.shape[1])) @ root.T
            drawn = np.empty_like(mean)
            for target in range(mean.shape[1]):
                factors = _block_roots(model.select([target]), inputs, number, count)
                moved = np.einsum("scd,sd->sc", factors, normal[:, :, target]).ravel()
                drawn[:, target] = mean[:, target] + self.factors[place][target] * moved
            # Losses are positive; a draw far below is as impossible as one at nothing.
            losses = np.maximum(drawn, 1e-3 * mean)
        return losses.reshape(number, count, -1)


def _past_shares(shares: np.ndarray, number: int) -> np.ndarray:
    """Return what each segment before segment `number` counts in the mixture so far."""
    return np.asarray(shares[:number] / shares[:number].sum())


def _inputs(
    schedules: np.ndarray,
    number: int,
    shares: np.ndarray,
    state: State | None,
    losses: np.ndarray,
) -> np.ndarray:
    """Return what the regression of one segment reads: [C, D] for the first, else [C, 2 D + R]."""
    if state is None:
        return schedules[:, number]
    past = np.einsum("n,cnd->cd", _past_shares(shares, number), schedules[:, :number])
    return np.hstack([schedules[:, number], past, state(losses)])


def _block_roots(model: GPModel, inputs: np.ndarray, number: int, count: int) -> np.ndarray:
    """Return square roots [S, C, C] of each draw's own covariance, for inputs of S * C rows."""
    size = max(1, 512 // count) * count
    roots = []
    for start in range(0, len(inputs), size):
        block = inputs[start : start + size]
        whole = model.covariance(block)[0].reshape(len(block) // count, count, -1, count)
        own = np.stack([whole[place, :, place] for place in range(len(block) // count)])
        values, vectors = np.linalg.eigh(own)
        roots.append(vectors * np.sqrt(np.maximum(values, 0))[:, None, :])
    return np.concatenate(roots)


def fit_chain(
    histories: Histories, columns: Sequence[int], rows: np.ndarray | None = None
) -> Chain:
    """Fit one regression per segment to the proxies `rows` [K'] (all where None).

    columns: the objective's targets. A chain of some rows draws nothing: it has no factors.
    """
    weights, losses = histories.weights, histories.losses
    if rows is not None:
        weights, losses = weights[rows], losses[rows]
    models, states = [], []
    last = len(histories.bounds) - 1
    for number in range(last + 1):
        before = losses[:, number - 1]
        state = State.of(before) if number else None
        after = losses[:, number] if number < last else losses[:, number][:, list(columns)]
        inputs = _inputs(weights, number, histories.shares, state, before)
        models.append(GaussianProcess().fit(inputs, after))
        states.append(state)
    return Chain(histories.shares, tuple(models), tuple(states))


@dataclass(frozen=True, eq=False)
class HeldOutChain:
    """final [K, M']: each proxy's final losses predicted from its schedule alone, unseen."""

    chain: Chain
    final: np.ndarray


def calibrated_chain(
    histories: Histories,
    columns: Sequence[int],
    seed: int,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> HeldOutChain:
    """Fit the chain, and know its errors: each proxy predicted by chains that had not seen it.

    `on_progress` gets the number of chains fitted, of NUM_FITS.
    """
    folds = fold_of_runs(len(histories), seed, _FOLDS)
    chain = fit_chain(histories, columns)
    on_progress(1)
    num_segments = len(histories.bounds)
    true = [histories.losses[:, i] for i in range(num_segments - 1)]
    true.append(histories.losses[:, -1][:, list(columns)])
    means = [np.empty_like(losses) for losses in true]
    sds = [np.empty_like(losses) for losses in true]
    final = np.empty_like(true[-1])
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        part = fit_chain(histories, columns, np.flatnonzero(~out))
        on_progress(fold + 2)
        final[out] = part.losses(histories.weights[out])
        for number, (model, state) in enumerate(zip(part.models, part.states, strict=True)):
            before = histories.losses[out, number - 1]
            inputs = _inputs(histories.weights[out], number, histories.shares, state, before)
            means[number][out], sds[number][out] = model.predict(inputs)
    factors = [
        widening(losses, mean, sd) for losses, mean, sd in zip(true, means, sds, strict=True)
    ]
    correlations = [_correlation(mean - losses) for losses, mean in zip(true, means, strict=True)]
    whole = replace(chain, factors=tuple(factors), correlations=tuple(correlations))
    return HeldOutChain(whole, final)


def _correlation(errors: np.ndarray) -> np.ndarray:
    """Return the correlation [M, M] of errors [K, M], drawn a little towards independence."""
    num_runs, num_targets = errors.shape
    scaled = (errors - errors.mean(0)) / np.maximum(errors.std(0), 1e-12)
    share = num_targets / (num_targets + num_runs)
    found = (1 - share) * (scaled.T @ scaled) / num_runs + share * np.eye(num_targets)
    return np.asarray(found)
