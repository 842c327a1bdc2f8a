"""A study, and an executor without processes: what happens to each stack is written in the test.

Enters: a function from a job to what becomes of it. Leaves: the events that a real executor would
tell, and the files that a worker would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.shards import ShardSet
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.events import Done, Event, Failed, Progress, Requeued, Started, Stopped
from regmix.swarm.jobs import RESULT_FILE, StackJob
from regmix.swarm.sweep import SweepOptions

ENVIRONMENT = {"versions": {"torch": "2.13.0"}}


def new_study(shards: ShardSet, training: Training, path: Path, num: int = 6) -> Study:
    return make_study(
        path,
        shards,
        swarm=SwarmRequest(num=num),
        training=training,
        objective={"animals": 1.0},
    )


class FakeExecutor:
    """Trains nothing, one stack after the other, and remembers what it was given.

    becomes: says what becomes of an attempt at a job: a result's table, or an event other than
    `Done`; None for losses that are the proxy's index.
    """

    def __init__(self, becomes: Callable[[StackJob], Any] = lambda _: None) -> None:
        self.becomes = becomes
        self.given: list[StackJob] = []

    def __call__(self, **_: Any) -> FakeExecutor:
        return self

    def options(self, **more: Any) -> SweepOptions:
        return SweepOptions(num_workers=1, make_executor=self, is_remote=True, **more)

    def run(
        self,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        _replace: Callable[[StackJob], Any],
    ) -> None:
        waiting = list(jobs)
        while waiting:
            job = waiting.pop(0)
            self.given.append(job)
            on_event(started(job))
            try:
                on_event(Progress(job=job, step=3, loss_nats=2.5, tokens_per_second=100.0))
                event = self.becomes(job)
                if not isinstance(event, Failed | Requeued):
                    event = Done(job=job, result=finish(job, event))
                if isinstance(event, Requeued):
                    waiting.insert(0, job)
                on_event(event)
            except KeyboardInterrupt:
                on_event(Stopped(job=job))
                raise


def started(job: StackJob) -> Started:
    return Started(
        job=job,
        worker="worker-0",
        machine="here",
        device="cpu",
        step=0,
        environment=ENVIRONMENT,
    )


def finish(job: StackJob, result: dict[str, Any] | None = None) -> dict[str, Any]:
    """Leave what a worker leaves of a trained stack; return its result, an old one if any."""
    folder = Path(job.folder)
    if (folder / RESULT_FILE).is_file():
        return json.loads((folder / RESULT_FILE).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for member in job.members:
        np.save(folder / f"{member.name}.npy", np.zeros(job.training.num_steps, dtype=np.float32))
        (folder / f"{member.name}.safetensors").write_bytes(b"parameters")
    result = result or result_of(job)
    (folder / RESULT_FILE).write_text(json.dumps(result))
    return result


def result_of(job: StackJob, failed: Sequence[int] = ()) -> dict[str, Any]:
    """Return a result where each loss is the proxy's index, and these proxies have failed."""
    losses = [[float(member.name)] * len(job.targets) for member in job.members]
    return {
        "losses": losses,
        "failed": [int(member.name) in failed for member in job.members],
        "evaluations": [[job.training.num_steps, losses]],
        "seconds": 2.0,
        "tokens": 100 * len(job.members),
    }
