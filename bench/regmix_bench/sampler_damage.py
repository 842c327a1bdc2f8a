"""Shards that were cut or changed: are they found, and when?

Enters: a folder to work in. Leaves: records: the share of truncated files that are refused when the
shards are opened, and of flipped bits that are refused when the tokens around them are first read.
The corpus is small and its own; every damage is mended before the next.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from regmix_bench.harness import Record
from regmix_bench.sampler_data import DOMAINS, make_corpus

SUITE = "sampler"
NUM_BYTES = 8_000_000
SEQ_LEN = 64


def read_all(shards: Path, domain: str) -> None:
    """Read every sequence of a domain once, as a training run would."""
    from regmix.data.sampling.sampler import MixtureSampler
    from regmix.data.shards import ShardSet

    sampler = MixtureSampler(
        ShardSet.open(shards), {domain: 1.0}, seq_len=SEQ_LEN, batch_size=SEQ_LEN
    )
    for step in range(-(-sampler.num_sequences[domain] // SEQ_LEN)):
        sampler.batch(step)


def refused(work: Callable[[], object]) -> bool:
    """Return whether the work ends with the error that names damaged shards."""
    from regmix.errors import ShardError

    try:
        work()
    except ShardError:
        return True
    return False


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def share_found(folder: Path, count: int, kind: str) -> float:
    """Return the share of `count` damages, at places drawn by chance, that are refused."""
    from regmix.data.shards import ShardSet
    from regmix.data.writer import HEADER_BYTES

    corpus = make_corpus(folder, NUM_BYTES)
    generator, found = np.random.default_rng(1), 0
    for _ in range(count):
        domain = DOMAINS[generator.integers(len(DOMAINS))]
        path = corpus.shards / "train" / f"{domain}-0.tokens"
        whole = path.read_bytes()
        if kind == "cut":
            _replace(path, whole[: generator.integers(len(whole))])
            found += refused(partial(ShardSet.open, corpus.shards))
        else:
            place = generator.integers(HEADER_BYTES, HEADER_BYTES + 2 * _num_tokens(path))
            changed = bytearray(whole)
            changed[place] ^= 1 << generator.integers(8)
            _replace(path, bytes(changed))
            found += refused(partial(read_all, corpus.shards, domain))
        _replace(path, whole)
    read_all(corpus.shards, DOMAINS[0])  # the mended corpus is whole: the errors were about damage
    return found / count


def _num_tokens(path: Path) -> int:
    import json
    import struct

    with path.open("rb") as stream:
        _, length = struct.unpack("<II", stream.read(16)[8:])
        return int(json.loads(stream.read(length))["tokens"])


def damage_records(folder: Path, count: int) -> list[Record]:
    """Return the share of truncations and of flipped bits that are found."""
    return [
        Record(
            suite=SUITE,
            case=f"{count} {words}",
            metric=metric,
            value=share_found(folder, count, kind),
            unit="",
        )
        for kind, words, metric in (
            ("cut", "files cut at a random byte", "truncations found at open"),
            ("flip", "single bits flipped in the tokens", "flipped bits found on first touch"),
        )
    ]
