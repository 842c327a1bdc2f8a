"""The sampler as other trainers take it: a PyTorch dataset with a state.

Enters: a sampler, the steps of a run, the rank. Leaves: an `IterableDataset` of whole batches, one
a step, for `DataLoader(dataset, batch_size=None)`, torchdata's `StatefulDataLoader` or a plain
loop. Collates nothing and shuffles nothing: the order is the sampler's, with any number of workers.

With W workers, worker w makes every W-th step from `start` + w on; a loader takes from them by
turns, so the order of the steps is that of one process. With workers only a `StatefulDataLoader`
knows the place; who drives a plain `DataLoader` knows the step, and so `sampler.state(step)`.
Workers cost more than they give unless the trainer's own process has no time: see `BatchRing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from regmix.data.sampling.sampler import MixtureSampler
from regmix.errors import ConfigError


class MixtureDataset(IterableDataset[torch.Tensor]):
    """Batches [B / num_ranks, T+1] int64 of steps `start` to `num_steps`, without end where None.

    Inputs are `batch[:, :-1]`, labels `batch[:, 1:]`. Rank r has rows r B / R to (r + 1) B / R of
    every batch; `ConfigError` where R does not divide B. `state_dict` and `load_state_dict` keep
    the place; a state fits any number of ranks, since it belongs to the global stream.
    """

    def __init__(
        self,
        sampler: MixtureSampler,
        *,
        start: int = 0,
        num_steps: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        super().__init__()
        if start < 0:
            raise ConfigError(f"start is {start}", cure="Steps count from 0")
        if num_ranks < 1 or not 0 <= rank < num_ranks or sampler.batch_size % num_ranks:
            raise ConfigError(
                f"rank {rank} of {num_ranks} for a batch of {sampler.batch_size}",
                cure="Use a number of ranks that divides the batch, and ranks from 0",
            )
        size = sampler.batch_size // num_ranks
        self._rows = (rank * size, (rank + 1) * size)
        self._sampler = sampler
        self._start, self._num_steps = start, num_steps
        self._next = start  # of this process, which may be one worker of several
        self._loaded = self._loaded_in_worker = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        # At once, not with the first batch: a loader may ask for the state before it.
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if not self._loaded:
            self._next = self._start
        if not self._loaded_in_worker:
            self._next += number
        self._loaded = self._loaded_in_worker = False
        return self._batches(num_workers)

    def _batches(self, stride: int) -> Iterator[torch.Tensor]:
        while self._num_steps is None or self._next < self._num_steps:
            tokens = torch.empty(self._sampler.batch_shape(self._rows), dtype=torch.int64)
            self._sampler.batch(self._next, out=tokens.numpy(), rows=self._rows)
            self._next += stride
            yield tokens

    def __len__(self) -> int:
        if self._num_steps is None:
            raise TypeError("a stream without end has no length")
        return max(0, self._num_steps - (self._next if self._loaded else self._start))

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream: plain values, for any checkpoint."""
        return self._sampler.state(self._next)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the place of `state`; `MixtureError` where it is of another stream.

        The next iteration begins there; one after it begins at `start` again.
        """
        self._next = self._sampler.restore(state)
        self._loaded, self._loaded_in_worker = True, get_worker_info() is not None
