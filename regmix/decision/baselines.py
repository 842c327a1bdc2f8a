"""Mixtures to beat: natural, uniform, the best one observed, and any that are given.

Enters: the runs, a prior, named mixtures. Leaves: baselines with their weights. Predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from regmix.data.mixtures import Mixture
from regmix.decision.objective import Objective
from regmix.decision.surrogate import Surrogate

# What stands in for the prior where none is given: the centre of what was observed.
SWARM_MEAN = "swarm mean"


@dataclass(frozen=True, eq=False)
class Baseline:
    """A mixture to compare with: its name and weights [D]."""

    name: str
    weights: np.ndarray


def make_baselines(
    model: Surrogate,
    objective: Objective,
    prior: np.ndarray | None,
    given: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Baseline, ...]:
    """Return the baselines, the prior first (`natural`); `given` ones may leave out domains."""
    uniform = np.full(len(model.domains), 1 / len(model.domains))
    best = int(objective.of_all(model.losses).argmin())
    found = [Baseline("uniform", uniform), Baseline("best observed", model.weights[best])]
    if prior is None:
        found.insert(0, Baseline(SWARM_MEAN, model.weights.mean(0)))
    elif not np.array_equal(prior, uniform):
        found.insert(0, Baseline("natural", prior))
    for name, weights in (given or {}).items():
        mixture = weights if isinstance(weights, Mixture) else Mixture(weights, where=name)
        found.append(Baseline(name, mixture.array(model.domains)))
    return tuple(found)
