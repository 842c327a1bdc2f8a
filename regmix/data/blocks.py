"""Token files checked block by block, by several threads, and mapped only as they were checked.

Enters: files, each with a cheap check of its ends and a check of one block of 1 MiB. Leaves: the
damage found, or a read-only memory map, and which blocks this process has found whole. Reads with
`pread`, never through a map, so a file that is cut meanwhile is an error here and no signal. Knows
no layout. Files are checked whole here; block_checks.py leaves blocks to the sampler.

What is left: a file that is cut in place after it was mapped ends the process with SIGBUS where
the lost part is read, as with every memory map. Nothing of ours cuts in place; files are replaced
by rename, which leaves a map whole.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from regmix.data.stored_file import (
    Damage,
    Identity,
    StoredFile,
    damage_of,
    file_problem,
    identity,
)
from regmix.errors import ShardError
from regmix.provenance import available_cores

BLOCK_BYTES = 1 << 20
SPAN_BLOCKS = 32  # what a thread takes at a time
INLINE_BYTES = 8 << 20  # below this, threads cost more than they give
MOST_THREADS = 8  # storage and memory are full before that
PATIENCE_SECONDS = 10.0  # a check that lasts longer says so on stderr

Result = TypeVar("Result")
OnBytes = Callable[[int], None]
# By file as it was on disk at that moment: 1 for every block that this process has found whole. The
# threads of a sampler set them too.
_CHECKED: dict[tuple[str, str, Identity], NDArray[np.uint8]] = {}
_CHECKED_LOCK = threading.Lock()


def num_blocks(num_bytes: int) -> int:
    """Return the blocks that `num_bytes` fill, the last perhaps in part."""
    return -(-num_bytes // BLOCK_BYTES)


def map_blocks(
    files: Sequence[StoredFile],
    work: Callable[[int, int, memoryview], Result],
    *,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> list[list[Result]]:
    """Return `work(file, block, bytes)` of every block of the token area of every file.

    A block that is cut comes shorter; `OSError` is the caller's. `on_bytes` is called in this
    thread, now and then, with the bytes done so far.
    """
    sizes = [file.tokens * file.dtype.itemsize for file in files]
    total = sum(sizes)
    results: list[list[Any]] = [[None] * num_blocks(size) for size in sizes]
    spans = _spans(sizes)
    lock = threading.Lock()
    done = [0]
    stopped = threading.Event()

    def run() -> None:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while not stopped.is_set():
            with lock:
                span = next(spans, None)
            if span is None:
                return
            number, first, last = span
            file = files[number]
            descriptor = os.open(file.path, os.O_RDONLY)
            try:
                for block in range(first, last):
                    content = read_block(file, descriptor, block, buffer)
                    results[number][block] = work(number, block, content)
                    with lock:
                        done[0] += block_bytes(file, block)
                    if stopped.is_set():
                        return
            finally:
                os.close(descriptor)

    if total <= INLINE_BYTES:
        run()
    else:
        _run_in_threads(run, stopped, threads, lambda: on_bytes and on_bytes(done[0]))
    if on_bytes is not None:
        on_bytes(total)
    return results


def _spans(sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    for number, size in enumerate(sizes):
        blocks = num_blocks(size)
        for first in range(0, blocks, SPAN_BLOCKS):
            yield number, first, min(first + SPAN_BLOCKS, blocks)


def block_bytes(file: StoredFile, block: int) -> int:
    """Return the bytes of a block of tokens: the last may be short."""
    return min(BLOCK_BYTES, file.tokens * file.dtype.itemsize - block * BLOCK_BYTES)


def read_block(file: StoredFile, descriptor: int, block: int, buffer: memoryview) -> memoryview:
    """Return a block of tokens, read into `buffer`; shorter where the file is cut."""
    wanted = buffer[: block_bytes(file, block)]
    return wanted[: _read(descriptor, wanted, file.start + block * BLOCK_BYTES)]


def _read(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill the buffer from a position as far as the file goes; return the bytes read."""
    filled = 0
    while filled < len(buffer):
        got = os.preadv(descriptor, [buffer[filled:]], position + filled)
        if got == 0:
            break
        filled += got
    return filled


def _run_in_threads(
    run: Callable[[], None],
    stopped: threading.Event,
    threads: int | None,
    report: Callable[[], object],
) -> None:
    count = threads or min(MOST_THREADS, available_cores())
    with ThreadPoolExecutor(count, thread_name_prefix="regmix-check") as pool:
        futures = [pool.submit(run) for _ in range(count)]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                report()
        finally:
            stopped.set()


def find_damage(
    files: Sequence[StoredFile], *, threads: int | None = None, on_bytes: OnBytes | None = None
) -> list[Damage]:
    """Check every block of `files` now, checked before or not; return all damage, in their order.

    A file whose ends are wrong is not read further. What is found whole needs no other check in
    this process until the file changes on disk.
    """
    problems: list[list[Damage]] = [[] for _ in files]
    before: list[Identity | None] = [None] * len(files)
    for place, file in enumerate(files):
        try:
            state = identity(os.stat(file.path))
            what = file.ends_problem() or file.load()
        except OSError as error:
            what = file_problem(error)
        if what is not None:
            problems[place].append(damage_of(file, what))
        else:
            before[place] = state
    kept = [place for place, state in enumerate(before) if state is not None]
    whole = [files[place] for place in kept]

    def check(number: int, block: int, content: memoryview) -> str | None:
        return block_damage(whole[number], block, content)

    try:
        found = map_blocks(whole, check, threads=threads, on_bytes=on_bytes)
    except OSError as error:
        place = next((p for p in kept if str(files[p].path) == str(error.filename)), kept[0])
        raise damage_of(files[place], file_problem(error)).error() from error
    for place, blocks in zip(kept, found, strict=True):
        problems[place] += [
            damage_of(files[place], what, number)
            for number, what in enumerate(blocks)
            if what is not None
        ]
        seen = before[place]
        if not problems[place] and seen is not None:
            block_states(files[place], seen)[:] = 1
    return [damage for of_file in problems for damage in of_file]


