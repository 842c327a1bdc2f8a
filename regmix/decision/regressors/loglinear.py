"""The log-linear law: the data mixing law of arXiv 2403.16952, as Olmix fits it (2602.12237).

Enters: parameters and weights. Leaves: losses and derivatives. Fitted by `laws`. Per target

    loss(p) = exp(c) + exp(sum_d t_d p_d),

a floor and a product of what each domain contributes: convex in p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Columns of theta [B, 1 + D]: c, then t.
_C, _T = 0, 1


@dataclass(frozen=True)
class LogLinearLaw:
    """The log-linear law."""

    name: str = "loglinear"
    num_head: int = _T

    def losses(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the losses [B, N]."""
        return np.asarray(np.exp(theta[:, [_C]]) + np.exp(theta[:, _T:] @ weights.T))

    def jacobian(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, P] of the losses by the parameters."""
        product = np.exp(theta[:, _T:] @ weights.T)
        jacobian = np.empty((*product.shape, theta.shape[1]))
        jacobian[:, :, _C] = np.exp(theta[:, [_C]])
        jacobian[:, :, _T:] = product[:, :, None] * weights[None]
        return jacobian

    def slopes(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, D] of the losses by the weights."""
        product = np.exp(theta[:, _T:] @ weights.T)
        return np.asarray(product[:, :, None] * theta[:, None, _T:])

    def starts(
        self, losses: np.ndarray, num_domains: int, num_starts: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return starting points [M, S, P]: floors from far below the losses to just below."""
        theta = np.zeros((losses.shape[1], num_starts, _T + num_domains))
        floors = np.log(np.linspace(0.2, 0.95, num_starts))
        theta[:, :, _C] = np.log(losses.min(0))[:, None] + floors
        gap = np.median(losses, axis=0)[:, None] - np.exp(theta[:, :, _C])
        theta[:, :, _T:] = np.log(np.maximum(gap, 1e-6))[:, :, None]
        theta[:, :, _T:] += rng.normal(0, 0.3, (num_starts, num_domains))
        return theta

    def centre(self, losses: np.ndarray, num_domains: int) -> np.ndarray:
        """Return the parameters [M, P] of a law in which all domains do alike."""
        centre = np.zeros((losses.shape[1], _T + num_domains))
        centre[:, _C] = np.log(0.6 * losses.min(0))
        gap = np.median(losses, axis=0) - np.exp(centre[:, _C])
        centre[:, _T:] = np.log(gap)[:, None]
        return centre
