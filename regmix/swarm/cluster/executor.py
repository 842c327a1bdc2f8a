"""Stacks trained on a Ray cluster: a worker on every GPU, or on shares of every node's cores.

Enters: a connected cluster, and how many places to use. Leaves: events, as of the local executor,
whose workers, scheduler and rules these are; who trained what changes no bit on one kind of
hardware. Nodes that come are used, those that go are replaced, up to the number of places that was
asked for. Starts nothing by itself: the scheduler says where a worker is started.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from regmix.data.shards import ShardSet
from regmix.errors import StudyError
from regmix.files import storage_errors, write_text
from regmix.swarm.cluster.actor import CONTACT_SECONDS
from regmix.swarm.cluster.connection import Cluster, Node
from regmix.swarm.cluster.place import Hooks, RayPlace, RunNeeds
from regmix.swarm.dispatch import Replace
from regmix.swarm.events import Event
from regmix.swarm.executors import Executor
from regmix.swarm.jobs import StackJob
from regmix.swarm.places import Inbox, Place, Worker
from regmix.swarm.processes import WORKER_MODULE

TICK_SECONDS = 1.5
# How long the start waits for more places once there is one, and for the first.
MORE_SECONDS = 10.0
FIRST_SECONDS = 180.0
# How long jobs wait while no machine is there: a cluster may be starting others.
PATIENCE_SECONDS = 600.0
CLOSE_SECONDS = 10.0
# After so many ends of places in a row, each this soon after its beginning, a node that is still
# there is used no more.
MOST_ENDS = 3
QUICK_SECONDS = 60.0
# Transfers of files that the coordinator takes part in at a time.
TRANSFERS = 4


class RayExecutor(Executor):
    """Workers on the nodes of a Ray cluster, one stack each at a time.

    num_workers: places for jobs of the CPU, over all nodes; threads: intra-op threads of each.
    uses_all: whether also more of them are used, where machines come.
    gpus: as many entries as GPUs are to be used; which they are is Ray's to say. logs: folder of
    the workers' stderr. inherited: taken for the local executor's sake and not used.
    shard_cache, scratch: folders on the nodes. is_shared: whether nodes see the study's folder;
    None finds it out for each. on_remark: is told what a person should know. The rest as in
    `Executor`.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        num_workers: int,
        threads: int,
        logs: Path,
        inherited: int | None = None,
        gpus: Sequence[str] = (),
        uses_all: bool = False,
        shard_cache: Path | None = None,
        scratch: Path | None = None,
        is_shared: bool | None = None,
        on_remark: Callable[[str], None] = lambda _: None,
        worker_module: str = WORKER_MODULE,
        probes_gpus: bool = True,
        contact_seconds: float = CONTACT_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        **patience: float,
    ) -> None:
        super().__init__(patience_seconds=patience_seconds, **patience)
        self._cluster, self._threads, self._logs = cluster, threads, logs
        self._most = {"cpu": sys.maxsize if uses_all else num_workers, "cuda": len(gpus)}
        self._wanted = dict.fromkeys(self._most, 0)
        self._shard_cache, self._scratch, self._is_shared = shard_cache, scratch, is_shared
        self._module, self._probes_gpus = worker_module, probes_gpus
        self._contact_seconds, self._on_remark = contact_seconds, on_remark
        self._needs: RunNeeds | None = None
        self._stacks = Path()
        self._inbox: Inbox | None = None
        self._hooks = Hooks(
            joined=self._joined, left=self._left, refused=self._refused, at_node=self._at_node
        )
        self._turns = threading.Semaphore(TRANSFERS)
        self._changed = threading.Condition()
        # All below is read and written under `_changed`.
        self._places: list[RayPlace] = []
        self._ready: list[Place] = []
        self._is_open = False
        self._serials: Counter[tuple[str, str]] = Counter()
        self._ends: Counter[str] = Counter()
        self._unfit: set[str] = set()
        self._hardware: dict[str, str] = {}
        self._said: set[str] = set()
        self._node_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._closing = threading.Event()

    @property
    def places(self) -> list[Place]:
        """The places that are ready now."""
        with self._changed:
            return [place.place for place in self._places if place.place is not None]

    def run(
        self,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        replace: Replace | None = None,
    ) -> None:
        """See `Executor.run`."""
        if not jobs:
            return
        devices = {job.device for job in jobs}
        self._wanted = {d: most if d in devices else 0 for d, most in self._most.items()}
        self._stacks = Path(jobs[0].folder).parent
        token = secrets.token_hex(16)
        self._needs = RunNeeds(
            shards=ShardSet.open(jobs[0].shards),
            token_path=self._stacks / f".shared-{token}",
            token=token,
            logs=self._logs,
            threads=self._threads,
            module=self._module,
            is_shared=self._is_shared,
            shard_cache=self._shard_cache,
            scratch=self._scratch,
            contact_seconds=self._contact_seconds,
            probes_gpus=self._probes_gpus,
        )
        if replace is None:
            super().run(jobs, on_event)
        else:
            super().run(jobs, on_event, replace)

    def open(self, inbox: Inbox) -> Sequence[Place]:
        """See `Executor.open`; `StudyError` where no node of the cluster can take part."""
        assert self._needs is not None
        self._inbox = inbox
        with storage_errors(self._stacks):
            self._stacks.mkdir(parents=True, exist_ok=True)
        write_text(self._needs.token_path, self._needs.token)
        self._look()
        threading.Thread(target=self._watch, daemon=True).start()
        started = time.monotonic()
        with self._changed:
            while self._may_come(time.monotonic() - started):
                waited = time.monotonic() - started
                opening = any(place.place is None for place in self._places)
                if self._ready and (not opening or waited > MORE_SECONDS):
                    break
                if waited > FIRST_SECONDS:
                    break
                self._changed.wait(0.2)
            if not self._ready:
                raise self._nothing_there()
            if late := sum(place.place is None for place in self._places):
                self._say(f"{late} more places take part once Ray has room and they are ready")
            self._is_open = True
            ready, self._ready = self._ready, []
        return ready

    def _may_come(self, waited: float) -> bool:
        """Whether a first place may still come: one is being made, or will be tried again."""
        tried = any(0 < ends < MOST_ENDS for ends in self._ends.values())
        return bool(self._places) or tried or waited < TICK_SECONDS

    def _nothing_there(self) -> StudyError:
        why = "; ".join(sorted(self._said)) or "none of its nodes has any free"
        what = "CPUs" if self._wanted["cpu"] else "GPUs"
        return StudyError(
            f"the Ray cluster at {self._cluster.address} has no {what} to train on: {why}",
            cure="`ray status` shows what it has and who uses it; start more machines, or leave "
            "--engine ray out to train on this one",
        )

    def start(self, place: Place) -> Worker:
        """See `Executor.start`."""
        assert self._inbox is not None
        with self._changed:
            found = next((p for p in self._places if p.place is place), None)
        if found is None:
            # It went, and the inbox says so next.
            return _NoWorker()
        return found.start_worker(self._inbox)

    def close(self) -> None:
        """See `Executor.close`: nothing of the run is left on any node."""
        self._closing.set()
        with self._changed:
            places = list(self._places)
        self._end(places)
        if self._needs is not None:
            self._needs.token_path.unlink(missing_ok=True)

    def _end(self, places: Sequence[RayPlace]) -> None:
        answers = [answer for place in places if (answer := place.close()) is not None]
        if answers:
            with contextlib.suppress(Exception):
                self._cluster.ray.wait(answers, num_returns=len(answers), timeout=CLOSE_SECONDS)
        for place in places:
            place.kill()

    # Nodes that come and go

    def _watch(self) -> None:
        while not self._closing.wait(TICK_SECONDS):
            # The head of the cluster may be restarting; its nodes train on meanwhile.
            with contextlib.suppress(Exception):
                self._look()

    def _look(self) -> None:
        """Ask for places where there are none yet, and note the nodes that went."""
        nodes = {node.id: node for node in self._cluster.nodes()}
        with self._changed:
            if self._closing.is_set():
                return
            for place in self._places:
                if place.node.id not in nodes:
                    place.give_up("its node is gone")
                elif nodes[place.node.id].is_draining:
                    place.preempt()
            usable = [n for n in nodes.values() if n.id not in self._unfit and not n.is_draining]
            for device, wanted in self._wanted.items():
                for node in self._spread(usable, device, wanted):
                    self._serials[node.id, device] += 1
                    self._places.append(
                        RayPlace(
                            self._cluster,
                            node,
                            device,
                            self._serials[node.id, device],
                            needs=self._needs_now,
                            hooks=self._hooks,
                            turns=self._turns,
                        )
                    )

    @property
    def _needs_now(self) -> RunNeeds:
        assert self._needs is not None
        return self._needs

    def _spread(self, nodes: Sequence[Node], device: str, wanted: int) -> list[Node]:
        """Return a node for every place that is wanting, the emptiest first."""
        taken = Counter(place.node.id for place in self._places if place.device == device)
        wanting, found = wanted - sum(taken.values()), []
        while wanting > 0:
            room = [node for node in nodes if taken[node.id] < self._capacity(node, device)]
            if not room:
                break
            node = min(room, key=lambda node: taken[node.id])
            taken[node.id] += 1
            wanting -= 1
            found.append(node)
        return found

    def _capacity(self, node: Node, device: str) -> int:
        return node.num_gpus if device != "cpu" else node.num_cpus // self._threads

    # What places say, each from its own thread

    @contextlib.contextmanager
    def _at_node(self, node: Node) -> Iterator[None]:
        with self._changed:
            lock = self._node_locks[node.id]
        with lock:
            yield

    def _joined(self, place: RayPlace, hardware: str) -> None:
        assert place.place is not None
        with self._changed:
            if self._is_open and self._inbox is not None:
                self._inbox.put((None, {"joined": place.place}))
            else:
                self._ready.append(place.place)
            self._hardware[place.node.name] = hardware
            kinds = sorted(set(self._hardware.values()))
            if len(kinds) > 1:
                self._say(
                    f"Losses are equal bit for bit on one kind of hardware only, and here are "
                    f"{len(kinds)}: {'; '.join(kinds)}"
                )
            self._changed.notify_all()

    def _left(self, place: RayPlace, why: str) -> None:
        node = place.node
        with self._changed:
            if place in self._places:
                self._places.remove(place)
            if not self._closing.is_set():
                if place.place in self._ready:
                    self._ready.remove(place.place)
                elif place.place is not None and self._inbox is not None:
                    self._inbox.put((None, {"left": place.place.id, "why": why}))
                # Deaths in a row soon after the start are the node's; others come with the years.
                quick = time.monotonic() - place.born < QUICK_SECONDS
                self._ends[node.id] = self._ends[node.id] + 1 if quick else 0
                if self._ends[node.id] >= MOST_ENDS and node.id not in self._unfit:
                    self._unfit.add(node.id)
                    self._say(f"{node.name} is used no more: {why}")
            self._changed.notify_all()
        if not self._closing.is_set():
            self._end([place])

    def _refused(self, place: RayPlace, remark: str) -> None:
        with self._changed:
            self._unfit.add(place.node.id)
            self._say(remark)

    def _say(self, remark: str) -> None:
        if remark not in self._said:
            self._said.add(remark)
            self._on_remark(remark)


class _NoWorker:
    """Stands for a worker of a place that went before it could start one."""

    log_path = Path()

    def send(self, message: dict[str, object]) -> None:
        """See `places.Worker.send`."""

    def wait(self, patience_seconds: float = 0.0) -> int | None:
        """See `places.Worker.wait`."""
        return None

    def kill(self) -> int | None:
        """See `places.Worker.kill`."""
        return None


def num_cpu_places(cluster: Cluster, wanted: int | None, threads: int) -> int:
    """Return how many workers a cluster's cores are for; `StudyError` where `wanted` are more."""
    found = sum(node.num_cpus // threads for node in cluster.nodes())
    if not found:
        raise StudyError(
            f"the Ray cluster at {cluster.address} has no {threads} CPUs together on any machine",
            cure="Give fewer --threads, or start machines: ray start --address=HOST:6379",
        )
    if wanted is not None and wanted > found:
        raise StudyError(
            f"--workers {wanted}: the Ray cluster at {cluster.address} has room for {found}",
            cure=f"Use --workers {found}, or leave it out to use all, also those that come later",
        )
    return wanted or found
