"""A worker on a Ray node as its coordinator sees it.

Enters: messages of the scheduler, and of the worker by its place's reader. Leaves: the former on
the node, the latter in the inbox. Where the node does not see the study's folder, a checkpoint or a
result is stored there before the message that tells of it is passed on. Nothing here blocks the
scheduler, but `wait` and `kill`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from regmix.errors import RegmixError
from regmix.swarm.processes import EXIT_PATIENCE_SECONDS

if TYPE_CHECKING:
    from regmix.swarm.cluster.courier import Courier
    from regmix.swarm.places import Inbox

# Messages that tell of no file: they overtake those that wait for theirs.
_OF_NO_FILE = ("ready", "started", "progress", "beat")


FINISH_SECONDS = 30.0


class GoneError(Exception):
    """The place's actor or its node is gone, or the run is over."""


class UnreachableError(GoneError):
    """The actor did not answer, and it may be there again in a moment."""


class Site(Protocol):
    """What a worker needs of its place; made by `RayPlace`."""

    logs: Path
    courier: Courier | None
    shards: str
    scratch: str

    def call(self, method: str, *arguments: Any, patience_seconds: float | None = None) -> Any:
        """Call the actor and wait; `GoneError` where there is no answer any more."""

    def tell(self, method: str, *arguments: Any) -> None:
        """Call the actor and do not wait."""

    def give_up(self, why: str) -> None:
        """Use the place no more: its actor does not answer."""


class RayWorker:
    """One worker of a place; `hear` is called by the place's reader with all that it says."""

    def __init__(self, site: Site, number: int, name: str, inbox: Inbox) -> None:
        self._site, self._number, self._name, self._inbox = site, number, name, inbox
        self.log_path = site.logs / f"{name}.log"
        self._job: dict[str, Any] | None = None
        self._code: int | None = None
        self._is_killed = self._is_silent = False
        self._ended = threading.Event()
        # (is an order, message): what must be done one after another, apart from the scheduler.
        self._errands: queue.SimpleQueue[tuple[bool, dict[str, Any] | None]] = queue.SimpleQueue()
        self._num_checkpoints = 0
        threading.Thread(target=self._run, daemon=True).start()

    # What the scheduler calls

    def send(self, message: dict[str, Any]) -> None:
        """See `places.Worker.send`."""
        if "job" in message:
            self._errands.put((True, message))
        else:
            self._site.tell("send", self._number, json.dumps(message))

    def wait(self, patience_seconds: float = EXIT_PATIENCE_SECONDS) -> int | None:
        """See `places.Worker.wait`; also until what it left is in the study."""
        if self._ended.wait(patience_seconds):
            return self._code
        return self.kill()

    def kill(self) -> int | None:
        """See `places.Worker.kill`."""
        self._is_killed = True
        if self._ended.is_set():
            return self._code
        try:
            patience = EXIT_PATIENCE_SECONDS + 5.0
            code = self._site.call("kill", self._number, patience_seconds=patience)
        except (GoneError, RegmixError):
            return None
        except TimeoutError:
            self._site.give_up("its actor does not answer")
            return None
        return None if code is None else int(code)

    # What the place's reader calls

    def hear(self, message: dict[str, Any] | None, code: int | None = None) -> None:
        """Take what the worker said; None once it is gone."""
        if message is None:
            self._code = code
        elif self._site.courier is None or any(key in message for key in _OF_NO_FILE):
            self._inbox.put((self, message))
            return
        elif "checkpoint" in message:
            self._num_checkpoints += 1
        self._errands.put((False, message))

    def finish(self, code: int | None) -> None:
        """Store what the worker left, and say nothing of its end: its place's is told instead."""
        self._is_silent = True
        self.hear(None, code)
        self._ended.wait(FINISH_SECONDS)

    # The errands

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            # A job that nobody sees to must not be waited for.
            self._site.give_up(f"{type(error).__name__}: {error}")
            self._ended.set()

    def _serve(self) -> None:
        problem = self._start()
        passed = 0
        while True:
            is_order, message = self._errands.get()
            if is_order:
                assert message is not None
                if problem is None:
                    self._order(message)
                    continue
                self._fail(problem, message["job"]["name"])
                self._end()
                return
            if message is None:
                self._fetch_last()
                self._end()
                return
            if "checkpoint" in message:
                passed += 1
                # Only the newest is worth its way.
                if passed < self._num_checkpoints:
                    continue
            self._pass_on(message)

    def _start(self) -> Exception | None:
        """Start the process; return what is wrong where that could not be."""
        try:
            logs = None if self._site.courier is not None else str(self._site.logs)
            self._site.call("start", self._number, self._name, logs)
        except UnreachableError as error:
            self._site.give_up(str(error))
            return error
        except (GoneError, RegmixError) as error:
            return error
        return None

    def _order(self, message: dict[str, Any]) -> None:
        job = self._job = message["job"]
        table = {**job, "shards": self._site.shards}
        try:
            if self._site.courier is not None:
                self._site.courier.deliver(job)
                table["folder"] = f"{self._site.scratch}/stacks/{job['name']}"
            self._site.call("send", self._number, json.dumps({**message, "job": table}))
        except UnreachableError as error:
            # Whether the worker has its orders is not known, and it must not have them twice.
            self._site.give_up(str(error))
        except (GoneError, RegmixError) as error:
            self._fail(error, job["name"])

    def _pass_on(self, message: dict[str, Any]) -> None:
        """Pass on a message once the files that it tells of are in the study."""
        courier, job = self._site.courier, self._job
        if courier is not None and job is not None and not self._is_killed:
            try:
                if "done" in message:
                    courier.fetch_results(job)
                else:
                    courier.fetch_checkpoint(job)
            except UnreachableError as error:
                self._site.give_up(str(error))
                return
            except GoneError:
                return
            except RegmixError as error:
                if "done" in message:
                    self._fail(error, job["name"])
                # A checkpoint that cannot be stored is no reason to end what still trains.
                return
        self._inbox.put((self, message))

    def _fetch_last(self) -> None:
        """Store what an ended worker left: it may have died before it could tell."""
        courier = self._site.courier
        if courier is None or self._is_killed:
            return
        with contextlib.suppress(GoneError, RegmixError, OSError):
            courier.fetch_log(self.log_path.name, self.log_path)
            if self._job is not None:
                courier.fetch_checkpoint(self._job)

    def _fail(self, error: Exception, name: str) -> None:
        # Where the place is gone, its reader says so; the worker has not failed. What could not be
        # started or sent there is the machine's fault, whatever kind of error it was.
        if isinstance(error, RegmixError):
            failed = {"failed": name, "kind": "StorageError"}
            self._inbox.put((self, {**failed, "what": error.what, "cure": error.cure}))

    def _end(self) -> None:
        self._ended.set()
        if not self._is_silent:
            self._inbox.put((self, None))
