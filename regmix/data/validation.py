"""Validation sets as windows: the same tokens for every model.

Enters: a corpus of shards, a target and a window length T. Leaves: non-overlapping windows in
file order, the last partial one masked; where only some are wanted, evenly spaced ones.
Computes no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regmix.errors import ShardError

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet


@dataclass(frozen=True)
class Windows:
    """tokens [N, T+1] int64 and mask [N, T] bool: which of the T predictions count."""

    tokens: np.ndarray
    mask: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Predictions that count."""
        return int(self.mask.sum())


def read_windows(
    shards: ShardSet, target: str, *, seq_len: int, max_tokens: int | None = None
) -> Windows:
    """Cut the validation set of `target` into windows of `seq_len` predictions.

    Window k predicts tokens kT+1 .. kT+T from those before them, so every token but the first is
    predicted exactly once. With `max_tokens`, the windows that are kept lie evenly over the set.
    """
    tokens = np.concatenate([np.asarray(part) for part in shards.arrays("valid", target)])
    num_predictions = len(tokens) - 1
    if num_predictions < 1:
        raise ShardError(
            f"{shards.path}: validation set '{target}' has {len(tokens)} tokens",
            cure="Pack more validation text for it, for example with a larger --valid-fraction",
        )
    num_windows = -(-num_predictions // seq_len)
    chosen = np.arange(num_windows)
    if max_tokens is not None and max_tokens < num_predictions:
        num_kept = max(1, max_tokens // seq_len)
        # Whole windows only: the partial last one is left to complete evaluations.
        whole = max(1, num_predictions // seq_len)
        chosen = np.unique(np.arange(num_kept) * whole // num_kept)
    starts = chosen * seq_len
    positions = starts[:, None] + np.arange(seq_len + 1)[None, :]
    inside = positions < len(tokens)
    return Windows(
        tokens=tokens[np.where(inside, positions, 0)].astype(np.int64), mask=inside[:, 1:]
    )
