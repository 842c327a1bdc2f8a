"""The linear regressor: ridge regression of loss on weights, the paper's baseline.

Enters: weights [K, D], losses [K, M]. Leaves: predicted mean and standard deviation [N, M].
Weights sum to 1, so there is no separate intercept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Draws the coefficients of domains hardly ever used towards the mean loss.
_RIDGE = 1e-2


@dataclass(frozen=True, eq=False)
class LinearModel:
    """coefficients [D, M]; inverse [D, D] of the regularised Gram matrix; scale [M] in nats.

    held_out, held_out_sd [K, M]: each run's prediction given all others, in closed form.
    """

    coefficients: np.ndarray
    inverse: np.ndarray
    scale: np.ndarray
    held_out: np.ndarray
    held_out_sd: np.ndarray

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        return weights @ self.coefficients

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M]; the latter grows away from the runs."""
        leverage = np.einsum("nd,de,ne->n", weights, self.inverse, weights)
        return self.mean(weights), np.sqrt(1 + leverage)[:, None] * self.scale

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, M, D] of the predicted losses by the weights."""
        return np.broadcast_to(self.coefficients.T, (len(weights), *self.coefficients.T.shape))

    def select(self, columns: Sequence[int]) -> LinearModel:
        """Return the model of these targets only."""
        chosen = list(columns)
        return LinearModel(
            self.coefficients[:, chosen],
            self.inverse,
            self.scale[chosen],
            self.held_out[:, chosen],
            self.held_out_sd[:, chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Ridge regression in closed form."""

    name: str = "linear"

    def fewest_runs(self, num_domains: int) -> int:
        """Return the number of runs below which this regressor refuses."""
        return 3

    def fit(self, weights: np.ndarray, losses: np.ndarray) -> LinearModel:
        """Fit every target."""
        num_domains = weights.shape[1]
        inverse = np.linalg.inv(weights.T @ weights + _RIDGE * np.eye(num_domains))
        average = losses.mean(0)
        # Weights sum to 1, so adding the mean loss to every coefficient adds it to the prediction.
        coefficients = average + inverse @ (weights.T @ (losses - average))
        leverage = np.einsum("nd,de,ne->n", weights, inverse, weights)
        kept = np.maximum(1 - leverage, 0.05)
        left_out = (losses - weights @ coefficients) / kept[:, None]
        scale = np.sqrt((left_out**2).mean(0))
        # Without the run the others know its mixture less well.
        deviation = np.sqrt(1 + leverage / kept)[:, None] * scale
        return LinearModel(coefficients, inverse, scale, losses - left_out, deviation)
