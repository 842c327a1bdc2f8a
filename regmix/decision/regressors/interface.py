"""The interface that all regressors share.

Enters: nothing. Leaves: what a regressor must offer, and what its fitted model must. A regressor's
`fit(weights [K, D], losses [K, M])` returns a model with `predict(weights [N, D]) -> (mean [N, M],
standard deviation [N, M])`; a new one is a class with this interface in a file of its own, and a
line in `registry`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


class Model(Protocol):
    """A fitted regressor."""

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        ...

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M]; the latter before any calibration."""
        ...

    def select(self, columns: Sequence[int]) -> Model:
        """Return the model of these targets only."""
        ...


@runtime_checkable
class SmoothModel(Model, Protocol):
    """A fitted regressor whose predictions have derivatives everywhere that a search may go."""

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [N, M, D] of the predicted losses by the weights."""
        ...


class Regressor(Protocol):
    """Something that learns losses from weights, one target at a time."""

    @property
    def name(self) -> str:
        """The name it is chosen by."""
        ...

    def fewest_runs(self, num_domains: int) -> int:
        """Return the number of runs below which it refuses."""
        ...

    def fit(self, weights: np.ndarray, losses: np.ndarray) -> Model:
        """Fit weights [K, D] and losses [K, M], every target for itself."""
        ...
