"""One place of a Ray node: serves the worker process there, and passes on what it says.

Enters: calls of the coordinator, by Ray. Leaves: their answers; messages as `poll` hands them out.
It runs on the node, where Ray finds this module by its name, and it starts the very worker that the
local executor starts. Decides nothing about jobs, holds no result, and imports no torch.

A node may lose its coordinator without knowing: nobody polls for `contact_seconds`, and the process
ends its worker and itself. SIGTERM, as of a machine that is taken away, is passed on to the worker,
which writes a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from regmix.data.sampling.order import ORDER_VERSION
from regmix.data.shards import ShardSet
from regmix.errors import RegmixError
from regmix.provenance import processor, versions
from regmix.swarm.cluster.scratch import Scratch, default_base
from regmix.swarm.places import Inbox
from regmix.swarm.processes import WorkerProcess, WorkerSetup
from regmix.swarm.shard_cache import IncomingCorpus, copy_corpus, doubt, find_copy

CONTACT_SECONDS = 60.0


class PlaceActor:
    """A place on a node; the coordinator makes it an actor and calls it from several threads.

    device: "cpu" or "cuda", then on the GPU that Ray gave this process. threads: of a worker.
    module: what a worker runs. scratch: folder for scratch folders, None for the usual one.
    """

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        module: str,
        scratch: str | None,
        contact_seconds: float = CONTACT_SECONDS,
    ) -> None:
        self._gpu = os.environ.get("CUDA_VISIBLE_DEVICES") if device != "cpu" else None
        self._threads, self._module = threads, module
        self._base = Path(scratch) if scratch else default_base()
        self._scratch: Scratch | None = None
        self._incoming: IncomingCorpus | None = None
        self._workers: dict[int, WorkerProcess] = {}
        self._numbers: dict[WorkerProcess, int] = {}
        self._inbox: Inbox = queue.Queue()
        self._said: deque[tuple[int, int, dict[str, Any] | None, int | None]] = deque()
        self._num_said = 0
        self._news = threading.Condition()
        self._contact: float | None = None
        # A worker dies with the thread that started it, and Ray's threads come and go.
        self._starts: queue.SimpleQueue[tuple[Future[WorkerProcess], Any]] = queue.SimpleQueue()
        self._is_leaving = False
        for run in (self._start_workers, self._listen):
            threading.Thread(target=run, daemon=True).start()
        threading.Thread(target=self._watch, args=(contact_seconds,), daemon=True).start()
        # Ray makes its actors in a process's main thread, the only one that may set a handler.
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, lambda _number, _frame: self.preempt())

    # What the place is

    def describe(self) -> dict[str, Any]:
        """Return what decides whether this place may take part, and whether bits are equal."""
        return {
            "host": platform.node(),
            "pid": os.getpid(),
            "gpu": self._gpu,
            "processor": processor(),
            "versions": versions(),
            "order_version": ORDER_VERSION,
        }

    def ask(self, question: str, text: str = "", seconds: float = 120.0) -> dict[str, Any]:
        """Ask a probe about this place's GPU; what it cannot say comes as {"error": words}."""
        from regmix.swarm.gpus import ProbeError, ask

        try:
            return ask(question, gpu=self._gpu, text=text, seconds=seconds)
        except ProbeError as error:
            return {"error": str(error)}

    def sees(self, path: str, token: str) -> bool:
        """Return whether a file with this text can be read here, and its folder written to."""
        try:
            return Path(path).read_text() == token and os.access(Path(path).parent, os.W_OK)
        except (OSError, UnicodeDecodeError):
            return False

    # The corpus

    def sees_corpus(self, path: str, digest: str) -> bool:
        """Return whether the corpus of this checksum can be read here at a path."""
        try:
            return ShardSet.open(path).checksum == digest
        except (RegmixError, OSError):
            return False

    def cache_path(self, cache: str | None) -> str:
        """Return the cache folder of this machine, where a person named none."""
        return cache or str(self._base / "shards")

    def find_copy(self, cache: str, digest: str) -> str | None:
        """Return where a whole copy of a corpus lies in a cache here."""
        found = find_copy(Path(cache), digest)
        return None if found is None else str(found)

    def copy_corpus(self, path: str, cache: str) -> str:
        """Copy a corpus that can be read here into a cache; return where."""
        return str(copy_corpus(ShardSet.open(path), Path(cache)))

    def begin_corpus(self, cache: str, digest: str, files: dict[str, int]) -> str:
        """Return "busy", "send" where parts of its files may come, or the path of a whole copy."""
        incoming = IncomingCorpus(Path(cache), digest, files)
        if not incoming.begin():
            return "busy"
        if incoming.whole is not None:
            incoming.close()
            return str(incoming.whole)
        self._incoming = incoming
        return "send"

    def write_corpus(self, name: str, offset: int, part: bytes) -> None:
        """Take a part of a corpus's file."""
        assert self._incoming is not None
        self._incoming.write(name, offset, part)

    def finish_corpus(self) -> str:
        """Check the corpus that came and return where it lies."""
        assert self._incoming is not None
        with self._incoming as incoming:
            self._incoming = None
            return str(incoming.finish())

    def doubt_corpus(self, path: str) -> None:
        """Have a copy of a corpus made again: damage was found in it."""
        doubt(Path(path))

    # Files of stacks, where the study's folder is not seen here

    @property
    def _own(self) -> Scratch:
        if self._scratch is None:
            self._scratch = Scratch(self._base)
        return self._scratch

    def make_scratch(self) -> str:
        """Return the path of this process's scratch folder."""
        return str(self._own.path)

    def keep_only(self, stack: str) -> None:
        """Remove what lies here of other stacks."""
        self._own.keep_only(stack)

    def newest_step(self, stack: str) -> int | None:
        """Return the step of a stack's newest checkpoint here; None where it has none."""
        return self._own.newest_step(stack)

    def files(self, stack: str) -> dict[str, int]:
        """Return the files of a stack with their bytes."""
        return self._own.files(stack)

    def read_file(self, path: str, offset: int, length: int) -> bytes | None:
        """Return a part of a file of the scratch folder; None where it has gone."""
        return self._own.read(path, offset, length)

    def write_file(self, path: str, offset: int, part: bytes, is_last: bool) -> None:
        """Write a part of a file of the scratch folder."""
        self._own.write(path, offset, part, is_last)

    # The worker

    def start(self, number: int, name: str, logs: str | None) -> None:
        """Start worker `number`; its log lies in `logs`, or in the scratch folder."""
        folder = self._own.logs if logs is None else Path(logs)
        setup = WorkerSetup(threads=self._threads, logs=folder, inherited=None, module=self._module)
        future: Future[WorkerProcess] = Future()
        self._starts.put((future, (number, name, setup)))
        future.result()

    def _start_workers(self) -> None:
        while True:
            future, (number, name, setup) = self._starts.get()
            try:
                worker = WorkerProcess(name, self._gpu, self._inbox, setup)
            except Exception as error:
                future.set_exception(error)
                continue
            with self._news:
                self._workers[number], self._numbers[worker] = worker, number
                self._news.notify_all()
            future.set_result(worker)

    def send(self, number: int, text: str) -> None:
        """Send a worker one message, as JSON."""
        worker = self._workers.get(number)
        if worker is not None:
            worker.send(json.loads(text))

    def kill(self, number: int) -> int | None:
        """Kill a worker and return its exit code."""
        worker = self._workers.get(number)
        return None if worker is None else worker.kill()

    def poll(
        self, after: int, seconds: float
    ) -> list[tuple[int, int, dict[str, Any] | None, int | None]]:
        """Return what workers said after message `after`, once there is anything, or nothing.

        Each as (message's number, worker's number, message, exit code); the message is None at a
        worker's end, and only then is there a code. What was handed out is kept until it is known
        to have arrived.
        """
        self._contact = None
        with self._news:
            while self._said and self._said[0][0] <= after:
                self._said.popleft()
            self._news.wait_for(lambda: bool(self._said), seconds)
            self._contact = time.monotonic()
            return list(self._said)

    def _listen(self) -> None:
        while True:
            worker, message = self._inbox.get()
            assert isinstance(worker, WorkerProcess)
            code = worker.wait() if message is None else None
            with self._news:
                # It may speak before the thread that started it has noted its number.
                self._news.wait_for(lambda worker=worker: worker in self._numbers)  # type: ignore[misc]
                self._num_said += 1
                number = self._numbers[worker]
                self._said.append((self._num_said, number, message, code))
                self._news.notify_all()

    # The end

    def preempt(self) -> None:
        """Let the worker write a checkpoint and end: this machine is about to be taken away."""
        if self._is_leaving:
            return
        self._is_leaving = True
        # Not in a handler's thread: it may have interrupted what it would wait for.
        threading.Thread(target=self._leave, daemon=True).start()

    def _leave(self) -> None:
        with self._news:
            self._num_said += 1
            self._said.append(
                (self._num_said, -1, {"leaving": "it is about to be shut down"}, None)
            )
            self._news.notify_all()
        for worker in list(self._workers.values()):
            with contextlib.suppress(OSError):
                worker.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Kill the workers and remove what this process wrote for itself."""
        for worker in list(self._workers.values()):
            worker.kill()
        if self._incoming is not None:
            self._incoming.close()
        if self._scratch is not None:
            self._scratch.close()

    def _watch(self, contact_seconds: float) -> None:
        while True:
            time.sleep(min(1.0, contact_seconds / 4))
            contact = self._contact
            if contact is not None and time.monotonic() - contact > contact_seconds:
                self.close()
                os._exit(1)
