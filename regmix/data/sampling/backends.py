"""Who computes the data order and gathers the tokens: C++, Numba or NumPy, with identical bytes.

Enters: the name of a backend, or "auto". Leaves: a `Backend`. Knows nothing of mixtures or steps.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regmix.data.sampling import order
from regmix.errors import ConfigError, nearest

if TYPE_CHECKING:
    from regmix.data.block_checks import BlockCheck

BACKENDS = ("native", "numba", "numpy")


Batch = NDArray[np.int64] | NDArray[np.int32] | NDArray[np.uint16]


class Gather(Protocol):
    """Copies sequences into a batch."""

    def add(self, files: Sequence[NDArray[Any]]) -> int:
        """Take a domain's token arrays, uint16 or uint32, and return its slot."""

    def fill(
        self,
        slots: NDArray[np.int64],
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
        seq_len: int,
        out: Batch,
    ) -> None:
        """Write sequence `sequences[i]` of slot `slots[domains[i]]` into row i of out [N, T+1]."""


class LazyGather(Gather, Protocol):
    """Checks a block of a file when a row first touches it."""

    def add(self, files: Sequence[NDArray[Any]], checks: Sequence[BlockCheck | None] = ()) -> int:
        """See `Gather.add`; a file with a check is checked by `fill`, which raises its error."""


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

    def gather(self) -> Gather:
        """Return a `Gather` without domains."""


class SliceGather:
    """Gathers by NumPy slices; a sequence may straddle several arrays."""

    def __init__(self) -> None:
        self._domains: list[tuple[NDArray[Any], ...]] = []
        self._ends: list[NDArray[np.int64]] = []

    def add(self, files: Sequence[NDArray[Any]]) -> int:
        """See `Gather.add`."""
        self._domains.append(tuple(np.asarray(array) for array in files))
        self._ends.append(np.cumsum([len(array) for array in files]))
        return len(self._domains) - 1

    def fill(
        self,
        slots: NDArray[np.int64],
        domains: NDArray[np.int64],
        sequences: NDArray[np.int64],
        seq_len: int,
        out: Batch,
    ) -> None:
        """See `Gather.fill`."""
        pairs = zip(slots[domains].tolist(), sequences.tolist(), strict=True)
        for row, (slot, sequence) in zip(out, pairs, strict=True):
            start = sequence * seq_len
            ends = self._ends[slot]
            file = int(np.searchsorted(ends, start, side="right"))
            done = 0
            while done < seq_len + 1:
                array = self._domains[slot][file]
                offset = start + done - (int(ends[file]) - len(array))
                part = array[offset : offset + seq_len + 1 - done]
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

    def gather(self) -> Gather:
        """See `Backend.gather`."""
        return SliceGather()


class NumbaBackend(NumpyBackend):
    """Order and gathering compiled by Numba; they work without the GIL."""

    name = "numba"

    def __init__(self) -> None:
        from regmix.data.sampling import _numba_order

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

    def gather(self) -> Gather:
        """See `Backend.gather`."""
        from regmix.data.sampling import _numba_gather

        return _numba_gather.NumbaGather()


class NativeBackend:
    """The C++ core, `csrc/`; it works without the GIL."""

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
        self.gather: Callable[[], LazyGather] = _sampler.Gather
        self.ring = _sampler.Ring


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
