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

from regmix.data.corpus import NUM_EXAMPLES, Source, Tally, read_documents, side_of
from regmix.data.tokenizer import Tokenizer
from regmix.errors import CorpusError

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


def leave_out_tokenless(
    batch: Batch, ids: np.ndarray, lengths: np.ndarray, tally: Tally, *, domain: str, strict: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (ids, lengths, UTF-8 bytes) without the documents that gave only a separator.

    They are counted in `tally` as malformed; with `strict` the first raises `CorpusError`.
    """
    kept = lengths > 1
    if kept.all():
        return ids, lengths, batch.utf8_bytes
    utf8_bytes = batch.utf8_bytes
    for place in np.flatnonzero(~kept):
        text = batch.texts[place]
        what = f"domain '{domain}': no token in the document {text[:40]!r}"
        if strict:
            raise CorpusError(what, cure="Use another tokenizer, or pack without --strict")
        utf8_bytes -= len(text.encode())
        tally.malformed += 1
        if len(tally.examples) < NUM_EXAMPLES:
            tally.examples.append(what)
    return ids[np.repeat(kept, lengths)], lengths[kept], utf8_bytes


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
