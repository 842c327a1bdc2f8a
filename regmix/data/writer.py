"""Writing token shards: the layout of a file, and the writers of a file and of a domain.

A file is a 4096-byte header | raw little-endian tokens | a footer with the xxh3_64 of each 1 MiB
block of the token area, the first token of each document, and the xxh3_64 of header and footer.

Enters: token ids of whole documents. Leaves: files under their names when they are complete, and
their entries for the manifest, which the caller writes last. Does not tokenize.
"""

from __future__ import annotations

import contextlib
import json
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from regmix.data.manifest import VERSION, Manifest, ShardFile, ShardStats
from regmix.errors import ShardError
from regmix.files import atomic_open, storage_errors

MAGIC = b"RGMXTOK\x00"
HEADER_BYTES = 4096
BLOCK_BYTES = 1 << 20
FILE_BYTES = 2 << 30  # tokens per file
FILE_DOCUMENTS = 1 << 24  # documents per file: their places are in memory until it is complete
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def header_bytes(
    manifest: Manifest, split: str, domain: str, *, tokens: int, largest_id: int
) -> bytes:
    """Return the header of a file: a pure function of the manifest, so open compares every bit."""
    fields = {
        "dtype": manifest.dtype,
        "tokens": tokens,
        "tokenizer": manifest.tokenizer.xxh3,
        "vocab_size": manifest.tokenizer.vocab_size,
        "largest_id": largest_id,
        "domain": domain,
        "split": split,
    }
    text = json.dumps(fields, ensure_ascii=False).encode()
    return (MAGIC + struct.pack("<II", VERSION, len(text)) + text).ljust(HEADER_BYTES, b"\0")


def file_bytes(tokens: int, documents: int, itemsize: int) -> int:
    """Return the exact size of a shard file."""
    blocks = -(-tokens * itemsize // BLOCK_BYTES)
    return HEADER_BYTES + tokens * itemsize + 8 * (blocks + documents + 1)


class ShardWriter:
    """Write one shard file: `with ShardWriter(folder, manifest, split, domain, 0) as writer`.

    The file appears under its name when the block ends well. `manifest` gives dtype and tokenizer.
    After the block, `record` is the file's entry for the manifest.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, split: str, domain: str, number: int
    ) -> None:
        self.name = f"{split}/{domain}-{number}.tokens"
        self.path = folder / self.name
        self.tokens = 0
        self.record: ShardFile | None = None
        self._manifest, self._split, self._domain = manifest, split, domain
        self._dtype = DTYPES[manifest.dtype]
        self._largest = 0
        self._offsets = array("Q")
        self._blocks = array("Q")
        self._block = xxhash.xxh3_64()
        self._block_filled = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        self._stream = self._stack.enter_context(atomic_open(self.path))
        self._stream.seek(HEADER_BYTES)
        return self

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._offsets)

    def write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their `ids` in one array, separators included, and their `lengths`."""
        if len(ids) == 0:
            return
        starts = np.cumsum(lengths, dtype=np.uint64) - np.asarray(lengths, np.uint64)
        self._offsets.frombytes((starts + np.uint64(self.tokens)).tobytes())
        self._largest = max(self._largest, int(ids.max()))
        if self._largest >= self._manifest.tokenizer.vocab_size:
            raise ShardError(
                f"{self.path}: token id {self._largest} is outside the vocabulary "
                f"of {self._manifest.tokenizer.vocab_size}",
                cure="Pack with the tokenizer that made these ids",
            )
        self.tokens += len(ids)
        raw = np.ascontiguousarray(ids, self._dtype).view(np.uint8).data
        with storage_errors(self.path):
            self._stream.write(raw)
        while len(raw) > 0:
            taken = raw[: BLOCK_BYTES - self._block_filled]
            self._block.update(taken)
            self._block_filled += len(taken)
            raw = raw[len(taken) :]
            if self._block_filled == BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._blocks.append(self._block.intdigest())
        self._block.reset()
        self._block_filled = 0

    def _finish(self) -> None:
        if self._block_filled:
            self._end_block()
        header = header_bytes(
            self._manifest, self._split, self._domain, tokens=self.tokens, largest_id=self._largest
        )
        footer = (
            np.asarray(self._blocks, "<u8").tobytes() + np.asarray(self._offsets, "<u8").tobytes()
        )
        total = xxhash.xxh3_64(header + footer)
        with storage_errors(self.path):
            self._stream.write(footer + struct.pack("<Q", total.intdigest()))
            size = self._stream.tell()
            self._stream.seek(0)
            self._stream.write(header)
        self.record = ShardFile(
            path=self.name,
            bytes=size,
            tokens=self.tokens,
            documents=len(self._offsets),
            largest_id=self._largest,
            checksum=total.hexdigest(),
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)


class DomainWriter:
    """Write one domain of one split: another file where one holds `FILE_BYTES` of tokens."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, domain: str) -> None:
        self._folder, self._manifest = folder, manifest
        self._split, self._domain = split, domain
        self._limit = FILE_BYTES // DTYPES[manifest.dtype].itemsize
        self._files: list[ShardFile] = []
        self._writer: ShardWriter | None = None
        self.documents = self.tokens = self.utf8_bytes = 0

    def __enter__(self) -> DomainWriter:
        return self

    def write(self, ids: np.ndarray, lengths: np.ndarray, utf8: np.ndarray) -> None:
        """Append documents: ids in one array, tokens of each, bytes of each text.

        A document is never divided over two files: it begins another one where it would take the
        file over its limit.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        first = start = 0  # document, token
        while first < len(lengths):
            room, documents = self._room()
            end = int(np.searchsorted(ends, start + room, side="right"))
            end = min(end, first + documents)
            if end <= first:
                if self._writer is not None:
                    self._close()
                    continue
                end = first + 1  # one document above the limit has a file of its own
            stop = int(ends[end - 1])
            if self._writer is None:
                writer = ShardWriter(
                    self._folder, self._manifest, self._split, self._domain, len(self._files)
                )
                self._writer = writer.__enter__()
            self._writer.write(ids[start:stop], lengths[first:end])
            first, start = end, stop
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.utf8_bytes += int(np.sum(utf8, dtype=np.int64))

    def _room(self) -> tuple[int, int]:
        """Return the tokens and documents that still go into the file."""
        if self._writer is None:
            return self._limit, FILE_DOCUMENTS
        return self._limit - self._writer.tokens, FILE_DOCUMENTS - self._writer.documents

    def _close(self, error: BaseException | None = None) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(type(error) if error else None, error, None)
            if writer.record is not None:
                self._files.append(writer.record)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close(error)

    def stats(self, *, dropped: Mapping[str, int]) -> ShardStats:
        """Return what the manifest says of the domain, given what was left out of it, by reason."""
        return ShardStats(
            documents=self.documents,
            tokens=self.tokens,
            utf8_bytes=self.utf8_bytes,
            **dropped,
            files=tuple(self._files),
        )
