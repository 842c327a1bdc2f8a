"""What a corpus of tokens holds, and what a budget takes from it.

Enters: a `ShardSet`. Leaves: a row a domain, the plan of a budget by domain, sample sequences as
text, and text made safe for a terminal. Prints nothing.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from regmix.data.manifest import ShardStats
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, ShardError

MOST_EPOCHS = 4  # repeated more often, text teaches less and less (Muennighoff et al. 2023)
_MOST_STEPS = 1 << 16
_COUNTED = ("documents", "tokens", "utf8_bytes", "files")


@dataclass(frozen=True, kw_only=True)
class DomainRow:
    """One domain of one split. `left_out`: reason -> records that `pack` left out.

    Lengths are in tokens, separators included. None where it cannot be known.
    """

    split: str
    domain: str
    documents: int
    tokens: int
    utf8_bytes: int | None
    bytes_per_token: float | None
    mean_tokens: float
    median_tokens: float
    files: int
    file_bytes: int
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """What a budget takes from a domain; `tail_tokens` are never trained at that length."""

    domain: str
    weight: float
    tokens: int
    sequences: int
    epochs: float
    available_sequences: int
    tail_tokens: int


def domain_rows(shards: ShardSet) -> Iterator[DomainRow]:
    """Yield a row for every domain, split by split; reads no tokens of packed shards."""
    for split in shards.splits:
        for domain in shards.domains(split):
            stats = shards.stats(split, domain)
            starts = shards.document_offsets(split, domain).astype(np.int64)
            lengths = np.diff(np.append(starts, stats.tokens))
            files = shards.files(split, domain)
            yield DomainRow(
                split=split,
                domain=domain,
                documents=stats.documents,
                tokens=stats.tokens,
                utf8_bytes=stats.utf8_bytes,
                bytes_per_token=shards.bytes_per_token(split, domain),
                mean_tokens=float(lengths.mean()) if len(lengths) else 0.0,
                median_tokens=float(np.median(lengths)) if len(lengths) else 0.0,
                files=len(files),
                file_bytes=sum(file.path.stat().st_size for file in files),
                left_out=_left_out(stats),
            )


def _left_out(stats: ShardStats) -> dict[str, int]:
    names = [f.name for f in dataclasses.fields(ShardStats) if f.name not in _COUNTED]
    return {name: getattr(stats, name) for name in names if getattr(stats, name)}


class _Unread:
    """Shards whose tokens are counted and not read, so nothing needs to be checked."""

    def __init__(self, shards: ShardSet) -> None:
        self._shards = shards

    def domains(self, split: str) -> tuple[str, ...]:
        return self._shards.domains(split)

    def arrays(self, split: str, domain: str) -> tuple[np.ndarray[Any, Any], ...]:
        return self._shards.arrays(split, domain, verify=False)


def budget_rows(
    shards: ShardSet, mixture: Mapping[str, float], *, budget_tokens: int, seq_len: int
) -> list[BudgetRow]:
    """Return exactly what the sampler deals of each weighted domain for a budget.

    The budget is rounded up to whole sequences.
    """
    sequences, unread = -(-budget_tokens // seq_len), _Unread(shards)
    batch_size = max(1, sequences // _MOST_STEPS)
    large, sampler = (
        MixtureSampler(unread, mixture, seq_len=seq_len, batch_size=size)
        for size in (batch_size, 1)
    )
    # What is dealt does not depend on the batch: large ones come near the end, single ones to it.
    steps = sequences // batch_size
    sampler.restore({**large.state(steps), "batch_size": 1, "step": steps * batch_size})
    plan = sampler.plan(sequences)
    total = sum(mixture.values())
    return [
        BudgetRow(
            domain=domain,
            weight=mixture[domain] / total,
            tokens=use.tokens,
            sequences=use.sequences,
            epochs=use.epochs,
            available_sequences=sampler.num_sequences[domain],
            tail_tokens=(shards.stats("train", domain).tokens - 1) % seq_len,
        )
        for domain, use in plan.items()
    ]


def sample_texts(
    shards: ShardSet, split: str, domain: str, *, num: int, seq_len: int
) -> list[tuple[int, str]]:
    """Return (number of the sequence, its text) of the first `num` that a run would read.

    All that there are where they are fewer. `escape` makes a text safe for a terminal.
    """
    from regmix.data.tokenizer import load_tokenizer

    if num < 1 or seq_len < 1:
        raise ConfigError(f"{num} sequences of {seq_len} tokens", cure="Ask for at least 1 of each")
    tokens = shards.stats(split, domain).tokens
    available = (tokens - 1) // seq_len
    if available < 1:
        raise ShardError(
            f"{shards.path}: domain '{domain}' has {tokens:,} tokens in {split}, fewer than one "
            f"sequence of {seq_len:,} and its label",
            cure="Use a smaller --seq-len",
        )
    separator = shards.manifest.tokenizer.separator
    tokenizer = load_tokenizer(shards.tokenizer_path, separator=separator)
    sampler = MixtureSampler(
        shards, {domain: 1.0}, seq_len=seq_len, batch_size=min(num, available), split=split
    )
    _, numbers = sampler.ids(0)
    rows = sampler.batch(0)
    return [
        (int(number), tokenizer.decode(row[:-1].tolist()))
        for number, row in zip(numbers, rows, strict=True)
    ]


def escape(text: str) -> str:
    """Return a text with everything that could steer a terminal written as an escape."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    # Cc: control; Cf: formats, which reorder text; Co, Cs, Cn: no meaning; Zl, Zp: line ends.
    if character in "\n\t" or unicodedata.category(character) not in (
        *("Cc", "Cf", "Co", "Cs", "Cn"),
        *("Zl", "Zp"),
    ):
        return character
    if ord(character) < 0x100:
        return f"\\x{ord(character):02x}"
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
