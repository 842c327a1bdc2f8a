"""One place of a Ray cluster: its actor on a node, the thread that reads it, its workers.

Enters: a node and what a run needs there. Leaves, by the executor's hooks: a `Place` once the node
has been found fit to take part, its end, remarks; and workers. A node with other versions is
refused, as its losses would differ. Decides nothing about jobs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.data.sampling.order import ORDER_VERSION
from regmix.data.shards import ShardSet
from regmix.errors import RegmixError, StudyError
from regmix.provenance import versions
from regmix.swarm.cluster.actor import PlaceActor
from regmix.swarm.cluster.connection import Cluster, Node
from regmix.swarm.cluster.courier import Courier, send_corpus
from regmix.swarm.cluster.remote_worker import GoneError, RayWorker, UnreachableError
from regmix.swarm.places import Inbox, Place

POLL_SECONDS = 5.0
# An actor that cannot be reached for so long is taken to be gone.
UNREACHABLE_SECONDS = 10.0
_MISSING = "No module named"
# Versions that decide bits, or whether a worker understands its orders.
DECISIVE = ("regmix-fast", "torch")


@dataclass(frozen=True, kw_only=True)
class RunNeeds:
    """What all places of a run have in common.

    shards: the corpus as the coordinator reads it. token_path, token: a file of the study's folder
    and its text, by which a node shows that it sees that folder. is_shared: None finds it out.
    shard_cache, scratch: folders on the nodes, None for the usual ones. module: what workers run.
    threads: of each. logs: folder of their logs. probes_gpus: whether a GPU must compute first.
    """

    shards: ShardSet
    token_path: Path
    token: str
    logs: Path
    threads: int
    module: str
    is_shared: bool | None = None
    shard_cache: Path | None = None
    scratch: Path | None = None
    contact_seconds: float
    probes_gpus: bool = True


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a place tells its executor, from the place's own thread.

    joined: it is ready; left: it is gone, with why; refused: its node may not take part, with a
    remark. at_node: one place of a node at a time prepares it.
    """

    joined: Callable[[RayPlace, str], None]
    left: Callable[[RayPlace, str], None]
    refused: Callable[[RayPlace, str], None]
    at_node: Callable[[Node], contextlib.AbstractContextManager[Any]]


