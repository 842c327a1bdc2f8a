"""What a lower loss on one target costs the others: predicted losses of many allowed mixtures.

Enters: a surrogate, an objective, limits, mixtures by name. Leaves: `Tradeoffs`: the mixtures that
no other one beats on two targets at once, a thinned cloud of the rest, and each target's own best
mixture with what it costs. Chooses no mixture; every loss is a prediction at the proxies' scale.

Legend: N mixtures, D domains, M targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.draws import BoundedOptions, draw_bounded
from regmix.data.groups import Groups
from regmix.data.mixtures import Mixture
from regmix.decision.objective import Objective
from regmix.decision.optimum import Optimum
from regmix.decision.rivals import around, pulled
from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.guard import SLACK_NATS, Guard
from regmix.decision.surrogate import Surrogate
from regmix.decision.uncertainty import draw_surfaces, tails
from regmix.errors import ConfigError
from regmix.files import write_json

NUM_JUDGED = 1800
# Of these mixtures, the share drawn from the whole of what is allowed; the rest lies where a
# target's loss is low. Of the cloud behind the fronts this many are kept.
_DRAWN = 1 / 3
_NUM_CLOUD = 150
_MOST_ON_FRONTS = 450
_NUM_SURFACES = 200
# How often mixtures near the best so far are added.
_ROUNDS = 3
# What a stored weight and a stored loss of a point are rounded to: a plot shows no more.
_WEIGHT_DIGITS, _LOSS_DIGITS = 4, 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Tradeoffs:
    """Predicted losses [N, M] of mixtures [N, D] within the limits, in nats.

    named: name -> (weights [D], losses [M]), the first of which costs are counted from; front [N]:
    whether no other mixture is better on the objective and a target, or on two targets, at once.
    best [M, D]: each target's own best mixture; costs [M, M, 3]: what it changes on every target
    (mean, low, high of the 90% interval); objective_costs [M, 3]: the same of the objective.
    num_judged: how many mixtures were predicted, of which num_allowed keep the guard.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    objective: Objective
    named: dict[str, tuple[np.ndarray, np.ndarray]]
    weights: np.ndarray
    losses: np.ndarray
    front: np.ndarray
    best: np.ndarray
    costs: np.ndarray
    objective_costs: np.ndarray
    num_judged: int
    num_allowed: int
    seed: int

    def record(self) -> dict[str, Any]:
        """Return what the file holds; the points are rounded, and it says to what."""
        named, reference = self.named, next(iter(self.named))
        values = self.objective.of_all(self.losses)
        return {
            "domains": list(self.domains),
            "targets": list(self.targets),
            "objective_name": self.objective.name,
            "reference": reference,
            "num_judged": self.num_judged,
            "num_allowed": self.num_allowed,
            "seed": self.seed,
            "mixtures": {
                name: {
                    "weights": weights.tolist(),
                    "losses_nats": losses.tolist(),
                    "objective_nats": float(self.objective.of_all(losses[None])[0]),
                }
                for name, (weights, losses) in named.items()
            },
            "points": {
                "rounded_to": {"weights": 10.0**-_WEIGHT_DIGITS, "nats": 10.0**-_LOSS_DIGITS},
                "weights": np.round(self.weights, _WEIGHT_DIGITS).tolist(),
                "losses_nats": np.round(self.losses, _LOSS_DIGITS).tolist(),
                "objective_nats": np.round(values, _LOSS_DIGITS).tolist(),
                "front": self.front.tolist(),
            },
            "payoff": {
                target: {
                    "weights": self.best[row].tolist(),
                    "change_nats": dict(zip(self.targets, self.costs[row].tolist(), strict=True)),
                    "objective_change_nats": self.objective_costs[row].tolist(),
                }
                for row, target in enumerate(self.targets)
            },
        }


