"""Trade-offs between targets: allowed, not beaten, costed from the optimum, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from regmix.data.groups import Groups
from regmix.data.mixtures import Mixture
from regmix.decision.baselines import Baseline
from regmix.decision.objective import Objective, make_objective
from regmix.decision.optimum import optimize
from regmix.decision.reuse import optimize_frozen
from regmix.decision.searching.constraints import Constraints, make_constraints
from regmix.decision.searching.guard import Guard, make_guard
from regmix.decision.surrogate import Surrogate, fit
from regmix.decision.tradeoffs import (
    Tradeoffs,
    pareto,
    tradeoffs,
    tradeoffs_of,
    write_tradeoffs,
)
from regmix.errors import ConfigError, MixtureError

DOMAINS = ("code", "legal", "maths", "web")
TARGETS = ("python", "law", "wiki")
RATES = np.array([[4.0, 0.1, 1.0, 0.3], [0.2, 3.0, 0.1, 0.5], [0.5, 0.8, 0.3, 2.0]])
OPTIMUM = np.array([0.4, 0.2, 0.0, 0.4])
UNIFORM = np.full(4, 0.25)


@pytest.fixture(scope="module")
def model() -> Surrogate:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), 40)
    losses = 2 + 1.2 * (0.05 + weights @ RATES.T) ** -0.35 + rng.normal(0, 0.005, (40, 3))
    return fit(weights, losses, regressor="gp", domains=DOMAINS, targets=TARGETS)


@pytest.fixture(scope="module")
def mean() -> Objective:
    return make_objective("mean", TARGETS)


def found_for(
    model: Surrogate,
    objective: Objective,
    limits: Constraints | None = None,
    *,
    guard: Guard | None = None,
    seed: int = 0,
) -> Tradeoffs:
    mixtures = {"optimum": OPTIMUM, "uniform": UNIFORM}
    given = limits or make_constraints(DOMAINS)
    return tradeoffs(model, objective, given, mixtures, guard=guard, number=300, seed=seed)


@pytest.fixture(scope="module")
def found(model: Surrogate, mean: Objective) -> Tradeoffs:
    return found_for(model, mean)


def test_pareto_keeps_what_no_other_is_below_in_both() -> None:
    values = np.random.default_rng(1).integers(0, 12, (60, 2)).astype(float)
    kept = pareto(values[:, 0], values[:, 1])
    for row, value in enumerate(values):
        below = (values <= value).all(1) & (values < value).any(1)
        if row in kept:
            assert not below.any()
        else:
            equal = (values[kept] == value).all(1)
            assert below.any() or equal.any()


def test_every_mixture_respects_the_limits_and_what_the_runs_have_seen(
    model: Surrogate, mean: Objective
) -> None:
    limits = make_constraints(DOMAINS, lower={"legal": 0.1}, upper={"web": 0.5})
    found = found_for(model, mean, limits)
    assert limits.satisfied(found.weights, 1e-7).all()
    assert (found.weights <= np.maximum(model.weights.max(0), OPTIMUM) + 1e-9).all()
    assert found.weights.sum(1) == pytest.approx(1)
    assert limits.satisfied(found.best, 1e-7).all()


def test_a_point_of_a_front_is_beaten_by_no_other_on_some_two_targets(found: Tradeoffs) -> None:
    table = np.column_stack([found.objective.of_all(found.losses), found.losses])
    fronts = [pareto(table[:, one], table[:, other]) for one in range(4) for other in range(one)]
    unbeaten = np.unique(np.concatenate(fronts))
    assert set(np.flatnonzero(found.front)) <= set(unbeaten)
    assert 0 < found.front.sum() < len(found.front)


def test_the_fronts_lose_no_point_of_the_objective_when_thinned(
    model: Surrogate, mean: Objective, monkeypatch: pytest.MonkeyPatch, found: Tradeoffs
) -> None:
    monkeypatch.setattr("regmix.decision.tradeoffs._MOST_ON_FRONTS", 0)
    monkeypatch.setattr("regmix.decision.tradeoffs._NUM_CLOUD", 0)
    few = found_for(model, mean)
    assert len(few.losses) < len(found.losses)
    for target in range(3):
        curves = []
        for each in (found, few):
            value = each.objective.of_all(each.losses)
            rows = pareto(value, each.losses[:, target])
            curves.append(np.column_stack([value[rows], each.losses[rows, target]]))
        np.testing.assert_array_equal(curves[0], curves[1])


def test_costs_are_counted_from_the_optimum_with_their_intervals(
    model: Surrogate, found: Tradeoffs
) -> None:
    expected = model.mean(found.best) - model.mean(OPTIMUM[None])
    np.testing.assert_allclose(found.costs[..., 0], expected)
    assert (found.costs[..., 1] <= found.costs[..., 0]).all()
    assert (found.costs[..., 0] <= found.costs[..., 2]).all()
    assert (np.diagonal(found.costs[..., 0]) <= 0).all()
    np.testing.assert_allclose(found.objective_costs[:, 0], expected.mean(1))


@pytest.mark.parametrize("target", TARGETS)
def test_a_targets_own_best_mixture_is_near_what_a_search_finds(
    model: Surrogate, found: Tradeoffs, target: str
) -> None:
    place = TARGETS.index(target)
    best = optimize(model, objective=target, method="exact")
    # Loss ranges over 0.7 nats or more between the runs.
    assert model.mean(found.best)[place, place] - best.loss < 0.02


def test_mixtures_that_a_guard_refuses_are_left_out(model: Surrogate, mean: Objective) -> None:
    best = optimize(model, objective="mean", method="exact").weights
    guard = make_guard(model, Baseline("optimum", best), 0.002)
    given = {"optimum": best}
    found = tradeoffs(model, mean, make_constraints(DOMAINS), given, guard=guard, number=300)
    assert (guard.excess(found.losses) <= 1e-9).all()
    # So tight a guard allows hardly more than neighbours of the optimum: those are looked for.
    assert 0.3 * found.num_judged < found.num_allowed < found.num_judged


def test_the_optimum_stays_even_where_it_breaks_the_guard(
    model: Surrogate, mean: Objective
) -> None:
    guard = make_guard(model, Baseline("uniform", UNIFORM), 0.0)
    found = found_for(model, mean, guard=guard)
    assert (np.abs(found.weights - OPTIMUM).max(1) < 1e-12).any()


def test_the_same_seed_gives_the_same_bytes(
    model: Surrogate, mean: Objective, found: Tradeoffs
) -> None:
    again, other = found_for(model, mean), found_for(model, mean, seed=1)
    assert json.dumps(again.record()) == json.dumps(found.record())
    assert json.dumps(other.record()) != json.dumps(found.record())


def test_no_more_mixtures_are_predicted_than_asked_for(found: Tradeoffs) -> None:
    assert 250 <= found.num_judged <= 300
    assert found.num_allowed == found.num_judged


def test_an_optimums_own_limits_baselines_and_guard_count(model: Surrogate) -> None:
    prior = dict(zip(DOMAINS, (0.4, 0.1, 0.2, 0.3), strict=True))
    given = {"optimum": dict(zip(DOMAINS, OPTIMUM.tolist(), strict=True))}
    best = optimize(
        model, objective="law", prior=prior, upper={"legal": 0.6}, guard="natural", baselines=given
    )
    found = tradeoffs_of(best, model, number=200)
    names = ["optimum", "natural", "uniform", "best observed", "optimum (baseline)"]
    assert list(found.named) == names
    np.testing.assert_allclose(found.named["optimum"][0], best.weights)
    np.testing.assert_allclose(found.named["optimum (baseline)"][0], OPTIMUM)
    assert (found.weights[:, 1] <= 0.6 + 1e-7).all()
    assert best.guard is not None
    assert (best.guard.excess(found.losses) <= 1e-6).all()


def test_frozen_ratios_are_kept_in_every_mixture() -> None:
    groups = Groups(DOMAINS, {"code": 0.75, "maths": 0.25})
    rng = np.random.default_rng(3)
    short = rng.dirichlet(np.ones(3), 24)
    losses = 2 + 1.2 * (0.05 + groups.expand(short) @ RATES.T) ** -0.35
    model = fit(short, losses, regressor="powerlaw", domains=groups.names, targets=TARGETS)
    best, _ = optimize_frozen(model, groups, objective="mean", upper={"maths": 0.1})
    found = tradeoffs_of(best, model, groups, number=200)
    assert found.domains == DOMAINS
    assert groups.representable(found.weights).all()
    assert groups.representable(found.best).all()
    # A quarter of what is kept is maths.
    assert (found.weights[:, 2] <= 0.1 + 1e-7).all()
    np.testing.assert_allclose(found.named["optimum"][0], best.weights)
    np.testing.assert_allclose(found.losses, model.mean(groups.reduce(found.weights)))


def test_the_file_lies_beside_the_optimum_and_says_what_it_rounded(
    tmp_path: Path, found: Tradeoffs
) -> None:
    path = write_tradeoffs(tmp_path / "optimum.yaml", found)
    assert path == tmp_path / "optimum-tradeoffs.json"
    record = json.loads(path.read_text())
    rounded = record["points"]["rounded_to"]
    assert np.abs(np.array(record["points"]["weights"]) - found.weights).max() < rounded["weights"]
    assert np.abs(np.array(record["points"]["losses_nats"]) - found.losses).max() < rounded["nats"]
    # The mixtures that somebody might use keep every digit.
    assert record["mixtures"]["optimum"]["weights"] == OPTIMUM.tolist()
    assert record["payoff"]["law"]["weights"] == found.best[1].tolist()
    assert set(record["payoff"]["law"]["change_nats"]) == set(TARGETS)


def test_mixtures_may_be_named_tables(model: Surrogate, mean: Objective, found: Tradeoffs) -> None:
    table = dict(zip(DOMAINS, OPTIMUM.tolist(), strict=True))
    mixtures = {"optimum": Mixture(table), "uniform": dict.fromkeys(DOMAINS, 0.25)}
    given = tradeoffs(model, mean, make_constraints(DOMAINS), mixtures, number=300)
    np.testing.assert_array_equal(given.losses, found.losses)


def test_without_a_mixture_there_is_nothing_to_count_from(
    model: Surrogate, mean: Objective
) -> None:
    with pytest.raises(ConfigError, match="no mixture to count costs from"):
        tradeoffs(model, mean, make_constraints(DOMAINS), {})


def test_a_mixture_of_other_domains_is_refused(model: Surrogate, mean: Objective) -> None:
    with pytest.raises(MixtureError, match="books"):
        tradeoffs(model, mean, make_constraints(DOMAINS), {"optimum": {"books": 1.0}})
