"""A block of raw records to the token ids of its documents: the work of one encoding process.

1. documents.py says what is a text, and why another record is left out.
2. A text longer than a piece is encoded in pieces where that cannot change its ids (pieces.py).
3. A sample of the block is encoded by `tokenizers` too: at the first difference `EngineDiffers`.

Enters: settings, then blocks. Leaves: `Encoded` blocks, in which numbers of records count from the
start of the block. Reads and writes no files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from regmix.data.packing.documents import (
    NO_TOKEN,
    TOO_LONG,
    TRAIN,
    VALID,
    Refusal,
    block_documents,
    side_of,
    side_of_digest,
)
from regmix.data.packing.engines import REFERENCE, Engine, ReferenceEngine, make_engine
from regmix.data.packing.long_texts import LongText
from regmix.data.packing.pieces import LONGEST_PIECE_BYTES, PIECE_CHARACTERS, cut_pattern, pieces
from regmix.data.packing.readers import Block
from regmix.data.tokenizer import Tokenizer

ENCODE_CHARACTERS = 1 << 17  # per call: `tokenizers` takes about 100 bytes a token for its answer
MAX_LISTED = 1000  # records that are listed of a domain, split and reason


class EngineDiffers(Exception):
    """The fast engine gave other ids than `tokenizers`, or failed, at a record of a block."""

    def __init__(self, number: int, words: str) -> None:
        super().__init__(f"record {number}: {words}")
        self.number, self.words = number, words


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """What an encoder needs to know before its first block."""

    tokenizer: str  # the text of tokenizer.json
    separator: str
    where: str
    engine: str
    text_field: str
    valid_fraction: float | None
    max_bytes: int
    hashes: bool  # 128 bits of each document, for deduplication


@dataclass(frozen=True)
class Dropped:
    """A record that is left out: its number, the split it would have gone to, and why."""

    number: int
    side: str
    reason: str
    words: str


@dataclass
class SideTokens:
    """The documents of one side of a block; `ids` has the separators."""

    ids: np.ndarray
    lengths: np.ndarray  # uint32, separator included
    numbers: np.ndarray  # uint32, of the records in the block
    utf8: np.ndarray  # uint32, bytes of each text
    hashes: np.ndarray  # uint64 [documents, 2], or [0, 2]


@dataclass
class Encoded:
    """What became of the records of a block; `dropped` lists the first of each side and reason."""

    num_lines: int
    num_records: int
    sides: dict[str, SideTokens]
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    verified_documents: int = 0
    verified_bytes: int = 0

    def drop(self, number: int, side: str, refusal: Refusal) -> None:
        """Count a record that is left out, and list it where there is room."""
        counts = self.counts.setdefault(side, {})
        counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        if counts[refusal.reason] <= MAX_LISTED:
            self.dropped.append(Dropped(number, side, refusal.reason, refusal.words))


class _Gathering:
    """The documents of one side while a block is read; `ids` grows with their separators."""

    def __init__(self, engine: Engine, dtype: Any, separator: int) -> None:
        self._engine, self._dtype, self._separator = engine, np.dtype(dtype), separator
        self._texts: list[str] = []
        self._size = 0
        self._ids = bytearray()
        self._lengths: list[np.ndarray] = []
        self.separator_found = False
        self.numbers: list[int] = []
        self.utf8: list[int] = []
        self.hashes: list[int] = []
        self.heads: list[str] = []  # how the texts begin

    def add(self, text: str) -> None:
        """Take a text in."""
        self._texts.append(text)
        self._size += len(text)
        if self._size >= ENCODE_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        """Encode what is gathered."""
        if not self._texts:
            return
        ids, lengths = self._encode(self._texts)
        self._texts, self._size = [], 0
        ends = np.cumsum(lengths + 1)
        out = np.empty(len(ids) + len(lengths), self._dtype)
        is_text = np.ones(len(out), np.bool_)
        is_text[ends - 1] = False
        out[is_text] = ids
        out[ends - 1] = self._separator
        self._ids += out.data
        self._lengths.append(lengths + 1)

    def add_pieces(self, texts: Iterable[str]) -> None:
        """Take in one document that comes in pieces."""
        self.flush()
        length = 1
        for text in texts:
            ids, _ = self._encode([text])
            self._ids += ids.astype(self._dtype).data
            length += len(ids)
        self._ids += np.asarray([self._separator], self._dtype).data
        self._lengths.append(np.asarray([length]))

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self._engine.encode(texts)
        self.separator_found |= bool((ids == self._separator).any())
        return ids, lengths

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all documents and how many each has, separators included."""
        self.flush()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int64)
        return np.frombuffer(self._ids, self._dtype), lengths


