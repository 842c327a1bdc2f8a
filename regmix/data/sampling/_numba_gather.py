"""Tokens into rows of a batch, compiled by Numba: the twin of `csrc/gather.hpp`.

Enters: token arrays per domain, and domain and sequence of every row. Leaves: rows of T+1 tokens.
Unusable without Numba, so imported only by the backend that needs it.

Numba takes the arrays by address: a list of arrays would be unboxed at every call, which costs more
than a small batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

# Rows of the spans, int64 [4, F], one column a file: where its tokens lie, whether they are
# uint32, how many there are, and how many its domain has up to here.
_ADDRESS, _WIDE, _LENGTH, _END = range(4)


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def at(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = context.get_value_type(signature.return_type)
            return builder.inttoptr(arguments[0], pointer)

        return types.CPointer(kind)(address), generate

    return at


_uint16_at: Any = _pointer_to(types.uint16)
_uint32_at: Any = _pointer_to(types.uint32)


@njit(cache=True, nogil=True)
def _fill(
    spans: Any, firsts: Any, slots: Any, domains: Any, sequences: Any, seq_len: int, out: Any
) -> bool:
    for row in range(len(domains)):
        domain = domains[row]
        if domain < 0 or domain >= len(slots):
            return False
        slot = slots[domain]
        if slot < 0 or slot >= len(firsts) - 1:
            return False
        file, last = firsts[slot], firsts[slot + 1]
        start = sequences[row] * seq_len
        if start < 0 or file == last or start + seq_len >= spans[_END, last - 1]:
            return False
        while spans[_END, file] <= start:
            file += 1
        offset = start - (spans[_END, file] - spans[_LENGTH, file])
        done = 0
        while done < seq_len + 1:
            num = min(seq_len + 1 - done, spans[_LENGTH, file] - offset)
            target = out[row, done : done + num]
            if spans[_WIDE, file]:
                wide = carray(_uint32_at(spans[_ADDRESS, file]), (spans[_LENGTH, file],))
                for i in range(num):
                    target[i] = wide[offset + i]
            else:
                narrow = carray(_uint16_at(spans[_ADDRESS, file]), (spans[_LENGTH, file],))
                for i in range(num):
                    target[i] = narrow[offset + i]
            done += num
            file += 1
            offset = 0
    return True


class NumbaGather:
    """See `regmix.data.sampling.backends.Gather`."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []  # keeps the tokens mapped
        self._spans = np.empty((4, 0), dtype=np.int64)
        self._firsts = np.zeros(1, dtype=np.int64)

    def add(self, files: Sequence[NDArray[Any]]) -> int:
        """See `Gather.add`."""
        arrays = [np.asarray(array) for array in files]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        addresses = [array.ctypes.data for array in arrays]
        wide = [array.dtype == np.uint32 for array in arrays]
        columns = np.array([addresses, wide, lengths, np.cumsum(lengths)], dtype=np.int64)
        self._arrays += arrays
        self._spans = np.ascontiguousarray(np.concatenate([self._spans, columns], axis=1))
        self._firsts = np.append(self._firsts, self._spans.shape[1])
        return len(self._firsts) - 2

    def fill(
        self,
        slots: NDArray[np.int64],
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
        seq_len: int,
        out: Any,
    ) -> None:
        """See `Gather.fill`."""
        if not _fill(self._spans, self._firsts, slots, domains, sequences, seq_len, out):
            raise IndexError("no such domain or sequence")
