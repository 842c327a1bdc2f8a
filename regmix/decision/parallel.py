"""Independent pieces of work on all cores, with the same bits on any number of them.

Enters: a function and its arguments. Leaves: the results in order. Each piece runs on one thread.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from regmix.provenance import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
# Beyond it, pieces wait for memory and for the interpreter rather than for a core.
_MOST_THREADS = 8


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return work(item) of every item.

    Linear algebra is held to one thread meanwhile: its own threads change the order of sums.
    """
    with one_thread():
        if len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(available_cores(), _MOST_THREADS, len(items))) as pool:
            return list(pool.map(work, items))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold linear algebra to one thread; for libraries that are loaded already."""
    with _libraries(len(sys.modules)).limit(limits=1):
        yield


@functools.lru_cache(maxsize=1)
def _libraries(num_modules: int) -> Any:
    """Return the control of the linear algebra libraries that are loaded.

    Finding them takes 1 to 3 ms, as long as a prediction: so only where a module came since.
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
