"""What each domain does to each target, and what a token of it is worth.

Enters: a fitted surrogate, a mixture. Leaves: changes of the predicted losses when a domain's
weight is raised, and the power law's exchange rates between domains, both with 90% intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.regressors.laws import LawModel
from regmix.decision.regressors.powerlaw import exchange_rates
from regmix.decision.surrogate import Surrogate
from regmix.decision.uncertainty import draw_surfaces, tails

RAISED_BY = 0.05
_NUM_DRAWS = 400


@dataclass(frozen=True, eq=False)
class Table:
    """mean, low, high [M, D], by target and domain, with what bounds 90% of the draws."""

    targets: tuple[str, ...]
    domains: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def record(self) -> dict[str, dict[str, list[float]]]:
        """Return target -> domain -> [mean, low, high]."""
        values = np.stack([self.mean, self.low, self.high], axis=-1).tolist()
        return {
            target: dict(zip(self.domains, row, strict=True))
            for target, row in zip(self.targets, values, strict=True)
        }


def influence(model: Surrogate, mixture: np.ndarray, *, seed: int = 0) -> Table:
    """Return the change in nats when a domain's weight rises by 0.05 and all others shrink alike.

    mixture [D]: where the change begins. A domain above 0.95 rises to 1.
    """
    num_domains = len(mixture)
    step = np.minimum(RAISED_BY, 1 - mixture)
    rest = np.maximum(1 - mixture, 1e-12)
    moved = mixture * (1 - step / rest)[:, None] + np.eye(num_domains) * (step / rest)[:, None]
    points = np.concatenate([mixture[None], moved])
    columns = range(len(model.targets))
    surfaces = draw_surfaces(model, columns, points, number=_NUM_DRAWS, seed=seed)
    change = surfaces[:, 1:] - surfaces[:, :1]
    mean = model.mean(points)
    low, high = np.quantile(change, tails(), axis=0)
    return Table(model.targets, model.domains, (mean[1:] - mean[0]).T, low.T, high.T)


def exchange_table(model: Surrogate, *, seed: int = 0) -> Table | None:
    """Return what a token of each domain is worth by the power law, the best domain being 1.

    Intervals come from the law's parameters, as uncertain as the runs leave them (linearised).
    None where the surrogate holds no power law.
    """
    member = model.member("powerlaw")
    if member is None or not isinstance(member.model, LawModel):
        return None
    draws = exchange_rates(member.model.draws(_NUM_DRAWS, seed))
    low, high = np.quantile(draws, tails(), axis=0)
    rates = exchange_rates(member.model.theta)
    low, high = np.minimum(low, rates), np.maximum(high, rates)
    return Table(model.targets, model.domains, rates, low, high)
