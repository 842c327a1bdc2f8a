"""A Ray cluster as its driver sees it: connected to, its nodes, an actor on one of them.

Enters: an address. Leaves: `Node` records, and actors that stay on the node they were made for.
Ray is imported in here and nowhere at import; where it is not installed, or no cluster answers,
that is a `StudyError` with the cure. Ray's own log lines go to a file, as they would break the
display and the answer on stdout. Knows no jobs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.errors import StudyError

INSTALL = "pip install 'regmix-fast[ray]'"
CONNECT_SECONDS = 10.0
_START = (
    "Start one: `ray start --head` on this machine, then on the others what it prints; or name "
    "another with --address HOST:6379"
)
# An actor answers while it polls, is stopped, and carries files.
_CALLS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living machine of a cluster, as Ray counts it; memory_bytes: what its work may take."""

    id: str
    address: str
    num_cpus: int
    num_gpus: int
    memory_bytes: int | None
    is_draining: bool

    @property
    def short_id(self) -> str:
        """The part of its id that people are shown."""
        return self.id[:8]

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.address} (node {self.short_id})"


class Cluster:
    """A connected cluster; made by `connect`."""

    def __init__(self, ray: Any, address: str, *, is_ours: bool) -> None:
        self.ray, self.address = ray, address
        self._is_ours = is_ours

    def nodes(self) -> list[Node]:
        """Return the living nodes, in the order of their ids."""
        draining = self._draining()
        found = [
            Node(
                id=entry["NodeID"],
                address=entry["NodeManagerAddress"],
                num_cpus=int(entry["Resources"].get("CPU", 0)),
                num_gpus=int(entry["Resources"].get("GPU", 0)),
                memory_bytes=int(entry["Resources"].get("memory", 0)) or None,
                is_draining=entry["NodeID"] in draining,
            )
            for entry in self.ray.nodes()
            if entry["Alive"]
        ]
        return sorted(found, key=lambda node: node.id)

    def _draining(self) -> set[str]:
        # Not part of Ray's promised interface: where it changes, a drained machine is seen to go
        # only once it is gone.
        with contextlib.suppress(Exception):
            return set(self.ray._private.state.state.get_draining_nodes())
        return set()

    def start_actor(
        self, node: Node, kind: type, *, num_cpus: float, num_gpus: float, **arguments: Any
    ) -> Any:
        """Return an actor of a class on a node; it waits there for its CPUs or GPU to be free."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            # What a death means is the scheduler's to say.
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": _CALLS_AT_ONCE,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        }
        return self.ray.remote(kind).options(**options).remote(**arguments)

    def kill(self, actor: Any) -> None:
        """End an actor's process, whatever it does."""
        with contextlib.suppress(Exception):
            self.ray.kill(actor)

    def close(self) -> None:
        """Leave the cluster; actors that are left end with that."""
        if self._is_ours:
            with _kept_signals():
                self.ray.shutdown()


def import_ray() -> Any:
    """Return the package `ray`; `StudyError` where it is not installed."""
    # Ray sends usage statistics from clusters that it starts; nothing of ours does.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise StudyError("--engine ray: Ray is not installed", cure=INSTALL) from error
    return ray


def connect(address: str | None = None, *, log: Path | None = None) -> Cluster:
    """Connect to a cluster; `StudyError` where none answers.

    address: `HOST:PORT`; None for what RAY_ADDRESS says, or the cluster of this machine. log: file
    for what Ray says of its machines; None drops it.
    """
    ray = import_ray()
    if ray.is_initialized():
        return Cluster(ray, ray.get_runtime_context().gcs_address, is_ours=False)
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in wanted:
        raise StudyError(
            f"--address {wanted}: Ray's client is not supported",
            cure="Run this command on a machine of the cluster, with --address HOST:6379 or "
            "without --address",
        )
    if wanted != "auto":
        _refuse_silent(wanted)
    try:
        with _kept_signals():
            context = ray.init(
                address=wanted,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                namespace="regmix-fast",
            )
    except ConnectionError as error:
        raise StudyError(f"no Ray cluster answers at '{wanted}'", cure=_START) from error
    except RuntimeError as error:
        raise StudyError(
            f"--address {wanted}: {' '.join(str(error).split())[:300]}",
            cure="Install the Ray and the Python of the cluster here, or name another cluster",
        ) from error
    _divert_lines(ray, log)
    return Cluster(ray, context.address_info["gcs_address"], is_ours=True)


def _refuse_silent(address: str) -> None:
    """Raise where nothing listens at an address: Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise StudyError(
            f"--address {address}: no HOST:PORT", cure="Name the head's: --address HOST:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise StudyError(f"no Ray cluster answers at '{address}' ({error})", cure=_START) from error


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray sets one that ends without a clean stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def _divert_lines(ray: Any, log: Path | None) -> None:
    """Write to a file what Ray would print on stdout when a machine or an actor dies."""

    def divert(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        if log is not None:
            with contextlib.suppress(OSError):
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "a", encoding="utf-8") as stream:
                    stream.writelines(f"{line}\n" for line in data.get("lines", ()))

    # Not part of Ray's promised interface: where it is gone, its lines are on the screen again.
    with contextlib.suppress(AttributeError):
        if callable(ray._private.worker.print_to_stdstream):
            ray._private.worker.print_to_stdstream = divert
