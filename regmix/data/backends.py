"""Who computes the data order and gathers the tokens: C++, Numba or NumPy, with identical bytes.

Enters: the name of a backend, or "auto". Leaves: a `Backend`. Knows nothing of mixtures or steps.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regmix.data import order
from regmix.errors import ConfigError, nearest

BACKENDS = ("native", "numba", "numpy")


class Gather(Protocol):
    """Copies sequences into a batch."""

    def fill(
        self, domains: NDArray[np.int64], sequences: NDArray[np.int64], out: NDArray[np.int64]
    ) -> None:
        """Write sequence `sequences[i]` of domain `domains[i]` into row i of `out` [N, T+1]."""


class Backend(Protocol):
    """The order and the gathering; `order.py` defines the tables and what `order` must write."""

    name: str

    def advance(
        self, table: NDArray[np.int64], dealing: NDArray[np.int64], first: int, num: int
    ) -> None:
        """Move `dealing` past sequences `first` to `first + num - 1`."""

    def order(
        self,
        table: NDArray[np.int64],
        dealing: NDArray[np.int64],
        first: int,
        step_key: int,
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
    ) -> None:
        """Deal one step into `domains` and `sequences`, in batch order."""

    def gather(self, arrays: Sequence[Sequence[NDArray[Any]]], seq_len: int) -> Gather:
        """Return a `Gather` over the token arrays of each domain."""


class SliceGather:
    """Gathers by NumPy slices; a sequence may straddle several arrays."""

    def __init__(self, arrays: Sequence[Sequence[NDArray[Any]]], seq_len: int) -> None:
        self._arrays = [tuple(np.asarray(array) for array in domain) for domain in arrays]
        self._ends = [np.cumsum([len(array) for array in domain]) for domain in self._arrays]
        self._seq_len = seq_len

    def fill(
        self, domains: NDArray[np.int64], sequences: NDArray[np.int64], out: NDArray[np.int64]
    ) -> None:
        """See `Gather.fill`."""
        length = self._seq_len + 1
        pairs = zip(domains.tolist(), sequences.tolist(), strict=True)
        for row, (domain, sequence) in zip(out, pairs, strict=True):
            start = sequence * self._seq_len
            ends = self._ends[domain]
            file = int(np.searchsorted(ends, start, side="right"))
            done = 0
            while done < length:
                array = self._arrays[domain][file]
                offset = start + done - (int(ends[file]) - len(array))
                part = array[offset : offset + length - done]
                row[done : done + len(part)] = part
                done += len(part)
                file += 1


class NumpyBackend:
    """Plain NumPy: the oracle of the tests, and what runs where nothing else does."""

    name = "numpy"

    def advance(
        self, table: NDArray[np.int64], dealing: NDArray[np.int64], first: int, num: int
    ) -> None:
        """See `Backend.advance`."""
        order.deal(table, dealing, first, num)

    def order(
        self,
        table: NDArray[np.int64],
        dealing: NDArray[np.int64],
        first: int,
        step_key: int,
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
    ) -> None:
        """See `Backend.order`."""
        order.order(table, dealing, first, step_key, domains, sequences)

    def gather(self, arrays: Sequence[Sequence[NDArray[Any]]], seq_len: int) -> Gather:
        """See `Backend.gather`."""
        return SliceGather(arrays, seq_len)


class NumbaBackend(NumpyBackend):
    """The order compiled by Numba; tokens are gathered by NumPy slices, which are as fast."""

    name = "numba"

    def __init__(self) -> None:
        from regmix.data import _numba_order

        self._kernels = _numba_order

    def advance(
        self, table: NDArray[np.int64], dealing: NDArray[np.int64], first: int, num: int
    ) -> None:
        """See `Backend.advance`."""
        self._kernels.advance(table, dealing, first, num)

    def order(
        self,
        table: NDArray[np.int64],
        dealing: NDArray[np.int64],
        first: int,
        step_key: int,
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
    ) -> None:
        """See `Backend.order`."""
        key = np.uint64(step_key)
        self._kernels.order(table, dealing, first, key, domains, sequences)


class NativeBackend:
    """The C++ core, `csrc/sampler.hpp`; it works without the GIL."""

    name = "native"

    def __init__(self) -> None:
        _sampler = importlib.import_module("regmix._sampler")
        if _sampler.ORDER_VERSION != order.ORDER_VERSION:
            raise ImportError(
                f"regmix._sampler was built for order version {_sampler.ORDER_VERSION}, "
                f"this package has {order.ORDER_VERSION}: build it again"
            )
        self.advance = _sampler.advance
        self.order = _sampler.order
        self._gather = _sampler.Gather

    def gather(self, arrays: Sequence[Sequence[NDArray[Any]]], seq_len: int) -> Gather:
        """See `Backend.gather`."""
        plain = [[np.asarray(array) for array in domain] for domain in arrays]
        return self._gather(plain, seq_len)


_KINDS: dict[str, Callable[[], Backend]] = {
    "native": NativeBackend,
    "numba": NumbaBackend,
    "numpy": NumpyBackend,
}


@functools.cache
def _load(name: str) -> Backend | str:
    """Return the backend, or the reason why it cannot be used here."""
    try:
        return _KINDS[name]()
    except (ImportError, RuntimeError) as error:  # RuntimeError: Numba cannot write its cache
        return str(error)


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that work here, fastest first."""
    return tuple(name for name in BACKENDS if not isinstance(_load(name), str))


@functools.cache
def _announce(chosen: str, reasons: tuple[str, ...]) -> None:
    warnings.warn(
        f"regmix reads data with its {chosen} backend: {'; '.join(reasons)}. "
        "The batches are the same, only slower to make.",
        RuntimeWarning,
        stacklevel=4,
    )


def load_backend(name: str) -> Backend:
    """Return the backend of that name; "auto" is the fastest that works here.

    Raises `ConfigError` for an unknown name and for a backend that does not work here.
    """
    if name == "auto":
        reasons: list[str] = []
        for candidate in BACKENDS:
            backend = _load(candidate)
            if not isinstance(backend, str):
                if reasons:
                    _announce(candidate, tuple(reasons))
                return backend
            reasons.append(f"{candidate} is not available ({backend})")
    if name not in _KINDS:
        raise ConfigError(
            f"Unknown sampler backend '{name}' ({nearest(name, ['auto', *BACKENDS])})",
            cure="Use 'auto'",
        )
    backend = _load(name)
    if isinstance(backend, str):
        raise ConfigError(
            f"The sampler backend '{name}' does not work here ({backend})",
            cure="Use 'auto', or install the package again with a C++ compiler and Numba",
        )
    return backend
