"""Documents of one domain, encoded in batches on all cores, in a fixed order.

Enters: sources and a tokenizer. Leaves: batches of token ids, the same whatever the number of
threads, a bounded number of them in memory. Writes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from regmix.data.corpus import Source, Tally, read_documents, side_of
from regmix.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 18  # text per call of the tokenizer: its result takes about 100 bytes a token
WINDOW = 4  # batches in memory per thread


@dataclass(frozen=True)
class Batch:
    """Texts of one side, about `BATCH_BYTES` of them."""

    side: str
    texts: list[str]
    utf8_bytes: int


def read_batches(
    files: Sequence[Source],
    tallies: Mapping[str, Tally],
    *,
    valid_fraction: float | None,
    text_field: str,
    strict: bool,
) -> Iterator[Batch]:
    """Gather documents by side; `tallies` has one per side, and "train" where hashes decide."""
    texts: dict[str, list[str]] = {"train": [], "valid": []}
    sizes = {"train": 0, "valid": 0}
    for source in files:
        tally = tallies[source.side or "train"]
        for text, utf8 in read_documents(source, tally, text_field=text_field, strict=strict):
            side = source.side or side_of(utf8, valid_fraction or 0.0)
            texts[side].append(text)
            sizes[side] += len(utf8)
            if sizes[side] >= BATCH_BYTES:
                yield Batch(side, texts[side], sizes[side])
                texts[side], sizes[side] = [], 0
    for side in texts:
        if texts[side]:
            yield Batch(side, texts[side], sizes[side])


def encode_batches(
    batches: Iterator[Batch], tokenizer: Tokenizer, pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """Yield (batch, ids of its documents in one array, their lengths), in the batches' order."""
    pending: deque[tuple[Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    for batch in batches:
        pending.append((batch, pool.submit(tokenizer.encode, batch.texts)))
        if len(pending) >= WINDOW * workers:
            first, future = pending.popleft()
            yield first, *future.result()
    for first, future in pending:
        yield first, *future.result()
