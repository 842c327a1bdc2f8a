"""The regressors by name, and the interface that they share.

Enters: a name. Leaves: a regressor whose `fit(weights [K, D], losses [K, M])` returns a model with
`predict(weights [N, D]) -> (mean [N, M], standard deviation [N, M])`. Each lives in its own file;
a new one is a class with this interface and a line in `REGRESSORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from regmix.decision.linear import Linear
from regmix.decision.powerlaw import PowerLaw
from regmix.decision.trees import Trees
from regmix.errors import ConfigError, LossTableError, nearest


class Model(Protocol):
    """A fitted regressor."""

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        ...

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M]."""
        ...

    def select(self, columns: Sequence[int]) -> Model:
        """Return the model of these targets only."""
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

    def fit(
        self, weights: np.ndarray, losses: np.ndarray, scale: np.ndarray | None = None
    ) -> Model:
        """Fit; `scale` [M] is the held-out error where the caller knows it."""
        ...


# The seed is the study's; LightGBM keeps the paper's own, 42.
REGRESSORS: dict[str, Callable[[int], Regressor]] = {
    "linear": lambda seed: Linear(),
    "lightgbm": lambda seed: Trees(),
    "powerlaw": lambda seed: PowerLaw(seed=seed),
}


def make_regressor(name: str, seed: int) -> Regressor:
    """Return a regressor by name; `ConfigError` names the nearest one."""
    if name not in REGRESSORS:
        known = [*REGRESSORS, "auto"]
        raise ConfigError(
            f"unknown regressor '{name}' ({nearest(name, known)})",
            cure=f"Use one of {', '.join(known)}",
        )
    return REGRESSORS[name](seed)


def check_enough_runs(regressor: Regressor, num_runs: int, num_domains: int) -> None:
    """Raise `LossTableError`, with the number needed, where there are too few runs."""
    needed = regressor.fewest_runs(num_domains)
    if num_runs < needed:
        raise LossTableError(
            f"{num_runs} runs are too few for the regressor '{regressor.name}' on {num_domains} "
            f"domains",
            cure=f"Train at least {needed} proxies, or use --regressor linear",
        )
