"""Where stacks are trained: worker processes on this machine, on its cores or one on each GPU.

Enters: stack jobs. Leaves: events, as they happen (`events.py`). Every slot, a core's share or a
GPU, takes the next job made for it as soon as it is free. A worker that dies is replaced and its
stack goes on from its last checkpoint. A GPU that is lost is retired and its stack goes on
elsewhere. A stack that runs out of GPU memory is replaced by what the caller says. Ctrl-C and
SIGTERM let every worker write a checkpoint first. Knows no ledger and no study.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from regmix.errors import RegmixError, StudyError
from regmix.swarm.engine import CHECKPOINT_SECONDS, StackJob
from regmix.swarm.events import Done, Event, Failed, Progress, Replaced, Retired
from regmix.swarm.processes import WORKER_MODULE, WorkerProcess, WorkerSetup, worker_processes

__all__ = [
    "Done",
    "Event",
    "Failed",
    "LocalExecutor",
    "Progress",
    "Replaced",
    "Retired",
    "stack_jobs",
    "worker_processes",
]

MAX_ATTEMPTS = 3
# Deaths in a row without a finished step after which a GPU is taken to be lost.
MAX_STRIKES = 2
STOP_PATIENCE_SECONDS = 60.0

# What takes the place of a stack that ran out of GPU memory, and a remark that says so.
Replace = Callable[[StackJob], tuple[Sequence[StackJob], str]]


def _refuse_to_replace(job: StackJob) -> tuple[Sequence[StackJob], str]:
    raise StudyError(
        f"stack {job.name} ran out of its GPU's memory", cure="Give a smaller --stack-size"
    )


class _Slot:
    """A place for one worker: a share of the cores, or one GPU.

    struck: the jobs of the last deaths in a row that came before any finished step.
    """

    def __init__(self, number: int, gpu: str | None) -> None:
        self.number, self.gpu = number, gpu
        self.worker: WorkerProcess | None = None
        self.job: StackJob | None = None
        self.has_stepped = self.is_retired = False
        self.struck: list[str] = []

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    @property
    def is_free(self) -> bool:
        return not self.is_retired and self.job is None


class LocalExecutor:
    """Worker processes on this machine, one stack each at a time.

    num_workers: processes for jobs of the CPU; threads: intra-op threads of each worker.
    gpus: what `CUDA_VISIBLE_DEVICES` calls the GPUs that jobs of device "cuda" may use.
    logs: folder of the workers' stderr. inherited: a descriptor (the study's lock) that stays open
    as long as a worker lives. checkpoint_seconds: time between two checkpoints of a stack; it
    changes no result. worker_module: what a worker runs.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        threads: int,
        logs: Path,
        inherited: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        gpus: Sequence[str] = (),
        worker_module: str = WORKER_MODULE,
    ) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        self._setup = WorkerSetup(
            threads=threads, logs=logs, inherited=inherited, module=worker_module
        )
        places = [*gpus, *[None] * num_workers]
        self._slots = [_Slot(number, gpu) for number, gpu in enumerate(places)]
        self._inbox: queue.Queue[tuple[WorkerProcess, dict[str, Any] | None]] = queue.Queue()
        self._waiting: deque[StackJob] = deque()
        self._attempts: Counter[str] = Counter()
        self._broke: defaultdict[str, set[str]] = defaultdict(set)
        self._remaining = 0
        self._why_retired = "none was given"
        self._on_event: Callable[[Event], None] = lambda _: None
        self._replace: Replace = _refuse_to_replace

    def run(
        self,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        replace: Replace = _refuse_to_replace,
    ) -> None:
        """Train all jobs, longest first; `KeyboardInterrupt` after a clean stop.

        replace: called where a stack ran out of GPU memory, once its worker holds nothing any
        more; returns the jobs in its place and a remark, or raises `RegmixError`: it has failed.
        """
        self._on_event, self._replace = on_event, replace
        self._waiting.extend(sorted(jobs, key=lambda job: -job.training.tokens * len(job.members)))
        self._remaining = len(jobs)
        previous = raise_on_sigterm()
        try:
            self._hand_out()
            while self._remaining:
                worker, message = self._inbox.get()
                slot = next((slot for slot in self._slots if slot.worker is worker), None)
                if slot is not None:
                    self._handle(slot, message)
                    self._hand_out()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            for worker in self._workers():
                worker.kill()

    def _workers(self) -> list[WorkerProcess]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def _hand_out(self) -> None:
        """Give every free slot a job made for it; fail the jobs that no slot can take."""
        self._fail_stranded()
        for slot in self._slots:
            if slot.is_free and (job := self._take(slot)) is not None:
                if slot.worker is None:
                    slot.worker = WorkerProcess(slot.number, slot.gpu, self._inbox, self._setup)
                slot.job, slot.has_stepped = job, False
                self._attempts[job.name] += 1
                order = {"job": job.to_table(), "checkpoint_seconds": self.checkpoint_seconds}
                slot.worker.send(order)

    def _take(self, slot: _Slot) -> StackJob | None:
        """Return the next job for a slot; one that died there waits for another slot, if any."""
        others = [
            other
            for other in self._slots
            if other.device == slot.device and not other.is_retired and other is not slot
        ]
        for job in self._waiting:
            died_here = job.name in slot.struck
            elsewhere = any(job.name not in other.struck for other in others)
            if job.device == slot.device and not (died_here and elsewhere):
                self._waiting.remove(job)
                return job
        return None

    def _fail_stranded(self) -> None:
        devices = {slot.device for slot in self._slots if not slot.is_retired}
        for job in [job for job in self._waiting if job.device not in devices]:
            self._waiting.remove(job)
            self._end(
                Failed(
                    job=job,
                    what=f"stack {job.name}: no GPU is left that works ({self._why_retired})",
                    cure="See the workers' logs and what the driver says (nvidia-smi); leave a "
                    "broken GPU out with CUDA_VISIBLE_DEVICES. What was trained is kept",
                )
            )

    def _end(self, event: Done | Failed) -> None:
        self._remaining -= 1
        self._on_event(event)

    def _handle(self, slot: _Slot, message: dict[str, Any] | None) -> None:
        if message is None:
            self._bury(slot)
            return
        job = slot.job
        if job is None:
            return
        if "progress" in message:
            loss = message["loss_nats"]
            if loss is not None:
                # Only a step that this worker finished has a loss.
                slot.has_stepped = True
                slot.struck.clear()
            self._on_event(
                Progress(
                    job=job,
                    step=message["step"],
                    loss_nats=float("nan") if loss is None else loss,
                    tokens_per_second=message["tokens_per_second"],
                )
            )
        elif "done" in message:
            slot.job = None
            slot.struck.clear()
            self._end(Done(job=job, result=message["result"]))
        elif "failed" in message:
            slot.job = None
            self._end(Failed(job=job, what=message["what"], cure=message["cure"]))
        elif "out_of_memory" in message:
            self._dismiss(slot)
            self._shrink(job)
        elif "broken" in message:
            _, log_path = self._dismiss(slot)
            if message["lost"]:
                self._lose(slot, job, message["what"])
            else:
                self._count_death(slot, job, message["what"], log_path)

    def _bury(self, slot: _Slot) -> None:
        job = slot.job
        code, log_path = self._dismiss(slot)
        if job is not None:
            self._count_death(slot, job, f"exit code {code}", log_path)

    def _dismiss(self, slot: _Slot) -> tuple[int | None, Path]:
        """Wait for the end of a worker that leaves, so that its GPU's memory is free again."""
        assert slot.worker is not None
        code, log_path = slot.worker.wait(), slot.worker.log_path
        slot.worker = slot.job = None
        return code, log_path

    def _shrink(self, job: StackJob) -> None:
        try:
            parts, remark = self._replace(job)
        except RegmixError as error:
            self._end(Failed(job=job, what=error.what, cure=error.cure))
            return
        self._waiting.extendleft(reversed(parts))
        self._remaining += len(parts) - 1
        self._on_event(Replaced(job=job, parts=tuple(parts), remark=remark))

    def _lose(self, slot: _Slot, job: StackJob, why: str) -> None:
        """A worker said that its GPU is lost: the job goes on elsewhere, and is not blamed."""
        assert slot.gpu is not None
        self._retire(slot, why)
        self._attempts[job.name] -= 1
        self._broke[job.name].add(slot.gpu)
        if len(self._broke[job.name]) < MAX_ATTEMPTS:
            self._waiting.appendleft(job)
            return
        what = f"stack {job.name}: {MAX_ATTEMPTS} GPUs were lost while they trained it ({why})"
        self._end(Failed(job=job, what=what, cure="See the workers' logs and the driver's"))

    def _count_death(self, slot: _Slot, job: StackJob, why: str, log_path: Path) -> None:
        """A worker died: after some deaths it is the job's fault, or the GPU's."""
        if slot.gpu is not None and not slot.has_stepped:
            slot.struck.append(job.name)
        if self._attempts[job.name] >= MAX_ATTEMPTS:
            for other in self._slots:
                other.struck = [name for name in other.struck if name != job.name]
            cure = (
                f"See {log_path}; a negative code is a signal, -9 often means memory ran out: use "
            )
            cure += "fewer --workers or " if slot.gpu is None else ""
            self._end(
                Failed(
                    job=job,
                    what=f"stack {job.name}: its worker died {MAX_ATTEMPTS} times ({why})",
                    cure=f"{cure}a smaller --stack-size",
                )
            )
            return
        self._waiting.appendleft(job)
        if len(slot.struck) >= MAX_STRIKES:
            self._attempts.subtract(slot.struck)
            self._retire(slot, f"{MAX_STRIKES} workers died on it without a step ({why})")

    def _retire(self, slot: _Slot, what: str) -> None:
        assert slot.gpu is not None
        slot.is_retired, self._why_retired = True, what
        left = sum(other.gpu is not None and not other.is_retired for other in self._slots)
        self._on_event(Retired(gpu=slot.gpu, what=what, num_left=left))

    def _stop(self) -> None:
        for worker in self._workers():
            worker.send({"stop": True})
        for worker in self._workers():
            worker.wait(STOP_PATIENCE_SECONDS)


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
