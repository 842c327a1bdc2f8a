"""Exact duplicates, found by 128-bit hashes of whole documents in the order of packing.

A table of open addressing in two arrays, compiled by Numba: 16 bytes a slot, at most 60 % full,
doubled when it fills, so 27 to 53 bytes a document, and up to 80 while it grows. Two different
documents among a billion share a hash with a probability below 2e-21; the hash is xxh3, which is
no defence against documents that are made to collide.

Enters: hashes, a block of documents at a time. Leaves: which of them were not there before. The
answer depends on the order of the documents alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SLOTS = 1 << 16
FULL = 0.6


@njit(cache=True, nogil=True)
def _insert(table: Any, hashes: Any, fresh: Any) -> Any:
    mask = np.uint64(table.shape[0] - 1)
    added = 0
    for row in range(hashes.shape[0]):
        low, high = hashes[row, 0], hashes[row, 1]
        if low == 0 and high == 0:
            high = np.uint64(1)  # 0, 0 marks a free slot
        place = low & mask
        while True:
            there_low, there_high = table[place, 0], table[place, 1]
            if there_low == 0 and there_high == 0:
                table[place, 0], table[place, 1] = low, high
                fresh[row] = True
                added += 1
                break
            if there_low == low and there_high == high:
                break
            place = (place + np.uint64(1)) & mask
    return added


class SeenDocuments:
    """The documents met so far."""

    def __init__(self, slots: int = SLOTS) -> None:
        self._table = np.zeros((slots, 2), np.uint64)
        self.num = 0

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Return for each row of `hashes` (uint64 [documents, 2]) whether it is met first here."""
        while self.num + len(hashes) > FULL * len(self._table):
            self._grow()
        fresh = np.zeros(len(hashes), np.bool_)
        self.num += int(_insert(self._table, np.ascontiguousarray(hashes, np.uint64), fresh))
        return fresh

    def _grow(self) -> None:
        before = self._table
        self._table = np.zeros((2 * len(before), 2), np.uint64)
        step = 1 << 20
        for start in range(0, len(before), step):
            part = before[start : start + step]
            part = part[(part != 0).any(axis=1)]
            _insert(self._table, part, np.zeros(len(part), np.bool_))

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return self._table.nbytes
