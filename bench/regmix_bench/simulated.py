"""An executor whose workers only say what real ones would: a sweep without its training.

Enters: how long each stack takes. Leaves: the same messages at the same times as real workers
send, on a clock that jumps from one to the next, but runs while the coordinator works. So the
scheduler, the dispatcher, the ledger and the tables are the real ones, their time is counted, and
a sweep of weeks takes as long as its coordinator does. Trains nothing, starts no process.
"""

from __future__ import annotations

import heapq
import json
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regmix.swarm.engine import REPORT_SECONDS
from regmix.swarm.executors import Executor
from regmix.swarm.jobs import RESULT_FILE, StackJob
from regmix.swarm.places import Inbox, Place, Worker
from regmix.swarm.worker import BEAT_SECONDS

ENVIRONMENT = {"processor": "simulated", "versions": {"regmix-fast": "simulated"}}


class SimulatedWorker:
    """A worker in words; `start_seconds` pass before its first."""

    log_path = "no log"

    def __init__(self, executor: SimulatedExecutor, start_seconds: float) -> None:
        self._executor, self._start_seconds = executor, start_seconds
        self._job: StackJob | None = None

    def send(self, message: dict[str, Any]) -> None:
        """Begin what a real worker would do with the message."""
        if "job" in message:
            self._job = job = StackJob.from_table(message["job"])
            lines = _messages(job, self._executor.seconds_of(job), message["checkpoint_seconds"])
            self._executor.say(self, lines, delay=self._start_seconds)
            self._start_seconds = 0.0

    def write_files(self) -> None:
        """Write what a real worker leaves in its job's folder."""
        assert self._job is not None
        folder = Path(self._job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        losses = np.zeros(self._job.training.num_steps, np.float32)
        for member in self._job.members:
            np.save(folder / f"{member.name}.npy", losses)
        (folder / RESULT_FILE).write_text("{}")

    def wait(self, patience_seconds: float = 0.0) -> int | None:
        """End at once."""
        return 0

    def kill(self) -> int | None:
        """End at once."""
        return 0


def _messages(
    job: StackJob, seconds: float, checkpoint_seconds: float
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield (seconds from the start, message) of one job, as worker.py says them."""
    num_steps = job.training.num_steps
    due = [(REPORT_SECONDS, 0), (BEAT_SECONDS, 1), (checkpoint_seconds, 2)]
    heapq.heapify(due)
    yield 0.0, {"started": job.name, "step": 0, "environment": ENVIRONMENT}
    while due[0][0] < seconds:
        at, kind = heapq.heappop(due)
        step = int(num_steps * at / seconds)
        if kind == 0:
            speed = {"loss_nats": 5.0, "tokens_per_second": 1e6}
            yield at, {"progress": job.name, "step": step, **speed}
        elif kind == 1:
            yield at, {"beat": step}
        else:
            yield at, {"checkpoint": job.name, "step": step}
        every = (REPORT_SECONDS, BEAT_SECONDS, checkpoint_seconds)[kind]
        heapq.heappush(due, (at + every, kind))
    yield seconds, {"done": job.name, "result": _result(job, seconds)}


def _result(job: StackJob, seconds: float) -> dict[str, Any]:
    draw = np.random.default_rng(len(job.name))
    losses = draw.uniform(2.0, 6.0, (len(job.members), len(job.targets))).tolist()
    return {
        "losses": losses,
        "failed": [False] * len(job.members),
        "evaluations": [[job.training.num_steps, losses]],
        "seconds": seconds,
        "tokens": job.training.tokens * len(job.members),
    }


class SimulatedExecutor(Executor):
    """Simulated workers on `num_places` places.

    seconds_of: how long a worker takes for a job; start_seconds: until a new worker begins its
    first. Takes what `LocalExecutor` does besides, and has no use for it.
    """

    def __init__(
        self,
        *,
        num_places: int,
        seconds_of: Callable[[StackJob], float],
        start_seconds: float = 0.0,
        checkpoint_seconds: float,
        **_of_real_workers: Any,
    ) -> None:
        super().__init__(checkpoint_seconds=checkpoint_seconds)
        self.seconds_of = seconds_of
        # Real time that the simulation itself took.
        self.idle_seconds = 0.0
        self._start_seconds = start_seconds
        self._places = [
            Place(id=f"worker-{n}", machine=f"machine-{n // 8}", device="cpu")
            for n in range(num_places)
        ]
        self._now, self._since = 0.0, time.perf_counter()
        self._queue: list[tuple[float, int, SimulatedWorker, str, Iterator[Any], float]] = []
        self._number = 0

    def open(self, inbox: Inbox) -> Sequence[Place]:
        """See `Executor.open`."""
        self._since = time.perf_counter()
        return self._places

    def start(self, place: Place) -> Worker:
        """See `Executor.start`."""
        return SimulatedWorker(self, self._start_seconds)

    def clock(self) -> float:
        """Return the simulated time; it goes on while the coordinator works."""
        return self._now + time.perf_counter() - self._since

    def say(
        self,
        worker: SimulatedWorker,
        lines: Iterator[tuple[float, dict[str, Any]]],
        *,
        delay: float,
    ) -> None:
        """Let a worker say these lines, the first `delay` from now."""
        self._say_next(worker, lines, self.clock() + delay)

    def _say_next(self, worker: SimulatedWorker, lines: Iterator[Any], begun: float) -> None:
        line = next(lines, None)
        if line is not None:
            self._number += 1
            text = json.dumps(line[1])
            entry = (begun + line[0], self._number, worker, text, lines, begun)
            heapq.heappush(self._queue, entry)

    def receive(self, inbox: Inbox, seconds: float) -> tuple[Worker | None, dict[str, Any] | None]:
        """Go to the next message; the clock does not count what is done in here."""
        self._now, entered = self.clock(), time.perf_counter()
        text = None
        if not self._queue or self._queue[0][0] > self._now + seconds:
            self._now += seconds
        else:
            at, _, worker, text, lines, begun = heapq.heappop(self._queue)
            self._now = max(self._now, at)
            self._say_next(worker, lines, begun)
            if '"done"' in text:
                worker.write_files()
        self._since = time.perf_counter()
        self.idle_seconds += self._since - entered
        if text is None:
            raise queue.Empty
        # In the coordinator a thread does this for each worker.
        return worker, json.loads(text)
