"""The Gaussian process: a smooth surface through the runs that knows where it has seen none.

Enters: weights [K, D], losses [K, M]. Leaves: predicted mean and standard deviation [N, M], joint
covariances, and leave-one-out predictions in closed form. Chooses nothing between regressors.

Per target, on standardised log losses, two exact processes (`kernel`): one on sqrt(p), one on
(p + 1e-4) ** 1/4; their means are averaged (Rasmussen and Williams 2006, chapters 2 and 5).
Legend: K runs, D domains, M targets, F features, N points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from regmix.decision.parallel import in_threads
from regmix.decision.regressors.kernel import Kernel, fit_kernel, prior_mean

# Below this weight the slope of sqrt(p) is taken at this weight: it has no end at 0.
_FLATTEST = 1e-6
_OFFSET = 1e-4
# Points judged at once: 256 rows of 512 kernel values are 1 MB.
_BLOCK = 256
_BENT = 0.5


def _root(weights: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(weights, 0.0))


def _root_slope(weights: np.ndarray) -> np.ndarray:
    return 0.5 / np.sqrt(np.maximum(weights, _FLATTEST))


def _fourth_root(weights: np.ndarray) -> np.ndarray:
    return np.asarray((np.maximum(weights, 0.0) + _OFFSET) ** 0.25)


def _fourth_root_slope(weights: np.ndarray) -> np.ndarray:
    return np.asarray(0.25 * (np.maximum(weights, 0.0) + _OFFSET) ** -0.75)


Transform = Callable[[np.ndarray], np.ndarray]
# A kernel, and how often jitter had to grow.
Fitted = tuple[Kernel, int]


@dataclass(frozen=True, eq=False)
class Feature:
    """A transform of the weights and its derivative; rows [K, D]: the runs', less `centre` [D]."""

    transform: Transform
    slope: Transform
    centre: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, transform: Transform, slope: Transform, weights: np.ndarray) -> Feature:
        """Return the feature of the runs' weights."""
        raw = transform(weights)
        centre = raw.mean(0)
        return cls(transform, slope, centre, raw - centre)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Return the features [N, D] of weights [N, D]."""
        return self.transform(weights) - self.centre


@dataclass(frozen=True, eq=False)
class Process:
    """One target's process on one feature: alpha [K] = C^-1 y and inverse [K, K] = C^-1."""

    feature: Feature
    kernel: Kernel
    alpha: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, feature: Feature, kernel: Kernel, target: np.ndarray) -> Process:
        """Condition on the standardised log losses [K] of the runs."""
        inverse = kernel.inverse(feature.rows)
        return cls(feature, kernel, inverse @ target, inverse)

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the standardised log losses [N]."""
        return self.kernel.between(self.feature(weights), self.feature.rows) @ self.alpha

    def covariance(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the posterior covariances [N, N'] of the surface, noise left out."""
        x, z, rows = self.feature(left), self.feature(right), self.feature.rows
        known = self.kernel.between(x, rows) @ self.inverse @ self.kernel.between(rows, z)
        return np.asarray(self.kernel.between(x, z) - known)

    def variance(self, weights: np.ndarray) -> np.ndarray:
        """Return the posterior variance [N] of the surface, noise left out."""
        x = self.feature(weights)
        cross = self.kernel.between(x, self.feature.rows)
        known = ((cross @ self.inverse) * cross).sum(1)
        return np.asarray(np.maximum(self.kernel.own(x) - known, 0.0))

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, D] of `mean` by the weights."""
        pull = self.kernel.pull(self.feature(weights), self.feature.rows, self.alpha)
        return pull * self.feature.slope(weights)

    def left_out(self, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each run's mean and variance [K] given all others (R and W, eq. 5.12)."""
        variance = 1 / np.diag(self.inverse)
        return target - self.alpha * variance, variance


@dataclass(frozen=True, eq=False)
class GPModel:
    """processes[m]: one process per feature, of target m.

    average, spread [M]: of the log losses;
    held_out, held_out_sd [K, M]: each run's prediction given all others, and its standard
    deviation, in nats; num_retries: factorisations that needed more jitter.
    """

    # The search judges few of its draws by it, and the others by a stand-in.
    is_costly: ClassVar[bool] = True

    processes: tuple[tuple[Process, ...], ...]
    average: np.ndarray
    spread: np.ndarray
    held_out: np.ndarray
    held_out_sd: np.ndarray
    num_retries: int

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        return self._nats(self._over_targets(weights, lambda one, x: one.mean(x)))

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M] of a new run's loss, noise included."""
        mean = self.mean(weights)
        variance = self._over_targets(weights, lambda one, x: one.variance(x) + one.kernel.noise)
        return mean, mean * self.spread * np.sqrt(variance)

    def covariance(self, weights: np.ndarray) -> np.ndarray:
        """Return the joint covariances [M, N, N] of the surface, in nats squared, noise left out.

        The two features' processes tell one story: their covariances are averaged, not halved.
        """
        mean = self.mean(weights)
        found = np.empty((mean.shape[1], len(weights), len(weights)))
        for column, pair in enumerate(self.processes):
            total = sum(one.covariance(weights, weights) for one in pair) / len(pair)
            factor = mean[:, column] * self.spread[column]
            found[column] = total * np.outer(factor, factor)
        return found

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, M, D] of the predicted losses by the weights."""
        slopes = np.stack(
            [sum(one.gradient(weights) for one in pair) / len(pair) for pair in self.processes],
            axis=1,
        )
        return np.asarray(self.mean(weights)[:, :, None] * self.spread[:, None] * slopes)

    def noise_sd(self) -> np.ndarray:
        """Return the standard deviation [M], in nats at the mean loss, that it takes for noise."""
        share = np.array([[one.kernel.noise for one in pair] for pair in self.processes]).mean(1)
        return np.asarray(np.exp(self.average) * self.spread * np.sqrt(share))

    def select(self, columns: Sequence[int]) -> GPModel:
        """Return the model of these targets only."""
        chosen = list(columns)
        return GPModel(
            tuple(self.processes[column] for column in chosen),
            self.average[chosen],
            self.spread[chosen],
            self.held_out[:, chosen],
            self.held_out_sd[:, chosen],
            self.num_retries,
        )

    def _nats(self, standardised: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(self.average + self.spread * standardised))

    def _over_targets(
        self, weights: np.ndarray, judge: Callable[[Process, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return [N, M]: the mean over features of judge(process, block of weights)."""
        blocks = [weights[start : start + _BLOCK] for start in range(0, len(weights), _BLOCK)]

        def one_block(block: np.ndarray) -> np.ndarray:
            columns = [
                sum(judge(one, block) for one in pair) / len(pair) for pair in self.processes
            ]
            return np.stack(columns, axis=1)

        return np.concatenate([np.empty((0, len(self.processes))), *in_threads(one_block, blocks)])


