"""Constraints: what clashes is named, mixtures are moved inside, UniMax is the published one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from search_cases import bowls

from regmix.data.draws import scale_into_bounds
from regmix.decision.baselines import unimax
from regmix.decision.optimum import optimize
from regmix.decision.searching.constraints import make_constraints
from regmix.decision.surrogate import Surrogate
from regmix.errors import ConfigError, ConstraintError

DOMAINS = ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"lower": {"a": 0.6, "b": 0.5}}, r"lower bounds sum to 1.1, above 1 \(a >= 0.6, b >= 0.5"),
        ({"upper": 0.2}, "upper bounds sum to 0.8"),
        ({"lower": {"a": 0.5}, "upper": {"a": 0.3}}, "'a' must be at least 0.5 and at most 0.3"),
        ({"available_tokens": 1e9, "budget_tokens": 20e9}, "fill only 80% of a run of 20B"),
        (
            {
                "lower": {"a": 0.5},
                "available_tokens": {"a": 1e9, "b": 1e10, "c": 1e10, "d": 1e10},
                "budget_tokens": 20e9,
            },
            "'a' must be at least 0.5 by its lower bound, but 4 epochs of its 1B tokens are 0.2",
        ),
        (
            {"upper": {"b": 0.1}, "available_tokens": 1.3e9, "budget_tokens": 20e9},
            "with the upper bounds of b fill only 88%",
        ),
        ({"available_tokens": {"a": 1e9}, "budget_tokens": 1e9}, "available tokens of 'b'"),
    ],
)
def test_constraints_that_clash_are_named(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        make_constraints(DOMAINS, **limits)


def test_half_of_the_token_counts_is_refused() -> None:
    with pytest.raises(ConfigError, match="both token counts"):
        make_constraints(DOMAINS, budget_tokens=1e9)


@pytest.fixture(scope="module")
def corners() -> Surrogate:
    """Return two targets: x wants domain a, y wants b and c."""
    return bowls(np.array([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0]]), "abcd", "xy")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"upper": {"a": 0.5}}, "0.8 of 'a', at most 0.5 (its upper bound)"),
        ({"lower": {"d": 0.3}}, "0 of 'd', at least 0.3 (its lower bound)"),
        (
            {"available_tokens": {"a": 1e9, "b": 9e9, "c": 9e9, "d": 9e9}, "budget_tokens": 1e10},
            "0.8 of 'a', at most 0.4 (4 epochs)",
        ),
    ],
)
def test_guard_that_clashes_is_named_with_bound_target_excess_and_cure(
    corners: Surrogate, limits: dict[str, Any], words: str
) -> None:
    reference = {"a": 0.8, "b": 0.1, "c": 0.1}
    wanted = {"objective": "y", "guard": reference, "guard_tolerance": 0.001, **limits}
    with pytest.raises(ConstraintError) as caught:
        optimize(corners, **wanted)
    assert "within 0.001 nats of 'guard'" in caught.value.what
    assert words in caught.value.what
    assert "loosen those limits" in caught.value.cure
    assert "--extrapolate" not in caught.value.cure
    above = float(caught.value.what.split("is predicted ")[1].split(" nats")[0])
    assert f"nats worse on 'x', {above - 0.001:.4f} beyond" in caught.value.what
    enough = float(caught.value.cure.split("Allow ")[1].split(" nats")[0])
    assert enough == pytest.approx(above, abs=2e-4)
    best = optimize(corners, **{**wanted, "guard_tolerance": enough})
    assert best.guard_changes is not None
    assert best.guard_changes["x"] <= enough + 1e-9
    with pytest.raises(ConstraintError, match="no mixture was found"):
        optimize(corners, **{**wanted, "guard_tolerance": enough - 0.001})


def test_guard_beyond_all_runs_is_named_with_its_cure(corners: Surrogate) -> None:
    share = (0.6 - 0.25) / 0.75  # corners drawn to the centre so far that the largest is 0.6
    drawn = share * corners.weights + (1 - share) * 0.25
    limited = replace(corners, weights=drawn)
    wanted: dict[str, Any] = {"objective": "y", "guard": {"a": 1.0}, "guard_tolerance": 0.0}
    with pytest.raises(ConstraintError, match=r"at most 0.6 \(the largest weight.*--extrapolate"):
        optimize(limited, **wanted)
    assert optimize(limited, extrapolate=True, **wanted).mixture["a"] == pytest.approx(1.0)


def test_guard_whose_reference_is_allowed_is_never_refused(corners: Surrogate) -> None:
    for objective in ("x", "y", "worst"):
        best = optimize(corners, objective=objective, guard="best observed", guard_tolerance=0)
        assert best.guard_changes is not None
        assert max(best.guard_changes.values()) <= 1e-9


@pytest.mark.parametrize("tolerance", [-0.01, float("nan"), float("inf")])
def test_tolerance_that_is_none_is_refused(corners: Surrogate, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="guard_tolerance is"):
        optimize(corners, guard="uniform", guard_tolerance=tolerance)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unifrom", r"unknown guard 'unifrom' \(did you mean 'uniform'"),
        ("natural", "as the prior"),
        ("unimax", "--tokens"),
    ],
)
def test_unknown_guard_is_refused_with_a_cure(corners: Surrogate, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimize(corners, guard=name)


def test_penalty_without_a_prior_is_refused(corners: Surrogate) -> None:
    with pytest.raises(ConfigError, match="needs a prior"):
        optimize(corners, kl=0.05)


@pytest.mark.parametrize("kl", [-0.1, float("nan"), float("inf")])
def test_penalty_that_is_none_is_refused(corners: Surrogate, kl: float) -> None:
    with pytest.raises(ConfigError, match="kl is"):
        optimize(corners, kl=kl, prior="uniform")


def test_penalty_names_the_domain_that_the_prior_lacks(corners: Surrogate) -> None:
    prior = {"a": 0.4, "b": 0.3, "c": 0.3}
    with pytest.raises(ConstraintError, match=r"allows 'd' no weight.*--upper d=0"):
        optimize(corners, kl=0.05, prior=prior)
    best = optimize(corners, kl=0.05, prior=prior, upper={"d": 0})
    assert best.mixture["d"] == 0
    assert best.divergence_nats is not None


def test_unimax_is_the_hand_worked_one() -> None:
    # 120 tokens over 4 domains, 2 epochs: 30 each, but a holds 5 and d 12. Smallest first: a gets
    # 10, then 110 over 3 is 36.67 > 24, so d gets 24; the other two share the remaining 86.
    found = unimax(np.array([5.0, 1000.0, 60.0, 12.0]), 120.0, 2.0)
    assert found == pytest.approx([10 / 120, 43 / 120, 43 / 120, 24 / 120])
    assert unimax(np.full(4, 1e9), 1e6, 1.0) == pytest.approx([0.25] * 4)


def test_unimax_is_compared_only_where_tokens_are_counted(corners: Surrogate) -> None:
    counted = {"available_tokens": {"a": 5, "b": 1000, "c": 60, "d": 12}, "budget_tokens": 120}
    best = optimize(corners, **counted, max_epochs=2, method="simulate")
    by_name = {entry.name: entry for entry in best.baselines}
    assert by_name["unimax"].weights == pytest.approx(
        {"a": 10 / 120, "b": 43 / 120, "c": 43 / 120, "d": 0.2}
    )
    assert by_name["unimax"].feasible
    assert not by_name["uniform"].feasible
    for unlimited in ({}, {**counted, "max_epochs": None}):
        without = optimize(corners, **unlimited, method="simulate")
        assert "unimax" not in {entry.name for entry in without.baselines}


def test_mixtures_are_moved_inside_as_by_bisection() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lower = rng.dirichlet(np.ones(6)) * rng.uniform(0, 0.9) * (rng.random(6) < 0.5)
        upper = np.minimum(1, lower + rng.dirichlet(np.ones(6)) * rng.uniform(1.2, 6))
        if upper.sum() < 1.001:
            continue
        limits = make_constraints("abcdef", lower=lower, upper=upper)
        draws = rng.dirichlet(np.full(6, 0.3), 300)
        moved = limits.moved_inside(draws)
        assert len(moved) == len(draws)
        assert limits.satisfied(moved).all()
        assert np.abs(moved.sum(1) - 1).max() < 1e-12
        outside = ~limits.satisfied(draws)
        touched = np.where(draws > 0, draws, 1e-9)[outside]
        slow = scale_into_bounds(touched, limits.lower, limits.upper)
        assert np.abs(moved[outside] - slow).max() < 1e-9
        assert np.array_equal(moved[~outside], draws[~outside])
