"""Parametric laws of loss, and how one is fitted to runs.

Enters: a law (its formula, derivatives and starting points), weights [K, D], losses [K, M]. Leaves:
predicted mean and standard deviation [N, M], and gradients. Knows no particular law.

Fitted by damped Gauss-Newton steps (Levenberg-Marquardt) on a Huber loss, every target and start
one row of one batch with its own damping. One L-BFGS over the whole batch shares its step length
between all problems: it needed 500 evaluations to come within 0.1 points of the rank correlation
this reaches in 80, in 5 times the time (64 published runs, 13 targets, 2-core Xeon).
Legend: B problems (targets times starts), K runs, N points, D domains, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from regmix.decision.parallel import in_threads

# Points whose Jacobian is held at once: that of 100,000 mixtures would take gigabytes.
_BLOCK = 4096


class Law(Protocol):
    """A formula for the loss of a mixture; of its P parameters the last D are the domains'."""

    @property
    def name(self) -> str:
        """The name of its regressor."""
        ...

    @property
    def num_head(self) -> int:
        """The number of parameters before the domains'."""
        ...

    def losses(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the losses [B, N] of parameters [B, P] at weights [N, D]."""
        ...

    def jacobian(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, P] of the losses by the parameters."""
        ...

    def slopes(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, D] of the losses by the weights."""
        ...

    def starts(
        self, losses: np.ndarray, num_domains: int, num_starts: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return starting points [M, S, P]."""
        ...

    def centre(self, losses: np.ndarray, num_domains: int) -> np.ndarray:
        """Return the parameters [M, P] that a fit is drawn towards."""
        ...


@dataclass(frozen=True, eq=False)
class LawModel:
    """A fitted law: theta [M, P]; covariance [M, P, P] per unit variance; scale [M] in nats.

    held_out, held_out_sd [K, M]: each run's prediction given all others, to first order, and its
    standard deviation.
    """

    law: Law
    theta: np.ndarray
    covariance: np.ndarray
    scale: np.ndarray
    held_out: np.ndarray
    held_out_sd: np.ndarray

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        return np.ascontiguousarray(self.law.losses(self.theta, weights).T)

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M]; the latter grows away from the runs."""
        deviation = np.empty((len(weights), len(self.theta)))
        for start in range(0, len(weights), _BLOCK):
            block = weights[start : start + _BLOCK]
            leverage = _leverage(self.law.jacobian(self.theta, block), self.covariance)
            deviation[start : start + _BLOCK] = (np.sqrt(1 + leverage) * self.scale[:, None]).T
        return self.mean(weights), deviation

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, M, D] of the predicted losses by the weights."""
        return np.ascontiguousarray(self.law.slopes(self.theta, weights).transpose(1, 0, 2))

    def select(self, columns: Sequence[int]) -> LawModel:
        """Return the model of these targets only."""
        chosen = list(columns)
        return LawModel(
            self.law,
            self.theta[chosen],
            self.covariance[chosen],
            self.scale[chosen],
            self.held_out[:, chosen],
            self.held_out_sd[:, chosen],
        )

    def draws(self, number: int, seed: int) -> np.ndarray:
        """Return parameters [number, M, P] as uncertain as the runs leave them."""
        rng = np.random.default_rng(seed)
        # Where losses differ by orders of magnitude the matrix is definite only up to rounding.
        values, vectors = np.linalg.eigh(self.covariance * (self.scale**2)[:, None, None])
        factors = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
        normal = rng.standard_normal((number, *self.theta.shape))
        return np.asarray(self.theta + np.einsum("mpq,smq->smp", factors, normal))


