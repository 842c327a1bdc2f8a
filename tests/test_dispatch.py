"""One run of an executor: workers that hang, say nonsense or are told to end; machines that come.

The executor here has a clock of its own and workers that do what a script says, so that hours pass
in no time and nothing depends on this machine's speed.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regmix.errors import StorageError, StudyError
from regmix.study import Training
from regmix.swarm.dispatch import TICK_SECONDS
from regmix.swarm.events import (
    Done,
    Event,
    Failed,
    Joined,
    Left,
    Progress,
    Requeued,
    Started,
    Stopped,
)
from regmix.swarm.executors import Executor
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.places import Inbox, Place, Worker


def job_of(training: Training, name: str, device: str = "cpu") -> StackJob:
    member = Member(name=f"{name}-0", weights={"a": 1.0}, data_seed=0, init_seed=0)
    return StackJob(
        name=name,
        members=(member,),
        training=training,
        targets=("a",),
        shards="s",
        shards_checksum="c",
        folder="f",
        device=device,
    )


def result_of(job: StackJob) -> dict[str, Any]:
    return {
        "losses": [[1.5]],
        "failed": [False],
        "evaluations": [[job.training.num_steps, [[1.5]]]],
        "seconds": 1.0,
        "tokens": 7,
    }


@dataclass(eq=False)
class ScriptedWorker:
    """Says what its script makes of a job: (seconds from then, message); None is its death."""

    executor: ScriptedExecutor
    place: Place
    log_path: str = "a log"
    is_alive: bool = True
    told: list[dict[str, Any]] = field(default_factory=list)

    def send(self, message: dict[str, Any]) -> None:
        self.told.append(message)
        if "job" in message:
            job = StackJob.from_table(message["job"])
            for seconds, line in self.executor.script(self, job):
                self.executor.later(seconds, self, line)
        elif self.is_alive:
            for seconds, line in self.executor.on_stop(self):
                self.executor.later(seconds, self, line)

    def wait(self, patience_seconds: float = 30.0) -> int | None:
        return self.kill()

    def kill(self) -> int | None:
        self.is_alive = False
        return self.executor.exit_code


Line = tuple[float, dict[str, Any] | None]


class ScriptedExecutor(Executor):
    def __init__(
        self,
        script: Callable[[ScriptedWorker, StackJob], Sequence[Line]],
        places: Sequence[Place],
        **patience: float,
    ) -> None:
        super().__init__(**patience)
        self.script, self.places = script, places
        self.on_stop: Callable[[ScriptedWorker], Sequence[Line]] = lambda worker: [(0.0, None)]
        self.exit_code: int | None = -9
        self.now = 1000.0
        self.workers: list[ScriptedWorker] = []
        self._timeline: list[tuple[float, int, Worker | None, dict[str, Any] | None]] = []
        self.is_closed = False

    def later(self, seconds: float, worker: Worker | None, message: dict[str, Any] | None) -> None:
        self._timeline.append((self.now + seconds, len(self._timeline), worker, message))

    def open(self, inbox: Inbox) -> Sequence[Place]:
        return self.places

    def start(self, place: Place) -> Worker:
        self.workers.append(ScriptedWorker(self, place))
        return self.workers[-1]

    def close(self) -> None:
        self.is_closed = True

    def clock(self) -> float:
        return self.now

    def receive(self, inbox: Inbox, seconds: float) -> tuple[Worker | None, dict[str, Any] | None]:
        while True:
            entry = min(self._timeline, default=None, key=lambda entry: entry[:2])
            if entry is None or entry[0] > self.now + seconds:
                self.now += seconds
                raise queue.Empty
            self._timeline.remove(entry)
            self.now = max(self.now, entry[0])
            worker = entry[2]
            # The dead say nothing more.
            if isinstance(worker, ScriptedWorker) and not worker.is_alive and entry[3] is not None:
                continue
            return worker, entry[3]


def place_of(number: int, machine: str = "m", device: str = "cpu") -> Place:
    return Place(id=f"{machine}/{number}", machine=machine, device=device, gpu=str(number))


def trained(job: StackJob, first_step: int = 0) -> list[Line]:
    return [
        (0.0, {"ready": 1, "environment": {"processor": "p"}}),
        (0.1, {"started": job.name, "step": first_step}),
        (1.0, {"done": job.name, "result": result_of(job)}),
    ]


def kinds(events: Sequence[Event], *names: type) -> list[str]:
    return [type(event).__name__ for event in events if isinstance(event, names)]


def run(executor: ScriptedExecutor, jobs: Sequence[StackJob]) -> list[Event]:
    events: list[Event] = []
    executor.run(jobs, events.append)
    assert executor.is_closed
    assert not any(worker.is_alive for worker in executor.workers)
    return events


def test_every_attempt_is_told_from_start_to_end(tiny_training: Training) -> None:
    job = job_of(tiny_training, "a")
    events = run(ScriptedExecutor(lambda _, job: trained(job, 3), [place_of(0)]), [job])
    started, done = events
    assert isinstance(started, Started)
    assert (started.worker, started.machine, started.step) == ("m/0", "m", 3)
    assert started.environment == {"processor": "p"}
    assert isinstance(done, Done)


def test_a_worker_that_falls_silent_is_killed_and_its_stack_goes_on(
    tiny_training: Training,
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if len(worker.executor.workers) == 1:
            beats: list[Line] = [(2.0 * n, {"beat": n}) for n in range(5)]
            return [(0.0, {"ready": 1}), (0.0, {"started": job.name, "step": 0}), *beats]
        return trained(job, 40)

    executor = ScriptedExecutor(script, [place_of(0)], beat_patience_seconds=30.0)
    events = run(executor, [job_of(tiny_training, "a")])
    assert kinds(events, object) == ["Started", "Requeued", "Started", "Done"]
    requeued = events[1]
    assert isinstance(requeued, Requeued)
    assert requeued.outcome == "hung"
    assert "no sign of life for 3" in requeued.why
    assert not executor.workers[0].is_alive


def test_a_training_that_stands_still_while_the_heart_beats_is_found(
    tiny_training: Training,
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if len(worker.executor.workers) == 1:
            moving: list[Line] = [(2.0 * n, {"beat": n}) for n in range(5)]
            still: list[Line] = [(10.0 + 2.0 * n, {"beat": 4}) for n in range(5000)]
            return [(0.0, {"ready": 1}), *moving, *still]
        return trained(job)

    executor = ScriptedExecutor(script, [place_of(0)], stall_seconds=300.0)
    events = run(executor, [job_of(tiny_training, "a")])
    (requeued,) = (event for event in events if isinstance(event, Requeued))
    assert requeued.outcome == "hung"
    assert "stood still for 300 s" in requeued.why


def test_a_gpu_may_hang_before_its_first_step_and_a_cpu_may_be_slow(
    tiny_training: Training,
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        still: list[Line] = [(2.0 * n, {"beat": 0}) for n in range(5000)]
        ends = trained(job)[-1][1]
        return [(0.0, {"ready": 1}), *still, (10_000.0, ends)]

    def outcome(device: str) -> list[str]:
        executor = ScriptedExecutor(script, [place_of(0, device=device)], stall_seconds=300.0)
        return kinds(run(executor, [job_of(tiny_training, "a", device)]), Done, Failed)

    assert outcome("cpu") == ["Done"]
    # A GPU that no worker gets to its first step is to blame.
    assert outcome("cuda") == ["Failed"]


def test_pauses_as_long_as_those_before_are_no_hang(tiny_training: Training) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        # A step takes 100 s, an evaluation of one part 1900 s.
        slow: list[Line] = [(100.0 * n, {"beat": n}) for n in range(4)]
        beats: list[Line] = [(300.0 + 2.0 * n, {"beat": 3}) for n in range(950)]
        return [(0.0, {"ready": 1}), *slow, *beats, (2200.0, trained(job)[-1][1])]

    executor = ScriptedExecutor(
        script, [place_of(0)], stall_seconds=60.0, beat_patience_seconds=150.0
    )
    assert kinds(run(executor, [job_of(tiny_training, "a")]), Done, Requeued) == ["Done"]


def test_a_coordinator_that_stood_still_blames_no_worker(tiny_training: Training) -> None:
    class Suspended(ScriptedExecutor):
        suspended = False

        def receive(self, inbox: Inbox, seconds: float) -> Any:
            if self.now > 1010.0 and not self.suspended:
                # As after SIGSTOP and SIGCONT: an hour is gone, and nothing was read meanwhile.
                self.suspended = True
                self.now += 3600.0
                raise queue.Empty
            return super().receive(inbox, seconds)

    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        before: list[Line] = [(2.0 * n, {"beat": n}) for n in range(6)]
        after: list[Line] = [(3620.0 + 2.0 * n, {"beat": n}) for n in range(9)]
        return [*before, *after, (3640.0, trained(job)[-1][1])]

    executor = Suspended(script, [place_of(0)], beat_patience_seconds=20.0)
    events = run(executor, [job_of(tiny_training, "a")])
    assert executor.suspended
    assert kinds(events, Done, Requeued) == ["Done"]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"progress": "a"},
        {"progress": "a", "step": "3", "loss_nats": 1.0, "tokens_per_second": 1.0},
        {"done": "a", "result": 5},
        {"done": "a", "result": {"losses": [[1.0, 2.0]], "failed": [False]}},
        {"done": "a", "result": {"losses": [["nan"]], "failed": [False]}},
        {"started": "a"},
        {"beat": "fast"},
        {"failed": "a", "what": 1, "cure": []},
    ],
)
def test_a_worker_that_says_nonsense_is_replaced(
    tiny_training: Training, nonsense: dict[str, Any]
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        return [(0.0, nonsense)] if len(worker.executor.workers) == 1 else trained(job)

    events = run(ScriptedExecutor(script, [place_of(0)]), [job_of(tiny_training, "a")])
    assert kinds(events, Requeued, Done) == ["Requeued", "Done"]


def test_what_no_worker_says_and_late_words_are_passed_over(tiny_training: Training) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        late = {"done": "another", "result": result_of(job)}
        return [(0.0, {"hello": 1}), (0.0, late), *trained(job)]

    events = run(ScriptedExecutor(script, [place_of(0)]), [job_of(tiny_training, "a")])
    assert kinds(events, object) == ["Started", "Done"]


def test_a_preempted_worker_costs_its_stack_nothing(tiny_training: Training) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if len(worker.executor.workers) <= 20:
            return [(0.0, {"started": job.name, "step": 0}), (1.0, {"preempted": None})]
        return trained(job)

    events = run(ScriptedExecutor(script, [place_of(0)]), [job_of(tiny_training, "a")])
    assert kinds(events, Requeued) == ["Requeued"] * 20
    assert kinds(events, Done, Failed) == ["Done"]


def test_a_worker_that_is_told_to_end_while_it_starts_is_not_the_stacks_fault(
    tiny_training: Training,
) -> None:
    def outcome(num_ended: int) -> list[str]:
        def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
            return [(0.1, None)] if len(worker.executor.workers) <= num_ended else trained(job)

        executor = ScriptedExecutor(script, [place_of(0)])
        executor.exit_code = -15
        return kinds(run(executor, [job_of(tiny_training, "a")]), Done, Failed)

    assert outcome(9) == ["Done"]
    assert outcome(10) == ["Failed"]


def test_machines_that_come_and_go_take_part(tiny_training: Training) -> None:
    jobs = [job_of(tiny_training, name) for name in "abcd"]
    executor = ScriptedExecutor(
        lambda worker, job: (
            [(0.0, {"started": job.name, "step": 0}), *trained(job)[2:]]
            if worker.place.machine != "going"
            else [(0.0, {"started": job.name, "step": 0})]
        ),
        [place_of(0, "going"), place_of(0, "staying")],
    )
    executor.later(0.5, None, {"left": "going/0", "why": "its node died"})
    executor.later(0.6, None, {"joined": place_of(0, "coming")})
    events = run(executor, jobs)
    assert kinds(events, Done) == ["Done"] * 4
    (lost,) = (event for event in events if isinstance(event, Requeued))
    assert (lost.outcome, lost.why) == ("lost", "its node died")
    assert kinds(events, Joined, Left) == ["Left", "Joined"]
    assert {w.place.machine for w in executor.workers} == {"going", "staying", "coming"}


def test_jobs_wait_for_machines_to_come_back_but_not_for_ever(tiny_training: Training) -> None:
    def run_with(coming_after: float) -> list[str]:
        executor = ScriptedExecutor(
            lambda _, job: trained(job), [place_of(0)], patience_seconds=100.0
        )
        executor.later(0.05, None, {"left": "m/0", "why": "gone"})
        executor.later(coming_after, None, {"joined": place_of(1)})
        return kinds(run(executor, [job_of(tiny_training, "a")]), Done, Failed)

    assert run_with(90.0) == ["Done"]
    assert run_with(200.0) == ["Failed"]


def test_a_machine_that_cannot_read_the_corpus_is_left_out(tiny_training: Training) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if worker.place.machine == "bad":
            words = {"what": "s: no such file", "cure": "Mount it"}
            return [(0.0, {"failed": job.name, "kind": "StorageError", **words})]
        return trained(job)

    jobs = [job_of(tiny_training, name) for name in "abcdef"]
    places = [place_of(n, machine) for n in range(2) for machine in ("bad", "good")]
    events = run(ScriptedExecutor(script, places), jobs)
    assert kinds(events, Done, Failed) == ["Done"] * 6
    left = [event for event in events if isinstance(event, Left)]
    assert [event.place.machine for event in left] == ["bad", "bad"]


def test_where_no_other_machine_is_the_reason_is_told(tiny_training: Training) -> None:
    words = {"what": "s: no such file", "cure": "Mount it"}
    executor = ScriptedExecutor(
        lambda _, job: [(0.0, {"failed": job.name, "kind": "StorageError", **words})],
        [place_of(0), place_of(1)],
    )
    (_, failed) = run(executor, [job_of(tiny_training, "a")])
    assert isinstance(failed, Failed)
    assert (failed.what, failed.cure) == ("s: no such file", "Mount it")


@pytest.mark.parametrize("error", [KeyboardInterrupt, StorageError("full", cure="free"), KeyError])
def test_whatever_ends_a_run_lets_workers_write_their_checkpoints(
    tiny_training: Training, error: BaseException
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        progress = {"progress": job.name, "step": 1, "loss_nats": 2.0, "tokens_per_second": 1.0}
        return [(0.0, {"started": job.name, "step": 0}), (1.0, progress)]

    jobs = [job_of(tiny_training, name) for name in "abc"]
    executor = ScriptedExecutor(script, [place_of(n) for n in range(3)])
    # One had just ended; one writes its checkpoint; one never answers.
    done = {"done": "a", "result": result_of(jobs[0])}
    answers = {"m/0": [(0.1, done)], "m/1": [(0.5, {"stopped": "b"})], "m/2": []}
    executor.on_stop = lambda worker: answers[worker.place.id]
    events: list[Event] = []

    def handle(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress):
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        executor.run(jobs, handle)
    assert all({"stop": True} in worker.told for worker in executor.workers)
    assert [e.job.name for e in events if isinstance(e, Done)] == ["a"]
    assert sorted(e.job.name for e in events if isinstance(e, Stopped)) == ["b", "c"]
    assert executor.is_closed


def test_a_worker_that_cannot_be_started_stops_the_others_cleanly(
    tiny_training: Training,
) -> None:
    class Poor(ScriptedExecutor):
        def start(self, place: Place) -> Worker:
            if self.workers:
                raise StudyError("a worker cannot be started: no memory", cure="Use fewer")
            return super().start(place)

    executor = Poor(lambda _, job: [], [place_of(0), place_of(1)])
    with pytest.raises(StudyError, match="cannot be started"):
        executor.run([job_of(tiny_training, name) for name in "ab"], lambda _: None)
    assert {"stop": True} in executor.workers[0].told


def test_a_worker_that_not_even_a_kill_ends_takes_its_gpu_with_it(
    tiny_training: Training,
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        return [(0.0, {"ready": 1})] if worker.place.gpu == "0" else trained(job)

    jobs = [job_of(tiny_training, name, "cuda") for name in "ab"]
    executor = ScriptedExecutor(script, [place_of(n, device="cuda") for n in range(2)])
    executor.exit_code = None
    events = run(executor, jobs)
    assert kinds(events, Done, Failed) == ["Done", "Done"]
    (requeued,) = (event for event in events if isinstance(event, Requeued))
    assert requeued.outcome == "lost"
    assert "cannot be killed" in requeued.why


def test_a_tick_is_short_beside_every_patience() -> None:
    from regmix.swarm.executors import BEAT_PATIENCE_SECONDS
    from regmix.swarm.worker import BEAT_SECONDS

    assert 10 * (BEAT_SECONDS + TICK_SECONDS) < BEAT_PATIENCE_SECONDS


def test_a_log_is_named_by_its_place(tmp_path: Path) -> None:
    from regmix.swarm.executors import LocalExecutor

    executor = LocalExecutor(num_workers=2, threads=1, logs=tmp_path, gpus=["3"])
    assert [place.id for place in executor.open(queue.Queue())] == ["gpu-0", "worker-1", "worker-2"]


@pytest.mark.parametrize("num_talkative", [1, 5])
def test_a_hang_is_found_however_much_the_others_say(
    tiny_training: Training, num_talkative: int
) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if job.name == "silent" and len(worker.executor.workers) <= num_talkative + 1:
            return [(0.0, {"started": job.name, "step": 0}), (1.0, {"beat": 1})]
        if job.name == "silent":
            return trained(job, 5)
        progress = {"progress": job.name, "step": 1, "loss_nats": 2.0, "tokens_per_second": 1.0}
        talk: list[Line] = [(0.3 * n, progress) for n in range(400)]
        return [*talk, (120.0, trained(job)[-1][1])]

    jobs = [job_of(tiny_training, "silent")]
    jobs += [job_of(tiny_training, f"talks-{n}") for n in range(num_talkative)]
    places = [place_of(n) for n in range(num_talkative + 1)]
    executor = ScriptedExecutor(script, places, beat_patience_seconds=10.0)
    found: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Requeued):
            found.append(executor.now)

    executor.run(jobs, note)
    assert len(found) == 1
    assert 1010.0 < found[0] < 1015.0


def test_one_machine_short_of_memory_fails_no_stack(tiny_training: Training) -> None:
    def script(worker: ScriptedWorker, job: StackJob) -> list[Line]:
        if worker.place.machine == "small":
            words = {"what": "its worker ran out of memory", "cure": "Use fewer --workers"}
            return [(0.0, {"failed": job.name, "kind": "MemoryError", **words})]
        return trained(job)

    jobs = [job_of(tiny_training, name) for name in "abcd"]
    events = run(ScriptedExecutor(script, [place_of(0, "small"), place_of(0, "large")]), jobs)
    assert kinds(events, Done, Failed) == ["Done"] * 4


def test_what_had_no_worker_yet_is_not_waited_for_at_the_end(tiny_training: Training) -> None:
    class Poor(ScriptedExecutor):
        def start(self, place: Place) -> Worker:
            raise StudyError("a worker cannot be started: no memory", cure="Use fewer")

    executor = Poor(lambda _, job: [], [place_of(0), place_of(1)])
    events: list[Event] = []
    with pytest.raises(StudyError, match="cannot be started"):
        executor.run([job_of(tiny_training, name) for name in "ab"], events.append)
    assert executor.now < 1001.0
    assert events == []
