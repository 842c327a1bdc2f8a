"""The tokens of a corpus as the samplers of a process share them.

Enters: shards and a backend. Leaves: for each domain asked for, its number of tokens and the slot
by which the gathering knows it. A domain is opened, and so checked, when it is first asked for.
A thousand mixtures of a corpus open it once.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regmix.data.sampling.backends import Backend, Gather
from regmix.errors import ShardError


class Shards(Protocol):
    """What the sampler needs of a `ShardSet`."""

    def domains(self, split: str) -> tuple[str, ...]:
        """Return the domains of a split."""

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        """Return the token arrays of a domain, in order."""


class TokenStore:
    """The domains of one split that have been opened; made by `token_store`."""

    def __init__(self, split: str, backend: Backend) -> None:
        self.gather: Gather = backend.gather()
        self._split = split
        self._opened: dict[str, tuple[int, int, bool]] = {}  # slot, tokens, any uint32

    def open(self, shards: Shards, domain: str) -> tuple[int, int, bool]:
        """Return (slot, number of tokens, whether any is stored as uint32) of a domain.

        Raises `ShardError` where the tokens are of a type that no sampler reads.
        """
        if domain not in self._opened:
            arrays = shards.arrays(self._split, domain)
            for array in arrays:
                if array.dtype not in (np.uint16, np.uint32) or not array.flags.c_contiguous:
                    raise ShardError(
                        f"Domain '{domain}' holds tokens of type {array.dtype}",
                        cure="Pack the corpus again: tokens are contiguous uint16 or uint32",
                    )
            slot = self.gather.add([np.asarray(array) for array in arrays])
            wide = any(array.dtype == np.uint32 for array in arrays)
            self._opened[domain] = (slot, sum(map(len, arrays)), wide)
        return self._opened[domain]


_STORES: weakref.WeakKeyDictionary[Any, dict[tuple[str, str], TokenStore]] = (
    weakref.WeakKeyDictionary()
)


def token_store(shards: Shards, split: str, backend: Backend) -> TokenStore:
    """Return the store of a split, the same one for every sampler over these shards."""
    stores = _STORES.setdefault(shards, {})
    return stores.setdefault((split, backend.name), TokenStore(split, backend))