def _leverage(jacobian: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return [B, N]: the variance of the fitted value per unit variance of the noise."""
    return np.maximum(0.0, (np.matmul(jacobian, covariance) * jacobian).sum(-1))


@dataclass(frozen=True, kw_only=True)
class LawRegressor:
    """A law and how it is fitted.

    huber_delta: residual in nats beyond which a run counts linearly.
    ridge, head_ridge: pull of the domains' parameters (their mean square) and of the others
    towards the law's centre, against the sum of all runs' losses: it fades as runs are added.
    num_starts: starting points per target; `num_finalists` of them go on after `first_steps`.
    """

    law: Law
    huber_delta: float = 0.1
    ridge: float = 1e-3
    head_ridge: float = 3e-2
    num_starts: int = 8
    num_finalists: int = 3
    first_steps: int = 20
    last_steps: int = 60
    seed: int = 0

    @property
    def name(self) -> str:
        """The name it is chosen by."""
        return self.law.name

    def fewest_runs(self, num_domains: int) -> int:
        """Return the number of runs below which this regressor refuses: one per parameter and 1."""
        return num_domains + self.law.num_head + 1

    def fit(self, weights: np.ndarray, losses: np.ndarray) -> LawModel:
        """Fit every target."""
        # One thread: two change the order of sums, and took twice as long on 300 runs, 2-core Xeon.
        return in_threads(lambda every: self._fit(weights, every), [losses])[0]

    def _fit(self, weights: np.ndarray, losses: np.ndarray) -> LawModel:
        num_targets, num_domains = losses.shape[1], weights.shape[1]
        rng = np.random.default_rng(self.seed)
        theta = self.law.starts(losses, num_domains, self.num_starts, rng)
        theta, cost = self._descend(theta, weights, losses, self.first_steps)
        best = np.argsort(cost, axis=1, kind="stable")[:, : self.num_finalists, None]
        theta = np.take_along_axis(theta, best, axis=1)
        theta, cost = self._descend(theta, weights, losses, self.last_steps)
        final = theta[np.arange(num_targets), cost.argmin(1)]
        return self._with_errors(final, weights, losses)

    def _precision(self, num_runs: int, num_domains: int) -> np.ndarray:
        """Return the pull [P] on each parameter, per run."""
        head = np.full(self.law.num_head, self.head_ridge / num_runs)
        rest = np.full(num_domains, 2 * self.ridge / num_domains / num_runs)
        return np.concatenate([head, rest])

    def _descend(
        self, theta: np.ndarray, x: np.ndarray, losses: np.ndarray, num_steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take damped Gauss-Newton steps for theta [M, S, P]; each row for itself.

        Returns the parameters and their costs [M, S].
        """
        shape = theta.shape
        num_starts, num_runs = shape[1], len(x)
        y = np.repeat(losses.T, num_starts, axis=0)
        centre = np.repeat(self.law.centre(losses, x.shape[1]), num_starts, axis=0)
        precision = self._precision(num_runs, x.shape[1])
        theta = theta.reshape(-1, shape[2])
        diagonal = np.arange(shape[2])

        def cost_of(trial: np.ndarray) -> np.ndarray:
            with np.errstate(all="ignore"):
                size = np.abs(self.law.losses(trial, x) - y)
                delta = self.huber_delta
                huber = np.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta))
                return huber.mean(1) + 0.5 * (precision * (trial - centre) ** 2).sum(1)

        damping = np.full(len(theta), 1e-2)
        cost = cost_of(theta)
        for _ in range(num_steps):
            residual = self.law.losses(theta, x) - y
            trust = np.minimum(1, self.huber_delta / np.maximum(np.abs(residual), 1e-300))
            jacobian = self.law.jacobian(theta, x)
            weighted = jacobian * trust[:, :, None]
            hessian = np.matmul(weighted.transpose(0, 2, 1), jacobian) / num_runs
            slope = (weighted * residual[:, :, None]).sum(1) / num_runs
            slope += precision * (theta - centre)
            curvature = hessian[:, diagonal, diagonal] + precision
            hessian[:, diagonal, diagonal] = curvature + damping[:, None] * (curvature + 1e-9)
            step = np.linalg.solve(hessian, slope[:, :, None])[:, :, 0]
            # A step of 2 is a factor of 7 in any parameter: further is beyond the linearisation.
            proposal = theta - np.clip(step, -2, 2)
            proposed = cost_of(proposal)
            better = proposed < cost
            theta = np.where(better[:, None], proposal, theta)
            cost = np.where(better, proposed, cost)
            damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-9, 1e6)
            if damping.min() > 1e4:
                break
        return theta.reshape(shape), cost.reshape(shape[:2])

    def _with_errors(self, theta: np.ndarray, x: np.ndarray, losses: np.ndarray) -> LawModel:
        """Attach the linearised covariance and the leave-one-out errors to theta [M, P]."""
        residual = losses.T - self.law.losses(theta, x)
        trust = np.minimum(1, self.huber_delta / np.maximum(np.abs(residual), 1e-300))
        jacobian = self.law.jacobian(theta, x)
        hessian = np.matmul((jacobian * trust[:, :, None]).transpose(0, 2, 1), jacobian)
        diagonal = np.arange(theta.shape[1])
        hessian[:, diagonal, diagonal] += len(x) * self._precision(len(x), x.shape[1])
        covariance = np.linalg.inv(hessian)
        leverage = _leverage(jacobian, covariance)
        kept = np.maximum(1 - trust * leverage, 0.05)
        held_out = (losses.T - residual / kept).T
        scale = np.sqrt(((held_out - losses) ** 2).mean(0))
        # Without the run the others know its mixture less well.
        deviation = (np.sqrt(1 + leverage / kept) * scale[:, None]).T
        return LawModel(self.law, theta, covariance, scale, held_out, deviation)
