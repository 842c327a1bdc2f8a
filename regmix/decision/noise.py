"""The noise floor: how much a loss moves when nothing but the seeds change.

Enters: runs. Leaves: the standard deviation between replicates, by target, or what the Gaussian
process takes for noise where there are no replicates. Trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.objective import Objective
from regmix.decision.regressors.gp import GPModel
from regmix.decision.runs import replicate_groups
from regmix.decision.surrogate import Surrogate
from regmix.decision.uncertainty import target_correlation


@dataclass(frozen=True, eq=False)
class Noise:
    """sd [M] in nats; num_groups: mixtures trained more than once, num_extra times again in all.

    measured: from replicates; otherwise it is what the Gaussian process could not explain.
    """

    sd: np.ndarray
    num_groups: int
    num_extra: int

    @property
    def measured(self) -> bool:
        """Whether there were replicates."""
        return self.num_extra > 0

    @property
    def words(self) -> str:
        """Where the number comes from."""
        if not self.measured:
            return "estimated by the Gaussian process; train replicates to measure it"
        runs = self.num_extra + self.num_groups
        return f"measured on {runs} proxies of {self.num_groups} mixtures with other seeds"


def noise_floor(model: Surrogate) -> Noise | None:
    """Return the noise between seeds of every target; None without replicates or a process."""
    groups = _replicates(model)
    if groups:
        return _between_replicates(model.losses, groups)
    member = model.member("gp")
    if member is None or not isinstance(member.model, GPModel):
        return None
    return Noise(member.model.noise_sd(), 0, 0)


def objective_noise(model: Surrogate, objective: Objective) -> float | None:
    """Return the standard deviation of the objective between seeds [nats], where it is known.

    Replicates give it directly; otherwise targets go together as their held-out errors do.
    """
    groups = _replicates(model)
    if groups:
        return float(_between_replicates(objective.of_all(model.losses)[:, None], groups).sd[0])
    noise = noise_floor(model)
    if noise is None:
        return None
    own = noise.sd[list(objective.columns)]
    if objective.worst:
        return float(own.max())
    weighted = objective.shares * own
    return float(np.sqrt(weighted @ target_correlation(model, objective.columns) @ weighted))


def _replicates(model: Surrogate) -> tuple[tuple[int, ...], ...]:
    """Return the groups of runs on one mixture; runs equal in every loss are copies of one run."""
    groups = replicate_groups(model.weights)
    return tuple(group for group in groups if np.ptp(model.losses[list(group)], axis=0).any())


def _between_replicates(losses: np.ndarray, groups: tuple[tuple[int, ...], ...]) -> Noise:
    squares = np.zeros(losses.shape[1])
    for group in groups:
        rows = losses[list(group)]
        squares += ((rows - rows.mean(0)) ** 2).sum(0)
    extra = sum(len(group) - 1 for group in groups)
    return Noise(np.sqrt(squares / extra), len(groups), extra)
