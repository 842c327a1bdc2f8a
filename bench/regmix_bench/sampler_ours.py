"""Our sampler and the limits of the machine, as contenders of the sampler measurements.

Enters: the corpus. Leaves: functions that do one unit of work each: a batch of ours, or a piece of
the two limits: copying memory, and gathering sequences whose ids were drawn beforehand, with the
same code and the same layout but without any order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from regmix_bench.sampler_data import BATCH, DOMAINS, LENGTH, PILE_PRIOR, SEQ_LEN, Corpus

GATHER_ROWS = 4 * BATCH  # 0.5 MB of int32: written to the cache, as a consumer would have it
GATHER_IDS = 1 << 19  # more than there are sequences: a smaller round would stay in the cache
GATHER_CALLS = 32  # between two looks at the clock
COPY_BYTES = 1 << 29


def open_sampler(corpus: Corpus, backend: str = "auto") -> Any:
    """Open the shards and return their sampler."""
    from regmix.data.sampling.sampler import MixtureSampler
    from regmix.data.shards import ShardSet

    shards = ShardSet.open(corpus.shards)
    return MixtureSampler(
        shards, PILE_PRIOR, seq_len=SEQ_LEN, batch_size=BATCH, data_seed=1, backend=backend
    )


def batches_of(sampler: Any, *, reuse: bool, start: int = 0) -> Iterator[Any]:
    """Yield int64 tensors [16, T+1], into two buffers in turn where `reuse`, else into new ones."""
    import torch

    buffers = [np.empty((BATCH, LENGTH), np.int64) for _ in range(2)]
    step = start
    while True:
        out = buffers[step % 2] if reuse else None
        yield torch.from_numpy(sampler.batch(step, out=out))
        step += 1


def ring_of(sampler: Any, dtype: str, threads: int) -> Iterator[Any]:
    """Yield the batches of a ring; the thread that takes them is one of its `threads`."""
    from regmix.data.sampling.ring import BatchRing

    with BatchRing(sampler, threads=threads - 1, dtype=np.dtype(dtype).type) as ring:
        for _, batch in ring:
            yield batch


def resume_seconds(corpus: Corpus, step: int) -> float:
    """Return the seconds from a checkpoint of `step` to its first batch; the shards are open."""
    state = open_sampler(corpus).state(step)
    sampler = open_sampler(corpus)
    sampler.batch(0)
    started = time.perf_counter()
    sampler.restore(state)
    sampler.batch(step)
    return time.perf_counter() - started


def copier() -> Callable[[], float]:
    """Return a function that copies memory once on one thread, and gives the GB copied."""
    source = np.ones(COPY_BYTES, np.uint8)
    target = np.zeros_like(source)

    def copy() -> float:
        np.copyto(target, source)
        return COPY_BYTES / 1e9

    return copy


def gatherer(corpus: Corpus, dtype: str, threads: int) -> Callable[[], float]:
    """Return a function that gathers sequences of random ids, and gives their number."""
    from regmix.data.sampling.backends import load_backend
    from regmix.data.shards import ShardSet

    shards = ShardSet.open(corpus.shards)
    gather = load_backend("native").gather()
    arrays = [shards.arrays("train", domain) for domain in DOMAINS]
    slots = np.array([gather.add([np.asarray(file) for file in files]) for files in arrays])
    sizes = np.array([(sum(map(len, files)) - 1) // SEQ_LEN for files in arrays])
    generator = np.random.default_rng(1)
    picks = generator.integers(sizes.sum(), size=GATHER_IDS)
    domains = np.repeat(np.arange(len(DOMAINS)), sizes)[picks]
    sequences = (generator.random(GATHER_IDS) * sizes[domains]).astype(np.int64)
    buffers = [np.empty((GATHER_ROWS, LENGTH), dtype) for _ in range(threads)]
    places = [thread * GATHER_IDS // threads for thread in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def work(thread: int) -> None:
        for _ in range(GATHER_CALLS):
            part = slice(places[thread], places[thread] + GATHER_ROWS)
            gather.fill(slots, domains[part], sequences[part], SEQ_LEN, buffers[thread])
            places[thread] = part.stop % GATHER_IDS

    def run() -> float:
        list(pool.map(work, range(threads)))
        return float(GATHER_ROWS * GATHER_CALLS * threads)

    return run
