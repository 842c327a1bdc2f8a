"""The next mixtures of a study: drawn as its swarm was, chosen by what its proxies have shown.

Enters: a study with finished proxies, how many mixtures, a rule. Leaves: mixtures that no row of
the study has, with what is expected of them. Writes nothing (`rounds` does) and trains nothing.

1. Draws from the study's own sampler, within the bounds that its swarm was drawn in.
2. The same moved to where the decision may end (the epochs of the large run).
3. Mixtures around the predicted optimum: between the best of 2 and others, again from their best.
4. A share of the batch is random draws of 1, so that the surrogate stays right elsewhere; the rule
   chooses the others among the best quarter of 2 and all of 3. Rules that need no prediction
   choose among all of 2.

Legend: N candidates, D domains, or the kept one and the free ones where ratios are frozen.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regmix.data.draws import BoundedOptions, RegmixOptions, drop_small
from regmix.data.mixtures import MixtureTable
from regmix.decision.active.acquisition import (
    BEST_SHARE,
    DEFAULT_EXPLORE,
    DEFAULT_RULE,
    choose,
    find_rule,
    num_explored,
)
from regmix.decision.active.outlook import Outlook, look
from regmix.decision.objective import make_objective
from regmix.decision.reuse import reduce_runs
from regmix.decision.runs import read_runs
from regmix.decision.searching.constraints import Constraints, make_constraints
from regmix.errors import ConfigError, MixtureError, StudyError
from regmix.study import Study
from regmix.swarm.drawing import SwarmRequest

# Tried in turn: tight bounds may leave fewer distinct mixtures than the first number.
_NUM_DRAWS = (2048, 512, 128)
_PARENTS, _CHILDREN, _GENERATIONS = 32, 128, 3
# Children lie up to half way from a parent to another mixture.
_FARTHEST = 0.5


@dataclass(frozen=True, kw_only=True)
class ProposalRequest:
    """num: mixtures; rule: by which they are chosen; seed: of draws and rules.

    explore: share of them drawn at random instead; target_tokens, max_epochs: the large run, and
    how often it may read a domain. None takes the study's run, and sets no limit without one.
    """

    num: int = 8
    rule: str = DEFAULT_RULE
    seed: int = 0
    explore: float = DEFAULT_EXPLORE
    target_tokens: int | None = None
    max_epochs: float = 4

    def __post_init__(self) -> None:
        find_rule(self.rule)
        if self.num < 1:
            raise ConfigError(f"{self.num} mixtures asked for", cure="Ask for at least 1")
        num_explored(self.num, self.explore)


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """table: the new rows alone; the first `num_explored` of them are random draws.

    expected_nats, sd_nats [N]: predicted objective of each, and its standard deviation;
    best_nats: lowest objective of a finished run; num_runs: finished runs that they are based on;
    num_waiting: mixtures of the study without losses, which count as runs to keep away from.
    """

    table: MixtureTable
    objective: str
    num_explored: int
    expected_nats: tuple[float, ...]
    sd_nats: tuple[float, ...]
    best_nats: float
    num_runs: int
    num_waiting: int


def propose(study: Study, request: ProposalRequest) -> Proposals:
    """Return the next mixtures of a study: a pure function of its rows, losses and the request.

    Raises `StudyError` where it has no losses, `LossTableError` for too few of them,
    `ConstraintError` where no mixture meets the limits, `MixtureError` where too few differ.
    """
    if not study.losses_path.is_file():
        raise StudyError(
            f"{study.path} has no losses yet",
            cure=f"Train the proxies first: regmix-fast proxies {study.path.name}",
        )
    runs = read_runs(study.mixtures_path, study.losses_path, partial=True)
    table = MixtureTable.read_csv(study.mixtures_path)
    groups = study.config.groups
    short = reduce_runs(runs, groups)
    rows = _short(study, table, short.domains)
    finished = set(runs.indices)
    waiting = rows[[index not in finished for index in table.indices]]
    objective = make_objective(study.config.objective, runs.targets)
    outlook = look(short.weights, short.losses, objective, request.seed)
    swarm = recorded_swarm(study)
    draws = _short(study, _drawn(study, table, swarm, request), short.domains)
    limits = limits_of(study, request, swarm, short.domains)
    sampler = RegmixOptions() if swarm.sampler == "regmix" else BoundedOptions()
    smallest = (swarm.options or {}).get("min_weight", sampler.min_weight)
    chosen = spread_out(outlook, draws, limits, waiting, request, smallest=smallest)
    mean, sd = outlook.predict(chosen)
    first = max(table.indices) + 1
    return Proposals(
        table=MixtureTable(
            short.domains if groups is None else groups.domains,
            tuple(range(first, first + len(chosen))),
            chosen if groups is None else groups.expand(chosen),
        ),
        objective=objective.name,
        num_explored=num_explored(request.num, request.explore),
        expected_nats=tuple(mean.tolist()),
        sd_nats=tuple(sd.tolist()),
        best_nats=float(objective.of_all(runs.losses).min()),
        num_runs=len(runs),
        num_waiting=len(waiting),
    )


def spread_out(
    outlook: Outlook,
    draws: np.ndarray,
    limits: Constraints,
    waiting: np.ndarray,
    request: ProposalRequest,
    *,
    smallest: float,
) -> np.ndarray:
    """Return the batch [num, D], random draws first; its mixtures keep away from each other.

    draws [N, D]: of the swarm's sampler; waiting [P, D]: mixtures that will be trained anyway;
    smallest: weights below it become 0, as in the swarm.
    """
    rng = np.random.default_rng([request.seed, len(outlook.weights), len(waiting)])
    at_random = num_explored(request.num, request.explore)
    inside = drop_small(limits.moved_inside(draws), limits.lower, limits.upper, smallest)
    first = draws[rng.permutation(len(draws))[:at_random]]
    rule = find_rule(request.rule)
    pool = inside if rule.everywhere else _promising(outlook, inside, rng)
    pool = drop_small(pool, limits.lower, limits.upper, smallest)
    pool = pool[limits.satisfied(pool)]
    candidates = outlook.candidates(
        pool, reference=inside, pending=np.concatenate([waiting, first])
    )
    seed = int(rng.integers(2**32))
    places = choose(candidates, request.num - at_random, rule=request.rule, seed=seed)
    return np.concatenate([first, pool[places]])


def _promising(outlook: Outlook, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the best quarter of the draws, and mixtures around the predicted optimum.

    A point between two mixtures that meet all bounds meets them too.
    """
    order = np.argsort(outlook.mean(draws), kind="stable")
    best = draws[order[: max(1, round(BEST_SHARE * len(draws)))]]
    parents, children = best[:_PARENTS], []
    for _ in range(_GENERATIONS):
        one = parents[rng.integers(len(parents), size=_CHILDREN)]
        other = best[rng.integers(len(best), size=_CHILDREN)]
        share = _FARTHEST * rng.random(_CHILDREN)[:, None]
        children.append((1 - share) * one + share * other)
        family = np.concatenate([parents, children[-1]])
        parents = family[np.argsort(outlook.mean(family), kind="stable")[:_PARENTS]]
    return np.concatenate([best, *children])


