"""A cheap stand-in for costly models: which of 100,000 mixtures are worth judging in full.

Enters: mixtures and their predicted losses. Leaves: a quick estimate of the losses of others. It
ranks mixtures for the search and decides nothing: what it picks is judged by the models themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RIDGE = 1e-5
# Pairs of more domains than this would cost more than the surrogate.
_MOST_PAIRED = 24
_BLOCK = 4096


@dataclass(frozen=True, eq=False)
class StandIn:
    """Ridge regression on p, sqrt(p), p^(1/4) and sqrt(p_i p_j): coefficients [F, U], offset [U].

    paired: the domains i, j that vary most.
    """

    paired: np.ndarray
    coefficients: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, weights: np.ndarray, losses: np.ndarray, importance: np.ndarray) -> StandIn:
        """Fit losses [n, U] at weights [n, D], whose errors count by importance [n]."""
        paired = np.sort(np.argsort(-np.sqrt(weights).var(0), kind="stable")[:_MOST_PAIRED])
        features = _features(weights, paired)
        centre, spread = features.mean(0), features.std(0) + 1e-12
        scaled = (features - centre) / spread
        middle = losses.mean(0)
        weighted = scaled * importance[:, None]
        gram = weighted.T @ scaled
        np.einsum("ii->i", gram)[:] += _RIDGE * len(weights)
        slopes = np.linalg.solve(gram, weighted.T @ (losses - middle)) / spread[:, None]
        return cls(paired, slopes, middle - centre @ slopes)

    def losses(self, weights: np.ndarray) -> np.ndarray:
        """Return the estimated losses [N, U]."""
        found = np.empty((len(weights), len(self.offset)))
        for start in range(0, len(weights), _BLOCK):
            block = weights[start : start + _BLOCK]
            found[start : start + _BLOCK] = _features(block, self.paired) @ self.coefficients
        return found + self.offset


def _features(weights: np.ndarray, paired: np.ndarray) -> np.ndarray:
    roots = np.sqrt(np.maximum(weights, 0.0))
    left, right = np.triu_indices(len(paired), 1)
    chosen = roots[:, paired]
    return np.hstack([weights, roots, np.sqrt(roots), chosen[:, left] * chosen[:, right]])
