"""Surrogates whose optimum is known: for the tests of the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regmix.decision.surrogate import Member, Surrogate, fit

Losses = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class MadeUp:
    """A smooth model: losses [N, M] of weights [N, D], and their slopes [N, M, D]."""

    losses: Losses
    slopes: Losses
    columns: tuple[int, ...]

    def mean(self, weights: np.ndarray) -> np.ndarray:
        return self.losses(weights)[:, list(self.columns)]

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = self.mean(weights)
        return mean, np.full(mean.shape, 0.01)

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        return self.slopes(weights)[:, list(self.columns)]

    def select(self, columns: Sequence[int]) -> MadeUp:
        return replace(self, columns=tuple(self.columns[column] for column in columns))


def made_up(losses: Losses, slopes: Losses, domains: str, targets: str) -> Surrogate:
    """Return a surrogate of these functions; its runs cover the simplex and its corners."""
    num_domains = len(domains)
    runs = np.vstack(
        [np.eye(num_domains), np.random.default_rng(0).dirichlet(np.ones(num_domains), 40)]
    )
    found = losses(runs)
    # Losses that are the same for all runs are refused, and these need not differ.
    told = found + np.random.default_rng(1).uniform(1, 2, found.shape)
    model = fit(runs, told, regressor="linear", domains=tuple(domains), targets=tuple(targets))
    whole = MadeUp(losses, slopes, tuple(range(len(targets))))
    own = Member("made up", 1.0, whole, np.ones(len(targets)))
    return replace(model, members=(own,), losses=found, held_out=found)


def bowls(centres: np.ndarray, domains: str, targets: str, *, rooted: bool = True) -> Surrogate:
    """Return loss_m = 2 + |f(p) - f(centre_m)|^2, f the square root (of infinite slope) or p."""
    if rooted:
        roots = np.sqrt(centres)

        def losses(weights: np.ndarray) -> np.ndarray:
            return 2 + ((np.sqrt(weights)[:, None] - roots) ** 2).sum(2)

        def slopes(weights: np.ndarray) -> np.ndarray:
            at = np.sqrt(np.maximum(weights, 1e-9))[:, None]
            return (at - roots) / at

        return made_up(losses, slopes, domains, targets)
    return made_up(
        lambda weights: 2 + ((weights[:, None] - centres) ** 2).sum(2),
        lambda weights: 2 * (weights[:, None] - centres),
        domains,
        targets,
    )
