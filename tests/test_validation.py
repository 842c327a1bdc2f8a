"""Validation windows: every token predicted once, and the same tokens for every model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from regmix.data.validation import read_windows
from regmix.errors import ShardError


@dataclass
class OneSet:
    """A corpus whose only validation set is `tokens`, in two files."""

    tokens: np.ndarray
    path: Path = Path("corpus")

    def arrays(self, split: str, domain: str) -> tuple[np.ndarray, ...]:
        assert split == "valid"
        return (self.tokens[:3], self.tokens[3:])


@pytest.mark.parametrize("length", [2, 5, 16, 17, 18, 33, 100])
def test_every_token_but_the_first_is_predicted_exactly_once(length: int) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    windows = read_windows(OneSet(tokens), "web", seq_len=16)  # type: ignore[arg-type]
    for batch_size in (1, 2, 100):
        batches = list(windows.batches(batch_size))
        predicted = np.concatenate([batch[:, 1:][mask] for batch, mask in batches])
        context = np.concatenate([batch[:, :-1][mask] for batch, mask in batches])
        np.testing.assert_array_equal(predicted, tokens[1:])
        np.testing.assert_array_equal(context, tokens[:-1])
    assert windows.num_tokens == length - 1


def test_a_limit_keeps_evenly_spaced_whole_windows() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    windows = read_windows(OneSet(tokens), "web", seq_len=10, max_tokens=200)  # type: ignore[arg-type]
    ((batch, mask),) = windows.batches(20)
    assert mask.all()
    np.testing.assert_array_equal(batch[:, 0], np.arange(20) * 50)
    assert windows.num_tokens == 200


def test_a_limit_above_the_set_reads_all_of_it() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    windows = read_windows(OneSet(tokens), "web", seq_len=16, max_tokens=5000)  # type: ignore[arg-type]
    assert windows.num_tokens == 100


def test_a_set_of_one_token_is_refused() -> None:
    with pytest.raises(ShardError, match="web"):
        read_windows(OneSet(np.arange(1, dtype=np.uint16)), "web", seq_len=16)  # type: ignore[arg-type]
