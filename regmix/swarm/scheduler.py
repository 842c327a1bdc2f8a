"""Which place trains which stack, and what a death means. Pure bookkeeping: no process, no clock.

Enters: jobs, places that come and go, and what happened to a worker. Leaves: hand-outs, and
verdicts: whether a job goes on or has failed, whether a place is to be used any more.

1. The job with the most work goes first, so that the last ones to end are short.
2. A place takes a job of its device that its GPU and its machine have the memory for. The
   machine's is shared by all that run there.
3. A death counts against a job only where it had not got further than at the death before; after
   MAX_ATTEMPTS of these in a row the job has failed. A lost machine or GPU counts apart.
4. Deaths in a row before any finished step are held against a GPU, and failures to read or write
   against a machine: after MAX_STRIKES it trains nothing more, and its jobs go elsewhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from regmix.swarm.jobs import StackJob
from regmix.swarm.needs import job_gpu_bytes, job_host_bytes, job_tokens
from regmix.swarm.places import Place

MAX_ATTEMPTS = 3
# Machines that come and go may take a job along more often than it could be to blame for.
MAX_LOSSES = 10
# Deaths in a row without a finished step after which a GPU is taken to be lost.
MAX_STRIKES = 2


@dataclass(eq=False)
class Slot:
    """A place in use; struck: the jobs of the last deaths in a row before any finished step."""

    place: Place
    job: StackJob | None = None
    has_stepped: bool = False
    is_retired: bool = False
    struck: list[str] = field(default_factory=list)

    @property
    def is_free(self) -> bool:
        """Whether it can take a job."""
        return not self.is_retired and self.job is None


class Scheduler:
    """The state of one run: what waits, what runs where, and who is to blame for what."""

    def __init__(self, jobs: Sequence[StackJob]) -> None:
        self._waiting = deque(sorted(jobs, key=_operations, reverse=True))
        self._slots: dict[str, Slot] = {}
        self.num_remaining = len(jobs)
        self.deaths: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._furthest: dict[str, int] = {}
        self._broke: defaultdict[str, set[str]] = defaultdict(set)
        self._unable: defaultdict[str, set[str]] = defaultdict(set)
        self._strikes: Counter[str] = Counter()
        # Most messages change nothing for what waits; looking costs a walk over places or jobs.
        self._may_be_stranded = True
        self._is_settled = False

    @property
    def slots(self) -> list[Slot]:
        """All slots, in the order in which their places came."""
        return list(self._slots.values())

    @property
    def num_machines(self) -> int:
        """Machines with a place that is in use."""
        return len({slot.place.machine for slot in self.slots if not slot.is_retired})

    def join(self, place: Place) -> Slot:
        """Use a place from now on."""
        slot = self._slots[place.id] = Slot(place)
        self._unsettle()
        return slot

    def leave(self, place_id: str) -> Slot | None:
        """Forget a place; return its slot, with the job that ran there, if it was known."""
        self._unsettle()
        return self._slots.pop(place_id, None)

    def _unsettle(self) -> None:
        self._may_be_stranded, self._is_settled = True, False

    def hand_out(self) -> list[Slot]:
        """Give every free slot a job that it can take; return the slots that got one."""
        given: list[Slot] = []
        if self._is_settled:
            return given
        self._is_settled = True
        for slot in self.slots:
            if slot.is_free and (job := self._take(slot)) is not None:
                slot.job, slot.has_stepped = job, False
                given.append(slot)
        return given

    def _take(self, slot: Slot) -> StackJob | None:
        free = self._free_host_bytes(slot.place)
        for job in self._waiting:
            if not self._fits(job, slot, free) or self._waits_for_another(job, slot):
                continue
            self._waiting.remove(job)
            return job
        return None

    def _waits_for_another(self, job: StackJob, slot: Slot) -> bool:
        """Whether a job died or failed here, and a place is left where it did not."""
        if not self._speaks_against(slot, job):
            return False
        # One reason to avoid this place and another to avoid that one must not block the job.
        return any(
            not other.is_retired and _suits(job, other) and not self._speaks_against(other, job)
            for other in self.slots
        )

    def _speaks_against(self, slot: Slot, job: StackJob) -> bool:
        return job.name in slot.struck or slot.place.machine in self._unable[job.name]

    def _free_host_bytes(self, place: Place) -> int | None:
        if place.host_bytes is None:
            return None
        return place.host_bytes - sum(
            job_host_bytes(slot.job)
            for slot in self.slots
            if slot.job is not None and slot.place.machine == place.machine
        )

    def _fits(self, job: StackJob, slot: Slot, free_host_bytes: int | None) -> bool:
        if not _suits(job, slot):
            return False
        return free_host_bytes is None or job_host_bytes(job) <= free_host_bytes

    def stranded(self) -> list[StackJob]:
        """Return the waiting jobs that no place could take, even if it were free."""
        if not self._may_be_stranded:
            return []
        usable = [slot for slot in self.slots if not slot.is_retired]
        found = [job for job in self._waiting if not any(_suits(job, slot) for slot in usable)]
        self._may_be_stranded = bool(found)
        return found

    def drop(self, job: StackJob) -> None:
        """Count out a waiting job: it has failed."""
        self._waiting.remove(job)
        self.num_remaining -= 1

    def stepped(self, slot: Slot) -> None:
        """Note that a worker finished a step: its GPU computes."""
        slot.has_stepped = True
        slot.struck.clear()

    def finish(self, slot: Slot, *, is_done: bool) -> None:
        """Count out the job of a slot: it is done, or has failed."""
        if is_done:
            slot.struck.clear()
            self._strikes[slot.place.machine] = 0
        slot.job, self._is_settled = None, False
        self.num_remaining -= 1

    def replace(self, slot: Slot, parts: Sequence[StackJob]) -> None:
        """Let parts wait in the place of a slot's job, before all others."""
        slot.job = None
        self._waiting.extendleft(reversed(parts))
        self._unsettle()
        self.num_remaining += len(parts) - 1

    def put_back(self, slot: Slot) -> None:
        """Let a slot's job wait again, before all others, without blame for anybody."""
        assert slot.job is not None
        self._waiting.appendleft(slot.job)
        slot.job = None
        self._unsettle()

    def bury(self, slot: Slot, first_step: int | None) -> bool:
        """Note the death of a worker whose attempt began at `first_step`; True: the job failed.

        Else the job waits again; where the slot has `MAX_STRIKES` now, its GPU is to blame.
        """
        job = slot.job
        assert job is not None
        if slot.place.device != "cpu" and not slot.has_stepped:
            slot.struck.append(job.name)
        self._note_progress(job, first_step)
        self.deaths[job.name] += 1
        if self.deaths[job.name] < MAX_ATTEMPTS:
            self.put_back(slot)
            return False
        for other in self.slots:
            other.struck = [name for name in other.struck if name != job.name]
        self.finish(slot, is_done=False)
        return True

    def _note_progress(self, job: StackJob, first_step: int | None) -> None:
        furthest = self._furthest.get(job.name, 0)
        if first_step is not None and first_step > furthest:
            self._furthest[job.name] = first_step
            self.deaths[job.name] = self._losses[job.name] = 0

    def is_struck(self, slot: Slot) -> bool:
        """Whether so many workers died there without a step that the GPU is to blame."""
        return len(slot.struck) >= MAX_STRIKES

    def retire(self, slot: Slot) -> int:
        """Use a slot no more; return how many others of its device are left."""
        slot.is_retired = True
        self._unsettle()
        self.deaths.subtract(slot.struck)
        return sum(
            not other.is_retired and other.place.device == slot.place.device for other in self.slots
        )

    def lose_gpu(self, slot: Slot) -> bool:
        """Note that a slot's GPU was lost under its job; True: too many were, the job failed."""
        job = slot.job
        assert job is not None
        self._broke[job.name].add(slot.place.id)
        return self._put_back_or_fail(slot, len(self._broke[job.name]) >= MAX_ATTEMPTS)

    def lose_machine(self, slot: Slot, first_step: int | None) -> bool:
        """Note that a slot's machine went under its job; True: too many did, the job failed."""
        job = slot.job
        assert job is not None
        self._note_progress(job, first_step)
        self._losses[job.name] += 1
        return self._put_back_or_fail(slot, self._losses[job.name] >= MAX_LOSSES)

    def fail_on_machine(self, slot: Slot) -> bool:
        """Note that a machine could not read or write what a job needs; True: the job failed.

        Where another machine is left that has not failed it, the job goes there.
        """
        job, machine = slot.job, slot.place.machine
        assert job is not None
        self._unable[job.name].add(machine)
        self._strikes[machine] += 1
        elsewhere = any(
            _suits(job, other)
            and not other.is_retired
            and other.place.machine not in self._unable[job.name]
            for other in self.slots
        )
        return self._put_back_or_fail(slot, not elsewhere)

    def is_machine_struck(self, slot: Slot) -> bool:
        """Whether a machine failed so many jobs in a row, while there are others."""
        machine = slot.place.machine
        return self._strikes[machine] >= MAX_STRIKES and any(
            not other.is_retired and other.place.machine != machine for other in self.slots
        )

    def _put_back_or_fail(self, slot: Slot, has_failed: bool) -> bool:
        if has_failed:
            self.finish(slot, is_done=False)
        else:
            self.put_back(slot)
        return has_failed


def _operations(job: StackJob) -> float:
    return job_tokens(job) * job.training.shape.flops_per_token()


def _suits(job: StackJob, slot: Slot) -> bool:
    """Whether a place could take a job if nothing else ran on its machine."""
    place = slot.place
    if job.device != place.device:
        return False
    if place.host_bytes is not None and job_host_bytes(job) > place.host_bytes:
        return False
    return place.gpu_bytes is None or job_gpu_bytes(job) <= place.gpu_bytes
