"""Raw records to documents: what is a text, and why another record is left out.

Enters: the bytes of a block. Leaves: for each record in order its number in the block and its
text (a `LongText` where it has megabytes), or a `Refusal` with a reason that can be counted and
words that say it. What a line of JSON
means is what Python's `json` says; orjson is asked first since it is twice as fast.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import xxhash

from regmix.data.packing.long_texts import (
    LONG_BYTES,
    LongText,
    json_text,
    split_long_strings,
    utf8_text,
)
from regmix.data.packing.readers import Block

MALFORMED, EMPTY, TOO_LONG, NO_TOKEN, DUPLICATE = (
    "malformed",
    "empty",
    "too_long",
    "no_token",
    "duplicate",
)
TRAIN, VALID = "train", "valid"
REASONS = (MALFORMED, EMPTY, TOO_LONG, NO_TOKEN, DUPLICATE)

_BOM = b"\xef\xbb\xbf"
_OTHER_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_LOOKED_AT = 4096  # bytes in which a text file's encoding shows


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a record is not packed: one of `REASONS`, and the words for a person."""

    reason: str
    words: str


Document = str | LongText | Refusal


def too_long(num_bytes: int, limit: int) -> Refusal:
    """Return the refusal of a record above the limit."""
    return Refusal(
        TOO_LONG, f"too long: {num_bytes / 1e6:,.1f} MB, the limit is {limit / 1e6:,.1f} MB"
    )


def side_of(utf8: bytes, valid_fraction: float) -> str:
    """Return "train" or "valid" for a document, by the hash of its text."""
    return side_of_digest(xxhash.xxh3_64_intdigest(utf8, seed=1), valid_fraction)


def side_of_digest(digest: int, valid_fraction: float) -> str:
    """Return the side for the xxh3_64 (seed 1) of a document."""
    return VALID if digest / 2**64 < valid_fraction else TRAIN


def block_documents(
    block: Block, raw: bytes | bytearray, *, text_field: str, max_bytes: int
) -> Iterator[tuple[int, Document]]:
    """Yield (number in the block, text or refusal) of each record of a block."""
    if block.kind == "skipped":
        return iter([(1, too_long(block.skipped_bytes, max_bytes))])
    if block.kind == "text":
        return text_document(raw)
    if block.kind == "values":
        return value_documents(raw, block.lengths, block.refused, text_field=text_field)
    return line_documents(raw, first=block.first, text_field=text_field, max_bytes=max_bytes)


def line_documents(
    raw: bytes | bytearray, *, first: bool, text_field: str, max_bytes: int
) -> Iterator[tuple[int, Document]]:
    """Yield (line number in the block, text or refusal); lines that hold nothing are no records."""
    mark = _other_mark(raw) if first else None
    if first and raw.startswith(_BOM):
        raw = raw[len(_BOM) :]
    # One line alone may be as long as the limit: no second copy of it.
    lines: Sequence[bytes | bytearray] = (
        [raw] if raw.find(b"\n") in (-1, len(raw) - 1) else (raw.split(b"\n"))
    )
    for number, line in enumerate(lines, start=1):
        if len(line) > max_bytes and len(line.rstrip(b"\n")) > max_bytes:
            yield number, too_long(len(line), max_bytes)
        elif len(line) > 2 * LONG_BYTES:
            yield number, _mark_or(mark, _read_long(line, text_field))
        elif line and not line.isspace():
            try:
                text = orjson.loads(line)[text_field]
            except (ValueError, KeyError, TypeError, IndexError):
                text = None
            if type(text) is not str:
                text = _read_slowly(bytes(line), text_field, mark)
            elif not text or text.isspace():
                text = Refusal(EMPTY, "no text")
            yield number, text


def _mark_or(mark: str | None, document: Document) -> Document:
    """Return the document, or that its file is in another encoding where it cannot be read."""
    if mark and isinstance(document, Refusal) and document.reason == MALFORMED:
        return Refusal(MALFORMED, mark)
    return document


