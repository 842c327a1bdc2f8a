"""How far a run of stacks is, over all its workers.

Enters: the events of an executor. Leaves: models done, tokens, speed and loss, for a display.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from regmix.swarm.events import Done, Event, Failed, Progress, Replaced, Retired
from regmix.swarm.jobs import StackJob
from regmix.swarm.needs import job_tokens


class Tally:
    """Adds up the progress of stacks that are trained at the same time.

    num_gpus: GPUs that are in use; those that are lost on the way are counted out. tokens: trained
    so far, those before a resume included.
    """

    def __init__(self, jobs: Sequence[StackJob], *, num_gpus: int = 0) -> None:
        self.num_gpus = num_gpus
        self.total_tokens = sum(job_tokens(job) for job in jobs)
        self.num_models = sum(len(job.members) for job in jobs)
        self.models_done = self.tokens = 0
        self._tokens: dict[str, int] = {}
        self._losses: dict[str, float] = {}
        self._first: tuple[float, int] | None = None

    def add(self, event: Event) -> None:
        """Count one event."""
        if isinstance(event, Retired):
            self.num_gpus = event.num_left
        elif isinstance(event, Progress):
            self._take_progress(event)
        elif isinstance(event, Replaced):
            # Its parts say for themselves how far they are.
            self._set_tokens(event.job, 0)
            self._losses.pop(event.job.name, None)
        elif isinstance(event, Done | Failed):
            self._set_tokens(event.job, job_tokens(event.job))
            self.models_done += len(event.job.members)
        else:
            return
        if self._first is None:
            self._first = (time.monotonic(), self.tokens)

    def _take_progress(self, event: Progress) -> None:
        training = event.job.training
        per_step = len(event.job.members) * training.batch_size * training.shape.seq_len
        self._set_tokens(event.job, event.step * per_step)
        # A stack that was just resumed has not trained a step yet.
        if not math.isnan(event.loss_nats):
            self._losses[event.job.name] = event.loss_nats

    def _set_tokens(self, job: StackJob, tokens: int) -> None:
        # A running sum: there may be thousands of stacks, and hundreds of events a second.
        self.tokens += tokens - self._tokens.get(job.name, 0)
        self._tokens[job.name] = tokens

    @property
    def tokens_per_second(self) -> float:
        """Speed since the first report, over all workers, evaluations included."""
        if self._first is None:
            return 0.0
        started, tokens = self._first
        return max(0.0, (self.tokens - tokens) / max(time.monotonic() - started, 1e-3))

    @property
    def loss_nats(self) -> float:
        """Mean of the stacks' last training losses."""
        return sum(self._losses.values()) / len(self._losses) if self._losses else math.nan
