"""Mixtures to beat: natural, uniform, UniMax, the best one observed, and any that are given.

Enters: the runs, a prior, token counts, named mixtures. Leaves: baselines with their weights.
Predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from regmix.data.mixtures import Mixture
from regmix.decision.objective import Objective
from regmix.decision.searching.constraints import Constraints
from regmix.decision.surrogate import Surrogate
from regmix.errors import ConfigError, nearest

# What stands in for the prior where none is given: the centre of what was observed.
SWARM_MEAN = "swarm mean"
# Names that a given baseline may not take.
RESERVED = ("prior", "natural", "uniform", "unimax", "best observed", SWARM_MEAN)


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
    limits: Constraints | None = None,
) -> tuple[Baseline, ...]:
    """Return the baselines, the prior first (`natural`); `given` ones may leave out domains.

    `unimax` is among them where `limits` know token counts and the epochs allowed.
    """
    uniform = np.full(len(model.domains), 1 / len(model.domains))
    best = int(objective.of_all(model.losses).argmin())
    found = [Baseline("uniform", uniform)]
    if limits is not None and (spread := _unimax_of(limits)) is not None:
        found.append(Baseline("unimax", spread))
    found.append(Baseline("best observed", model.weights[best]))
    if prior is None:
        found.insert(0, Baseline(SWARM_MEAN, model.weights.mean(0)))
    elif not np.array_equal(prior, uniform):
        found.insert(0, Baseline("natural", prior))
    for name, weights in (given or {}).items():
        mixture = weights if isinstance(weights, Mixture) else Mixture(weights, where=name)
        found.append(Baseline(name, mixture.array(model.domains)))
    return tuple(found)


def named(name: str, baselines: tuple[Baseline, ...], kind: str = "baseline") -> Baseline:
    """Return a baseline by name, `prior` being the first; `ConfigError` names the nearest."""
    if name == "prior":
        return baselines[0]
    for entry in baselines:
        if entry.name == name:
            return entry
    names = ["prior", *(entry.name for entry in baselines)]
    cure = "Correct it"
    if name == "natural":
        cure = "Give the natural mixture as the prior (--prior natural.yaml)"
    elif name == "unimax":
        cure = "UniMax needs the tokens that exist and those of the run (--tokens), and max_epochs"
    raise ConfigError(f"unknown {kind} '{name}' ({nearest(name, names)})", cure=cure)


def unimax(available: np.ndarray, budget: float, max_epochs: float) -> np.ndarray:
    """Return the UniMax mixture [D] of `available` tokens [D] (Chung et al. 2023, algorithm 1).

    The budget is spread as evenly as `max_epochs` of each domain allow: the smallest first, and
    what they cannot take goes to the others.
    """
    tokens = np.zeros(len(available))
    rest = float(budget)
    order = np.argsort(available, kind="stable")
    for position, domain in enumerate(order):
        tokens[domain] = min(rest / (len(order) - position), max_epochs * available[domain])
        rest -= tokens[domain]
    return np.asarray(tokens / tokens.sum())


def _unimax_of(limits: Constraints) -> np.ndarray | None:
    counts = limits.available_tokens, limits.budget_tokens, limits.max_epochs
    if counts[0] is None or counts[1] is None or counts[2] is None:
        return None
    return unimax(counts[0], counts[1], counts[2])
