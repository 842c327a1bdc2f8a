"""Active rounds replayed on runs that are finished: what would they have cost, and found?

Enters: finished runs to choose from, others to judge by, a rule. Leaves: after each round, how good
the mixture is that the runs chosen so far point to. Trains nothing and reads no files.

The regressor sees a run's losses only once it is chosen. Legend: K runs of the pool, H held-out
runs, D domains, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.active.acquisition import (
    BEST_SHARE,
    DEFAULT_EXPLORE,
    DEFAULT_RULE,
    choose,
    find_rule,
    num_explored,
)
from regmix.decision.active.outlook import Outlook, look
from regmix.decision.objective import Objective
from regmix.decision.validation import spearman
from regmix.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """start: random runs to begin with; then `num_rounds` of `per_round` runs chosen by `rule`.

    explore: share of each round that is chosen at random instead.
    """

    start: int = 24
    per_round: int = 8
    num_rounds: int = 5
    rule: str = DEFAULT_RULE
    explore: float = DEFAULT_EXPLORE

    def __post_init__(self) -> None:
        find_rule(self.rule)
        if min(self.start, self.per_round) < 1 or self.num_rounds < 0:
            raise ConfigError(
                f"a replay of {self.start} runs and {self.num_rounds} rounds of {self.per_round}",
                cure="Give at least 1 run to start with and 1 a round",
            )
        num_explored(self.per_round, self.explore)

    @property
    def num_runs(self) -> int:
        """Runs at the end."""
        return self.start + self.num_rounds * self.per_round


@dataclass(frozen=True, kw_only=True)
class ReplayPoint:
    """How good the decision is after some runs.

    loss_nats: the true objective of the held-out run that is predicted best; regret_nats: less
    that of the truly best one; spearman: of all held-out runs; spearman_best: of the quarter that
    is truly best (None where it has no order).
    """

    num_runs: int
    loss_nats: float
    regret_nats: float
    spearman: float | None
    spearman_best: float | None


def replay(
    weights: np.ndarray,
    losses: np.ndarray,
    held_weights: np.ndarray,
    held_losses: np.ndarray,
    *,
    objective: Objective,
    plan: ReplayPlan,
    seed: int = 0,
) -> tuple[ReplayPoint, ...]:
    """Return the points of one replay, that of the random start first.

    weights [K, D], losses [K, M]: the pool, out of which every run is taken; held_weights [H, D],
    held_losses [H, M]: what the decision is judged by. `seed` chooses the start. Raises
    `ConfigError` where the pool is smaller than the plan.
    """
    if plan.num_runs > len(weights):
        raise ConfigError(
            f"a replay of {plan.num_runs} runs out of {len(weights)}",
            cure="Start with fewer, or replay fewer rounds",
        )
    taken = np.random.default_rng(seed).permutation(len(weights))[: plan.start]
    points = []
    for number in range(plan.num_rounds + 1):
        outlook = look(weights[taken], losses[taken], objective)
        points.append(_judge(outlook, held_weights, held_losses))
        if number < plan.num_rounds:
            rest = np.setdiff1d(np.arange(len(weights)), taken)
            chosen = _chosen(outlook, weights[rest], plan, [seed, number])
            taken = np.concatenate([taken, rest[chosen]])
    return tuple(points)


def _chosen(outlook: Outlook, rest: np.ndarray, plan: ReplayPlan, seeds: list[int]) -> np.ndarray:
    """Return the positions of a round's runs among the rest of the pool: random ones first."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    at_random = num_explored(plan.per_round, plan.explore)
    first = np.random.default_rng(seed).permutation(len(rest))[:at_random]
    others = np.setdiff1d(np.arange(len(rest)), first)
    candidates = outlook.candidates(rest[others], reference=rest, pending=rest[first])
    chosen = choose(candidates, plan.per_round - at_random, rule=plan.rule, seed=seed)
    return np.concatenate([first, others[chosen]])


def _judge(outlook: Outlook, weights: np.ndarray, losses: np.ndarray) -> ReplayPoint:
    predicted = outlook.mean(weights)
    true = outlook.objective.of_all(losses)
    best = np.argsort(true, kind="stable")[: max(1, round(BEST_SHARE * len(true)))]
    found = float(true[predicted.argmin()])
    return ReplayPoint(
        num_runs=len(outlook.weights),
        loss_nats=found,
        regret_nats=found - float(true.min()),
        spearman=spearman(true, predicted),
        spearman_best=spearman(true[best], predicted[best]),
    )