def tradeoffs(
    model: Surrogate,
    objective: Objective,
    limits: Constraints,
    mixtures: Mapping[str, Mapping[str, float] | np.ndarray],
    *,
    guard: Guard | None = None,
    number: int = NUM_JUDGED,
    seed: int = 0,
) -> Tradeoffs:
    """Return the trade-offs between the targets among about `number` mixtures within the limits.

    mixtures: by name; from the first one, the optimum, costs are counted, and no domain gets more
    than the largest weight of any run or of the optimum. Mixtures that a guard refuses are left
    out. Raises `ConfigError` without a mixture, and `MixtureError` for one of other domains.
    """
    if not mixtures:
        raise ConfigError("no mixture to count costs from", cure="Give the optimum")
    named = {name: _weights_of(name, given, model) for name, given in mixtures.items()}
    known = np.stack(list(named.values()))
    reach = np.maximum(model.weights.max(0), known[0])
    limits = limits.within(reach, np.zeros(len(reach), dtype=bool))
    weights, losses, num_judged = _judged(model, objective, limits, known, guard, number, seed)
    table = _table(objective, losses)
    front = _on_fronts(table)
    best = weights[losses.argmin(0)]
    costs, objective_costs = _costs(model, objective, known[0], best, seed)
    kept = _thinned(table, front, np.random.default_rng(seed))
    of_named = model.mean(known)
    return Tradeoffs(
        domains=model.domains,
        targets=model.targets,
        objective=objective,
        named={name: (known[row], of_named[row]) for row, name in enumerate(named)},
        weights=weights[kept],
        losses=losses[kept],
        front=front[kept],
        best=best,
        costs=costs,
        objective_costs=objective_costs,
        num_judged=num_judged,
        num_allowed=len(weights),
        seed=seed,
    )


def tradeoffs_of(
    best: Optimum, model: Surrogate, groups: Groups | None = None, *, number: int = NUM_JUDGED
) -> Tradeoffs:
    """Return the trade-offs around an optimum and its baselines, under its limits and its guard.

    With frozen ratios (`groups`) the surrogate knows the short space alone, and the trade-offs
    are told over all domains, as the optimum is.
    """
    mixtures = {"optimum": best.weights}
    for entry in best.baselines:
        name = entry.name if entry.name not in mixtures else f"{entry.name} (baseline)"
        mixtures[name] = np.array([entry.weights[domain] for domain in best.domains])
    limits = best.constraints
    if groups is not None:
        mixtures = {name: groups.reduce(weights[None])[0] for name, weights in mixtures.items()}
        limits = _short(limits, groups)
    found = tradeoffs(
        model, best.objective, limits, mixtures, guard=best.guard, number=number, seed=best.seed
    )
    return found if groups is None else _over_all(found, groups)


def _short(limits: Constraints, groups: Groups) -> Constraints:
    pairs = zip(limits.domains, limits.lower.tolist(), limits.upper.tolist(), strict=True)
    bounds = {name: (low, high) for name, low, high in pairs}
    low = groups.reduce_lower({name: pair[0] for name, pair in bounds.items()})
    high = groups.reduce_upper({name: pair[1] for name, pair in bounds.items()})
    return Constraints(
        groups.names,
        np.array([low.get(name, 0.0) for name in groups.names]),
        np.array([min(high.get(name, 1.0), 1.0) for name in groups.names]),
    )


def _over_all(found: Tradeoffs, groups: Groups) -> Tradeoffs:
    return replace(
        found,
        domains=groups.domains,
        named={
            name: (groups.expand(weights[None])[0], losses)
            for name, (weights, losses) in found.named.items()
        },
        weights=groups.expand(found.weights),
        best=groups.expand(found.best),
    )


def tradeoffs_path(optimum: Path) -> Path:
    """Return where the trade-offs of an optimum lie: `optimum-tradeoffs.json` beside it."""
    return optimum.with_name(f"{optimum.stem}-tradeoffs.json")


def write_tradeoffs(optimum: Path, found: Tradeoffs) -> Path:
    """Write the record beside the optimum's file, and return its path."""
    path = tradeoffs_path(optimum)
    write_json(path, found.record())
    return path


def _weights_of(name: str, given: Mapping[str, float] | np.ndarray, model: Surrogate) -> np.ndarray:
    if isinstance(given, np.ndarray):
        given = dict(zip(model.domains, given.tolist(), strict=True))
    mixture = given if isinstance(given, Mixture) else Mixture(given, where=name)
    return np.asarray(mixture.array(model.domains))


