"""The order: integer weights, every prefix within one sequence of the request, permutations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampler_cases import few, mixtures, normalised, quick

from regmix.data.sampling import order
from regmix.data.sampling.backends import available_backends, load_backend
from regmix.errors import MixtureError

# --- weights ---


@given(mixtures)
@quick
def test_integer_weights_sum_exactly_and_stay_within_one_unit(raw: tuple[float, ...]) -> None:
    mixture = normalised(list(raw))
    integers = order.integer_weights(mixture)
    assert sum(integers.values()) == 1 << 50
    total = sum(Fraction(value) for value in mixture.values())
    for domain, value in mixture.items():
        assert abs(integers[domain] - Fraction(value) / total * 2**50) < 1
        assert value > 0 or integers[domain] == 0


def test_ties_of_the_largest_remainder_go_by_domain_name() -> None:
    third = 1 / 3
    integers = order.integer_weights({"b": third, "c": third, "a": third})
    assert list(integers) == ["a", "b", "c"]
    assert integers["a"] == integers["b"] + 1 == integers["c"] + 1


def test_a_sum_beyond_the_tolerance_is_an_error_and_one_within_is_not() -> None:
    assert sum(order.integer_weights({"a": 0.5, "b": 0.5000009}).values()) == 1 << 50
    for wrong in (0.500002, 0.499998):
        with pytest.raises(MixtureError, match="make them sum to 1"):
            order.integer_weights({"a": 0.5, "b": wrong})


# --- dealing ---


def start(mixture: Mapping[str, float]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """The table and the first dealing of a mixture, and its positive weights."""
    weights = [value for value in order.integer_weights(mixture).values() if value]
    ones = [1] * len(weights)
    table = order.order_table(weights, ones, ones, ones)
    return table, order.start_dealing(table, np.zeros(len(weights), dtype=np.int64)), weights


def bound(num_domains: int) -> int:
    """The largest error of a count, in parts of 2^50."""
    return 2**50 - 2**50 // (2 * (num_domains - 1)) if num_domains > 1 else 0


@given(mixtures)
@example((0.5, 0.5))
@example((1.0,))
@example((1.0, 1e-7))
@example((0.0, 1.0, 0.0))
@example((5e-324, 1.0))
@example(tuple([1e-7] * 999 + [1.0]))
@example(tuple([1.0] * 1000))
@quick
def test_every_prefix_is_within_one_sequence_of_the_request(raw: tuple[float, ...]) -> None:
    num = 1500
    table, dealing, weights = start(normalised(list(raw)))
    domains = order.deal(table, dealing, 1, num)[0]
    counts = np.cumsum(domains[:, None] == np.arange(len(weights)), axis=0, dtype=np.int64)
    asked = np.arange(1, num + 1)[:, None] * np.array(weights)  # below 2^61: exact
    assert np.abs(counts * 2**50 - asked).max() <= bound(len(weights))


@pytest.mark.parametrize("backend", available_backends())
@given(raw=mixtures, sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40))
@few
def test_every_backend_deals_the_same_sequence_after_sequence(
    backend: str, raw: tuple[float, ...], sizes: list[int]
) -> None:
    table, dealing, weights = start(normalised(list(raw)))
    by_one, by_some = dealing.copy(), dealing.copy()
    kernels = load_backend(backend)
    domains, _ = order.deal(table, dealing, 1, sum(sizes))
    counts = np.zeros(len(weights), dtype=np.int64)
    for i, domain in enumerate(domains.tolist(), start=1):
        kernels.advance(table, by_one, i, 1)
        counts[domain] += 1
        assert np.array_equal(by_one[order.COUNT], counts)
    first = 1
    for size in sizes:  # batches of any sizes hold the same sequences
        kernels.advance(table, by_some, first, size)
        first += size
    assert np.array_equal(by_one, dealing)
    assert np.array_equal(by_some, dealing)


@given(mixtures, st.integers(0, 400))
@few
def test_the_dealing_is_a_function_of_the_counts(raw: tuple[float, ...], num: int) -> None:
    table, dealing, _ = start(normalised(list(raw)))
    order.deal(table, dealing, 1, num)
    assert np.array_equal(order.start_dealing(table, dealing[order.COUNT]), dealing)


@pytest.mark.parametrize("backend", available_backends())
@given(raw=mixtures, rounds=st.integers(1, 2000))
@few
def test_after_2_to_the_50_sequences_the_order_begins_again(
    backend: str, raw: tuple[float, ...], rounds: int
) -> None:
    table, dealing, weights = start(normalised(list(raw)))
    counts = np.array(weights, dtype=np.int64) * rounds  # exact: nothing is owed to any domain
    late = order.start_dealing(table, counts)
    kernels = load_backend(backend)
    kernels.advance(table, dealing, 1, 300)
    kernels.advance(table, late, 2**50 * rounds + 1, 300)
    assert np.array_equal(late[order.COUNT] - counts, dealing[order.COUNT])
    assert np.array_equal(late[order.DEADLINE] - 2**50 * rounds, dealing[order.DEADLINE])
    assert np.array_equal(late[order.DEADLINE_SLACK], dealing[order.DEADLINE_SLACK])


@given(mixtures)
@few
def test_dealing_is_tijdemans_rule_as_published(raw: tuple[float, ...]) -> None:
    table, dealing, weights = start(normalised(list(raw[:12])))
    domains = order.deal(table, dealing, 1, 200)[0]
    shares = [Fraction(value, 2**50) for value in weights]
    half = Fraction(1, 2 * (len(shares) - 1)) if len(shares) > 1 else Fraction(0)
    counts = [0] * len(shares)
    for i, domain in enumerate(domains.tolist(), start=1):
        deficits = [share * i - count for share, count in zip(shares, counts, strict=True)]
        allowed = [
            (-((deficit - 1 + half) // share) + i, d)
            for d, (deficit, share) in enumerate(zip(deficits, shares, strict=True))
            if deficit >= half
        ]
        assert domain == min(allowed)[1]
        counts[domain] += 1


# --- permutations and shuffles ---


@given(
    st.integers(1, 400), st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 3, 127, 128, 129, 1000])
)
@quick
def test_permute_is_a_permutation(size: int, key: int, other_size: int) -> None:
    for n in (size, other_size):
        index = np.arange(n, dtype=np.uint64)
        image = order.permute(index, np.full(n, n, np.uint64), np.full(n, key, np.uint64))
        assert np.array_equal(np.sort(image), index)


def test_permutations_of_few_elements_are_uniform() -> None:
    num = 24_000
    keys = np.array([order.mix_key(1, k) for k in range(num)], dtype=np.uint64)
    size = np.full(num, 4, np.uint64)
    images = [order.permute(np.full(num, j, np.uint64), size, keys) for j in range(4)]
    placed = Counter(zip(*(image.tolist() for image in images), strict=True))
    shuffled = Counter(tuple(order.shuffle(4, order.mix_key(2, k)).tolist()) for k in range(num))
    for counts in (placed, shuffled):
        assert len(counts) == 24
        # Chi-square with 23 degrees of freedom: 64.3 is its 1 - 1e-5 quantile.
        assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 64.3


@pytest.mark.parametrize("backend", available_backends())
@given(
    size=st.integers(1, 400),
    cap=st.integers(1, 400),
    key=st.integers(0, 2**64 - 1),
    batch_size=st.integers(1, 130),
)
@settings(max_examples=25, deadline=None)
def test_an_epoch_takes_every_sequence_of_its_pool_once(
    backend: str, size: int, cap: int, key: int, batch_size: int
) -> None:
    pool = min(cap, size)
    table = order.order_table([1 << 50], [size], [pool], [key])
    dealing = order.start_dealing(table, np.zeros(1, dtype=np.int64))
    epochs = []
    domains = np.empty(batch_size, dtype=np.int64)
    for first in range(1, 2 * pool + 1, batch_size):
        sequences = np.empty(batch_size, dtype=np.int64)
        load_backend(backend).order(table, dealing, first, 5, domains, sequences)
        back = np.empty_like(sequences)
        back[order.shuffle(batch_size, 5)] = sequences
        epochs += back.tolist()
    one, two = epochs[:pool], epochs[pool : 2 * pool]
    assert len(set(one)) == pool
    assert set(one) == set(two)
    assert 0 <= min(one) <= max(one) < size
    assert pool < 12 or one != two