def block_damage(file: StoredFile, block: int, content: memoryview) -> str | None:
    """Return what is wrong with a block that was read."""
    if len(content) < block_bytes(file, block):
        return f"block {block} is cut short: the file changed while it was read"
    return file.block_problem(block, content)


def block_states(file: StoredFile, seen: Identity) -> NDArray[np.uint8]:
    """Return the states of a file's blocks, shared by all who check them: 1 is found whole."""
    key = (str(file.path), file.stamp, seen)
    fresh = np.zeros(num_blocks(file.tokens * file.dtype.itemsize), np.uint8)
    with _CHECKED_LOCK:
        return _CHECKED.setdefault(key, fresh)


def check_ends(files: Sequence[StoredFile]) -> None:
    """Raise `ShardError` for the first file whose size, header or footer is wrong."""
    for file in files:
        try:
            what = file.ends_problem()
        except OSError as error:
            what = file_problem(error)
        if what is not None:
            raise damage_of(file, what).error()


def load(file: StoredFile) -> None:
    """Read what is stored beside a file's tokens, as its offsets; `ShardError` where damaged."""
    try:
        what = file.load()
    except OSError as error:
        what = file_problem(error)
    if what is not None:
        raise damage_of(file, what).error()


def check_once(files: Sequence[StoredFile]) -> None:
    """Raise `ShardError` for the first damage; files found whole before are not read again."""
    fresh = [file for file in files if not is_checked(file)]
    if not fresh:
        return
    total = sum(file.tokens * file.dtype.itemsize for file in fresh)
    damage = find_damage(fresh, on_bytes=_plain_progress(fresh[0].domain, total))
    if damage:
        raise damage[0].error()


def is_checked(file: StoredFile) -> bool:
    """Return whether this process has found every block of a file whole, as it is on disk now."""
    try:
        return _is_whole(file, identity(os.stat(file.path)))
    except OSError:
        return False


def _is_whole(file: StoredFile, seen: Identity) -> bool:
    with _CHECKED_LOCK:
        states = _CHECKED.get((str(file.path), file.stamp, seen))
    return states is not None and bool(states.all())


def _plain_progress(domain: str, total: int) -> OnBytes:
    """Return a callback that prints a line every 10 s: a caller may own the terminal's display."""
    started = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PATIENCE_SECONDS:
            return
        last = now
        rate = done / (now - started)
        print(
            f"checking the shards of domain '{domain}': {done / 1e9:.1f}/{total / 1e9:.1f} GB, "
            f"{rate / 1e6:,.0f} MB/s, eta {(total - done) / max(rate, 1):.0f} s",
            file=sys.stderr,
            flush=True,
        )

    return report


def map_tokens(file: StoredFile, *, checked: bool) -> np.ndarray:
    """Return a file's tokens as a read-only memory map.

    Raises `ShardError` where the file is too short for it, or, if `checked`, is no longer the one
    that was found whole. A map keeps a descriptor, so many files may need the hard limit on them.
    """
    return with_descriptors(file, lambda: _map(file, checked))


def with_descriptors(file: StoredFile, make: Callable[[], Result]) -> Result:
    """Return `make()`, which opens `file`, with more descriptors where they were too few.

    Raises `ShardError` for any other `OSError`.
    """
    try:
        try:
            return make()
        except OSError as error:
            if error.errno != errno.EMFILE or not _raise_file_limit():
                raise
            return make()
    except OSError as error:
        raise _map_error(file, error) from error


def _map(file: StoredFile, checked: bool) -> np.ndarray:
    with open(file.path, "rb") as stream:
        if checked and not _is_whole(file, identity(os.fstat(stream.fileno()))):
            raise damage_of(file, "the file changed on disk while it was checked").error()
        return map_stream(file, stream)


def map_stream(file: StoredFile, stream: IO[bytes]) -> np.ndarray:
    """Return the tokens of an open file as a map; `ShardError` where it is too short."""
    size = os.fstat(stream.fileno()).st_size
    if size < file.start + file.tokens * file.dtype.itemsize:
        raise damage_of(file, f"cut short to {size} bytes").error()
    return np.memmap(stream, file.dtype, mode="r", offset=file.start, shape=(file.tokens,))


def _raise_file_limit() -> bool:
    """Raise this process's limit on open files as far as it may; return whether that helped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return False
    return True


def _map_error(file: StoredFile, error: OSError) -> ShardError:
    if error.errno == errno.EMFILE:
        what, cure = "too many open files", "Raise the limit: ulimit -n 1000000"
    elif error.errno == errno.ENOMEM:
        what = "the system maps no more files"
        cure = "Raise the limit, sysctl vm.max_map_count=1000000, or join small files"
    else:
        what, cure = file_problem(error), file.cure
    return replace(damage_of(file, what), cure=cure).error()