def limits_of(
    study: Study, request: ProposalRequest, swarm: SwarmRequest, domains: tuple[str, ...]
) -> Constraints:
    """Return what the decision must respect, over `domains`: the swarm's bounds and the epochs.

    Raises `ConstraintError` that names what clashes.
    """
    config = study.config
    budget = request.target_tokens or config.target_tokens
    whole = make_constraints(
        config.train_domains,
        lower=swarm.lower,
        upper=swarm.upper,
        available_tokens=None if budget is None else config.available_tokens,
        budget_tokens=budget,
        max_epochs=request.max_epochs,
    )
    lower = dict(zip(whole.domains, whole.lower.tolist(), strict=True))
    upper = dict(zip(whole.domains, whole.upper.tolist(), strict=True))
    if config.groups is not None:
        lower = config.groups.reduce_lower(lower)
        upper = config.groups.reduce_upper(upper)
    return make_constraints(domains, lower=lower, upper=upper)


def recorded_swarm(study: Study) -> SwarmRequest:
    """Return how the study's mixtures were drawn, its bounds among it; the default for a file's."""
    record = study.config.swarm
    known: dict[str, Any] = {"num": 1, "sampler": record.get("sampler", "bounded")}
    for name in ("lower", "upper", "options"):
        known[name] = _mapping(record.get(name), f"{study.path / 'study.toml'}, swarm.{name}")
    return SwarmRequest(**known)


def _mapping(text: str | None, where: str) -> Mapping[str, float] | None:
    if text is None:
        return None
    try:
        found = ast.literal_eval(text)
        return {str(name): float(value) for name, value in found.items()}
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise StudyError(
            f"{where} is not a mapping of names to numbers",
            cure="Restore it: the bounds and options that the mixtures were drawn with",
        ) from error


def _drawn(
    study: Study, table: MixtureTable, swarm: SwarmRequest, request: ProposalRequest
) -> MixtureTable:
    """Return many draws unlike any row; other ones for every length of the table."""
    seed = int(np.random.SeedSequence([request.seed, len(table)]).generate_state(1)[0])
    config = study.config
    for num in _NUM_DRAWS:
        with contextlib.suppress(MixtureError):
            return replace(swarm, num=num, seed=seed).draw(config.prior, table, config.groups)
    return replace(swarm, num=request.num, seed=seed).draw(config.prior, table, config.groups)


def _short(study: Study, table: MixtureTable, domains: tuple[str, ...]) -> np.ndarray:
    """Return the rows of a table over `domains`, those of the space that runs live in."""
    groups = study.config.groups
    if groups is None:
        return table.weights[:, [table.domains.index(name) for name in domains]]
    columns = [table.domains.index(name) for name in groups.domains]
    return groups.reduce(table.weights[:, columns], table.indices)
