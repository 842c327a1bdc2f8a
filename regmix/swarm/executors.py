"""Where stacks are trained: local worker processes, each with its own stacks.

Enters: stack jobs. Leaves: events, as they happen: progress, done, failed. A worker that dies is
replaced and its stack goes on from its last checkpoint. Ctrl-C and SIGTERM let every worker write
a checkpoint first. Knows no ledger and no study.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from regmix.errors import StudyError
from regmix.files import storage_errors
from regmix.swarm.engine import CHECKPOINT_SECONDS, StackJob

MAX_ATTEMPTS = 3
STOP_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A stack is at `step`, its members' mean training loss is `loss_nats`."""

    job: StackJob
    step: int
    loss_nats: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Done:
    """A stack is trained; `result` is the table that `worker.train_job` describes."""

    job: StackJob
    result: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A stack could not be trained."""

    job: StackJob
    what: str
    cure: str


Event = Progress | Done | Failed


class _WorkerProcess:
    """One worker, the job that it holds, and the thread that reads its messages."""

    def __init__(
        self, number: int, inbox: queue.Queue, threads: int, logs: Path, inherited: int | None
    ) -> None:
        self.number, self.alive = number, True
        self.job: StackJob | None = None
        environment = {
            **os.environ,
            "PYTHONSAFEPATH": "1",
            # Threads that spin while they wait take the core of another process's thread.
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        with storage_errors(logs):
            logs.mkdir(parents=True, exist_ok=True)
            self.log_path = logs / f"worker-{number}.log"
            log = open(self.log_path, "ab")  # noqa: SIM115 - the child keeps it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "regmix.swarm.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=() if inherited is None else (inherited,),
            )
        finally:
            log.close()
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: queue.Queue) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            inbox.put((self, message))
        inbox.put((self, None))

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            # The worker is gone; its reader says so.
            return


class LocalExecutor:
    """Worker processes on this machine, one stack each at a time.

    num_workers: processes; threads: intra-op threads of each. logs: folder of their stderr.
    inherited: a descriptor (the study's lock) that stays open as long as a worker lives.
    checkpoint_seconds: time between two checkpoints of a stack; it changes no result.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        threads: int,
        logs: Path,
        inherited: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.num_workers, self.threads = num_workers, threads
        self.checkpoint_seconds = checkpoint_seconds
        self.logs, self.inherited = logs, inherited
        self._inbox: queue.Queue = queue.Queue()
        self._workers: list[_WorkerProcess] = []
        self._waiting: deque[StackJob] = deque()
        self._attempts: dict[str, int] = {}

    def run(self, jobs: Sequence[StackJob], on_event: Callable[[Event], None]) -> None:
        """Train all jobs, longest first; `KeyboardInterrupt` after a clean stop."""
        jobs = sorted(jobs, key=lambda job: -job.training.tokens * len(job.members))
        self._waiting.extend(jobs)
        remaining = len(jobs)
        previous = _raise_on_sigterm()
        try:
            for number in range(min(self.num_workers, len(jobs))):
                self._start_worker(number)
            while remaining:
                worker, message = self._inbox.get()
                event = self._handle(worker, message)
                if event is not None:
                    on_event(event)
                    remaining -= not isinstance(event, Progress)
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()
            self._workers.clear()

    def _start_worker(self, number: int) -> None:
        worker = _WorkerProcess(number, self._inbox, self.threads, self.logs, self.inherited)
        self._workers.append(worker)
        self._hand_out(worker)

    def _hand_out(self, worker: _WorkerProcess) -> None:
        worker.job = self._waiting.popleft() if self._waiting else None
        if worker.job is not None:
            name = worker.job.name
            self._attempts[name] = self._attempts.get(name, 0) + 1
            table = worker.job.to_table()
            worker.send({"job": table, "checkpoint_seconds": self.checkpoint_seconds})

    def _handle(self, worker: _WorkerProcess, message: dict[str, Any] | None) -> Event | None:
        if message is None:
            return self._bury(worker)
        job = worker.job
        if job is None:
            return None
        if "progress" in message:
            return Progress(
                job=job,
                step=message["step"],
                loss_nats=message["loss_nats"] or float("nan"),
                tokens_per_second=message["tokens_per_second"],
            )
        if "done" in message:
            self._hand_out(worker)
            return Done(job=job, result=message["result"])
        if "failed" in message:
            self._hand_out(worker)
            return Failed(job=job, what=message["what"], cure=message["cure"])
        return None

    def _bury(self, worker: _WorkerProcess) -> Event | None:
        if not worker.alive:
            return None
        worker.alive = False
        code = worker.process.wait()
        self._workers.remove(worker)
        job = worker.job
        if job is None:
            return None
        if self._attempts[job.name] < MAX_ATTEMPTS:
            self._waiting.appendleft(job)
            self._start_worker(worker.number)
            return None
        if self._waiting:
            self._start_worker(worker.number)
        return Failed(
            job=job,
            what=f"stack {job.name}: its worker died {MAX_ATTEMPTS} times (exit code {code})",
            cure=f"See {worker.log_path}; a negative code is a signal, -9 often means memory ran "
            "out: use fewer --workers or a smaller --stack-size",
        )

    def _stop(self) -> None:
        for worker in self._workers:
            worker.send({"stop": True})
        for worker in self._workers:
            try:
                worker.process.wait(STOP_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()


def _raise_on_sigterm() -> Any:
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


def worker_processes(coordinator: int) -> list[int]:
    """Return the process ids of a coordinator's living workers (Linux; elsewhere none)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # pid (name) state ppid: the name may hold spaces, so count from its last bracket.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == coordinator and b"regmix.swarm.worker" in words:
            found.append(int(entry.name))
    return sorted(found)
