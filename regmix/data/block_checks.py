"""A file mapped before its blocks are checked, with what checks each when a row first touches it.

Enters: a file whose format stores a checksum for every block. Leaves: its map, and `BlockCheck`,
from which csrc/check.hpp works: it hands out no token of a block that it has not compared. What was
checked is known to the whole process, here and in blocks.py. Reads no tokens itself, except to say
what is wrong with a block.
"""

from __future__ import annotations

import os
import weakref

import numpy as np
from numpy.typing import NDArray

from regmix.data.blocks import (
    BLOCK_BYTES,
    block_damage,
    block_states,
    is_checked,
    map_stream,
    map_tokens,
    read_block,
    with_descriptors,
)
from regmix.data.stored_file import Identity, StoredFile, damage_of, file_problem, identity
from regmix.errors import ShardError


class BlockCheck:
    """What checks the blocks of one open file: `states` turns from 0 to 1 as each is found whole.

    `descriptor` is of the file that is mapped, whatever its path names later; `start` is the byte
    of the first token, `digests` and `states` have an entry a block.
    """

    def __init__(self, file: StoredFile, descriptor: int, seen: Identity) -> None:
        if file.digests is None:
            raise TypeError(f"{file.path}: its format has no checksum of a block")
        self._file, self.descriptor, self.start = file, descriptor, file.start
        self.digests: NDArray[np.uint64] = np.ascontiguousarray(file.digests, np.uint64)
        self.states = block_states(file, seen)
        # Not at exit: the threads of a ring may still read then.
        weakref.finalize(self, os.close, descriptor).atexit = False

    def error(self, block: int, cause: int) -> ShardError:
        """Return what is wrong with a block as the check of a whole file says it.

        `cause` is the errno of a read that failed, 0 where the block was not what was written.
        """
        try:
            what = file_problem(OSError(cause, os.strerror(cause))) if cause else self._what(block)
        except OSError as error:
            what = file_problem(error)
        return damage_of(self._file, what, block).error()

    def _what(self, block: int) -> str:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        content = read_block(self._file, self.descriptor, block, buffer)
        what = block_damage(self._file, block, content)
        if what is None:
            return (
                f"block {block} was read wrong once and right the second time: "
                "the memory or the disk of this machine is faulty"
            )
        return self._file.ends_problem() or what


def map_lazily(file: StoredFile) -> tuple[np.ndarray, BlockCheck | None]:
    """Return a file's tokens as a read-only memory map, and what must check them before use.

    None where this process has checked all of it before. Raises `ShardError` where size, header or
    footer are wrong.
    """
    if is_checked(file):
        return map_tokens(file, checked=True), None
    return with_descriptors(file, lambda: _map(file))


def _map(file: StoredFile) -> tuple[np.ndarray, BlockCheck]:
    seen = identity(os.stat(file.path))
    what = file.ends_problem() or file.load()
    if what is not None:
        raise damage_of(file, what).error()
    descriptor = os.open(file.path, os.O_RDONLY)
    try:
        if identity(os.fstat(descriptor)) != seen:
            raise damage_of(file, "the file changed on disk while it was checked").error()
        with open(descriptor, "rb", closefd=False) as stream:
            array = map_stream(file, stream)
    except BaseException:
        os.close(descriptor)
        raise
    return array, BlockCheck(file, descriptor, seen)
