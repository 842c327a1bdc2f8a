"""The tokens of a corpus as the samplers of a process share them.

Enters: shards and a backend. Leaves: for each domain asked for, its number of tokens and the slot
by which the gathering knows it. A domain is opened when it is first asked for. Its blocks are
checked then, or, by the native backend, when a row first touches each. A thousand mixtures of a
corpus open it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from regmix.data.sampling.backends import Backend, Gather, NativeBackend
from regmix.errors import ShardError

if TYPE_CHECKING:
    from regmix.data.block_checks import BlockCheck


class Shards(Protocol):
    """What the sampler needs of a `ShardSet`."""

    def domains(self, split: str) -> tuple[str, ...]:
        """Return the domains of a split."""

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        """Return the token arrays of a domain, in order."""


@runtime_checkable
class LazyShards(Protocol):
    """Shards that leave the check of their blocks to the sampler."""

    def lazy_arrays(
        self, split: str, domain: str
    ) -> tuple[tuple[NDArray[Any], BlockCheck | None], ...]:
        """Return the token arrays of a domain, each with what checks its blocks."""


class TokenStore:
    """The domains of one split that have been opened; made by `token_store`."""

    def __init__(self, split: str, backend: Backend) -> None:
        self._lazy = backend.gather() if isinstance(backend, NativeBackend) else None
        self.gather: Gather = self._lazy or backend.gather()
        self._split = split
        self._opened: dict[str, tuple[int, int, bool]] = {}  # slot, tokens, any uint32

    def open(self, shards: Shards, domain: str) -> tuple[int, int, bool]:
        """Return (slot, number of tokens, whether any is stored as uint32) of a domain.

        Raises `ShardError` where the tokens are of a type that no sampler reads.
        """
        if domain not in self._opened:
            if self._lazy is not None and isinstance(shards, LazyShards):
                pairs = shards.lazy_arrays(self._split, domain)
                arrays = _plain(domain, [array for array, _ in pairs])
                slot = self._lazy.add(arrays, [check for _, check in pairs])
            else:
                arrays = _plain(domain, shards.arrays(self._split, domain))
                slot = self.gather.add(arrays)
            wide = any(array.dtype == np.uint32 for array in arrays)
            self._opened[domain] = (slot, sum(map(len, arrays)), wide)
        return self._opened[domain]


def _plain(domain: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    for array in arrays:
        if array.dtype not in (np.uint16, np.uint32) or not array.flags.c_contiguous:
            raise ShardError(
                f"Domain '{domain}' holds tokens of type {array.dtype}",
                cure="Pack the corpus again: tokens are contiguous uint16 or uint32",
            )
    return [np.asarray(array) for array in arrays]


_STORES: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], TokenStore]] = (
    weakref.WeakKeyDictionary()
)


def token_store(shards: Shards, split: str, backend: Backend) -> TokenStore:
    """Return the store of a split, the same one for every sampler over these shards."""
    stores = _STORES.setdefault(shards, {})
    return stores.setdefault((split, backend.name), TokenStore(split, backend))
