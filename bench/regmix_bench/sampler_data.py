"""The corpus of the sampler measurements: 17 domains, their tokens drawn by chance.

Enters: a folder and a number of tokens. Leaves: packed shards, made once and found again, in which
every token of domain d is d modulo 17, so that whoever delivers a sequence, its domain is known.
Real text would not change what is measured: nobody here looks at a token.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN = 2048
LENGTH = SEQ_LEN + 1
BATCH = 16
SPREAD = 2950  # token = 17 x (a number below this) + domain, below GPT-NeoX's 50,277

# Shares of the Pile's tokens, counted by RegMix's authors: sail-sg/regmix,
# mixture_config/synthesize_mixture.py, `get_token_distribution`. They are the weights, too.
PILE_PRIOR: dict[str, float] = {
    "arxiv": 0.113285273,
    "dm_mathematics": 0.015962925,
    "enron_emails": 0.001750772,
    "europarl": 0.007929969,
    "freelaw": 0.079608651,
    "github": 0.101750772,
    "gutenberg_pg_19": 0.027085479,
    "hackernews": 0.008032956,
    "nih_exporter": 0.003913491,
    "philpapers": 0.003707518,
    "pile_cc": 0.236869207,
    "pubmed_abstracts": 0.038825953,
    "pubmed_central": 0.185375901,
    "stackexchange": 0.066529351,
    "ubuntu_irc": 0.01184346,
    "uspto_backgrounds": 0.046446962,
    "wikipedia_en": 0.051081359,
}
DOMAINS = tuple(PILE_PRIOR)
WEIGHTS = tuple(weight / sum(PILE_PRIOR.values()) for weight in PILE_PRIOR.values())


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where the data of one run lies: our shards, and each peer's own format beside them."""

    folder: Path
    num_tokens: int

    @property
    def shards(self) -> Path:
        """The folder that `ShardSet.open` takes."""
        return self.folder / "shards"

    def tokens(self, domain: str) -> np.ndarray:
        """Return the tokens of a domain, mapped."""
        from regmix.data.shards import ShardSet

        (tokens,) = ShardSet.open(self.shards).arrays("train", domain)
        return np.asarray(tokens)

    def blocks(self, domain: str) -> np.ndarray:
        """Return the tokens of a domain cut as the peers cut them, [N, T+1]: no token is shared."""
        tokens = self.tokens(domain)
        return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def make_corpus(folder: Path, num_bytes: int) -> Corpus:
    """Write the shards, or find those of an earlier run."""
    corpus = Corpus(folder=folder, num_tokens=num_bytes // 2)
    note = folder / "corpus.json"
    said = json.dumps({"tokens": corpus.num_tokens, "weights": WEIGHTS})
    if note.is_file() and note.read_text(encoding="utf-8") == said:
        return corpus
    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(corpus)
    note.write_text(said, encoding="utf-8")
    return corpus


def _write_shards(corpus: Corpus) -> None:
    from regmix.data.manifest import (
        MANIFEST_FORMAT,
        VERSION,
        Manifest,
        TokenizerRecord,
        write_manifest,
    )
    from regmix.data.writer import DomainWriter
    from regmix.files import checksum

    corpus.shards.mkdir(exist_ok=True)
    tokenizer = corpus.shards / "tokenizer.json"
    tokenizer.write_text("{}", encoding="utf-8")  # checked by its checksum, read by nobody here
    record = TokenizerRecord(
        file=tokenizer.name,
        xxh3=checksum(tokenizer),
        vocab_size=SPREAD * len(DOMAINS),
        separator="<|endoftext|>",
        separator_id=0,
    )
    splits: dict[str, dict[str, Any]] = {"train": {}}
    empty = Manifest(
        format=MANIFEST_FORMAT, version=VERSION, dtype="uint16", tokenizer=record, settings={}
    )
    for number, domain in enumerate(DOMAINS):
        left = int(corpus.num_tokens * WEIGHTS[number])
        generator = np.random.default_rng(number)
        with DomainWriter(corpus.shards, empty, "train", domain) as writer:
            while left:
                num = min(left, 1 << 24)
                draws = generator.integers(SPREAD, size=num, dtype=np.uint16)
                ids = draws * np.uint16(len(DOMAINS)) + np.uint16(number)
                lengths = np.diff(np.r_[np.arange(0, num, 1500), num])
                writer.write(ids, lengths, 2 * lengths)
                left -= num
        splits["train"][domain] = writer.stats(dropped={})
    write_manifest(corpus.shards, dataclasses.replace(empty, splits=splits))


def domain_of(batch: Any) -> np.ndarray:
    """Return the number of the domain of each row of a batch."""
    return np.asarray(batch)[:, 0].astype(np.int64) % len(DOMAINS)


def check_rows(batch: Any) -> None:
    """Raise where a row of a batch mixes domains: then it is not a sequence of this corpus."""
    tokens = np.asarray(batch).astype(np.int64)
    if (tokens % len(DOMAINS) != domain_of(tokens)[:, None]).any():
        raise RuntimeError("a row of the batch holds tokens of several domains")


def drop_pages(folder: Path) -> None:
    """Ask the system to forget the pages of all shards, so that the next reads are cold."""
    for path in folder.rglob("*.tokens"):
        with path.open("rb") as stream:
            os.fdatasync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(folder: Path) -> float:
    """Return the share of the shards' pages that lie in the page cache (mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = total = 0
    for path in folder.rglob("*.tokens"):
        with _mapped(path) as (address, size):
            pages = -(-size // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * pages)()
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            there += int((np.frombuffer(bytes(vector), np.uint8) & 1).sum())
            total += pages
    return there / total if total else 0.0


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[tuple[int, int]]:
    array = np.memmap(path, np.uint8, mode="r")
    yield array.ctypes.data, len(array)