@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """Exact Gaussian processes, and how their hyperparameters are found.

    subset: runs on which the search for hyperparameters starts, where there are more;
    first_steps, last_steps: of L-BFGS on the subset and on all runs.
    """

    name: str = "gp"
    subset: int = 128
    first_steps: int = 80
    last_steps: int = 12
    seed: int = 0

    def fewest_runs(self, num_domains: int) -> int:
        """Return the number of runs below which this regressor refuses."""
        return 8

    def fit(self, weights: np.ndarray, losses: np.ndarray) -> GPModel:
        """Fit every target."""
        rng = np.random.default_rng(self.seed)
        rows = np.sort(rng.permutation(len(weights))[: self.subset])
        steps = (self.first_steps, self.last_steps)

        def kernel_of(_place: tuple[int, int], feature: Feature, target: np.ndarray) -> Fitted:
            return fit_kernel(feature.rows, target, subset=rows, max_steps=steps)

        return _condition(weights, losses, kernel_of)

    def refit(self, model: GPModel, weights: np.ndarray, losses: np.ndarray) -> GPModel:
        """Fit to a part of the runs of a fitted model: the search starts at its hyperparameters.

        Two thirds of the time of a fit, and held-out errors within 2% of it (32 to 96 runs).
        """
        rows = np.arange(len(weights))

        def kernel_of(place: tuple[int, int], feature: Feature, target: np.ndarray) -> Fitted:
            start = model.processes[place[0]][place[1]].kernel
            steps = (self.first_steps, 0)
            return fit_kernel(feature.rows, target, subset=rows, max_steps=steps, start=start)

        return _condition(weights, losses, kernel_of)


def untrained(weights: np.ndarray, losses: np.ndarray) -> GPModel:
    """Return the processes with hyperparameters that no run has set: an idea of the shape.

    Length scales of exp(0.5) bend over the range of a feature, as the error of a surrogate without
    a process of its own does; all else is at the priors' means.
    """
    theta = prior_mean(weights.shape[1])
    theta[: weights.shape[1]] = _BENT
    kernel = Kernel.at(theta)
    return _condition(weights, losses, lambda _place, _feature, _target: (kernel, 0))


def _condition(
    weights: np.ndarray,
    losses: np.ndarray,
    kernel_of: Callable[[tuple[int, int], Feature, np.ndarray], Fitted],
) -> GPModel:
    """Return the processes of all targets, given the runs, with kernels as `kernel_of` finds."""
    logs = np.log(losses)
    average, spread = logs.mean(0), logs.std(0)
    # The runs that a fold leaves may all have one loss, where all runs do not.
    spread = np.where(spread > 0, spread, 1.0)
    targets = (logs - average) / spread
    pairs = ((_root, _root_slope), (_fourth_root, _fourth_root_slope))
    features = [Feature.of(transform, slope, weights) for transform, slope in pairs]

    def one(place: tuple[int, int]) -> tuple[Process, int]:
        column, feature = place[0], features[place[1]]
        kernel, retries = kernel_of(place, feature, targets[:, column])
        return Process.of(feature, kernel, targets[:, column]), retries

    work = [(column, f) for column in range(losses.shape[1]) for f in range(len(features))]
    fitted = in_threads(one, work)
    step = len(features)
    processes = tuple(
        tuple(process for process, _ in fitted[start : start + step])
        for start in range(0, len(fitted), step)
    )
    held_out, deviation = _left_out(processes, targets, average, spread)
    retries = sum(number for _, number in fitted)
    return GPModel(processes, average, spread, held_out, deviation, retries)


def _left_out(
    processes: Sequence[Sequence[Process]],
    targets: np.ndarray,
    average: np.ndarray,
    spread: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each run's prediction and standard deviation [K, M] in nats, given all others."""
    mean, variance = np.empty_like(targets), np.empty_like(targets)
    for column, pair in enumerate(processes):
        parts = [one.left_out(targets[:, column]) for one in pair]
        mean[:, column] = sum(part[0] for part in parts) / len(parts)
        variance[:, column] = sum(part[1] for part in parts) / len(parts)
    predicted = np.exp(average + spread * mean)
    return predicted, predicted * spread * np.sqrt(variance)
