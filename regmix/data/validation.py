"""Validation sets as windows: the same tokens for every model.

Enters: a corpus of shards, a target and a window length T. Leaves: non-overlapping windows in
file order, the last partial one masked; where only some are wanted, evenly spaced ones. They are
read batch by batch, so a set may be larger than memory. Computes no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from regmix.errors import ShardError

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet


class Windows:
    """Windows of `seq_len` predictions over the token arrays `files`; made by `read_windows`."""

    def __init__(self, files: Sequence[np.ndarray], starts: np.ndarray, seq_len: int) -> None:
        self._files, self._starts, self._seq_len = tuple(files), starts, seq_len
        self._ends = np.cumsum([len(file) for file in files])
        inside = np.minimum(int(self._ends[-1]) - 1 - starts, seq_len)
        self.num_tokens = int(inside.sum())  # predictions that count

    def __len__(self) -> int:
        return len(self._starts)

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens [B, T+1] int64 and mask [B, T] bool: which of the T predictions count."""
        for first in range(0, len(self._starts), batch_size):
            starts = self._starts[first : first + batch_size]
            tokens = np.zeros((len(starts), self._seq_len + 1), dtype=np.int64)
            mask = np.zeros((len(starts), self._seq_len), dtype=bool)
            for row, start in enumerate(starts.tolist()):
                mask[row, : self._read(start, tokens[row]) - 1] = True
            yield tokens, mask

    def _read(self, start: int, out: np.ndarray) -> int:
        """Copy the tokens from `start` on into `out`; return how many there are."""
        done = 0
        file = int(np.searchsorted(self._ends, start, side="right"))
        while done < len(out) and file < len(self._files):
            tokens = self._files[file]
            offset = start + done - (int(self._ends[file]) - len(tokens))
            part = tokens[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            file += 1
        return done


def read_windows(
    shards: ShardSet, target: str, *, seq_len: int, max_tokens: int | None = None
) -> Windows:
    """Cut the validation set of `target` into windows of `seq_len` predictions.

    Window k predicts tokens kT+1 .. kT+T from those before them, so every token but the first is
    predicted exactly once. With `max_tokens`, the windows that are kept lie evenly over the set.
    """
    files = shards.arrays("valid", target)
    num_tokens = sum(map(len, files))
    num_predictions = num_tokens - 1
    if num_predictions < 1:
        raise ShardError(
            f"{shards.path}: validation set '{target}' has {num_tokens} tokens",
            cure="Pack more validation text for it, for example with a larger --valid-fraction",
        )
    chosen = np.arange(-(-num_predictions // seq_len))
    if max_tokens is not None and max_tokens < num_predictions:
        num_kept = max(1, max_tokens // seq_len)
        # Whole windows only: the partial last one is left to complete evaluations.
        whole = max(1, num_predictions // seq_len)
        chosen = np.unique(np.arange(num_kept) * whole // num_kept)
    return Windows(files, chosen * seq_len, seq_len)
