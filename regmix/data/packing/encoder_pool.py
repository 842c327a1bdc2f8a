"""Encoding processes, and how blocks come to them.

One worker encodes in this process; more are processes of their own (encoder_process.py), because
parsing and hashing hold the interpreter's lock. A message is a line of JSON and raw bytes, over the
standard streams: a worker ends with its coordinator.

Enters: `EncoderSettings`, blocks. Leaves: futures of `Encoded` blocks. Keeps no order.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from regmix import errors
from regmix.data.packing.encoder import (
    BlockEncoder,
    Dropped,
    Encoded,
    EncoderSettings,
    EngineDiffers,
    SideTokens,
)
from regmix.data.packing.readers import Block
from regmix.errors import RegmixError, StorageError

PIPE_BYTES = 1 << 20  # a whole block, so that neither side waits for the other to read
Buffer = bytes | bytearray | memoryview
_FIELDS = ("ids", "lengths", "numbers", "utf8", "hashes")


def send(
    stream: IO[bytes],
    table: dict[str, Any],
    buffers: Sequence[Buffer] = (),
    *,
    joined: bool = False,
) -> None:
    """Write a message: a line of JSON, then the buffers, which arrive as one if `joined`."""
    sizes = [len(buffer) for buffer in buffers]
    line = json.dumps({**table, "sizes": [sum(sizes)] if joined else sizes})
    stream.write(line.encode() + b"\n")
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[bytearray]]:
    """Read a message; `EOFError` where the other side has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    table = json.loads(line)
    buffers = []
    for size in table.pop("sizes"):
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            count = stream.readinto(view[got:])  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            got += count
        buffers.append(buffer)
    return table, buffers


def send_encoded(stream: IO[bytes], result: Encoded) -> None:
    """Write an encoded block."""
    buffers: list[Buffer] = []
    sides = {}
    for side, part in result.sides.items():
        sides[side] = part.ids.dtype.str
        buffers += [_raw(getattr(part, name)) for name in _FIELDS]
    table = {
        "num_lines": result.num_lines,
        "num_records": result.num_records,
        "sides": sides,
        "counts": result.counts,
        "dropped": [[d.number, d.side, d.reason, d.words] for d in result.dropped],
        "verified_documents": result.verified_documents,
        "verified_bytes": result.verified_bytes,
    }
    send(stream, table, buffers)


def _raw(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def _encoded(table: dict[str, Any], buffers: list[bytearray]) -> Encoded:
    rest = iter(buffers)
    sides = {}
    for side, dtype in table.pop("sides").items():
        ids, lengths, numbers, utf8, hashes = (next(rest) for _ in _FIELDS)
        sides[side] = SideTokens(
            np.frombuffer(ids, dtype),
            np.frombuffer(lengths, np.uint32),
            np.frombuffer(numbers, np.uint32),
            np.frombuffer(utf8, np.uint32),
            np.frombuffer(hashes, np.uint64).reshape(-1, 2),
        )
    dropped = [Dropped(*row) for row in table.pop("dropped")]
    return Encoded(sides=sides, dropped=dropped, **table)


class InlineEncoders:
    """One encoder, in this process."""

    def __init__(self, settings: EncoderSettings) -> None:
        self._encoder = BlockEncoder(settings)
        self.processes: list[int] = []

    def submit(self, block: Block, *, side: str | None, verify_bytes: int) -> Future[Encoded]:
        """Encode a block now."""
        future: Future[Encoded] = Future()
        raw = block.parts[0] if len(block.parts) == 1 else b"".join(block.parts)
        raw = bytes(raw) if isinstance(raw, memoryview) else raw
        try:
            future.set_result(
                self._encoder.encode(block, raw, side=side, verify_bytes=verify_bytes)
            )
        except Exception as error:  # comes out where the result is asked for
            future.set_exception(error)
        return future

    def close(self) -> None:
        """End; there is nothing to end."""


class ProcessEncoders:
    """Encoders in `num` processes, each with a thread here that feeds it."""

    def __init__(self, settings: EncoderSettings, num: int) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._settings = asdict(settings)
        self._workers = [_start() for _ in range(num)]
        self.processes = [worker.pid for worker in self._workers]
        self._threads = [
            threading.Thread(target=self._feed, args=(worker,), daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, block: Block, *, side: str | None, verify_bytes: int) -> Future[Encoded]:
        """Give a block to the next process that is free."""
        future: Future[Encoded] = Future()
        self._tasks.put((block, side, verify_bytes, future))
        return future

    def _feed(self, worker: subprocess.Popen[bytes]) -> None:
        stdin, stdout = worker.stdin, worker.stdout
        assert stdin is not None
        assert stdout is not None
        # Here, so that no process waits for another to start; a dead one is met at the next block.
        with contextlib.suppress(OSError):
            send(stdin, self._settings)
        while (task := self._tasks.get()) is not None:
            block, side, verify_bytes, future = task
            if not future.set_running_or_notify_cancel():
                continue
            table = {
                "kind": block.kind,
                "first": block.first,
                "lengths": block.lengths,
                "refused": dict(block.refused),
                "skipped_bytes": block.skipped_bytes,
                "side": side,
                "verify_bytes": verify_bytes,
            }
            parts, task, block = block.parts, None, None
            try:
                send(stdin, table, parts, joined=True)
                del parts  # a long record is held by one process at a time
                answer, buffers = receive(stdout)
                if "error" in answer:
                    future.set_exception(_error(answer["error"]))
                else:
                    future.set_result(_encoded(answer, buffers))
                del answer, buffers
            except (OSError, EOFError):
                future.set_exception(_ended(worker))
            except Exception as error:  # no memory, say: what is left in the pipe is no answer
                worker.kill()
                future.set_exception(error)
            del future

    def close(self) -> None:
        """Stop the processes, whatever they are at."""
        for _ in self._threads:
            self._tasks.put(None)
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    _close(stream)


def _close(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except OSError:
        return  # what was still to be sent has nobody to read it


def _start() -> subprocess.Popen[bytes]:
    root = str(Path(errors.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        # One process a core: no library may start threads of its own.
        "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "regmix.data.packing.encoder_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        # Ctrl-C is the coordinator's to answer.
        start_new_session=True,
    )
    for stream in (worker.stdin, worker.stdout):
        # Linux lets a user have 64 MiB of pipes, which 32 processes take up: smaller ones do.
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
    return worker


def _ended(worker: subprocess.Popen[bytes]) -> RegmixError:
    code = worker.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    why = " (out of memory?)" if code == -9 else ""
    return StorageError(
        f"an encoding process {how}{why}",
        cure="Run the same command again, it goes on; if that repeats, use --workers 1, "
        "or --engine tokenizers",
    )


def describe_error(error: Exception) -> dict[str, Any]:
    """Return an error as plain values that `_error` turns back."""
    if isinstance(error, EngineDiffers):
        return {"kind": "EngineDiffers", "number": error.number, "what": error.words}
    if isinstance(error, RegmixError):
        return {"kind": type(error).__name__, "what": error.what, "cure": error.cure}
    return {"kind": "", "what": "".join(traceback.format_exception(error))}


def _error(table: dict[str, Any]) -> Exception:
    if table["kind"] == "EngineDiffers":
        return EngineDiffers(table["number"], table["what"])
    if table["kind"]:
        kind: type[RegmixError] = getattr(errors, table["kind"])
        return kind(table["what"], cure=table["cure"])
    return RuntimeError(f"in an encoding process:\n{table['what']}")
