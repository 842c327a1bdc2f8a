"""A unit: the encoded documents of one source, on disk until they are put into shards.

A file of frames. A frame is a line of JSON (its `kind`, the sizes of its parts, the xxh3_64 of
their bytes) and the parts. Kinds: "tokens" (of one side of a block), "dropped" (records left out)
and, last, "books" (what became of every record of the source). The file gets its name when it is
complete, so a unit that is there is a source that is done.

Enters: encoded blocks. Leaves: frames, checked. Knows no shards.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from regmix.config import build
from regmix.data.packing.encoder import MAX_LISTED, Encoded, SideTokens
from regmix.errors import ConfigError, StorageError
from regmix.files import storage_errors

_DTYPES = {"lengths": "<u4", "numbers": "<u4", "utf8": "<u4", "hashes": "<u8"}


@dataclass(kw_only=True)
class Books:
    """What became of every record of a source: `records` = documents and all reasons together."""

    name: str
    bytes: int
    mtime_ns: int
    xxh3: str
    records: int = 0
    lines: int = 0
    documents: dict[str, int] = field(default_factory=dict)  # by side
    tokens: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # by side and reason
    verified_documents: int = 0
    verified_bytes: int = 0

    def add(self, result: Encoded) -> None:
        """Take a block in."""
        self.records += result.num_records
        self.lines += result.num_lines
        self.verified_documents += result.verified_documents
        self.verified_bytes += result.verified_bytes
        for side, part in result.sides.items():
            self.documents[side] = self.documents.get(side, 0) + len(part.lengths)
            self.tokens[side] = self.tokens.get(side, 0) + len(part.ids)
        for side, reasons in result.counts.items():
            counts = self.dropped.setdefault(side, {})
            for reason, number in reasons.items():
                counts[reason] = counts.get(reason, 0) + number

    @property
    def num_dropped(self) -> int:
        """All records that were left out."""
        return sum(sum(reasons.values()) for reasons in self.dropped.values())

    def check(self) -> None:
        """Raise where records are unaccounted for, which is a defect of this package."""
        packed = sum(self.documents.values())
        if self.records != packed + self.num_dropped:
            raise RuntimeError(
                f"{self.name}: {self.records} records read, {packed} packed, "
                f"{self.num_dropped} left out: the books do not balance"
            )


@dataclass(frozen=True)
class TokensFrame:
    """Documents of one side of a block; record numbers count from the start of the file."""

    side: str
    first_line: int  # lines of the file before the block
    tokens: SideTokens


@dataclass(frozen=True)
class DroppedFrame:
    """Records that were left out: number in the file, side, reason, words."""

    rows: list[tuple[int, str, str, str]]


class UnitWriter:
    """Write one unit: `add` blocks in file order, then `finish`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_suffix(".tmp")
        self._listed: dict[tuple[str, str], int] = {}
        with storage_errors(path):
            self._stream: IO[bytes] = open(self._temporary, "wb")  # noqa: SIM115

    def add(self, first_line: int, result: Encoded) -> None:
        """Write what a block holds."""
        for side, part in result.sides.items():
            if len(part.lengths) == 0:
                continue
            parts = [getattr(part, name) for name in ("ids", *_DTYPES)]
            table = {"kind": "tokens", "side": side, "first_line": first_line}
            self._frame({**table, "dtype": part.ids.dtype.str}, [_raw(array) for array in parts])
        rows = []
        for record in sorted(result.dropped, key=lambda dropped: dropped.number):
            key = (record.side, record.reason)
            self._listed[key] = self._listed.get(key, 0) + 1
            if self._listed[key] <= MAX_LISTED:
                place = first_line + record.number
                rows.append((place, record.side, record.reason, record.words))
        if rows:
            self._frame({"kind": "dropped"}, [json.dumps(rows).encode()])

    def _frame(self, table: dict[str, Any], parts: list[Any]) -> None:
        digest = xxhash.xxh3_64()
        for part in parts:
            digest.update(part)
        table |= {"sizes": [len(part) for part in parts], "xxh3": digest.hexdigest()}
        with storage_errors(self.path):
            self._stream.write(json.dumps(table).encode() + b"\n")
            for part in parts:
                self._stream.write(part)

    def finish(self, books: Books) -> None:
        """Write the books and give the file its name."""
        books.check()
        raw = json.dumps(asdict(books)).encode()
        self._frame({"kind": "books"}, [raw])
        with storage_errors(self.path):
            # The books are found from the end of the file.
            self._stream.write(len(raw).to_bytes(8, "little"))
            self._stream.close()
            os.replace(self._temporary, self.path)

    def abandon(self) -> None:
        """Remove what is written of a unit that is not finished; a finished one stays."""
        with contextlib.suppress(OSError):  # a full disk was said already
            self._stream.close()
        self._temporary.unlink(missing_ok=True)


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def read_books(path: Path) -> Books | None:
    """Return the books of a finished unit, or None where there is none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(-8, os.SEEK_END)
            size = int.from_bytes(stream.read(8), "little")
            stream.seek(-8 - size, os.SEEK_END)
            return build(Books, json.loads(stream.read(size)), where=str(path))
    except (OSError, ValueError, ConfigError):
        return None


def read_frames(path: Path) -> Iterator[TokensFrame | DroppedFrame]:
    """Yield the frames of a unit but the books.

    Where a byte is not what was written (a power cut) the unit is removed and `StorageError` says
    that the command shall be run again.
    """
    with storage_errors(path), open(path, "rb") as stream:
        while True:
            try:
                frame = _read_frame(stream, path.stat().st_size)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                path.unlink()
                raise StorageError(
                    f"{path}: damaged ({error}), probably when the machine went down",
                    cure="Run the same command again: this source file is encoded anew",
                ) from error
            if frame is None:
                return
            yield frame


def _read_frame(stream: IO[bytes], most_bytes: int) -> TokensFrame | DroppedFrame | None:
    """Return the next frame, None for the books; `ValueError` and its like where it is damaged."""
    table = json.loads(stream.readline())
    sizes = table["sizes"]
    if not all(type(size) is int and 0 <= size <= most_bytes for size in sizes):
        raise ValueError(f"parts of {sizes!r} bytes")
    parts = [stream.read(size) for size in sizes]
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    if digest.hexdigest() != table["xxh3"]:
        raise ValueError("a checksum differs")
    if table["kind"] == "books":
        return None
    if table["kind"] == "dropped":
        rows = [
            (int(line), str(s), str(r), str(words)) for line, s, r, words in json.loads(parts[0])
        ]
        return DroppedFrame(rows)
    if table["side"] not in ("train", "valid") or type(table["first_line"]) is not int:
        raise ValueError("its first line is none of a frame")
    dtypes = [table["dtype"], *_DTYPES.values()]
    arrays = [np.frombuffer(p, d) for p, d in zip(parts, dtypes, strict=True)]
    arrays[-1] = arrays[-1].reshape(-1, 2)
    return TokensFrame(table["side"], table["first_line"], SideTokens(*arrays))
