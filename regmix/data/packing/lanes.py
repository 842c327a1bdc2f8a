"""Sources to units: threads that each read one file at a time and share the encoders.

A lane reads and decompresses a file, hands its blocks to the encoders and writes what comes back,
in the order of the file, to its unit. Several lanes read several files at once, so that one slow
decompressor does not keep many encoders waiting; one lane alone feeds all of them from one file.
The bytes under way are bounded for all lanes together.

Enters: sources that have no unit. Leaves: units; the first error in the order of the sources.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path

from regmix.data.packing.documents import MALFORMED, NO_TOKEN, TOO_LONG
from regmix.data.packing.encoder import Encoded, EngineDiffers
from regmix.data.packing.encoder_pool import InlineEncoders, ProcessEncoders
from regmix.data.packing.readers import BLOCK_BYTES, LONG_RECORD_BYTES, Meter, read_blocks
from regmix.data.packing.sources import Source
from regmix.data.packing.units import Books, UnitWriter
from regmix.errors import CorpusError

# Compared first of every file: a sixteenth, within these bounds. Comparing small files whole would
# make many of them slower to pack than one large one by the factor that the fast engine gains.
FIRST_VERIFIED_SHARE, FIRST_VERIFIED_BYTES = 16, (1 << 10, 64 << 10)
VERIFIED_SHARE = 0.003  # of every block after the first
BLOCKS_PER_WORKER = 3  # under way: one being encoded, one ready, one being written
_STRICT = (MALFORMED, NO_TOKEN, TOO_LONG)


class DiffersIn(Exception):
    """The fast engine differs from the reference in a file."""

    def __init__(self, source: Source, line: int, words: str) -> None:
        super().__init__(f"{source.path}, line {line}: {words}")


@dataclass
class Task:
    """One source and the unit that it becomes."""

    source: Source
    unit: Path


class _Budget:
    """Bytes under way; a block larger than the whole budget goes alone."""

    def __init__(self, num_bytes: int) -> None:
        self._limit, self._used = num_bytes, 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int, *, seconds: float) -> bool:
        """Return whether there was room, or came to be within the time."""
        with self._changed:
            fits = self._changed.wait_for(
                lambda: not self._used or self._used + num_bytes <= self._limit, seconds
            )
            self._used += num_bytes if fits else 0
            return fits

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()


class _Turn:
    """One lane's turn to hold a long record."""

    def __init__(self, lock: threading.Lock, stopped: threading.Event) -> None:
        self._lock, self._stopped = lock, stopped
        self._held = False

    def take(self) -> None:
        """Wait until no other lane holds one."""
        while not self._held:
            self._held = self._lock.acquire(timeout=0.2)
            if self._stopped.is_set():
                raise CancelledError

    def end(self) -> None:
        """Let another lane have its turn."""
        if self._held:
            self._held = False
            self._lock.release()