class RayPlace:
    """A place from the moment its actor is asked for; `place` is set once it is ready."""

    def __init__(
        self,
        cluster: Cluster,
        node: Node,
        device: str,
        serial: int,
        *,
        needs: RunNeeds,
        hooks: Hooks,
        turns: threading.Semaphore,
    ) -> None:
        self.node, self.device, self.logs = node, device, needs.logs
        self.place: Place | None = None
        self.courier: Courier | None = None
        self.shards = self.scratch = ""
        self._cluster, self._serial = cluster, serial
        self._needs, self._hooks, self._turns = needs, hooks, turns
        self._workers: dict[int, RayWorker] = {}
        self._num_started = 0
        self.born = time.monotonic()
        self._is_leaving = False
        self._end = threading.Event()
        self._why = "the run is over"
        is_cpu = device == "cpu"
        self._actor = cluster.start_actor(
            node,
            PlaceActor,
            num_cpus=needs.threads if is_cpu else 0,
            num_gpus=0 if is_cpu else 1,
            device=device,
            threads=needs.threads,
            module=needs.module,
            scratch=None if needs.scratch is None else str(needs.scratch),
            contact_seconds=needs.contact_seconds,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # Calls

    def call(self, method: str, *arguments: Any, patience_seconds: float | None = None) -> Any:
        """See `remote_worker.Site.call`; `TimeoutError` after the patience."""
        from ray.exceptions import (
            ActorUnavailableError,
            GetTimeoutError,
            RayActorError,
            RayError,
            RayTaskError,
        )

        reference = getattr(self._actor, method).remote(*arguments)
        started = time.monotonic()
        while not self._end.is_set():
            try:
                return self._cluster.ray.get(reference, timeout=1.0)
            except GetTimeoutError:
                if patience_seconds is None or time.monotonic() - started < patience_seconds:
                    continue
                raise TimeoutError(f"{self.node.name} does not answer") from None
            except ActorUnavailableError as error:
                raise UnreachableError("its node cannot be reached") from error
            except RayActorError as error:
                raise GoneError(_words(error)) from error
            except RayTaskError as error:
                if isinstance(error.cause, RegmixError):
                    raise error.cause from None
                raise StudyError(
                    f"{self.node.name}: {_last_line(error)}", cure="See Ray's logs on that machine"
                ) from error
            except RayError as error:
                raise GoneError(_words(error)) from error
        raise GoneError(self._why)

    def tell(self, method: str, *arguments: Any) -> None:
        """See `remote_worker.Site.tell`."""
        with contextlib.suppress(Exception):
            getattr(self._actor, method).remote(*arguments)

    # The executor's side

    def start_worker(self, inbox: Inbox) -> RayWorker:
        """Start a worker; its end, or the place's, comes by the inbox."""
        assert self.place is not None
        number, self._num_started = self._num_started, self._num_started + 1
        name = self.place.id.replace("/", "-")
        worker = self._workers[number] = RayWorker(self, number, name, inbox)
        if self._end.is_set():
            worker.hear(None)
        return worker

    def give_up(self, why: str) -> None:
        """Use the place no more, as its actor or node is lost."""
        if not self._end.is_set():
            self._why = why
            self._end.set()

    def preempt(self) -> None:
        """Let its worker write a checkpoint and end: the node is about to go."""
        if not self._is_leaving:
            self._is_leaving = True
            self.tell("preempt")

    def close(self) -> Any:
        """End its workers and clean up there, without waiting; returns what may be waited for."""
        self.give_up("the run is over")
        with contextlib.suppress(Exception):
            return self._actor.close.remote()
        return None

    def kill(self) -> None:
        """End its process."""
        self._cluster.kill(self._actor)

    # Its own thread

    def _run(self) -> None:
        try:
            self._open()
            self._read()
        except _RefusedError as refused:
            self.give_up("it is refused")
            self._hooks.refused(self, str(refused))
        except GoneError as gone:
            self.give_up(str(gone))
        except RegmixError as error:
            self.give_up("it cannot take part")
            self._hooks.refused(self, f"{self.node.name} is not used: {error}")
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {_words(error)}")
        finally:
            self._hooks.left(self, self._why)
            for worker in list(self._workers.values()):
                worker.hear(None)

    def _open(self) -> None:
        """Find out whether the place may take part, and bring there what it needs."""
        try:
            facts = self.call("describe")
        except GoneError as gone:
            if _MISSING in str(gone):
                raise _RefusedError(f"{self.node.name} is not used: {gone}") from gone
            raise
        _refuse_other_versions(self.node, facts)
        hardware = facts["processor"]
        gpu_bytes = None
        if self.device != "cpu" and self._needs.probes_gpus:
            answer = self.call("ask", "describe")
            if "error" in answer:
                raise _RefusedError(
                    f"{self.node.name}: GPU {facts['gpu']} does not work: {answer['error']}"
                )
            hardware, gpu_bytes = answer["name"], answer["free_bytes"]
        with self._hooks.at_node(self.node):
            self._prepare_storage()
            self._prepare_corpus()
        kind = f"cpu-{self._serial}" if self.device == "cpu" else f"gpu-{facts['gpu']}"
        if self.device != "cpu" and self._serial > self.node.num_gpus:
            kind += f"-{self._serial}"
        self.place = Place(
            id=f"{self.node.short_id}/{kind}",
            machine=self.node.name,
            device=self.device,
            gpu=facts["gpu"],
            host_bytes=self.node.memory_bytes,
            gpu_bytes=gpu_bytes,
        )
        self._hooks.joined(self, hardware)

    def _prepare_storage(self) -> None:
        needs = self._needs
        is_shared = needs.is_shared
        if is_shared is None:
            is_shared = self.call("sees", str(needs.token_path), needs.token)
        if not is_shared:
            self.scratch = self.call("make_scratch")
            self.courier = Courier(self.call, self._turns)

    def _prepare_corpus(self) -> None:
        needs, shards = self._needs, self._needs.shards
        is_seen = self.courier is None or needs.is_shared is None
        is_seen = is_seen and self.call("sees_corpus", str(shards.path), shards.checksum)
        if is_seen and needs.shard_cache is None:
            self.shards = str(shards.path)
            return
        named = None if needs.shard_cache is None else str(needs.shard_cache)
        cache = self.call("cache_path", named)
        found = self.call("find_copy", cache, shards.checksum)
        if found is None and is_seen:
            found = self.call("copy_corpus", str(shards.path), cache)
        self.shards = found or send_corpus(shards, cache, self.call, self._pause)

    def _pause(self, seconds: float) -> None:
        if self._end.wait(seconds):
            raise GoneError(self._why)

    def _read(self) -> None:
        """Hand on what workers say until the place is gone; always ends with `GoneError`."""
        after, reached = 0, time.monotonic()
        leaving_why = ""
        while True:
            try:
                batch = self.call("poll", after, POLL_SECONDS)
            except UnreachableError:
                # Its node may only be out of reach for a moment; nothing it says is lost then.
                if time.monotonic() - reached > UNREACHABLE_SECONDS:
                    raise
                self._pause(0.5)
                continue
            reached = time.monotonic()
            for number, worker, message, code in batch:
                if number <= after:
                    continue
                after = number
                if message is not None and "leaving" in message:
                    self._is_leaving, leaving_why = True, message["leaving"]
                else:
                    self._hear(worker, message, code)
            if leaving_why and not self._workers:
                raise GoneError(leaving_why)

    def _hear(self, number: int, message: dict[str, Any] | None, code: int | None) -> None:
        worker = self._workers.get(number)
        if worker is None:
            return
        if message is None:
            del self._workers[number]
            if self._is_leaving:
                worker.finish(code)
                return
        elif message.get("kind") == "ShardError" and self.shards != str(self._needs.shards.path):
            self.tell("doubt_corpus", self.shards)
        elif "preempted" in message and self._is_leaving:
            # The place leaves as a whole, so that nothing is begun there any more.
            return
        worker.hear(message, code)


class _RefusedError(Exception):
    """A node may not take part; the text says why and how to cure it."""


def _refuse_other_versions(node: Node, facts: dict[str, Any]) -> None:
    ours, theirs = versions(), facts["versions"]
    for package in DECISIVE:
        if ours.get(package) != theirs.get(package):
            raise _RefusedError(
                f"{node.name} is not used: it has {package} {theirs.get(package)} and this machine "
                f"{ours.get(package)}, so its losses would not compare. Install the same there."
            )
    if facts["order_version"] != ORDER_VERSION:
        raise _RefusedError(
            f"{node.name} is not used: its regmix-fast deals data in order "
            f"{facts['order_version']}, this one in order {ORDER_VERSION}. Install the same there."
        )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__


def _words(error: BaseException) -> str:
    """Return the first line of an error of Ray's, which may have fifty."""
    text = str(error)
    if _MISSING in text:
        line = [line for line in text.splitlines() if _MISSING in line][-1]
        return f"{line.strip()}: install regmix-fast there, of this version"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
