"""Batches made ahead of their consumer, in buffers that go round.

Enters: a sampler or a stack of them, the first and the last step. Leaves: (step, batch) in order;
a batch lies in one of `depth` buffers and is valid until the next one is taken. The bytes are those
of `sampler.batch(step)`, whatever the number of threads. Moves nothing to a GPU: buffers in pinned
memory can be handed in.

The threads are C++ and persistent, since starting one takes longer than making a batch; without the
extension one Python thread fills the buffers. Data that is not in memory yet is asked of the disk
some steps ahead, once a batch had to wait for it.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from regmix.data.sampling.backends import Batch, NativeBackend, load_backend
from regmix.data.sampling.sampler import MixtureSampler, StackSampler
from regmix.errors import ConfigError

NO_STOP = 1 << 62
# Rows whose place is known before they are gathered: enough to keep a disk busy.
AHEAD_ROWS = 1024
# More would leave the processor's own cache: 4 of 16 x 2049 int64 take 1 MB.
SLOTS_PER_WRITER = 4


class _Core(Protocol):
    """The ring itself."""

    def __next__(self) -> tuple[int, Batch]:
        """Return the next step and its batch; free the slot of the one before."""

    def __iter__(self) -> _Core:
        """Return itself: a consumer may leave the loop and come back."""

    def close(self) -> None:
        """Stop the threads."""

    @property
    def num_read_ahead(self) -> int:
        """Steps whose rows were asked of the disk before they were gathered."""


class BatchRing:
    """Iterate over (step, batch): `with BatchRing(sampler, stop=1000) as ring`.

    A batch is [B, T+1], or [P, B, T+1] for a stack, in one of `buffers` (of pinned torch memory,
    `tensor.numpy()`), or of `depth` buffers of `dtype` made here. `threads` work in the background;
    with `assist`, who asks for a batch that is not there makes one meanwhile, and `threads` may be
    0. `rows` = (first, last + 1) are the rows of one rank, all where it is None. `read_ahead` asks
    the disk for rows before they are gathered, where one had to wait for it. The sampler stays free
    for other use. One consumer per ring. Raises `ConfigError` for a size out of range, `ValueError`
    for a buffer that does not fit.
    """

    def __init__(
        self,
        stream: MixtureSampler | StackSampler,
        *,
        start: int = 0,
        stop: int | None = None,
        depth: int | None = None,
        threads: int = 1,
        assist: bool = True,
        dtype: Any = np.int64,
        rows: tuple[int, int] | None = None,
        buffers: Sequence[Batch] | None = None,
        read_ahead: bool = True,
    ) -> None:
        if depth is None:
            depth = SLOTS_PER_WRITER * max(1, threads + assist)
        depth = depth if buffers is None else len(buffers)
        for name, value, least in (
            ("depth", depth, 2),
            ("threads", threads, 0 if assist else 1),
            ("start", start, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} of the ring: {value}", cure=f"Use at least {least}")
        shape = stream.batch_shape(rows)
        if buffers is None:
            buffers = [np.empty(shape, dtype=dtype) for _ in range(depth)]
        for buffer in buffers:
            stream.check_out(buffer, rows)
        self.buffers = tuple(buffers)
        last = NO_STOP if stop is None else max(start, stop)
        samplers = stream.samplers if isinstance(stream, StackSampler) else (stream,)
        shared = len({id(sampler.gather) for sampler in samplers}) == 1
        if shared and samplers[0].backend_name == "native":
            ahead = AHEAD_ROWS if read_ahead else 0
            workers = (threads, assist)
            self._core = _native_core(samplers, self.buffers, start, last, workers, rows, ahead)
        else:
            self._core = _ThreadCore(stream.copy(), self.buffers, start, last, rows)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self._core

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; the batch taken last stays as it is."""
        self._core.close()

    @property
    def num_read_ahead(self) -> int:
        """Steps whose rows were asked of the disk before they were gathered."""
        return self._core.num_read_ahead


def _native_core(
    samplers: Sequence[MixtureSampler],
    buffers: Sequence[Batch],
    start: int,
    stop: int,
    workers: tuple[int, bool],
    rows: tuple[int, int] | None,
    ahead_rows: int,
) -> _Core:
    backend = load_backend("native")
    if not isinstance(backend, NativeBackend):
        raise TypeError("the native backend is not native")
    batch_size, seq_len = samplers[0].batch_size, samplers[0].seq_len
    first, last = rows or (0, batch_size)
    return backend.ring(
        gather=samplers[0].gather,
        members=[sampler.ring_member(start) for sampler in samplers],
        seq_len=seq_len,
        batch_size=batch_size,
        first_row=first,
        num_rows=last - first,
        start=start,
        stop=stop,
        ahead=-(-ahead_rows // (batch_size * len(samplers))),
        buffers=list(buffers),
        threads=workers[0],
        assist=workers[1],
    )


class _ThreadCore:
    """The ring where there is no extension: one Python thread."""

    num_read_ahead = 0

    def __init__(
        self,
        stream: MixtureSampler | StackSampler,
        buffers: Sequence[Batch],
        start: int,
        stop: int,
        rows: tuple[int, int] | None,
    ) -> None:
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._buffers, self._step = buffers, start
        for slot in range(len(buffers)):
            self._free.put(slot)
        self._held: int | None = None
        self._ended = self._closed = False
        # Nothing of `self`, so that a ring that is dropped can end its thread.
        self._thread = threading.Thread(
            target=_fill,
            args=(stream, buffers, range(start, stop), rows, self._free, self._full),
            daemon=True,
        )
        self._thread.start()
        weakref.finalize(self, self._free.put, None)

    def __iter__(self) -> _ThreadCore:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._closed:
            raise RuntimeError("the ring is closed")
        if self._ended:
            raise StopIteration
        if self._held is not None:
            self._free.put(self._held)
        taken = self._full.get()
        if isinstance(taken, BaseException) or taken < 0:
            self._ended = True
            raise taken if isinstance(taken, BaseException) else StopIteration
        self._held = taken
        self._step += 1
        return self._step - 1, self._buffers[taken]

    def close(self) -> None:
        self._closed = True
        self._free.put(None)
        self._thread.join()


def _fill(
    stream: MixtureSampler | StackSampler,
    buffers: Sequence[Batch],
    steps: range,
    rows: tuple[int, int] | None,
    free: queue.SimpleQueue[int | None],
    full: queue.SimpleQueue[int | BaseException],
) -> None:
    try:
        for step in steps:
            slot = free.get()
            if slot is None:
                return
            stream.batch(step, out=buffers[slot], rows=rows)
            full.put(slot)
        full.put(-1)
    except BaseException as error:
        full.put(error)