@dataclass
class _Sample:
    """Whole documents and excerpts that the reference encodes too."""

    left: int  # bytes that are still wanted
    whole: list[tuple[str, int, str]] = field(default_factory=list)  # side, place, text
    excerpts: list[tuple[int, str]] = field(default_factory=list)  # number, text

    def take(self, number: int, side: str, place: int, text: str, num_bytes: int) -> None:
        """Take a document in, or as much of it as is wanted."""
        if num_bytes <= self.left:
            self.whole.append((side, place, text))
        else:
            num_bytes = self.left
            self.excerpts.append((number, text[: self.left]))
        self.left -= num_bytes


class BlockEncoder:
    """Encodes blocks; `BlockEncoder(settings).encode(block, raw, side, verify_bytes)`."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        tokenizer = Tokenizer(
            settings.tokenizer, separator=settings.separator, where=settings.where
        )
        self._tokenizer = tokenizer
        self._reference = ReferenceEngine(tokenizer)
        self._engine = make_engine(tokenizer, settings.engine)
        self._cut = cut_pattern(json.loads(settings.tokenizer))
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encode(
        self, block: Block, raw: bytes | bytearray, *, side: str | None, verify_bytes: int
    ) -> Encoded:
        """Encode the records of a block whose bytes are `raw`; `EngineDiffers`, `TokenizerError`.

        `side` is None where the hash of each document decides. About `verify_bytes` of text are
        compared with the reference.
        """
        result = Encoded(block.num_lines(raw), 0, {})
        sample = _Sample(verify_bytes if self._settings.engine != REFERENCE else 0)
        gathered = {name: self._gathering() for name in (TRAIN, VALID)}
        number = 0
        documents = block_documents(
            block,
            raw,
            text_field=self._settings.text_field,
            max_bytes=self._settings.max_bytes,
        )
        try:
            for number, text in documents:
                result.num_records += 1
                if isinstance(text, Refusal):
                    result.drop(number, side or TRAIN, text)
                elif isinstance(text, LongText) or len(text) > PIECE_CHARACTERS:
                    self._add_long(number, text, side, gathered, result, sample)
                else:
                    self._add(number, text, side, gathered, sample)
            finished = {name: part.finish() for name, part in gathered.items()}
        except Exception as error:
            if self._settings.engine == REFERENCE:
                raise
            raise EngineDiffers(max(1, number), f"fails ({str(error)[:200]})") from error
        self._verify(sample, finished, gathered, result)
        for name, part in gathered.items():
            if part.numbers:
                result.sides[name] = self._tokens(name, part, *finished[name], result)
        return result

    def _gathering(self) -> _Gathering:
        return _Gathering(self._engine, self._dtype, self._tokenizer.separator_id)

    def _add(
        self,
        number: int,
        text: str,
        side: str | None,
        gathered: dict[str, _Gathering],
        sample: _Sample,
    ) -> None:
        utf8 = text.encode()
        side = side or side_of(utf8, self._settings.valid_fraction or 0.0)
        part = gathered[side]
        if sample.left > 0:
            sample.take(number, side, len(part.numbers), text, len(utf8))
        part.numbers.append(number)
        part.utf8.append(len(utf8))
        part.heads.append(text[:40])
        if self._settings.hashes:
            part.hashes.append(xxhash.xxh3_128_intdigest(utf8))
        part.add(text)

    def _add_long(
        self,
        number: int,
        text: str | LongText,
        side: str | None,
        gathered: dict[str, _Gathering],
        result: Encoded,
        sample: _Sample,
    ) -> None:
        """Add a document piece by piece, so that it is never held whole as a string."""
        seeded, wide = xxhash.xxh3_64(seed=1), xxhash.xxh3_128()
        chunks = text.chunks() if isinstance(text, LongText) else [text]
        head, size = "", 0
        for piece in pieces(chunks, self._cut):
            utf8 = piece.encode()
            seeded.update(utf8)
            wide.update(utf8)
            size += len(utf8)
            head = head or piece[: max(sample.left, 40)]
            if self._cut is not None and len(utf8) > LONGEST_PIECE_BYTES:
                megabytes = f"{len(utf8) / 1e6:,.1f} MB"
                words = f"too long: {megabytes} without a place to cut, one word or white space"
                result.drop(number, side or TRAIN, Refusal(TOO_LONG, words))
                return
        fraction = self._settings.valid_fraction
        part = gathered[side or side_of_digest(seeded.intdigest(), fraction or 0.0)]
        if sample.left > 0:
            sample.excerpts.append((number, head[: sample.left]))
            sample.left -= min(len(head), sample.left)
        part.numbers.append(number)
        part.utf8.append(size)
        part.heads.append(head[:40])
        if self._settings.hashes:
            part.hashes.append(wide.intdigest())
        chunks = text.chunks() if isinstance(text, LongText) else [text]
        part.add_pieces(pieces(chunks, self._cut))

    def _verify(
        self,
        sample: _Sample,
        finished: dict[str, tuple[np.ndarray, np.ndarray]],
        gathered: dict[str, _Gathering],
        result: Encoded,
    ) -> None:
        """Compare the sample with the reference; raise `EngineDiffers` at the first difference."""
        texts = [text for _, _, text in sample.whole] + [text for _, text in sample.excerpts]
        if not texts:
            return
        given: list[tuple[int, np.ndarray]] = []
        ends = {name: np.cumsum(lengths) for name, (_, lengths) in finished.items()}
        for name, place, _ in sample.whole:
            end = int(ends[name][place])
            start = end - int(finished[name][1][place])
            given.append((gathered[name].numbers[place], finished[name][0][start : end - 1]))
        for number, text in sample.excerpts:
            given.append((number, self._fast_ids(number, text)))
        ids, lengths = self._reference.encode(texts)
        place = 0
        for (number, fast), length, text in zip(given, lengths.tolist(), texts, strict=True):
            _compare(number, fast, ids[place : place + length], text)
            place += length
            result.verified_documents += 1
            result.verified_bytes += len(text.encode())

    def _fast_ids(self, number: int, text: str) -> np.ndarray:
        try:
            return self._engine.encode([text])[0]
        except Exception as error:  # the library raises what it likes
            raise EngineDiffers(number, f"fails ({str(error)[:200]})") from error

    def _tokens(
        self, side: str, part: _Gathering, ids: np.ndarray, lengths: np.ndarray, result: Encoded
    ) -> SideTokens:
        """Return a side's documents; those that consist of a separator alone drop out."""
        if part.separator_found:
            if self._settings.engine == REFERENCE:
                raise self._tokenizer.separator_found()
            raise EngineDiffers(part.numbers[0], "gives the separator for text of a document")
        kept = lengths > 1
        numbers = np.asarray(part.numbers, np.uint32)
        utf8 = np.asarray(part.utf8, np.uint32)
        hashes = _halves(part.hashes)
        if not kept.all():
            for place in np.flatnonzero(~kept).tolist():
                words = f"no token in the document {part.heads[place]!r}"
                result.drop(part.numbers[place], side, Refusal(NO_TOKEN, words))
            ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
            numbers, utf8 = numbers[kept], utf8[kept]
            hashes = hashes[kept] if len(hashes) else hashes
        return SideTokens(ids, lengths.astype(np.uint32), numbers, utf8, hashes)


def _halves(hashes: Sequence[int]) -> np.ndarray:
    raw = b"".join(value.to_bytes(16, "little") for value in hashes)
    return np.frombuffer(raw, "<u8").reshape(-1, 2)


def _compare(number: int, fast: np.ndarray, wanted: np.ndarray, text: str) -> None:
    if np.array_equal(fast, wanted):
        return
    common = min(len(fast), len(wanted))
    other = np.flatnonzero(fast[:common] != wanted[:common])
    place = int(other[0]) if len(other) else common
    raise EngineDiffers(
        number,
        f"other ids than tokenizers from token {place} on: {fast[place : place + 4].tolist()} "
        f"instead of {wanted[place : place + 4].tolist()}, in {text[:40]!r}",
    )
