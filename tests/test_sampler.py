"""The sampler: exact weights and resume, no repeat within an epoch, the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regmix.data import backends, order
from regmix.data.sampler import MixtureSampler, StackSampler, available_backends
from regmix.errors import ConfigError, MixtureError, ShardError

FAST = "numba" if "native" not in available_backends() else "native"
quick = settings(max_examples=40, deadline=None)


class FakeShards:
    """Token t of the d-th domain, over all its files, is d * 10,000 + t."""

    def __init__(self, files: Mapping[str, tuple[int, ...]], dtype: type = np.uint16) -> None:
        self._arrays: dict[str, tuple[NDArray[Any], ...]] = {}
        for d, (domain, lengths) in enumerate(sorted(files.items())):
            tokens: NDArray[Any] = (d * 10_000 + np.arange(sum(lengths))).astype(dtype)
            cuts = np.cumsum(lengths)[:-1]
            self._arrays[domain] = tuple(np.ascontiguousarray(a) for a in np.split(tokens, cuts))

    def domains(self, split: str) -> tuple[str, ...]:
        return tuple(sorted(self._arrays))

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        return self._arrays[domain]


SHARDS = FakeShards({"code": (1000,), "news": (300, 17, 4, 500), "web": (2000, 2000), "zoo": (65,)})
MIXTURE = {"code": 0.5, "news": 0.3, "web": 0.2}


def sampler(mixture: Mapping[str, float] = MIXTURE, **options: Any) -> MixtureSampler:
    options = {"seq_len": 16, "batch_size": 4, "backend": FAST, **options}
    return MixtureSampler(options.pop("shards", SHARDS), mixture, **options)


def drawn(stream: MixtureSampler, num_steps: int) -> dict[str, list[int]]:
    """The sequences taken from each domain, in any order within a step."""
    taken: dict[str, list[int]] = {domain: [] for domain in stream.domains}
    for step in range(num_steps):
        for d, sequence in zip(*stream.ids(step), strict=True):
            taken[stream.domains[d]].append(int(sequence))
    return taken


def normalised(raw: list[float]) -> dict[str, float]:
    total = sum(raw)
    assume(total > 0)
    return {f"d{number:03d}": value / total for number, value in enumerate(raw)}


weight = st.one_of(
    st.floats(0, 1, allow_subnormal=False), st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 1 / 3])
)
mixtures = st.lists(weight, min_size=1, max_size=200).map(tuple)


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


# --- dealing ---


def dealt(mixture: Mapping[str, float], num: int) -> tuple[NDArray[np.int64], list[int]]:
    weights = [value for value in order.integer_weights(mixture).values() if value]
    ones = [1] * len(weights)
    table = order.order_table(weights, ones, ones, ones)
    dealing = order.start_dealing(table, np.zeros(len(weights), dtype=np.int64))
    return order.deal(table, dealing, 1, num)[0], weights


@given(mixtures)
@example((0.5, 0.5))
@example((1.0, 1e-7))
@example(tuple([1e-7] * 199 + [1.0]))
@example(tuple([1.0] * 200))
@quick
def test_every_prefix_is_within_one_sequence_of_the_request(raw: tuple[float, ...]) -> None:
    num = 1500
    domains, weights = dealt(normalised(list(raw)), num)
    counts = np.cumsum(domains[:, None] == np.arange(len(weights)), axis=0, dtype=np.int64)
    asked = np.arange(1, num + 1)[:, None] * np.array(weights)  # below 2^61: exact
    halves = max(2 * (len(weights) - 1), 1)
    bound = 2**50 - 2**50 // halves
    assert np.abs(counts * 2**50 - asked).max() <= (bound if len(weights) > 1 else 0)


@given(mixtures)
@settings(max_examples=15, deadline=None)
def test_dealing_is_tijdemans_rule_as_published(raw: tuple[float, ...]) -> None:
    domains, weights = dealt(normalised(list(raw[:12])), 200)
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


def test_a_weight_of_one_part_in_ten_million_is_dealt_on_time() -> None:
    stream = sampler({"code": 1 - 1e-7, "web": 1e-7}, batch_size=1000)
    assert stream.counts(4_000)["web"] == 0
    assert stream.counts(15_000)["web"] in (1, 2)


# --- which sequences ---


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
    for cap in (5, 50):
        taken = drawn(sampler({"web": 1.0}, batch_size=1, pool={"web": cap}), 3 * cap)["web"]
        assert taken[:cap] == full[:cap]
        assert sorted(taken[cap : 2 * cap]) == sorted(full[:cap])
        assert taken[cap : 2 * cap] != taken[2 * cap :]


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


# --- tokens ---


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_sequence_is_its_tokens_and_one_label_across_files(backend: str, dtype: type) -> None:
    shards = FakeShards({"a": (1, 1, 40, 3, 90, 2), "b": (200,)}, dtype=dtype)
    stream = sampler({"a": 0.5, "b": 0.5}, shards=shards, seq_len=8, backend=backend)
    assert stream.num_sequences == {"a": 17, "b": 24}
    for step in range(15):
        batch = stream.batch(step)
        domains, sequences = stream.ids(step)
        assert batch.shape == (4, 9)
        assert batch.dtype == np.int64
        starts = domains * 10_000 + sequences * 8
        assert np.array_equal(batch, starts[:, None] + np.arange(9))


@pytest.mark.parametrize("backend", available_backends())
def test_the_largest_uint32_token_survives(backend: str) -> None:
    shards = FakeShards({"a": (9,)}, dtype=np.uint32)
    shards.arrays("train", "a")[0][:] = 2**32 - 1
    assert (
        sampler({"a": 1.0}, shards=shards, seq_len=8, backend=backend).batch(0) == 2**32 - 1
    ).all()


@given(
    st.lists(weight, min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(1, 33),
    st.integers(-5, 2**70),
    st.booleans(),
    st.lists(st.integers(0, 60), min_size=0, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_backends_give_identical_bytes(
    raw: list[float],
    seq_len: int,
    batch_size: int,
    seed: int,
    capped: bool,
    cuts: list[int],
) -> None:
    mixture = normalised(raw)
    shards = FakeShards({domain: (*cuts, 50 + 37 * d) for d, domain in enumerate(mixture)})
    pool = dict.fromkeys(mixture, 1) if capped else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        streams = [
            MixtureSampler(
                shards,
                mixture,
                seq_len=seq_len,
                batch_size=batch_size,
                data_seed=seed,
                pool=pool,
                backend=backend,
            )
            for backend in available_backends()
        ]
    for step in (0, 1, 30, 7):
        assert len({stream.batch(step).tobytes() for stream in streams}) == 1
        assert all(stream.counts(40) == streams[0].counts(40) for stream in streams)


def test_the_order_of_this_version_never_changes() -> None:
    digest = hashlib.sha256()
    stream = sampler(pool={"news": 9}, data_seed=7)
    for step in (0, 1, 2, 300, 299):
        digest.update(stream.batch(step).astype("<i8").tobytes())
    assert order.ORDER_VERSION == 1
    assert digest.hexdigest()[:16] == "1e2b689d6065c60a"


def test_a_batch_goes_into_the_array_given() -> None:
    out = np.zeros((4, 17), dtype=np.int64)
    assert sampler().batch(3, out=out) is out
    assert np.array_equal(out, sampler().batch(3))
    with pytest.raises(ValueError, match="contiguous array"):
        sampler().batch(3, out=np.zeros((17, 4), dtype=np.int64).T)


# --- resume ---


@given(st.lists(st.integers(0, 700), min_size=1, max_size=12), st.integers(1, 6))
@quick
def test_any_step_in_any_order_is_the_uninterrupted_stream(
    steps: list[int], batch_size: int
) -> None:
    straight, jumping = sampler(batch_size=batch_size), sampler(batch_size=batch_size)
    stream = [straight.batch(step) for step in range(max(steps) + 1)]
    for step in steps:
        assert np.array_equal(jumping.batch(step), stream[step])


@given(st.integers(0, 900), st.integers(0, 900))
@quick
def test_resume_repeats_no_step_and_skips_none(saved_at: int, then: int) -> None:
    state = json.loads(json.dumps(sampler().state(saved_at)))
    resumed = sampler()
    assert resumed.restore(state) == saved_at
    for step in (saved_at, saved_at + 1, then):
        assert np.array_equal(resumed.batch(step), sampler().batch(step))
    assert resumed.state(saved_at) == state


def test_a_length_of_run_is_nowhere_in_the_order() -> None:
    stream = sampler()
    before = [stream.batch(step) for step in range(5)]
    stream.plan(5)
    stream.plan(5_000)
    assert all(np.array_equal(stream.batch(step), before[step]) for step in range(5))


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


def test_numpy_integers_are_taken_as_numbers() -> None:
    plain = sampler(data_seed=3).batch(5)
    stream = sampler(data_seed=np.int64(3), seq_len=np.int32(16))
    step: Any = np.int64(5)
    assert np.array_equal(stream.batch(step), plain)
    assert json.loads(json.dumps(stream.state(step))) == sampler(data_seed=3).state(5)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 32},
        {"batch_size": 8},
        {"data_seed": 1},
        {"split": "valid"},
        {"pool": {"code": 5}},
        {"mixture": {"code": 0.5, "news": 0.2, "web": 0.3}},
        {"shards": FakeShards({"code": (1001,), "news": (821,), "web": (4100,)})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_another_order_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MixtureError, match="saved data order differs"):
        sampler(**change).restore(sampler().state(3))


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(MixtureError, match="order_version"):
        sampler().restore({**sampler().state(3), "order_version": 0})


@pytest.mark.parametrize(
    "damage",
    [
        {"counts": {"code": 12, "news": 0, "web": 0}},
        {"counts": {"code": 6, "news": 4, "web": "2"}},
        {"counts": {"code": 6, "news": 4}},
        {"counts": None},
        {"step": 4},
        {"step": None},
    ],
    ids=str,
)
def test_damaged_counts_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(MixtureError, match="The checkpoint is damaged"):
        sampler().restore({**sampler().state(3), **damage})


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


# --- backends ---


def test_the_native_backend_is_there_when_it_is_required() -> None:
    if os.environ.get("REGMIX_REQUIRE_NATIVE") != "1":
        pytest.skip("REGMIX_REQUIRE_NATIVE is not set: the extension is optional")
    assert sampler(backend="auto").backend_name == "native"


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean 'native'"):
        sampler(backend="nativ")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make backends fail to load, and forget what was loaded and announced."""

    def break_backends(*names: str) -> None:
        def refuse() -> backends.Backend:
            raise ImportError("broken for this test")

        for name in names:
            monkeypatch.setitem(backends._KINDS, name, refuse)
        backends._load.cache_clear()
        backends._announce.cache_clear()

    yield break_backends
    monkeypatch.undo()
    backends._load.cache_clear()
    backends._announce.cache_clear()


@pytest.mark.parametrize(
    ("missing", "used"), [(("native",), "numba"), (("native", "numba"), "numpy")]
)
def test_a_fallback_is_announced_once_with_its_reason(
    broken: Any, missing: tuple[str, ...], used: str
) -> None:
    broken(*missing)
    with pytest.warns(RuntimeWarning, match="native is not available .broken for this test."):
        assert sampler(backend="auto").backend_name == used
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(backend="auto")
    assert available_backends() == tuple(b for b in backends.BACKENDS if b not in missing)


def test_asking_for_a_backend_that_does_not_work_is_an_error(broken: Any) -> None:
    broken("native")
    with pytest.raises(ConfigError, match="'native' does not work here"):
        sampler(backend="native")
