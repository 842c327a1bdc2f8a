"""The backends: the same bytes from C++ with any instructions, from Numba and from NumPy."""

from __future__ import annotations

import hashlib
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sampler_cases import FakeShards, normalised, sampler, weight

from regmix.data.sampling import backends, order
from regmix.data.sampling.sampler import MixtureSampler, available_backends
from regmix.errors import ConfigError

NATIVE: Any = (
    importlib.import_module("regmix._sampler") if "native" in available_backends() else None
)


def _variants() -> list[tuple[str, str | None]]:
    """(backend, its vector instructions): all that this machine can run."""
    found: list[tuple[str, str | None]] = [
        (backend, None) for backend in available_backends() if backend != "native"
    ]
    for isa in ("scalar", "avx2", "avx512") if NATIVE else ():
        with instructions(isa) as taken:
            if taken == isa:
                found.append(("native", isa))
    return found


@contextmanager
def instructions(isa: str | None) -> Iterator[str | None]:
    """Use these vector instructions, or the best below; yield those in use."""
    if isa is None:
        yield None
        return
    before = NATIVE.isa()
    try:
        yield NATIVE.set_isa(getattr(NATIVE.Isa, isa)).name
    finally:
        NATIVE.set_isa(before)


VARIANTS = _variants()


def test_all_backends_and_the_lesser_instructions_are_compared() -> None:
    assert {("numba", None), ("numpy", None)} <= set(VARIANTS)
    if NATIVE:
        assert {("native", "scalar"), ("native", NATIVE.isa().name)} <= set(VARIANTS)


class RandomShards:
    """Files of any lengths and types; `odd` begins every array at an odd address."""

    def __init__(
        self, files: Mapping[str, list[tuple[int, bool]]], seed: int, *, odd: bool = False
    ) -> None:
        draw = np.random.default_rng(seed)
        self._arrays: dict[str, tuple[NDArray[Any], ...]] = {}
        for domain, lengths in files.items():
            arrays: list[NDArray[Any]] = []
            for length, wide in lengths:
                kind, limit = (np.uint32, 2**31) if wide else (np.uint16, 2**16)
                tokens = draw.integers(0, limit, length).astype(kind)
                if odd:
                    tokens = np.frombuffer(b"x" + tokens.tobytes(), np.uint8)[1:].view(kind)
                arrays.append(tokens)
            self._arrays[domain] = tuple(arrays)

    def domains(self, split: str) -> tuple[str, ...]:
        return tuple(sorted(self._arrays))

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        return self._arrays[domain]


@given(
    raw=st.lists(weight, min_size=1, max_size=5),
    seq_len=st.integers(1, 130),
    batch_size=st.integers(1, 33),
    seed=st.integers(-5, 2**70),
    files=st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=4),
    dtype=st.sampled_from([np.int64, np.int32, np.uint16]),
    shift=st.integers(0, 9),
    capped=st.booleans(),
    odd=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_every_variant_gives_the_tokens_byte_for_byte(
    raw: list[float],
    seq_len: int,
    batch_size: int,
    seed: int,
    files: list[tuple[int, bool]],
    dtype: type,
    shift: int,
    capped: bool,
    odd: bool,
) -> None:
    if dtype is np.uint16:
        files = [(length, False) for length, _ in files]
    mixture = normalised(raw)
    lengths = {name: [*files, (seq_len + 1 + 37 * d, False)] for d, name in enumerate(mixture)}
    shards = RandomShards(lengths, seed % 2**32, odd=odd)
    seen: set[bytes] = set()
    for backend, isa in VARIANTS:
        with instructions(isa), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # weights below 2^-50
            stream = MixtureSampler(
                shards,
                mixture,
                seq_len=seq_len,
                batch_size=batch_size,
                data_seed=seed,
                pool=dict.fromkeys(mixture, 1) if capped else None,
                backend=backend,
            )
            everything = b""
            for step in (0, 1, 30, 7):
                rows = (step % batch_size, batch_size)
                shape = stream.batch_shape(rows)
                room: NDArray[Any] = np.full(shift + shape[0] * shape[1] + 9, 77, dtype=dtype)
                out = room[shift:-9].reshape(shape)  # begins anywhere, as a row of a batch does
                assert stream.batch(step, out=out, rows=rows) is out
                assert (room[:shift] == 77).all()
                assert (room[-9:] == 77).all()
                everything += out.tobytes()
            domains, sequences = stream.ids(step)
            for row, d, sequence in zip(out, domains[rows[0] :], sequences[rows[0] :], strict=True):
                tokens = np.concatenate(shards.arrays("train", stream.domains[d]))
                assert np.array_equal(row, tokens[sequence * seq_len :][: seq_len + 1])
            seen.add(everything + repr((domains.tolist(), stream.counts(40))).encode())
    assert len(seen) == 1


