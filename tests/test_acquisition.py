"""Acquisition: batches keep apart, every rule does what it says, and fewer runs do."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from regmix_bench.replay import measure, plans, records

from regmix.decision.active.acquisition import (
    RULES,
    Candidates,
    choose,
    distances,
    find_rule,
    importance,
    num_explored,
)
from regmix.decision.active.outlook import Outlook, look
from regmix.decision.active.replay import ReplayPlan, replay
from regmix.decision.objective import Objective, make_objective
from regmix.decision.runs import NamedArray, Runs
from regmix.errors import ConfigError, LossTableError, MixtureError

NUM_DOMAINS = 5
OBJECTIVE = make_objective("a", ["a"])


def law(weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """A loss that one mixture of two domains minimises, with the noise of a proxy."""
    noise = 0.003 * np.random.default_rng(seed).standard_normal(len(weights))
    useful = (
        0.5 * weights[:, 0] + 0.4 * weights[:, 1] + 0.3 * np.sqrt(weights[:, 0] * weights[:, 1])
    )
    return np.asarray(2.0 + 0.8 * (0.05 + useful) ** -0.4 + noise)[:, None]


def draws(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(NUM_DOMAINS, 0.5), num)


@cache
def outlook() -> Outlook:
    runs = draws(24, seed=1)
    return look(runs, law(runs), OBJECTIVE)


@cache
def candidates() -> Candidates:
    points = draws(300, seed=2)
    return outlook().candidates(points, reference=points, pending=np.empty((0, NUM_DOMAINS)))


def closest_pair(weights: np.ndarray) -> float:
    return min(
        float(distances(weights[[place]], np.delete(weights, place, axis=0))[0])
        for place in range(len(weights))
    )


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_batch_repeats_itself_and_no_mixture(rule: str) -> None:
    first = choose(candidates(), 8, rule=rule, seed=3)
    assert first.tolist() == choose(candidates(), 8, rule=rule, seed=3).tolist()
    assert len(set(first.tolist())) == 8


@pytest.mark.parametrize("rule", ["precision", "promise+distance", "disagreement", "distance"])
def test_a_batch_lies_further_apart_than_the_lowest_scores_do(rule: str) -> None:
    batch = choose(candidates(), 8, rule=rule)
    top = np.argsort(candidates().mean, kind="stable")[:8]
    apart = closest_pair(candidates().weights[batch])
    assert apart > 1.2 * closest_pair(candidates().weights[top])


def test_each_choice_lowers_the_variance_of_its_neighbours() -> None:
    """Two twins: once one is chosen, the other tells nothing new, and another is chosen next."""
    twins = np.array([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
    covariance = np.array([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 0.5]])
    given = Candidates(
        weights=twins,
        runs=np.array([[0.0, 1.0, 0.0]]),
        mean=np.zeros(3),
        covariance=covariance,
        noise=np.full(3, 0.01),
        members=np.zeros((2, 3)),
        importance=np.ones(3),
    )
    for rule in ("precision", "lcb"):
        assert choose(given, 2, rule=rule).tolist() == [0, 2]


def test_a_batch_keeps_apart_where_nothing_is_uncertain() -> None:
    line = np.linspace(0.4, 0.6, 201)
    given = Candidates(
        weights=np.stack([line, 1 - line], 1),
        runs=np.array([[0.5, 0.5]]),
        mean=np.abs(line - 0.5),
        covariance=np.zeros((201, 201)),
        noise=np.full(201, 1e-6),
        members=np.zeros((1, 201)),
        importance=np.ones(201),
    )
    chosen = given.weights[choose(given, 2, rule="lcb")]
    assert distances(chosen, given.runs).min() > 0.05
    assert closest_pair(chosen) > 0.05
    # Five do not have so much room, and are chosen all the same.
    assert len(set(choose(given, 5, rule="lcb").tolist())) == 5


def test_a_run_is_not_proposed_again() -> None:
    runs = outlook().weights
    points = np.concatenate([runs, draws(4, seed=9)])
    given = outlook().candidates(points, reference=points, pending=np.empty((0, NUM_DOMAINS)))
    assert sorted(choose(given, 4, rule="promise").tolist()) == [24, 25, 26, 27]
    with pytest.raises(MixtureError, match=r"only 4 of the 5 mixtures.*Ask for fewer"):
        choose(given, 5, rule="promise")


def test_pending_mixtures_count_as_runs() -> None:
    points = draws(300, seed=2)
    best = choose(candidates(), 1, rule="precision")
    given = outlook().candidates(points, reference=points, pending=points[best])
    both = choose(candidates(), 2, rule="precision")
    assert choose(given, 1, rule="precision").tolist() == both[1:].tolist()


def test_a_rule_of_two_takes_turns() -> None:
    turns = choose(candidates(), 2, rule="precision+lcb")
    points = candidates().weights
    first = choose(candidates(), 1, rule="precision")
    assert turns[:1].tolist() == first.tolist()
    after = outlook().candidates(points, reference=points, pending=points[first])
    assert turns[1:].tolist() == choose(after, 1, rule="lcb").tolist()


def test_importance_falls_from_the_best_to_none_at_the_quarter() -> None:
    reference = np.arange(100.0)
    found = importance(np.array([-1.0, 0.0, 12.5, 25.0, 80.0]), reference)
    assert found == pytest.approx([1.0, 1.0, 0.48, 0.0, 0.0])


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown rule 'precison'.*did you mean 'precision'"):
        find_rule("precison")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_exploration_outside_0_and_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="Give a number from 0 to 1"):
        num_explored(8, share)


def test_too_few_runs_are_refused_with_the_number_needed() -> None:
    runs = draws(7)
    with pytest.raises(LossTableError, match=r"7 runs are too few.*at least 8"):
        look(runs, law(runs), OBJECTIVE)


def test_an_objective_of_several_targets_is_their_mean() -> None:
    runs = draws(24, seed=1)
    losses = np.hstack([law(runs), law(runs[:, ::-1], seed=1)])
    both = look(runs, losses, Objective("mean", (0, 1), np.array([0.5, 0.5])))
    alone = [look(runs, losses[:, [j]], OBJECTIVE).mean(runs[:3]) for j in (0, 1)]
    assert both.mean(runs[:3]) == pytest.approx((alone[0] + alone[1]) / 2, rel=1e-6)


def mean_regret(plan: ReplayPlan) -> float:
    """The mean regret of six replays on 8 domains, two of which do better together."""
    worth = np.linspace(1, 0.05, 8)

    def losses(weights: np.ndarray, seed: int) -> np.ndarray:
        useful = weights @ worth + 0.6 * np.sqrt(weights[:, 0] * weights[:, 1])
        noise = 0.005 * np.random.default_rng(seed).standard_normal(len(weights))
        return np.asarray(2 + 0.8 * (0.05 + useful) ** -0.4 + noise)[:, None]

    pool, held = (np.random.default_rng(s).dirichlet(np.full(8, 0.4), 300) for s in (5, 6))
    tables = pool, losses(pool, 0), held, losses(held, 1)
    curves = [replay(*tables, objective=OBJECTIVE, plan=plan, seed=seed) for seed in range(6)]
    return float(np.mean([curve[-1].regret_nats for curve in curves]))


def test_active_rounds_need_fewer_runs_than_random_ones() -> None:
    chosen = mean_regret(ReplayPlan(start=12, num_rounds=2, per_round=8))
    as_many, half_more = (mean_regret(ReplayPlan(start=n, num_rounds=0)) for n in (28, 42))
    assert chosen < 0.5 * as_many
    assert chosen < half_more


def test_a_replay_has_a_point_for_the_start_and_each_round() -> None:
    pool, held = draws(60, seed=5), draws(40, seed=6)
    plan = ReplayPlan(start=12, num_rounds=2, per_round=4)
    curve = replay(pool, law(pool), held, law(held), objective=OBJECTIVE, plan=plan)
    assert [point.num_runs for point in curve] == [12, 16, 20]
    best = float(law(held).min())
    assert all(p.regret_nats == pytest.approx(p.loss_nats - best) for p in curve)
    assert curve == replay(pool, law(pool), held, law(held), objective=OBJECTIVE, plan=plan)


def test_a_replay_of_more_runs_than_there_are_is_refused() -> None:
    pool = draws(30)
    with pytest.raises(ConfigError, match=r"a replay of 64 runs out of 30.*Start with fewer"):
        replay(pool, law(pool), pool, law(pool), objective=OBJECTIVE, plan=ReplayPlan())


def test_the_bench_compares_every_rule_with_random_runs() -> None:
    weights = draws(120, seed=5)
    runs = Runs(
        NamedArray.of(weights, tuple("abcde")),
        NamedArray.of(law(weights), ("a",)),
        tuple("abcde"),
        ("a",),
        tuple(range(120)),
    )
    cases = plans(["lcb"])
    assert [plan.num_runs for plan in cases.values()] == [64, 128, 64, 64]
    ends = measure(runs, None, OBJECTIVE, cases["64 random"], num_starts=2)
    assert ends[0] != ends[1]
    found = list(records("a, 64 random", ends, "runs kept aside"))
    assert found[0].value == pytest.approx((ends[0].regret_nats + ends[1].regret_nats) / 2)
    assert [record.unit for record in found] == ["nats", "nats", "nats", *["points"] * 3]


@pytest.mark.parametrize("wrong", [{"start": 0}, {"per_round": 0}, {"num_rounds": -1}])
def test_a_plan_without_runs_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 run"):
        ReplayPlan(**wrong)  # type: ignore[arg-type]
