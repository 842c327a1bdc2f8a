"""Executors: the places where stacks are trained, and how a worker is started there.

Enters: stack jobs. Leaves: events, as they happen (`events.py`). An executor says which places
there are and starts workers; the run itself (`dispatch.py`, `scheduler.py`) is the same for all.
A worker that dies or hangs is replaced and its stack goes on from its last checkpoint. A GPU that
is lost is retired and its stack goes on elsewhere. A stack that runs out of GPU memory is replaced
by what the caller says. Ctrl-C and SIGTERM let every worker write a checkpoint first. Knows no
ledger and no study.
"""

from __future__ import annotations

import platform
import queue
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from regmix.errors import StudyError
from regmix.swarm.dispatch import Dispatcher, Replace, default_clock
from regmix.swarm.events import Event
from regmix.swarm.jobs import CHECKPOINT_SECONDS, StackJob
from regmix.swarm.places import Inbox, Place, Worker
from regmix.swarm.processes import WORKER_MODULE, WorkerProcess, WorkerSetup
from regmix.swarm.scheduler import MAX_ATTEMPTS

__all__ = ["MAX_ATTEMPTS", "Executor", "LocalExecutor", "raise_on_sigterm", "stack_jobs"]

# A worker's thread says this often that it lives; a machine that pages may take its time.
BEAT_PATIENCE_SECONDS = 60.0
# Kernels are compiled before the first step of a GPU, and a worker's libraries may lie far away.
STALL_SECONDS = 900.0


def _refuse_to_replace(job: StackJob) -> tuple[Sequence[StackJob], str]:
    raise StudyError(
        f"stack {job.name} ran out of its GPU's memory", cure="Give a smaller --stack-size"
    )


class Executor(ABC):
    """Trains jobs; a kind of executor says where there are places and starts workers there.

    checkpoint_seconds: time between two checkpoints of a stack; it changes no result.
    beat_patience_seconds: how long a worker may say nothing; stall_seconds: how long its training
    may stand still; None for this module's constants. patience_seconds: how long jobs wait where no
    place is left that could take them, as machines may come back.
    """

    def __init__(
        self,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        beat_patience_seconds: float | None = None,
        stall_seconds: float | None = None,
        patience_seconds: float = 0.0,
    ) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        self.beat_patience_seconds = (
            BEAT_PATIENCE_SECONDS if beat_patience_seconds is None else beat_patience_seconds
        )
        self.stall_seconds = STALL_SECONDS if stall_seconds is None else stall_seconds
        self.patience_seconds = patience_seconds

    @abstractmethod
    def open(self, inbox: Inbox) -> Sequence[Place]:
        """Return the places there are; those that come or go later are told by the inbox."""

    @abstractmethod
    def start(self, place: Place) -> Worker:
        """Start a worker, soon; what it says, and its end, come by the inbox."""

    def close(self) -> None:
        """Give back what `open` took; called once, when no worker is left."""
        return

    def clock(self) -> float:
        """Return the seconds that deadlines are counted in."""
        return default_clock()

    def receive(self, inbox: Inbox, seconds: float) -> tuple[Worker | None, dict[str, Any] | None]:
        """Return what comes next; `queue.Empty` where nothing does for so long."""
        return inbox.get(timeout=seconds)

    def run(
        self,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        replace: Replace = _refuse_to_replace,
    ) -> None:
        """Train all jobs, longest first; `KeyboardInterrupt` after a clean stop.

        replace: called where a stack ran out of GPU memory, once its worker holds nothing any
        more; returns the jobs in its place and a remark, or raises `RegmixError`: it has failed.
        Whatever `on_event` raises, every worker writes a checkpoint first, too.
        """
        dispatcher = Dispatcher(self, jobs, on_event, replace)
        previous = raise_on_sigterm()
        try:
            try:
                dispatcher.serve()
            except (KeyboardInterrupt, Exception):
                dispatcher.stop()
                raise
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            try:
                dispatcher.kill_all()
            finally:
                self.close()


class LocalExecutor(Executor):
    """Worker processes on this machine, one stack each at a time.

    num_workers: processes for jobs of the CPU; threads: intra-op threads of each worker.
    gpus: what `CUDA_VISIBLE_DEVICES` calls the GPUs that jobs of device "cuda" may use.
    logs: folder of the workers' stderr. inherited: a descriptor (the study's lock) that stays open
    as long as a worker lives. worker_module: what a worker runs. The rest as in `Executor`.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        threads: int,
        logs: Path,
        inherited: int | None = None,
        gpus: Sequence[str] = (),
        worker_module: str = WORKER_MODULE,
        **patience: float,
    ) -> None:
        super().__init__(**patience)
        self._setup = WorkerSetup(
            threads=threads, logs=logs, inherited=inherited, module=worker_module
        )
        machine = platform.node()
        self._places = [
            *(
                Place(id=f"gpu-{number}", machine=machine, device="cuda", gpu=gpu)
                for number, gpu in enumerate(gpus)
            ),
            *(
                Place(id=f"worker-{number}", machine=machine, device="cpu")
                for number in range(len(gpus), len(gpus) + num_workers)
            ),
        ]
        self._inbox: Inbox = queue.Queue()

    def open(self, inbox: Inbox) -> Sequence[Place]:
        """See `Executor.open`."""
        self._inbox = inbox
        return self._places

    def start(self, place: Place) -> Worker:
        """See `Executor.start`."""
        return WorkerProcess(place.id, place.gpu, self._inbox, self._setup)


def raise_on_sigterm() -> Any:
    """Make SIGTERM raise `KeyboardInterrupt`; return the handler that was there, if any."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    return signal.signal(signal.SIGTERM, stop)


def stack_jobs(
    members: Sequence[Any], *, num_workers: int, stack_size: int | None, largest: int
) -> list[list[Any]]:
    """Split members into stacks: as equal as can be, the same number for every worker.

    stack_size: members of a stack where the user chose it; largest: the most otherwise.
    """
    if not members:
        return []
    if stack_size is not None:
        if stack_size < 1:
            raise StudyError(f"a stack of {stack_size}", cure="Give a --stack-size above 0")
        num_stacks = -(-len(members) // stack_size)
    else:
        rounds = -(-len(members) // (largest * num_workers))
        num_stacks = min(len(members), rounds * num_workers)
    base, extra = divmod(len(members), num_stacks)
    stacks, start = [], 0
    for number in range(num_stacks):
        end = start + base + (number < extra)
        stacks.append(list(members[start:end]))
        start = end
    return stacks