def _read_long(line: bytes | bytearray, text_field: str) -> Document:
    """Read a line of megabytes without ever making one string of it."""
    try:
        rest, strings = split_long_strings(line)
        record = json.loads(rest.decode())
        found = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(found, str) or found not in strings:
            for raw in strings.values():
                json_text(raw).check()
            return _judged(record, text_field)
        del record
        kept = [json_text(raw).check() for raw in strings.values()]
    except UnicodeDecodeError:
        return Refusal(MALFORMED, "not UTF-8")
    except UnicodeEncodeError:
        return Refusal(MALFORMED, "half a surrogate pair: not valid Unicode")
    except (ValueError, RecursionError) as error:
        return Refusal(MALFORMED, f"not JSON ({str(error)[:100]})")
    has_text = kept[list(strings).index(found)]
    return json_text(strings[found]) if has_text else Refusal(EMPTY, "no text")


def _read_slowly(line: bytes, text_field: str, mark: str | None) -> str | Refusal:
    """Say what `json` says of a line that orjson would not give the text of."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Refusal(MALFORMED, mark or f"not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Refusal(MALFORMED, mark or f"not JSON ({error})")
    return _judged(record, text_field)


def _judged(record: Any, text_field: str) -> str | Refusal:
    """Return the text of a line that is JSON, or what is wrong with it."""
    if not isinstance(record, dict):
        return Refusal(MALFORMED, f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        return Refusal(MALFORMED, f"no field '{text_field}'")
    return _checked(record[text_field], text_field)


def _checked(value: Any, text_field: str) -> str | Refusal:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return _not_text(kind, text_field)
    if not value or value.isspace():
        return Refusal(EMPTY, "no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        return Refusal(MALFORMED, "half a surrogate pair: not valid Unicode")
    return value


def _not_text(kind: str, text_field: str) -> Refusal:
    kind = "empty (null)" if kind == "null" else f"a {kind}"
    return Refusal(MALFORMED, f"field '{text_field}' is {kind}, not a string")


def _other_mark(raw: bytes | bytearray) -> str | None:
    for mark, name in _OTHER_MARKS:
        if raw.startswith(mark):
            return f"{name} (its byte-order mark is there), not UTF-8: convert the file"
    return None


def value_documents(
    raw: bytes | bytearray,
    lengths: Sequence[int],
    refused: Mapping[int, str],
    *,
    text_field: str,
) -> Iterator[tuple[int, Document]]:
    """Yield (row in the block, text or refusal) of values that lie one after another."""
    place = 0
    view = memoryview(raw)
    for row, length in enumerate(lengths):
        value = view[place : place + length]
        place += length
        if row in refused:
            yield row + 1, _not_text(refused[row], text_field)
            continue
        yield row + 1, _decoded(value) or Refusal(MALFORMED, "not UTF-8")


def _decoded(raw: memoryview) -> Document | None:
    """Return the text of UTF-8 bytes, or None where they are something else."""
    try:
        if len(raw) > LONG_BYTES:
            text = utf8_text(raw)
            return text if text.check() else Refusal(EMPTY, "no text")
        short = str(raw, "utf-8")
    except UnicodeDecodeError:
        return None
    return short if short and not short.isspace() else Refusal(EMPTY, "no text")


def text_document(raw: bytes | bytearray) -> Iterator[tuple[int, Document]]:
    """Yield the one document of a .txt file, or in which line it is not text."""
    mark = _other_mark(raw)
    if mark or _is_two_byte(raw):
        words = mark or "every second byte is NUL: UTF-16, not UTF-8: convert the file"
        yield 1, Refusal(MALFORMED, words)
        return
    view = memoryview(raw)[len(_BOM) if raw.startswith(_BOM) else 0 :]
    document = _decoded(view)
    if document is None:
        yield _line_of_error(raw), Refusal(MALFORMED, "not UTF-8")
    else:
        yield 1, document


def _line_of_error(raw: bytes | bytearray) -> int:
    """Return the line in which bytes cease to be UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, line in enumerate(io.BytesIO(raw), start=1):
        try:
            decoder.decode(line)
        except UnicodeDecodeError:
            return number
    return raw.count(b"\n") + 1


def _is_two_byte(raw: bytes | bytearray) -> bool:
    """Return whether a text looks like UTF-16 without a mark: it would pass as UTF-8 with NULs."""
    head = bytes(raw[:_LOOKED_AT])
    nuls = (head[0::2].count(0), head[1::2].count(0))
    return len(head) >= 8 and max(nuls) > len(head) // 8 and min(nuls) <= max(nuls) // 8
