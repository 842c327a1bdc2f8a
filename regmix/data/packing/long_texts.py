"""Texts of many megabytes, decoded a piece at a time.

A string of 100 MB of UTF-8 takes up to 400 MB in Python, and a JSON parser as much again. So the
bytes stay as they are, and each use decodes them anew in steps.

Enters: the bytes of a text, as UTF-8 or as the inside of a JSON string. Leaves: strings that make
up the text together. `ValueError` says why it is none.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import xxhash

LONG_BYTES = 4 << 20  # a shorter text is one string
STEP_BYTES = 1 << 20

Buffer = bytes | bytearray | memoryview
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


class LongText:
    """A text whose `chunks()` are decoded each time; made by `utf8_text` or `json_text`."""

    def __init__(self, decode: Callable[[], Iterator[str]]) -> None:
        self._decode = decode

    def chunks(self) -> Iterator[str]:
        """Yield the text in strings of at most `STEP_BYTES`."""
        return self._decode()

    def check(self) -> bool:
        """Return whether there is anything but white space; `ValueError` where it is no text."""
        found = False
        for chunk in self.chunks():
            found = found or not chunk.isspace()
        return found


def utf8_text(raw: Buffer) -> LongText:
    """Return the text of UTF-8 bytes; its chunks raise `UnicodeDecodeError`."""
    return LongText(lambda: _utf8_chunks(memoryview(raw)))


def _utf8_chunks(raw: memoryview) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(raw), STEP_BYTES):
        part = raw[start : start + STEP_BYTES]
        if text := decoder.decode(bytes(part), start + STEP_BYTES >= len(raw)):
            yield text


def json_text(raw: Buffer) -> LongText:
    """Return the text of what stands between the quotes of a JSON string."""
    return LongText(lambda: _json_chunks(raw))


def _json_chunks(raw: Buffer) -> Iterator[str]:
    start = 0
    while start < len(raw):
        end = _whole(raw, start, min(len(raw), start + STEP_BYTES))
        part = b'"' + bytes(raw[start:end]) + b'"'
        try:
            text = orjson.loads(part)
        except ValueError:
            text = json.loads(part.decode())
            text.encode()  # half a surrogate pair, which orjson refuses
        yield text
        start = end


def _whole(raw: Buffer, start: int, end: int) -> int:
    """Return the last place up to `end` that divides neither a character nor an escape."""
    if end == len(raw):
        return end
    for _ in range(3):  # a character has at most three bytes after its first
        end -= raw[end] & 0xC0 == 0x80
    head = bytes(raw[max(start, end - 6) : end])
    last = end - len(head) + head.rfind(b"\\")
    if b"\\" in head and _begins_escape(raw, start, last):
        length = 6 if raw[last + 1 : last + 2] == b"u" else 2
        if last + length > end:
            end = last
    # The second half of a surrogate pair must not be parted from the first.
    first = max(start, end - 6)
    if _HIGH_SURROGATE.fullmatch(bytes(raw[first:end])) and _begins_escape(raw, start, first):
        return first
    return end


def _begins_escape(raw: Buffer, start: int, place: int) -> bool:
    """Return whether the backslash at `place` is not itself escaped by those before it."""
    run = place
    while run > start and raw[run - 1] == 0x5C:
        run -= 1
    return (place - run) % 2 == 0


def split_long_strings(line: Buffer) -> tuple[bytes, dict[str, memoryview]]:
    """Return a line of JSON with a name for each long string in it, and those strings' bytes.

    The line is valid JSON if what is returned is, and each string. `ValueError` where a string
    does not end.
    """
    raw = bytearray(line) if isinstance(line, memoryview) else line
    view = memoryview(raw)
    kept: list[Any] = []
    strings: dict[str, memoryview] = {}
    mark = ""
    done = place = 0
    while (start := raw.find(b'"', place)) >= 0:
        end = _string_end(raw, start + 1)
        if end - start > LONG_BYTES:
            # No text can hold the name by chance, nor by design.
            mark = mark or xxhash.xxh3_128_hexdigest(view)
            name = f"{mark} {len(strings)}"
            strings[name] = view[start + 1 : end]
            kept += [view[done:start], json.dumps(name).encode()]
            done = end + 1
        place = end + 1
    kept.append(view[done:])
    return b"".join(kept), strings


def _string_end(raw: bytes | bytearray, place: int) -> int:
    while (end := raw.find(b'"', place)) >= 0:
        run = end
        while raw[run - 1] == 0x5C:
            run -= 1
        if (end - run) % 2 == 0:
            return end
        place = end + 1
    raise ValueError("Unterminated string")
