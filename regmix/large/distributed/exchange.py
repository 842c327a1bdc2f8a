"""What the ranks of a run tell each other about a checkpoint, over a group of its own.

Enters: JSON values and failures of single ranks. Leaves: the same values and the same failure on
every rank, also in a thread beside the training. Moves no tensors and pickles nothing; without
`torch.distributed` it is one rank that speaks to itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regmix.errors import RegmixError, StorageError

# Ranks wait here for the slowest disk; one that died ends the wait at once.
_PATIENCE = timedelta(hours=2)
_groups: list[tuple[Any, dist.ProcessGroup]] = []  # the newest world and its group


class Exchange:
    """This rank among those of the run; all of them must make the same calls in the same order."""

    def __init__(self) -> None:
        self._group = _own_group()
        self.rank = 0 if self._group is None else dist.get_rank()
        self.num_ranks = 1 if self._group is None else dist.get_world_size()

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank and return all ranks' JSON values.

        Where one rank fails, every rank raises: that one its own error, the others a `StorageError`
        which names it.
        """
        value, error = _attempt(work)
        answers = self._gather({"value": value, "error": _words(error)})
        if error is not None:
            raise error
        for rank, answer in enumerate(answers):
            if answer["error"] is not None:
                what, cure = answer["error"]
                raise StorageError(f"Rank {rank}: {what}", cure=cure)
        return [answer["value"] for answer in answers]

    def from_first(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone and return its JSON value, or raise its error, everywhere."""
        value, error = _attempt(work) if self.rank == 0 else (None, None)
        answer = self._broadcast({"value": value, "error": _words(error)})
        if error is not None:
            raise error
        if answer["error"] is not None:
            what, cure = answer["error"]
            raise StorageError(f"Rank 0: {what}", cure=cure)
        return answer["value"]

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [json.loads(json.dumps(value))]
        own = _encode(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.num_ranks)]
        dist.all_gather(sizes, torch.tensor([own.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: own.numel()] = own
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.num_ranks)]
        dist.all_gather(texts, padded, group=self._group)
        return [_decode(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def _broadcast(self, value: Any) -> Any:
        if self._group is None:
            return json.loads(json.dumps(value))
        text = _encode(value)
        size = torch.tensor([text.numel()])
        dist.broadcast(size, src=0, group=self._group)
        if self.rank != 0:
            text = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, src=0, group=self._group)
        return _decode(text)


def this_rank() -> int:
    """Return the number of this rank, 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _own_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks that nothing else uses, or None for a single process.

    Collectives of one group must come in one order on all ranks, so a thread cannot share the
    training's. It is made once for each initialisation of `torch.distributed`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if not _groups or _groups[0][0] is not world:
        _groups[:] = [(world, dist.new_group(backend="gloo", timeout=_PATIENCE))]
    return _groups[0][1]


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _words(error: Exception | None) -> tuple[str, str] | None:
    if error is None:
        return None
    if isinstance(error, RegmixError):
        return error.what, error.cure
    return repr(error), "See the message of that rank"


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())
