"""The ring: the sampler's batches whatever the threads, depth and rows; it ends and never hangs."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_cases import FAST, MIXTURE, FakeShards, no_longer_than, sampler

from regmix.data.sampling.order import NEVER, RELEASE
from regmix.data.sampling.ring import BatchRing
from regmix.data.sampling.sampler import MixtureSampler, StackSampler
from regmix.errors import ConfigError

BACKENDS = sorted({FAST, "numpy"})
every_backend = pytest.mark.parametrize("backend", BACKENDS)
MIXTURES = [MIXTURE, {"web": 1.0}, {"code": 0.1, "zoo": 0.9}]


@pytest.fixture(autouse=True)
def _hanging_is_failing() -> Iterator[None]:
    with no_longer_than(60):
        yield


def taken(ring: BatchRing) -> list[tuple[int, bytes]]:
    with ring:
        return [(step, batch.tobytes()) for step, batch in ring]


def expected(stream: Any, start: int, stop: int, **options: Any) -> list[tuple[int, bytes]]:
    return [(step, stream.batch(step, **options).tobytes()) for step in range(start, stop)]


# --- the same batches ---


@every_backend
@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("depth", [None, 2, 3, 4, 9])
@pytest.mark.parametrize("assist", [True, False])
def test_threads_and_depth_change_no_byte(
    backend: str, threads: int, depth: int | None, assist: bool
) -> None:
    threads = max(threads, 1 - assist)
    ring = BatchRing(sampler(backend=backend), stop=60, threads=threads, depth=depth, assist=assist)
    assert taken(ring) == expected(sampler(), 0, 60)


@every_backend
@given(
    start=st.sampled_from([0, 1, 5, 255, 256, 257, 700]),
    num_steps=st.integers(0, 20),
    threads=st.integers(0, 4),
    depth=st.integers(2, 7),
    num_proxies=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    first_row=st.integers(0, 8),
    dtype=st.sampled_from([np.int64, np.int32, np.uint16]),
)
@settings(max_examples=30, deadline=None)
def test_a_ring_of_any_shape_gives_the_batches_of_the_sampler(
    backend: str,
    start: int,
    num_steps: int,
    threads: int,
    depth: int,
    num_proxies: int,
    batch_size: int,
    first_row: int,
    dtype: Any,
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "backend": backend}
    samplers = [sampler(mixture, **options) for mixture in MIXTURES[:num_proxies]]
    stream = StackSampler(samplers) if num_proxies > 1 else samplers[0]
    rows = (min(first_row, batch_size - 1), batch_size)
    ring = BatchRing(
        stream,
        start=start,
        stop=start + num_steps,
        threads=threads,
        depth=depth,
        dtype=dtype,
        rows=rows,
    )
    assert taken(ring) == expected(stream, start, start + num_steps, rows=rows, dtype=dtype)


@every_backend
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_rings_of_all_ranks_make_the_global_batches(backend: str, num_ranks: int) -> None:
    whole, size = sampler(batch_size=24), 24 // num_ranks
    streams = [sampler(batch_size=24, backend=backend) for _ in range(num_ranks)]
    rings = [
        BatchRing(stream, stop=9, rows=(r * size, (r + 1) * size), threads=1 + r % 2)
        for r, stream in enumerate(streams)
    ]
    for parts in zip(*rings, strict=True):
        steps, batches = zip(*parts, strict=True)
        assert set(steps) == {steps[0]}
        assert np.array_equal(np.concatenate(batches), whole.batch(steps[0]))
    for ring in rings:
        ring.close()


@every_backend
def test_the_stop_changes_nothing_before_it(backend: str) -> None:
    short = taken(BatchRing(sampler(backend=backend), stop=7, threads=2))
    longer = taken(BatchRing(sampler(backend=backend), stop=31, threads=2))
    with BatchRing(sampler(backend=backend), threads=2) as endless:
        first = [(step, batch.tobytes()) for (step, batch), _ in zip(endless, short, strict=False)]
    assert len(short) == 7
    assert len(longer) == 31
    assert short == longer[:7] == first


@every_backend
def test_a_ring_takes_up_a_restored_run(backend: str) -> None:
    resumed = sampler(backend=backend)
    start = resumed.restore(sampler().state(300))
    ring = BatchRing(resumed, start=start, stop=start + 10, threads=2)
    assert taken(ring) == expected(sampler(), 300, 310)


@every_backend
def test_the_sampler_stays_free_while_its_ring_runs(backend: str) -> None:
    stream = sampler(backend=backend)
    with BatchRing(stream, stop=100, threads=2) as ring:
        for step, batch in ring:
            assert np.array_equal(stream.batch(99 - step), sampler().batch(99 - step))
            assert np.array_equal(batch, sampler().batch(step))


@every_backend
def test_other_samplers_may_open_domains_while_a_ring_runs(backend: str) -> None:
    shards = FakeShards({f"d{d:03d}": (400,) for d in range(60)})
    reference = FakeShards({f"d{d:03d}": (400,) for d in range(60)})
    first = sampler({"d000": 1.0}, shards=shards, backend=backend)
    alone = sampler({"d000": 1.0}, shards=reference)
    with BatchRing(first, stop=60, threads=2) as ring:
        for step, batch in ring:
            assert np.array_equal(batch, alone.batch(step))
            name = f"d{step:03d}"
            other = sampler({name: 1.0}, shards=shards, backend=backend)
            assert np.array_equal(other.batch(0), sampler({name: 1.0}, shards=reference).batch(0))


@every_backend
def test_proxies_of_different_shards_may_share_a_ring(backend: str) -> None:
    other = FakeShards({"web": (5000,)})
    stream = StackSampler(
        [sampler(backend=backend), sampler({"web": 1.0}, shards=other, backend=backend)]
    )
    assert taken(BatchRing(stream, stop=9)) == expected(stream, 0, 9)


# --- buffers ---


@every_backend
def test_batches_lie_in_the_buffers_given(backend: str) -> None:
    torch = pytest.importorskip("torch")
    buffers = [torch.empty(4, 17, dtype=torch.int64).numpy() for _ in range(3)]
    with BatchRing(sampler(backend=backend), stop=20, buffers=buffers) as ring:
        for step, batch in ring:
            assert any(np.shares_memory(batch, buffer) for buffer in buffers)
            assert np.array_equal(batch, sampler().batch(step))


@every_backend
def test_a_batch_stays_until_the_next_is_taken_and_after_close(backend: str) -> None:
    ring = BatchRing(sampler(backend=backend), stop=50, depth=2, threads=2)
    for step, batch in ring:
        threading.Event().wait(0.002)  # time for the threads to do what they must not
        assert np.array_equal(batch, sampler().batch(step))
        if step == 20:
            break
    ring.close()
    assert np.array_equal(batch, sampler().batch(20))


@pytest.mark.parametrize(
    "buffer",
    [
        np.empty((4, 16), np.int64),
        np.empty((5, 17), np.int64),
        np.empty((4, 17), np.int16),
        np.empty((17, 4), np.int64).T,
    ],
    ids=["short", "tall", "int16", "transposed"],
)
@every_backend
def test_a_buffer_that_does_not_fit_is_an_error(backend: str, buffer: Any) -> None:
    with pytest.raises(ValueError, match="out"):
        BatchRing(sampler(backend=backend), buffers=[np.empty((4, 17), np.int64), buffer])


@every_backend
def test_a_buffer_that_cannot_be_written_is_an_error(backend: str) -> None:
    buffers = [np.empty((4, 17), np.int64) for _ in range(2)]
    buffers[1].flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        BatchRing(sampler(backend=backend), buffers=buffers)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"depth": 1}, "depth"),
        ({"buffers": [np.empty((4, 17), np.int64)]}, "depth"),
        ({"threads": 0, "assist": False}, "threads"),
        ({"threads": -1}, "threads"),
        ({"start": -1}, "start"),
        ({"rows": (0, 5)}, "rows"),
    ],
    ids=lambda value: str(value)[:12],
)
@every_backend
def test_a_size_out_of_range_is_an_error(backend: str, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BatchRing(sampler(backend=backend), **options)


# --- the end ---


@every_backend
def test_a_ring_without_steps_is_empty(backend: str) -> None:
    for start, stop in ((0, 0), (7, 7), (7, 3)):
        assert taken(BatchRing(sampler(backend=backend), start=start, stop=stop, threads=2)) == []


@every_backend
def test_an_ended_ring_stays_ended_and_closes_more_than_once(backend: str) -> None:
    ring = BatchRing(sampler(backend=backend), stop=3)
    assert [step for step, _ in ring] == [0, 1, 2]
    assert list(ring) == []
    ring.close()
    ring.close()


@every_backend
def test_a_consumer_that_comes_back_goes_on_with_the_next_step(backend: str) -> None:
    ring = BatchRing(sampler(backend=backend), stop=9)
    seen = []
    for leave_after in (0, 2, 3, 9):
        for step, batch in ring:
            assert np.array_equal(batch, sampler().batch(step))
            seen.append(step)
            if step == leave_after:
                break
    assert next(iter(ring), None) is None
    assert seen == list(range(9))
    ring.close()


@every_backend
def test_a_closed_ring_is_an_error_not_a_wait(backend: str) -> None:
    ring = BatchRing(sampler(backend=backend), stop=50, threads=2)
    next(iter(ring))
    ring.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the ring is closed"):
            next(iter(ring))


@every_backend
def test_a_failure_in_a_thread_reaches_the_consumer(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = sampler(backend=backend)
    if backend == "numpy":
        monkeypatch.setattr(stream, "_slots", stream._slots + 99)
    else:
        member = stream.ring_member(0)
        broken = (*member[:4], member[4] + 99)
        monkeypatch.setattr(stream, "ring_member", lambda step: broken)
    ring = BatchRing(stream, stop=50, threads=3)
    with pytest.raises(IndexError):
        list(ring)
    ring.close()


@every_backend
def test_a_dealing_that_fits_no_step_reaches_the_consumer(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = sampler(backend=backend)
    if backend == "numpy":
        stream._dealer._dealing[RELEASE] = NEVER
        monkeypatch.setattr(MixtureSampler, "copy", lambda self: self)  # a copy would be whole
    else:
        segments, dealing, *rest = stream.ring_member(0)
        dealing[RELEASE] = NEVER
        monkeypatch.setattr(stream, "ring_member", lambda step: (segments, dealing, *rest))
    with BatchRing(stream, stop=50, threads=3) as ring, pytest.raises((IndexError, RuntimeError)):
        list(ring)


@every_backend
def test_a_ring_keeps_alive_what_it_reads(backend: str) -> None:
    shards = FakeShards({"web": (2000, 2000)})
    reference = expected(sampler({"web": 1.0}, shards=FakeShards({"web": (2000, 2000)})), 0, 80)
    stream = sampler({"web": 1.0}, shards=shards, backend=backend)
    ring = BatchRing(stream, stop=80, threads=2)
    gone = weakref.ref(shards)
    del stream, shards
    gc.collect()
    waste = [np.full(2000, 7, np.uint16) for _ in range(50)]  # what would take freed memory
    assert taken(ring) == reference
    del ring, waste
    gc.collect()
    assert gone() is None


@every_backend
def test_a_dropped_ring_ends_its_threads(backend: str) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

    gc.collect()
    before = threads()
    for _ in range(5):
        ring = BatchRing(sampler(backend=backend), threads=3)
        next(iter(ring))
    del ring
    gc.collect()
    for _ in range(200):
        if threads() <= before:
            break
        threading.Event().wait(0.01)
    assert threads() <= before


@every_backend
def test_hundreds_of_short_rings_never_hang(backend: str) -> None:
    draw = random.Random(5)
    streams = [sampler(backend=backend), sampler(backend=backend, batch_size=1, seq_len=1)]
    reference = [expected(stream, 0, 20) for stream in streams]
    for _ in range(300):
        which, stop, leave = draw.randrange(2), draw.randrange(20), draw.randrange(25)
        ring = BatchRing(
            streams[which],
            stop=stop,
            threads=draw.randint(1, 5),
            depth=draw.randint(2, 6),
            assist=draw.random() < 0.5,
        )
        for step, batch in ring:
            if step == leave:
                break
            assert (step, batch.tobytes()) == reference[which][step]
        for _ in range(draw.randrange(3)):
            ring.close()


@every_backend
def test_a_closing_thread_frees_a_waiting_consumer(backend: str) -> None:
    ring = BatchRing(sampler(backend=backend), threads=2)
    closing = threading.Timer(0.05, ring.close)
    closing.start()
    with pytest.raises(RuntimeError, match="closed"):
        for _ in ring:
            pass
    closing.join()


def test_data_that_is_not_in_memory_gives_the_same_batches(tmp_path: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 2**16, 4_000_000).astype(np.uint16)
    path = tmp_path / "tokens"
    tokens.tofile(path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    class Mapped(FakeShards):
        def __init__(self, array: Any) -> None:
            self._arrays = {"a": (array,)}

    cold: MixtureSampler = sampler(
        {"a": 1.0}, shards=Mapped(np.memmap(path, np.uint16, "r")), seq_len=512
    )
    warm = sampler({"a": 1.0}, shards=Mapped(tokens), seq_len=512)
    assert taken(BatchRing(cold, stop=400, threads=2)) == expected(warm, 0, 400)
