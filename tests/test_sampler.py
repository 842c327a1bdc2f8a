"""The sampler: what it refuses, which sequences a run takes, pools, ranks, plans and stacks."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import (
    MIXTURE,
    FakeShards,
    drawn,
    few,
    mixtures,
    normalised,
    quick,
    sampler,
)

from regmix.data.sampling import order
from regmix.data.sampling.sampler import StackSampler
from regmix.errors import ConfigError, MixtureError, ShardError

# --- what it refuses ---


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -0.5, "0.5", None, True], ids=lambda value: repr(value)
)
def test_a_weight_that_is_no_fraction_is_an_error_naming_the_domain(bad: Any) -> None:
    with pytest.raises(MixtureError, match="'code'"):
        sampler({"code": bad, "web": 0.5})


def test_weights_that_do_not_sum_to_one_are_an_error() -> None:
    with pytest.raises(MixtureError, match=r"sum to 0\.9"):
        sampler({"code": 0.5, "web": 0.4})


def test_an_empty_mixture_is_an_error() -> None:
    with pytest.raises(MixtureError, match="names no domain"):
        sampler({})


def test_an_unknown_domain_is_an_error_naming_the_nearest() -> None:
    with pytest.raises(MixtureError, match="did you mean 'news'"):
        sampler({"code": 1.0, "newz": 0.0})


def test_a_weighted_domain_without_one_whole_sequence_is_an_error() -> None:
    assert sampler({"zoo": 1.0}, seq_len=64).num_sequences == {"zoo": 1}
    with pytest.raises(ShardError, match="'zoo' has 65 tokens"):
        sampler({"code": 0.5, "zoo": 0.5}, seq_len=65)
    assert sampler({"code": 1.0, "zoo": 0.0}, seq_len=65).domains == ("code",)


def test_a_weight_too_small_to_be_dealt_is_announced() -> None:
    with pytest.warns(RuntimeWarning, match="web"):
        assert sampler({"code": 1.0, "web": 1e-17}).domains == ("code",)


@pytest.mark.parametrize("name", ["seq_len", "batch_size"])
def test_a_size_below_one_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        sampler(MIXTURE, **{name: 0})


def test_a_negative_step_is_an_error() -> None:
    with pytest.raises(ConfigError, match="step is -1"):
        sampler().batch(-1)


def test_tokens_of_another_type_are_an_error() -> None:
    with pytest.raises(ShardError, match="float64"):
        sampler({"code": 1.0}, shards=FakeShards({"code": (100,)}, dtype=np.float64))


# --- which sequences ---


def test_a_weight_of_one_part_in_ten_million_is_dealt_on_time() -> None:
    stream = sampler({"code": 1 - 1e-7, "web": 1e-7}, batch_size=1000)
    assert stream.counts(4_000)["web"] == 0
    assert stream.counts(15_000)["web"] in (1, 2)


@given(st.integers(0, 2**40), st.integers(1, 9), st.sampled_from([None, 7]))
@quick
def test_no_sequence_repeats_before_its_domains_epoch_ends(
    seed: int, batch_size: int, cap: int | None
) -> None:
    stream = sampler(
        data_seed=seed, batch_size=batch_size, pool={"code": cap} if cap else None, seq_len=32
    )
    for domain, taken in drawn(stream, 300 // batch_size).items():
        epoch = cap if cap and domain == "code" else stream.num_sequences[domain]
        # A step may hold the end of one epoch and the start of the next, shuffled: counts suffice.
        times = Counter(taken)
        assert max(times.values(), default=0) - (len(taken) // epoch) <= 1
        assert len(times) == min(len(taken), epoch)
        if len(taken) >= epoch:
            assert min(times.values()) >= len(taken) // epoch


@given(mixtures, st.integers(1, 64))
@few
def test_every_step_boundary_is_within_one_sequence_for_any_batch_size(
    raw: tuple[float, ...], batch_size: int
) -> None:
    mixture = normalised(list(raw))
    shards = FakeShards(dict.fromkeys(mixture, (9,)))
    weights = {name: value for name, value in order.integer_weights(mixture).items() if value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # weights below 2^-50
        stream = sampler(mixture, shards=shards, seq_len=8, batch_size=batch_size)
    assert tuple(weights) == stream.domains
    taken = np.zeros(len(weights), dtype=np.int64)
    for step in range(12):
        taken += np.bincount(stream.ids(step)[0], minlength=len(weights))
        asked = np.array(list(weights.values())) * batch_size * (step + 1)
        assert np.abs(taken * 2**50 - asked).max() < 2**50
        assert list(stream.counts(step + 1).values()) == taken.tolist()


@given(st.integers(2, 40), st.integers(0, 2**64))
@few
def test_a_batch_of_any_size_is_a_shuffled_stretch_of_one_stream(
    batch_size: int, seed: int
) -> None:
    one = sampler(batch_size=1, data_seed=seed)
    many = sampler(batch_size=batch_size, data_seed=seed)
    for step in (0, 3):
        first = step * batch_size
        rows = [tuple(one.batch(first + i)[0].tolist()) for i in range(batch_size)]
        batch = many.batch(step)
        assert sorted(rows) == sorted(tuple(row) for row in batch.tolist())
        source = order.shuffle(batch_size, order.mix_key(order.hash_key("step", seed), step))
        assert [rows[i] for i in source] == [tuple(row) for row in batch.tolist()]


def test_batches_are_shuffled_and_differently_at_every_step() -> None:
    stream = sampler({"code": 0.5, "web": 0.5}, batch_size=32)
    orders = {tuple(stream.ids(step)[0].tolist()) for step in range(20)}
    assert len(orders) == 20


def test_epochs_come_in_different_orders() -> None:
    stream = sampler({"code": 1.0}, batch_size=1)
    num = stream.num_sequences["code"]
    taken = drawn(stream, 2 * num)["code"]
    assert sorted(taken[:num]) == sorted(taken[num:]) == list(range(num))
    assert taken[:num] != taken[num:]


def test_the_order_within_a_domain_does_not_depend_on_the_mixture() -> None:
    alone = drawn(sampler({"web": 1.0}, batch_size=1), 120)["web"]
    mixed = drawn(sampler(MIXTURE, batch_size=1), 600)["web"]
    more = FakeShards({"aaa": (900,), "code": (1000,), "web": (2000, 2000)})
    moved = drawn(sampler({"aaa": 0.5, "web": 0.5}, shards=more, batch_size=1), 240)["web"]
    assert mixed == alone[: len(mixed)]
    assert moved == alone[: len(moved)]


def test_pools_are_nested_and_start_the_first_epoch() -> None:
    full = drawn(sampler({"web": 1.0}, batch_size=1), 200)["web"]
    for cap in (5, 50, 100, 199):
        taken = drawn(sampler({"web": 1.0}, batch_size=1, pool={"web": cap}), 3 * cap)["web"]
        assert taken[:cap] == full[:cap]
        assert sorted(taken[cap : 2 * cap]) == sorted(full[:cap])
        assert taken[cap : 2 * cap] != taken[2 * cap :]


@given(st.integers(1, 249), st.integers(1, 249), st.floats(0.1, 0.9))
@few
def test_a_larger_pool_starts_with_the_smaller_whatever_else_is_drawn(
    cap: int, other: int, share: float
) -> None:
    small, large = sorted((cap, other))
    mixture = {"web": share, "code": 1 - share}
    pools = [drawn(sampler(pool={"web": m}), 80)["web"][:m] for m in (small, large)]
    alone = drawn(sampler({"web": 1.0}, batch_size=1), 249)["web"]
    mixed = drawn(sampler(mixture, batch_size=1, pool={"web": large}), 300)["web"]
    assert set(pools[0]) <= set(alone[:small])
    assert set(pools[1]) <= set(alone[:large])
    assert mixed[:large] == alone[: len(mixed[:large])]


def test_a_pool_of_the_whole_domain_is_no_pool() -> None:
    num = sampler().num_sequences["code"]
    plain, pooled = sampler(), sampler(pool={"code": num})
    for step in (0, 40, 90):
        assert np.array_equal(plain.batch(step), pooled.batch(step))


@pytest.mark.parametrize("cap", [0, 10_000])
def test_a_pool_that_the_domain_cannot_give_is_an_error(cap: int) -> None:
    with pytest.raises(MixtureError, match=r"pool of domain 'code' is .* 62 are there"):
        sampler(pool={"code": cap})


def test_a_pool_for_an_unknown_domain_is_an_error() -> None:
    with pytest.raises(MixtureError, match="did you mean 'code'"):
        sampler(pool={"coda": 3})


def test_a_batch_goes_into_the_array_given() -> None:
    out = np.zeros((4, 17), dtype=np.int64)
    assert sampler().batch(3, out=out) is out
    assert np.array_equal(out, sampler().batch(3))
    with pytest.raises(ValueError, match="contiguous array"):
        sampler().batch(3, out=np.zeros((17, 4), dtype=np.int64).T)


def test_a_domain_of_weight_zero_changes_nothing() -> None:
    without, with_zero = sampler(MIXTURE), sampler({**MIXTURE, "zoo": 0.0})
    fewer = FakeShards({"code": (1000,), "news": (300, 17, 4, 500), "web": (2000, 2000)})
    for step in (0, 9, 77):
        assert np.array_equal(without.batch(step), with_zero.batch(step))
        assert np.array_equal(without.batch(step), sampler(MIXTURE, shards=fewer).batch(step))
    assert without.state(9) == with_zero.state(9)


def test_the_order_of_the_mapping_changes_nothing() -> None:
    turned = dict(reversed(MIXTURE.items()))
    assert np.array_equal(sampler(MIXTURE).batch(5), sampler(turned).batch(5))


def test_one_domain_is_dealt_alone() -> None:
    stream = sampler({"web": 1.0})
    assert stream.counts(10) == {"web": 40}
    assert set(stream.ids(3)[0].tolist()) == {0}


def test_another_seed_is_another_order() -> None:
    assert not np.array_equal(sampler(data_seed=1).batch(0), sampler(data_seed=2).batch(0))


# --- plans ---


def test_a_plan_is_what_the_run_takes() -> None:
    stream = sampler(pool={"news": 10})
    taken = drawn(stream, 50)
    for domain, plan in stream.plan(50).items():
        assert plan.sequences == len(taken[domain])
        assert plan.tokens == 16 * len(taken[domain])
        available = 10 if domain == "news" else stream.num_sequences[domain]
        assert plan.epochs == len(taken[domain]) / available


def test_a_plan_beyond_its_epochs_is_an_error_naming_the_domain() -> None:
    stream = sampler(pool={"news": 10})
    assert stream.plan(33, max_epochs=4)["news"].sequences <= 40
    with pytest.raises(MixtureError, match="domain 'news'"):
        stream.plan(100, max_epochs=4)


# --- stacks ---


def test_a_stack_is_its_samplers() -> None:
    samplers = [sampler(MIXTURE), sampler({"web": 1.0})]
    batch = StackSampler(samplers).batch(11)
    assert batch.shape == (2, 4, 17)
    for proxy, stream in enumerate(samplers):
        assert np.array_equal(batch[proxy], stream.batch(11))


def test_a_stack_of_different_sizes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="batch size"):
        StackSampler([sampler(batch_size=4), sampler(batch_size=5)])


def test_an_empty_stack_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no sampler"):
        StackSampler([])


# --- ranks ---


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 12, 24])
def test_the_rows_of_all_ranks_are_the_global_batch(num_ranks: int) -> None:
    whole, rank = sampler(batch_size=24), sampler(batch_size=24)
    size = 24 // num_ranks
    for step in (0, 1, 77):
        parts = [rank.batch(step, rows=(r * size, (r + 1) * size)) for r in range(num_ranks)]
        assert all(part.shape == (size, 17) for part in parts)
        assert np.array_equal(np.concatenate(parts), whole.batch(step))


@pytest.mark.parametrize("rows", [(0, 0), (-1, 2), (2, 5), (3, 2), (4, 4)], ids=str)
def test_rows_that_the_batch_does_not_have_are_an_error(rows: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="of a batch of 4"):
        sampler().batch(0, rows=rows)


def test_a_stack_gives_the_rows_of_a_rank() -> None:
    stack = StackSampler([sampler(MIXTURE), sampler({"web": 1.0})])
    assert np.array_equal(stack.batch(9, rows=(1, 3)), stack.batch(9)[:, 1:3])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_len": "128"}, "seq_len is '128'"),
        ({"batch_size": 4.0}, "batch_size is 4.0"),
        ({"shards": "shards"}, "shards is 'shards'"),
        ({"mixture": "natural"}, "mixture is 'natural'"),
        ({"mixture": [(0, 1.0)]}, "mixture is"),
    ],
    ids=str,
)
def test_an_argument_of_another_kind_is_an_error_that_names_it(
    change: dict[str, Any], named: str
) -> None:
    mixture = change.pop("mixture", MIXTURE)
    with pytest.raises(ConfigError, match=named):
        sampler(mixture, **change)


def test_a_torch_tensor_as_out_is_an_error_that_says_what_to_give() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"\.numpy\(\)"):
        sampler().batch(0, out=torch.empty(4, 17, dtype=torch.int64))