class _Quota:
    """How much of each block is compared with the reference."""

    def __init__(self, file_bytes: int) -> None:
        least, most = FIRST_VERIFIED_BYTES
        self.first = min(most, max(least, file_bytes // FIRST_VERIFIED_SHARE))
        self._seen = self._asked = 0

    def of(self, num_bytes: int) -> int:
        """Return the bytes to compare of the next block, which has `num_bytes`."""
        self._seen += num_bytes
        owed = max(self.first, int(VERIFIED_SHARE * self._seen)) - self._asked
        asked = min(num_bytes, max(owed, int(VERIFIED_SHARE * num_bytes)))
        self._asked += asked
        return asked


class Lanes:
    """Encode sources in the background: `with Lanes(...) as lanes: lanes.wait(place, seconds)`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        encoders: InlineEncoders | ProcessEncoders,
        *,
        num_lanes: int,
        num_workers: int,
        text_field: str,
        max_bytes: int,
        strict: bool,
    ) -> None:
        self._tasks, self._encoders = tasks, encoders
        self._text_field, self._max_bytes, self._strict = text_field, max_bytes, strict
        self._window = BLOCKS_PER_WORKER * num_workers
        self._budget = _Budget(2 * self._window * BLOCK_BYTES)
        self._next = 0
        self._lock = threading.Lock()
        self._long_record = threading.Lock()
        self._stopped = threading.Event()
        self._ended = [threading.Event() for _ in tasks]
        self._errors: list[Exception | None] = [None] * len(tasks)
        self._meters = [Meter() for _ in tasks]
        self.tokens = 0
        self._threads = [
            threading.Thread(target=self._run, name=f"lane {number}", daemon=True)
            for number in range(max(1, min(num_lanes, len(tasks))))
        ]

    def __enter__(self) -> Lanes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self._stopped.set()
        self._encoders.close()
        for thread in self._threads:
            thread.join()

    @property
    def read_bytes(self) -> int:
        """Bytes read so far of all sources, as they lie on disk."""
        return sum(meter.num_bytes for meter in self._meters)

    def wait(self, place: int, seconds: float) -> bool:
        """Return whether the unit of task `place` is done; raises what a lane raised."""
        done = self._ended[place].wait(seconds)
        if self._stopped.is_set():
            for thread in self._threads:
                thread.join()
            for error in self._errors:
                if error is not None:
                    raise error
        return done and self._errors[place] is None

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                place = self._next
                self._next += 1
            if place >= len(self._tasks):
                return
            try:
                self._encode(self._tasks[place], self._meters[place])
            except CancelledError:
                return
            except Exception as error:  # raised again by `wait`, in the caller's thread
                self._errors[place] = error
                self._stopped.set()
            self._ended[place].set()

    def _encode(self, task: Task, meter: Meter) -> None:
        status = task.source.path.stat()
        books = Books(
            name=task.source.name, bytes=status.st_size, mtime_ns=status.st_mtime_ns, xxh3=""
        )
        writer = UnitWriter(task.unit)
        try:
            for result in self._results(task.source, meter):
                self._judge(task.source, books.lines, result)
                writer.add(books.lines, result)
                books.add(result)
                self.tokens += sum(len(part.ids) for part in result.sides.values())
            now = task.source.path.stat()
            if (now.st_size, now.st_mtime_ns) != (books.bytes, books.mtime_ns):
                raise CorpusError(
                    f"{task.source.path}: changed while it was read",
                    cure="Wait until it is written, then run the same command again",
                )
            books.xxh3 = meter.checksum
            meter.num_bytes = task.source.num_bytes
            writer.finish(books)
        except EngineDiffers as error:
            raise DiffersIn(task.source, books.lines + error.number, error.words) from error
        finally:
            writer.abandon()

    def _results(self, source: Source, meter: Meter) -> Iterator[Encoded]:
        """Yield the encoded blocks of a file in its order."""
        pending: deque[tuple[int, Future[Encoded]]] = deque()
        ready: deque[Encoded] = deque()
        quota = _Quota(source.num_bytes)
        turn = _Turn(self._long_record, self._stopped)

        def on_long() -> None:
            # Another lane may wait for room that this one's blocks take up.
            while pending:
                ready.append(self._taken(pending))
            turn.take()

        blocks = read_blocks(
            source,
            meter,
            text_field=self._text_field,
            max_bytes=self._max_bytes,
            on_long=on_long,
        )
        try:
            for block in blocks:
                while ready:
                    yield ready.popleft()
                size = block.num_bytes
                while pending and (len(pending) >= self._window or pending[0][1].done()):
                    yield self._taken(pending)
                # Own results first: what waits in this lane nobody else can take away.
                while not self._budget.take(size, seconds=0.0 if pending else 0.2):
                    if pending:
                        yield self._taken(pending)
                    elif self._stopped.is_set():
                        raise CancelledError
                future = self._encoders.submit(block, side=source.side, verify_bytes=quota.of(size))
                is_long = block.kind == "skipped" or size > LONG_RECORD_BYTES
                del block
                pending.append((size, future))
                del future
                if is_long:
                    while pending:
                        yield self._taken(pending)
                    turn.end()
                if self._stopped.is_set():
                    raise CancelledError
            yield from ready
            while pending:
                yield self._taken(pending)
        finally:
            turn.end()
            for size, future in pending:
                future.cancel()
                self._budget.give(size)

    def _taken(self, pending: deque[tuple[int, Future[Encoded]]]) -> Encoded:
        size, future = pending.popleft()
        try:
            return future.result()
        finally:
            self._budget.give(size)

    def _judge(self, source: Source, lines: int, result: Encoded) -> None:
        """Raise `CorpusError` for the first record that strict packing does not leave out."""
        bad = [record for record in result.dropped if record.reason in _STRICT]
        if self._strict and bad:
            first = min(bad, key=lambda record: record.number)
            raise CorpusError(
                f"{source.path}, line {lines + first.number}: {first.words}",
                cure="Correct the line, or pack without --strict",
            )
