"""One file of tokens as it lies on disk: what a check and a map need of it.

Enters: a path. Leaves: its size and identity, or what is wrong with it in words, and `Damage`, the
error that names file, domain and cure. Reads no tokens.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from regmix.errors import ShardError
from regmix.files import cure_of_reason

Identity = tuple[int, ...]


class StoredFile(Protocol):
    """One file of tokens, as a check and a map need it."""

    @property
    def split(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def start(self) -> int:
        """Byte of the first token."""

    @property
    def tokens(self) -> int: ...
    @property
    def cure(self) -> str: ...
    @property
    def stamp(self) -> str:
        """What the content is known by: the same path may hold another corpus tomorrow."""

    @property
    def offsets(self) -> np.ndarray:
        """First token of each document (uint64), after `load`."""

    @property
    def digests(self) -> np.ndarray | None:
        """The xxh3_64 of every block (uint64), after `load`; None where its check is another."""

    def ends_problem(self) -> str | None:
        """Return what is wrong with size or header; reads no tokens."""

    def load(self) -> str | None:
        """Read what a check of blocks compares with; return what is wrong with it."""

    def block_problem(self, number: int, block: memoryview) -> str | None:
        """Return what is wrong with one block."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Something wrong with a file: `block` is None where it is the file as a whole.

    `split` and `domain` are None where the file belongs to no domain.
    """

    path: str
    what: str
    cure: str
    split: str | None = None
    domain: str | None = None
    block: int | None = None

    def __str__(self) -> str:
        whose = "" if self.domain is None else f" (domain '{self.domain}', {self.split})"
        return f"{self.path}{whose}: {self.what}"

    def error(self) -> ShardError:
        """Return the damage as the error that names file, domain and cure."""
        return ShardError(str(self), cure=self.cure)


def identity(status: os.stat_result) -> Identity:
    """Return what tells one state of a file from another without reading it."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def file_problem(error: OSError) -> str:
    """Return an `OSError` in words, for a message that names the file itself."""
    if error.errno == errno.ENOENT:
        return "the file is missing"
    return os.strerror(error.errno) if error.errno else str(error)


def size_of(path: Path) -> int | str:
    """Return the size of a regular file, or what is wrong with it."""
    try:
        if path.is_dir():
            return "a folder where the file should be"
        if not path.is_file():
            return "not a regular file" if path.exists() else "the file is missing"
        return path.stat().st_size
    except OSError as error:
        return file_problem(error)


def damage_of(file: StoredFile, what: str, block: int | None = None) -> Damage:
    """Return what is wrong with a file as `Damage`."""
    return Damage(
        split=file.split,
        domain=file.domain,
        path=str(file.path),
        what=what,
        # Packing again cures no permission and no disk.
        cure=cure_of_reason(what) or file.cure,
        block=block,
    )
