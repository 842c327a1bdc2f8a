"""The layout of one file of token ids that another program wrote.

Enters: what its header or its description says. Leaves: where the ids lie and how to map them
without a copy. Reads no ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.stored_file import file_problem, size_of
from regmix.errors import ShardError

# Stored type -> (type it is mapped as, largest id it can say): a negative number has the bits of
# a larger id than that, so the check of ids finds it.
_MAPPED: dict[str, tuple[np.dtype[Any], int]] = {
    "uint16": (np.dtype("<u2"), (1 << 16) - 1),
    "int16": (np.dtype("<u2"), (1 << 15) - 1),
    "uint32": (np.dtype("<u4"), (1 << 32) - 1),
    "int32": (np.dtype("<u4"), (1 << 31) - 1),
}


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """stored: the type in the file; dtype: what it is mapped as; start: byte of the first id.

    largest: the largest id that the stored type can say; index: a file beside it that belongs to
    it, or None; padding: ids at the end that are not read.
    """

    path: Path
    stored: str
    dtype: np.dtype[Any]
    largest: int
    start: int
    tokens: int
    bytes: int
    index: Path | None = None
    padding: int = 0


class TokenFileError(ShardError):
    """A file of another program cannot be used: `path` and `reason` apart."""

    path: Path
    reason: str


def refuse(path: Path, reason: str, *, cure: str) -> TokenFileError:
    """Return the error about a file; who knows its domain adds that."""
    error = TokenFileError(f"{path}: {reason}", cure=cure)
    error.path, error.reason = path, reason
    return error


def regular_size(path: Path) -> int:
    """Return the size of a file; `ShardError` where it is missing, empty or no regular file."""
    size = size_of(path)
    if isinstance(size, str):
        raise refuse(path, size, cure="Restore the file, or correct the description")
    if size == 0:
        raise refuse(path, "the file is empty", cure="Restore the file, or leave it out")
    return size


def token_file(
    path: Path,
    stored: str,
    *,
    start: int,
    size: int,
    tokens: int | None = None,
    index: Path | None = None,
) -> TokenFile:
    """Return the layout of `tokens` ids from byte `start`, or of as many as the file holds.

    Raises `ShardError` where the type needs a copy to be read or the size does not fit.
    """
    if stored not in _MAPPED:
        raise refuse(
            path,
            f"ids of type {stored} cannot be read in place",
            cure="Write the file again with 2 or 4 bytes an id: "
            "numpy's astype('uint16') where the vocabulary is at most 65,536, else 'uint32'",
        )
    dtype, largest = _MAPPED[stored]
    if start % dtype.itemsize:
        raise refuse(
            path,
            f"the ids start at byte {start}, no multiple of {dtype.itemsize}",
            cure="Correct header_bytes, or write the ids into a file of their own",
        )
    room = size - start
    if tokens is None:
        if room % dtype.itemsize:
            raise refuse(
                path,
                f"{max(room, 0)} bytes are no whole number of ids of {dtype.itemsize} bytes",
                cure="Restore the file, or correct its type in the description",
            )
        tokens = room // dtype.itemsize
    elif room != tokens * dtype.itemsize:
        raise refuse(
            path,
            f"{size} bytes where {start + tokens * dtype.itemsize} were written: cut short or "
            "changed",
            cure="Restore the file, or write it again",
        )
    if tokens < 1:
        raise refuse(path, "holds no token ids", cure="Restore the file, or leave it out")
    return TokenFile(
        path=path,
        stored=stored,
        dtype=dtype,
        largest=largest,
        start=start,
        tokens=tokens,
        bytes=size,
        index=index,
    )


def read_start(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a file; `ShardError` where it cannot be read."""
    what = size_of(path)
    if isinstance(what, str):  # opening a pipe would wait for ever
        raise refuse(path, what, cure="Restore the file, or correct the description")
    try:
        with open(path, "rb") as stream:
            return stream.read(num_bytes)
    except OSError as error:
        raise refuse(path, file_problem(error), cure="Check its permissions") from error
