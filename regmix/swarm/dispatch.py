"""One run of an executor: hands jobs to workers, hears what becomes of them, tells it as events.

Enters: jobs, an executor's places and its workers' messages. Leaves: events, in the order in which
things happened. Who gets what and who is to blame is the scheduler's to say. Starts no process
itself, and knows no ledger and no study.

A worker is taken for hung where it has said nothing for `beat_patience_seconds`, or where its heart
beats and its training stands still (a GPU that does not answer, a file system that hangs). Silence
counts only while this process itself was running and had read all that had come.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from regmix.errors import RegmixError
from regmix.swarm.attempts import Attempt
from regmix.swarm.events import (
    Done,
    Event,
    Failed,
    Joined,
    Left,
    Progress,
    Replaced,
    Requeued,
    Retired,
    Started,
    Stopped,
)
from regmix.swarm.jobs import StackJob
from regmix.swarm.messages import is_of_another_job, message_problem
from regmix.swarm.places import Inbox, Place, Worker
from regmix.swarm.scheduler import MAX_ATTEMPTS, MAX_STRIKES, Scheduler, Slot

if TYPE_CHECKING:
    from regmix.swarm.executors import Executor

STOP_PATIENCE_SECONDS = 60.0
TICK_SECONDS = 0.5
# A tick that took so long was no tick: the whole process stood still.
_LONG_TICK_SECONDS = 5.0
# What takes the place of a stack that ran out of GPU memory, and a remark that says so.
Replace = Callable[[StackJob], tuple[Sequence[StackJob], str]]
# Errors of a worker that another machine may not have.
_OF_THE_MACHINE = ("StorageError", "ShardError", "MemoryError")


class Dispatcher:
    """One run of an executor over some jobs."""

    def __init__(
        self,
        executor: Executor,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        replace: Replace,
    ) -> None:
        self.scheduler = Scheduler(jobs)
        self._executor, self._on_event, self._replace = executor, on_event, replace
        self._inbox: Inbox = queue.Queue()
        self._attempts: dict[str, Attempt] = {}
        self._slots: dict[Worker, Slot] = {}
        self._why_retired = "none was given"
        self._ticked_at = self._looked_at = self._able_at = executor.clock()

    def serve(self) -> None:
        """Train all jobs; returns when each of them is done or has failed."""
        for place in self._executor.open(self._inbox):
            self.scheduler.join(place)
        self._ticked_at = self._looked_at = self._able_at = self._executor.clock()
        self._hand_out()
        while self.scheduler.num_remaining:
            came = self._receive()
            if came is None:
                self._look_after()
            else:
                self._take_in(*came)
                self._ticked_at = self._executor.clock()
            self._hand_out()

    def _receive(self) -> tuple[Worker | None, dict[str, Any] | None] | None:
        """Return what comes next; None every tick, once all that had come is taken in."""
        # However much the others say, silence is looked for; a wait of 0 takes what is there.
        wait = max(0.0, self._looked_at + TICK_SECONDS - self._executor.clock())
        try:
            came = self._executor.receive(self._inbox, wait)
        except queue.Empty:
            came = None
        now = self._executor.clock()
        if now - self._ticked_at > _LONG_TICK_SECONDS:
            # This process stood still itself, so no worker is to blame for what it did not hear.
            for attempt in self._attempts.values():
                attempt.excuse(now)
        self._ticked_at = now
        if came is None:
            self._looked_at = now
        return came

    def _take_in(self, worker: Worker | None, message: dict[str, Any] | None) -> None:
        if worker is None:
            assert message is not None
            if "joined" in message:
                self._join(message["joined"])
            else:
                self._leave(message["left"], message["why"])
            return
        # A worker that was given up may still have had something to say.
        slot = self._slots.get(worker)
        if slot is not None:
            self._handle(slot, message)

    def _begin(self, slot: Slot) -> Attempt:
        """Return the worker of a slot at the beginning of its job; it is started where needed."""
        now = self._executor.clock()
        attempt = self._attempts.get(slot.place.id)
        if attempt is None:
            attempt = Attempt(self._executor.start(slot.place), now)
            self._attempts[slot.place.id] = attempt
            self._slots[attempt.worker] = slot
        attempt.begin(now)
        return attempt

    def _give_up(self, slot: Slot) -> Attempt | None:
        """Listen to the worker of a slot no more."""
        attempt = self._attempts.pop(slot.place.id, None)
        if attempt is not None:
            del self._slots[attempt.worker]
        return attempt

    # Places

    def _join(self, place: Place) -> None:
        self.scheduler.join(place)
        self._on_event(Joined(place=place))

    def _leave(self, place_id: str, why: str) -> None:
        slot = self.scheduler.leave(place_id)
        if slot is None:
            return
        attempt = self._give_up(slot)
        if attempt is not None:
            attempt.worker.kill()
        if slot.job is not None:
            job, first = slot.job, None if attempt is None else attempt.first_step
            self._tell_start(slot, attempt)
            if self.scheduler.lose_machine(slot, first):
                what = f"stack {job.name}: its machine went away too often ({why})"
                self._fail(job, what, "Run the same command again where machines stay")
            else:
                self._on_event(Requeued(job=job, outcome="lost", why=why))
        self._on_event(Left(place=slot.place, why=why))

    def _hand_out(self) -> None:
        """Give every free slot a job made for it; fail the jobs that no slot can take."""
        self._fail_stranded()
        for slot in self.scheduler.hand_out():
            assert slot.job is not None
            attempt = self._begin(slot)
            seconds = self._executor.checkpoint_seconds
            attempt.worker.send({"job": slot.job.to_table(), "checkpoint_seconds": seconds})

    def _fail_stranded(self) -> None:
        stranded = self.scheduler.stranded()
        now = self._executor.clock()
        if not stranded or any(slot.job is not None for slot in self.scheduler.slots):
            # While something runs, a machine with more may still come.
            self._able_at = now
        if not stranded:
            return
        patience = self._executor.patience_seconds
        if patience and now - self._able_at < patience:
            return
        for job in stranded:
            self.scheduler.drop(job)
            self._fail(job, *self._why_stranded(job))

    def _why_stranded(self, job: StackJob) -> tuple[str, str]:
        if any(slot.place.device == job.device for slot in self.scheduler.slots):
            slots = [s for s in self.scheduler.slots if s.place.device == job.device]
            if not all(slot.is_retired for slot in slots):
                return (
                    f"stack {job.name}: no machine has the memory for it",
                    "Use machines with more memory, or a smaller --stack-size for a new study",
                )
        if job.device == "cpu":
            return (
                f"stack {job.name}: no machine is left that could train it",
                "Start machines again, then run the same command. What was trained is kept",
            )
        return (
            f"stack {job.name}: no GPU is left that works ({self._why_retired})",
            "See the workers' logs and what the driver says (nvidia-smi); leave a broken GPU "
            "out with CUDA_VISIBLE_DEVICES. What was trained is kept",
        )

    # Messages

    def _handle(self, slot: Slot, message: dict[str, Any] | None) -> None:
        attempt, job = self._attempts[slot.place.id], slot.job
        if message is None:
            self._bury(slot)
            return
        attempt.hear(message, self._executor.clock())
        if problem := message_problem(message, job):
            attempt.worker.kill()
            self._dismiss(slot)
            if job is not None:
                self._count_death(slot, job, attempt, "died", problem)
            return
        if job is None or is_of_another_job(message, job):
            return
        if "started" in message:
            attempt.first_step = int(message["step"])
            self._tell_start(slot, attempt)
        elif "progress" in message:
            self._progress(slot, job, message)
        elif "done" in message:
            self._tell_start(slot, attempt)
            self.scheduler.finish(slot, is_done=True)
            self._on_event(Done(job=job, result=message["result"]))
        elif "failed" in message:
            self._tell_start(slot, attempt)
            self._failed(slot, job, message)
        elif "preempted" in message:
            self._dismiss(slot)
            self.scheduler.put_back(slot)
            why = "its worker was told to end (SIGTERM)"
            self._on_event(Requeued(job=job, outcome="preempted", why=why))
        elif "out_of_memory" in message:
            self._dismiss(slot)
            self._shrink(slot, job)
        elif "broken" in message:
            self._dismiss(slot)
            if message["lost"]:
                self._lose_gpu(slot, job, message["what"])
            else:
                self._count_death(slot, job, attempt, "died", message["what"])

    def _tell_start(self, slot: Slot, attempt: Attempt | None) -> None:
        """Tell once that an attempt began, also where its worker never said so."""
        assert slot.job is not None
        if attempt is not None and not attempt.is_told:
            attempt.is_told = True
            place = slot.place
            self._on_event(
                Started(
                    job=slot.job,
                    worker=place.id,
                    machine=place.machine,
                    device=place.device,
                    step=attempt.first_step,
                    environment=attempt.environment,
                )
            )

    def _progress(self, slot: Slot, job: StackJob, message: dict[str, Any]) -> None:
        loss = message["loss_nats"]
        if loss is not None:
            # Only a step that this worker finished has a loss.
            self.scheduler.stepped(slot)
        self._on_event(
            Progress(
                job=job,
                step=message["step"],
                loss_nats=float("nan") if loss is None else loss,
                tokens_per_second=message["tokens_per_second"],
            )
        )

    def _failed(self, slot: Slot, job: StackJob, message: dict[str, Any]) -> None:
        what, cure = message["what"], message["cure"]
        if message.get("kind") not in _OF_THE_MACHINE:
            self.scheduler.finish(slot, is_done=False)
            self._fail(job, what, cure)
            return
        if self.scheduler.fail_on_machine(slot):
            self._fail(job, what, cure)
        else:
            self._on_event(Requeued(job=job, outcome="failed", why=what))
        if self.scheduler.is_machine_struck(slot):
            for other in self.scheduler.slots:
                if other.place.machine == slot.place.machine and not other.is_retired:
                    self.scheduler.retire(other)
                    self._on_event(Left(place=other.place, why=what))

    def _bury(self, slot: Slot) -> None:
        job, attempt = slot.job, self._attempts[slot.place.id]
        code = self._dismiss(slot)
        if job is None:
            return
        if code != -signal.SIGTERM:
            self._count_death(slot, job, attempt, "died", f"exit code {code}")
        elif self.scheduler.lose_machine(slot, attempt.first_step):
            what = f"stack {job.name}: something ends its workers again and again (SIGTERM)"
            self._fail(job, what, "Find out what does, then run the same command again")
        else:
            # It came while the worker was starting, so it could not say so itself.
            why = "its worker was told to end (SIGTERM)"
            self._on_event(Requeued(job=job, outcome="preempted", why=why))

    def _dismiss(self, slot: Slot) -> int | None:
        """Wait for the end of a worker that leaves, so that its GPU's memory is free again."""
        attempt = self._give_up(slot)
        assert attempt is not None
        if slot.job is not None:
            self._tell_start(slot, attempt)
        return attempt.worker.wait()

    def _shrink(self, slot: Slot, job: StackJob) -> None:
        """A worker ran out of GPU memory: what takes the job's place waits before all others."""
        try:
            parts, remark = self._replace(job)
        except RegmixError as error:
            self.scheduler.finish(slot, is_done=False)
            self._fail(job, error.what, error.cure)
            return
        self.scheduler.replace(slot, parts)
        self._on_event(Replaced(job=job, parts=tuple(parts), remark=remark))

    def _lose_gpu(self, slot: Slot, job: StackJob, why: str) -> None:
        """A worker said that its GPU is lost: the job goes on elsewhere, and is not blamed."""
        has_failed = self.scheduler.lose_gpu(slot)
        self._retire(slot, why)
        if has_failed:
            what = f"stack {job.name}: {MAX_ATTEMPTS} GPUs were lost while they trained it ({why})"
            self._fail(job, what, "See the workers' logs and the driver's")
        else:
            self._on_event(Requeued(job=job, outcome="lost", why=why))

    def _count_death(
        self, slot: Slot, job: StackJob, attempt: Attempt, outcome: str, why: str
    ) -> None:
        """A worker died or hung: after some deaths it is the job's fault, or the GPU's."""
        if self.scheduler.bury(slot, attempt.first_step):
            cure = (
                f"See {attempt.worker.log_path}; a negative code is a signal, -9 often means "
                "memory ran out: use "
            )
            cure += "fewer --workers or " if slot.place.gpu is None else ""
            what = f"stack {job.name}: its worker died {MAX_ATTEMPTS} times ({why})"
            self._fail(job, what, f"{cure}a smaller --stack-size")
            return
        self._on_event(Requeued(job=job, outcome=outcome, why=why))
        if self.scheduler.is_struck(slot):
            self._retire(slot, f"{MAX_STRIKES} workers died on it without a step ({why})")

    def _retire(self, slot: Slot, what: str) -> None:
        self._why_retired = what
        machine = slot.place.machine if self.scheduler.num_machines > 1 else ""
        left = self.scheduler.retire(slot)
        gpu = slot.place.gpu or slot.place.id
        self._on_event(Retired(gpu=gpu, machine=machine, what=what, num_left=left))

    def _fail(self, job: StackJob, what: str, cure: str) -> None:
        self._on_event(Failed(job=job, what=what, cure=cure))

    # Silence

    def _look_after(self) -> None:
        """Find workers that hang; called where all that had come is read."""
        now = self._executor.clock()
        for slot in self.scheduler.slots:
            attempt = self._attempts.get(slot.place.id)
            if attempt is None or slot.job is None:
                continue
            why = attempt.why_hung(
                now,
                device=slot.place.device,
                beat_patience_seconds=self._executor.beat_patience_seconds,
                stall_seconds=self._executor.stall_seconds,
            )
            if why:
                self._end_hung(slot, slot.job, attempt, why)

    def _end_hung(self, slot: Slot, job: StackJob, attempt: Attempt, why: str) -> None:
        self._give_up(slot)
        self._tell_start(slot, attempt)
        code = attempt.worker.kill()
        if code is None and slot.place.device != "cpu":
            # Not even kill -9 ends it: its driver holds it, and the GPU with it.
            self._lose_gpu(slot, job, f"{why}, and its worker cannot be killed")
            return
        self._count_death(slot, job, attempt, "hung", why)

    # The end

    def stop(self) -> None:
        """Let every worker write a checkpoint; take in what is done meanwhile."""
        clock = self._executor.clock
        for idle in self._running():
            if idle.place.id not in self._attempts:
                # What ended the run came before its worker was started.
                idle.job = None
        for attempt in self._attempts.values():
            attempt.worker.send({"stop": True})
        deadline = clock() + STOP_PATIENCE_SECONDS
        while self._running() and (left := deadline - clock()) > 0:
            try:
                worker, message = self._executor.receive(self._inbox, min(left, TICK_SECONDS))
            except queue.Empty:
                continue
            slot = None if worker is None else self._slots.get(worker)
            if slot is not None:
                self._take_last(slot, message)
        for slot in self._running():
            self._end_stopped(slot)

    def _running(self) -> list[Slot]:
        return [slot for slot in self.scheduler.slots if slot.job is not None]

    def _take_last(self, slot: Slot, message: dict[str, Any] | None) -> None:
        job = slot.job
        if job is None:
            return
        if message is not None and (
            message_problem(message, job) or is_of_another_job(message, job)
        ):
            return
        if message is not None and "done" in message:
            self._tell_start(slot, self._attempts.get(slot.place.id))
            self.scheduler.finish(slot, is_done=True)
            # Whatever keeps this from being stored, the others' checkpoints are written.
            with contextlib.suppress(Exception):
                self._on_event(Done(job=job, result=message["result"]))
        elif message is None or {"stopped", "preempted", "failed"} & set(message):
            self._end_stopped(slot)

    def _end_stopped(self, slot: Slot) -> None:
        assert slot.job is not None
        job = slot.job
        with contextlib.suppress(Exception):
            self._tell_start(slot, self._attempts.get(slot.place.id))
            self._on_event(Stopped(job=job))
        slot.job = None

    def kill_all(self) -> None:
        """Leave no worker behind."""
        for attempt in self._attempts.values():
            attempt.worker.kill()


def default_clock() -> float:
    """Return seconds that only ever go forwards, whatever happens to the time of day."""
    return time.monotonic()
