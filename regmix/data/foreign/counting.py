"""Documents and bytes of text, counted in one pass over a domain's tokens.

Enters: files that were checked, the separator, and bytes by token id. Leaves: the first token of
each document, and the bytes of their text. Trusts an index where the format has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from regmix.data.blocks import BLOCK_BYTES, map_blocks
from regmix.data.stored_file import StoredFile


@dataclass(frozen=True)
class Counted:
    """offsets: first token of each document, counted over the files; utf8_bytes: of their text."""

    offsets: np.ndarray
    utf8_bytes: int | None


@dataclass(frozen=True)
class _Block:
    starts: np.ndarray  # of documents, a first one included that may go on from before
    ended: bool  # the last token is a separator
    utf8_bytes: int


def count_tokens(
    files: Sequence[StoredFile], separator_id: int, byte_lengths: np.ndarray | None
) -> Counted:
    """Count a domain: documents are the stretches between separators, over blocks and files."""

    def count(number: int, _block: int, content: memoryview) -> _Block:
        ids = np.frombuffer(content, files[number].dtype)
        inside = ids != separator_id
        # A document starts where another id follows a separator.
        starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
        if inside[0]:
            starts = np.concatenate([[0], starts])
        total = 0
        if byte_lengths is not None:
            total = int(np.take(byte_lengths, ids).sum(dtype=np.int64))
        return _Block(starts.astype(np.uint64), not inside[-1], total)

    parts, before, ended, total = [np.empty(0, np.uint64)], 0, True, 0
    for file, blocks in zip(files, map_blocks(files, count), strict=True):
        for number, block in enumerate(blocks):
            goes_on = not ended and len(block.starts) > 0 and block.starts[0] == 0
            position = before + number * (BLOCK_BYTES // file.dtype.itemsize)
            parts.append(block.starts[int(goes_on) :] + np.uint64(position))
            ended, total = block.ended, total + block.utf8_bytes
        before += file.tokens
    return Counted(np.concatenate(parts), total if byte_lengths is not None else None)


def block_digests(files: Sequence[StoredFile]) -> list[str]:
    """Return the joined xxh3_64 of every block of each file."""
    found = map_blocks(files, lambda _file, _block, content: xxhash.xxh3_64_hexdigest(content))
    return ["".join(blocks) for blocks in found]
