"""Frozen domains as one: the way there and back, bounds, and tables that break the ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regmix.data.groups import KEPT, Groups, find_groups
from regmix.errors import ConstraintError, MixtureError

DOMAINS = ("a", "b", "c", "d")
GROUPS = Groups(DOMAINS, {"a": 0.5, "c": 0.3, "d": 0.2})


@st.composite
def groups_and_points(draw: st.DrawFn) -> tuple[Groups, np.ndarray]:
    """Frozen ratios of some of up to 8 domains, and mixtures of the short space."""
    num = draw(st.integers(2, 8))
    num_frozen = draw(st.integers(1, num - 1))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    names = tuple(f"d{number}" for number in range(num))
    frozen = rng.choice(num, num_frozen, replace=False)
    shares = rng.dirichlet(np.full(num_frozen, 0.5))
    groups = Groups(names, {names[i]: float(s) for i, s in zip(frozen, shares, strict=True)})
    return groups, rng.dirichlet(np.ones(len(groups.names)), 5)


@given(groups_and_points())
@settings(max_examples=60, deadline=None)
def test_expand_and_reduce_are_inverse(case: tuple[Groups, np.ndarray]) -> None:
    groups, short = case
    whole = groups.expand(short)
    assert whole.shape == (5, len(groups.domains))
    np.testing.assert_allclose(whole.sum(1), 1, rtol=0, atol=1e-12)
    assert groups.representable(whole).all()
    np.testing.assert_allclose(groups.reduce(whole), short, rtol=0, atol=1e-12)
    np.testing.assert_allclose(groups.expand(groups.reduce(whole)), whole, rtol=0, atol=1e-12)


@given(groups_and_points(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_bounds_hold_in_one_space_where_they_hold_in_the_other(
    case: tuple[Groups, np.ndarray], seed: int
) -> None:
    groups, short = case
    rng = np.random.default_rng(seed)
    whole = groups.expand(short)
    ratios = np.array([groups.ratios.get(name, 1.0) for name in groups.domains])
    upper = dict(zip(groups.domains, (rng.random(len(ratios)) * ratios).tolist(), strict=True))
    lower = {name: 0.4 * bound for name, bound in upper.items()}
    low, high = groups.reduce_lower(lower), groups.reduce_upper(upper)
    inside = (whole <= list(upper.values())).all(1) & (whole >= list(lower.values())).all(1)
    expected = (short <= [high.get(n, 1.0) for n in groups.names]).all(1)
    expected &= (short >= [low.get(n, 0.0) for n in groups.names]).all(1)
    np.testing.assert_array_equal(inside, expected)


@given(groups_and_points(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_epochs_of_the_virtual_domain_are_the_most_of_any_frozen_one(
    case: tuple[Groups, np.ndarray], seed: int
) -> None:
    groups, short = case
    tokens = np.random.default_rng(seed).uniform(1e3, 1e6, len(groups.domains))
    reduced = groups.reduce_tokens(dict(zip(groups.domains, tokens.tolist(), strict=True)))
    places = [groups.domains.index(name) for name in groups.frozen]
    most = (groups.expand(short) / tokens)[:, places].max(1)
    np.testing.assert_allclose(short[:, 0] / reduced[KEPT], most, rtol=1e-9)


def test_the_virtual_domain_comes_first_and_free_ones_keep_their_order() -> None:
    assert GROUPS.names == (KEPT, "b")
    np.testing.assert_allclose(GROUPS.expand(np.array([[0.6, 0.4]])), [[0.3, 0.4, 0.18, 0.12]])


def test_a_mixture_of_other_ratios_is_refused_by_name() -> None:
    table = np.array([[0.3, 0.4, 0.18, 0.12], [0.3, 0.4, 0.12, 0.18]])
    assert GROUPS.representable(table).tolist() == [True, False]
    with pytest.raises(MixtureError, match=r"mixture 1: 'c' has 0.12, and .* 0.18 of 0.6"):
        GROUPS.reduce(table)
    with pytest.raises(MixtureError, match="mixture 17"):
        GROUPS.reduce(table, [16, 17])


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"a": 0.5, "e": 0.5}, "unknown domain 'e'"),
        ({"a": 0.5, "b": 0.4}, "sum to 0.9"),
        ({"a": 1.5, "b": -0.5}, "not within 0 and 1"),
        ({"a": math.nan, "b": 1.0}, "not within 0 and 1"),
        ({}, "sum to 0"),
    ],
)
def test_ratios_that_are_none_are_refused(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        Groups(DOMAINS, ratios)


def test_a_lower_bound_beyond_a_frozen_ratio_is_refused() -> None:
    with pytest.raises(ConstraintError, match=r"'c' must be at least 0\.4, .* most 0\.3"):
        GROUPS.reduce_lower({"c": 0.4})


def test_a_domain_frozen_at_zero_stays_there_and_bounds_nothing() -> None:
    groups = Groups(DOMAINS, {"a": 1.0, "c": 0.0})
    assert groups.expand(np.array([[0.5, 0.2, 0.3]]))[0].tolist() == [0.5, 0.2, 0.0, 0.3]
    assert groups.reduce_upper({"c": 0.1}) == {}
    assert groups.reduce_tokens({"a": 10, "b": 1, "c": 1, "d": 1})[KEPT] == 10
    with pytest.raises(ConstraintError, match="at most 0 of"):
        groups.reduce_lower({"c": 0.1})


def test_a_table_shows_its_frozen_group() -> None:
    rng = np.random.default_rng(0)
    table = GROUPS.expand(rng.dirichlet([1, 1], 12))
    found = find_groups(table, DOMAINS)
    assert found is not None
    assert found.ratios == pytest.approx(GROUPS.ratios)
    np.testing.assert_allclose(found.reduce(table), GROUPS.reduce(table))


def test_a_table_of_free_domains_shows_no_group() -> None:
    rng = np.random.default_rng(0)
    assert find_groups(rng.dirichlet(np.ones(6), 12), tuple("abcdef")) is None
    # One mixture with both domains shows no ratio of them.
    sparse = np.eye(4)[[0, 1, 0, 1]] * 1.0
    sparse = np.vstack([sparse, [[0, 0, 0.5, 0.5]]])
    assert find_groups(sparse, DOMAINS) is None