def _judged(
    model: Surrogate,
    objective: Objective,
    limits: Constraints,
    known: np.ndarray,
    guard: Guard | None,
    number: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return allowed mixtures [N, D], the first known one among them, their losses, how many.

    Drawn from all that is allowed; then near what does best for each target; then near that and
    between it, where the fronts of two targets run.
    """
    rng = np.random.default_rng(seed)
    num_domains = len(model.domains)
    drawn = draw_bounded(
        np.full(num_domains, 1 / num_domains),
        limits.lower,
        limits.upper,
        max(16, int(_DRAWN * number)),
        seed,
        BoundedOptions(),
    )
    given = known[1:][limits.satisfied(known[1:])]
    weights = np.concatenate([known[:1], given, limits.moved_inside(drawn)])
    losses = model.mean(weights)
    share = max(16, (number - len(weights)) // _ROUNDS)
    for round_ in range(_ROUNDS):
        between = round_ > 0
        allowed = _allowed(losses, guard)
        liked = np.unique(np.concatenate([[0], allowed[losses[allowed].argmin(0)]]))
        near = around(weights[liked], share // 2 if between else share, limits, rng)
        parts = [near]
        if between:
            front = allowed[_on_fronts(_table(objective, losses[allowed]))]
            parts.append(_between(weights[front], weights[liked], share - share // 2, rng))
        fresh = np.concatenate(parts)
        if guard is not None:
            fresh = pulled(fresh, weights[allowed], rng)
        weights = np.concatenate([weights, fresh])
        losses = np.concatenate([losses, model.mean(fresh)])
    allowed = _allowed(losses, guard)
    return weights[allowed], losses[allowed], len(weights)


def _allowed(losses: np.ndarray, guard: Guard | None) -> np.ndarray:
    """Return the rows that the guard allows; the first one, which it was found under, always."""
    kept = np.ones(len(losses), dtype=bool)
    if guard is not None:
        kept = guard.excess(losses) <= SLACK_NATS
        kept[0] = True
    return np.flatnonzero(kept)


def _table(objective: Objective, losses: np.ndarray) -> np.ndarray:
    return np.column_stack([objective.of_all(losses), losses])


def _between(
    first: np.ndarray, second: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Return mixtures [number, D] on the lines between both; bounds hold there too."""
    share = rng.random((number, 1))
    return (
        share * first[rng.integers(len(first), size=number)]
        + (1 - share) * second[rng.integers(len(second), size=number)]
    )


def pareto(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the rows, by rising `first`, that no other is below in both; of equal ones one."""
    order = np.lexsort((second, first))
    lowest = np.minimum.accumulate(second[order])
    before = np.concatenate([[np.inf], lowest[:-1]])
    return np.asarray(order[second[order] < before])


def _on_fronts(table: np.ndarray) -> np.ndarray:
    """Return [N]: whether a row is on the front of any two columns of `table` [N, 1 + M]."""
    found = np.zeros(len(table), dtype=bool)
    for one in range(table.shape[1]):
        for other in range(one):
            found[pareto(table[:, other], table[:, one])] = True
    return found


def _thinned(table: np.ndarray, front: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the rows to keep: the first, the fronts with the objective, others as far as they fit.

    The fronts of two targets are many; past a number some of their points are left out by chance.
    """
    needed = np.zeros(len(table), dtype=bool)
    needed[0] = True
    needed[table.argmin(0)] = True
    for column in range(1, table.shape[1]):
        needed[pareto(table[:, 0], table[:, column])] = True
    others, cloud = np.flatnonzero(front & ~needed), np.flatnonzero(~front & ~needed)
    room = max(0, _MOST_ON_FRONTS - int(needed.sum()))
    kept = [
        np.flatnonzero(needed),
        rng.permutation(others)[:room],
        rng.permutation(cloud)[:_NUM_CLOUD],
    ]
    return np.sort(np.concatenate(kept))


def _costs(
    model: Surrogate, objective: Objective, reference: np.ndarray, best: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each best mixture [M, D] changes against the reference: [M, M, 3] and [M, 3]."""
    points = np.concatenate([reference[None], best])
    mean = model.mean(points)
    columns = range(len(model.targets))
    surfaces = draw_surfaces(model, columns, points, number=_NUM_SURFACES, seed=seed)
    values = np.stack([objective.of_all(surface) for surface in surfaces])
    value = objective.of_all(mean)
    return (
        _estimates(mean[1:] - mean[0], surfaces[:, 1:] - surfaces[:, :1]),
        _estimates(value[1:] - value[0], values[:, 1:] - values[:, :1]),
    )


def _estimates(mean: np.ndarray, draws: np.ndarray) -> np.ndarray:
    low, high = np.quantile(draws, tails(), axis=0)
    return np.stack([mean, np.minimum(low, mean), np.maximum(high, mean)], axis=-1)