@pytest.mark.parametrize(("backend", "isa"), VARIANTS)
@pytest.mark.parametrize("num_domains", [1, 2, 7, 8, 9, 100, 1000])
def test_every_variant_deals_the_same_order(
    backend: str, isa: str | None, num_domains: int
) -> None:
    weights = np.array([1.0 + 5 * (number % 3) for number in range(num_domains)])  # many ties
    mixture = {f"{d:03d}": share for d, share in enumerate((weights / weights.sum()).tolist())}
    integers = list(order.integer_weights(mixture).values())
    sizes = [1 + 13 * d for d in range(num_domains)]
    pools = [1 + d for d in range(num_domains)]
    table = order.order_table(integers, sizes, pools, range(num_domains))
    dealings = [order.start_dealing(table, np.zeros(num_domains, np.int64)) for _ in range(2)]
    kernels = [backends.load_backend("numpy"), backends.load_backend(backend)]
    for step, size in enumerate([1, 63, 64, 65, 128, 700]):
        made = []
        for dealing, kernel in zip(dealings, kernels, strict=True):
            ids = np.empty((2, size), dtype=np.int64)
            first = int(dealing[order.COUNT].sum()) + 1
            with instructions(isa):
                kernel.order(table, dealing, first, 2**63 + step, ids[0], ids[1])
            made.append(ids)
        assert np.array_equal(made[0], made[1])
        assert np.array_equal(dealings[0], dealings[1])


@pytest.mark.parametrize("backend", available_backends())
def test_uint16_rows_are_refused_where_tokens_are_wider(backend: str) -> None:
    shards = RandomShards({"a": [(50, False), (50, True)]}, 1)
    stream = sampler({"a": 1.0}, shards=shards, backend=backend)
    with pytest.raises(ValueError, match="which uint16 cannot hold"):
        stream.batch(0, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float32, ">i8"], ids=str)
def test_a_type_that_no_batch_has_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="use int64, int32 or uint16"):
        sampler().batch(0, dtype=dtype)


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "numpy"])
def test_a_domain_or_sequence_that_is_not_there_is_never_read(backend: str) -> None:
    gather = backends.load_backend(backend).gather()
    slot = np.array([gather.add([np.arange(33, dtype=np.uint16)])])
    out = np.empty((1, 17), dtype=np.int64)
    gather.fill(slot, np.array([0]), np.array([1]), 16, out)
    for domain, sequence in ((0, 2), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(IndexError):
            gather.fill(slot, np.array([domain]), np.array([sequence]), 16, out)
    with pytest.raises(IndexError):
        gather.fill(slot + 1, np.array([0]), np.array([0]), 16, out)


@pytest.mark.parametrize("backend", available_backends())
def test_the_largest_uint32_token_survives(backend: str) -> None:
    shards = FakeShards({"a": (9,)}, dtype=np.uint32)
    shards.arrays("train", "a")[0][:] = 2**32 - 1
    assert (
        sampler({"a": 1.0}, shards=shards, seq_len=8, backend=backend).batch(0) == 2**32 - 1
    ).all()


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


def test_the_order_of_this_version_never_changes() -> None:
    digest = hashlib.sha256()
    stream = sampler(pool={"news": 9}, data_seed=7)
    for step in (0, 1, 2, 300, 299):
        digest.update(stream.batch(step).astype("<i8").tobytes())
    assert order.ORDER_VERSION == 1
    assert digest.hexdigest()[:16] == "1e2b689d6065c60a"


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
