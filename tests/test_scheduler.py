"""The scheduler: whatever happens to workers and machines, every job ends exactly once."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regmix.study import Training
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.needs import job_host_bytes
from regmix.swarm.places import Place
from regmix.swarm.scheduler import MAX_ATTEMPTS, MAX_LOSSES, Scheduler, Slot


def job_of(training: Training, name: str, size: int = 1, device: str = "cpu") -> StackJob:
    members = tuple(
        Member(name=f"{name}{i}", weights={"a": 1.0}, data_seed=0, init_seed=0) for i in range(size)
    )
    return StackJob(
        name=name,
        members=members,
        training=training,
        targets=("a",),
        shards="s",
        shards_checksum="c",
        folder="f",
        device=device,
    )


def place_of(number: int, machine: str = "m", **limits: int) -> Place:
    return Place(id=f"{machine}/{number}", machine=machine, device="cpu", **limits)


def slot_with(scheduler: Scheduler, name: str) -> Slot:
    (slot,) = (s for s in scheduler.slots if s.job is not None and s.job.name == name)
    return slot


def test_the_longest_goes_first(tiny_training: Training) -> None:
    jobs = [job_of(tiny_training, name, size) for name, size in (("s", 1), ("l", 9), ("m", 4))]
    scheduler = Scheduler(jobs)
    order = []
    slot = scheduler.join(place_of(0))
    while scheduler.num_remaining:
        scheduler.hand_out()
        assert slot.job is not None
        order.append(slot.job.name)
        scheduler.finish(slot, is_done=True)
    assert order == ["l", "m", "s"]


def test_a_machine_runs_at_once_what_its_memory_holds(tiny_training: Training) -> None:
    large, small = job_of(tiny_training, "large", 16), job_of(tiny_training, "small", 1)
    other = job_of(tiny_training, "other", 16)
    memory = job_host_bytes(large) + job_host_bytes(small)
    scheduler = Scheduler([small, large, other])
    for number in range(3):
        scheduler.join(place_of(number, host_bytes=memory))
    given_now = [slot.job.name for slot in scheduler.hand_out() if slot.job]
    # The other large one must wait, and the small one goes before it meanwhile.
    assert given_now == ["large", "small"]
    scheduler.finish(slot_with(scheduler, "large"), is_done=True)
    assert [slot.job.name for slot in scheduler.hand_out() if slot.job] == ["other"]


def test_what_no_machine_can_hold_is_stranded(tiny_training: Training) -> None:
    large, small = job_of(tiny_training, "large", 16), job_of(tiny_training, "small", 1)
    scheduler = Scheduler([large, small])
    scheduler.join(place_of(0, host_bytes=job_host_bytes(small)))
    scheduler.hand_out()
    assert scheduler.stranded() == [large]
    scheduler.join(place_of(1, "larger", host_bytes=job_host_bytes(large)))
    assert scheduler.stranded() == []
    assert [slot.job for slot in scheduler.hand_out()] == [large]


def test_deaths_with_progress_between_them_fail_nothing(tiny_training: Training) -> None:
    scheduler = Scheduler([job_of(tiny_training, "a")])
    slot = scheduler.join(place_of(0))
    for step in range(100):
        scheduler.hand_out()
        assert not scheduler.bury(slot, first_step=step)
    assert scheduler.num_remaining == 1


def test_deaths_without_progress_fail_the_job(tiny_training: Training) -> None:
    scheduler = Scheduler([job_of(tiny_training, "a")])
    slot = scheduler.join(place_of(0))
    verdicts = []
    # The first attempt got to step 7; none after it gets further.
    for step in (0, 7, 7, 5):
        scheduler.hand_out()
        verdicts.append(scheduler.bury(slot, first_step=step))
    assert verdicts == [False, False, False, True]
    assert MAX_ATTEMPTS == 3
    assert scheduler.num_remaining == 0


def test_machines_that_go_are_not_the_jobs_fault_for_long(tiny_training: Training) -> None:
    scheduler = Scheduler([job_of(tiny_training, "a")])
    verdicts = []
    for number in range(MAX_LOSSES):
        scheduler.join(place_of(number))
        scheduler.hand_out()
        slot = scheduler.leave(f"m/{number}")
        assert slot is not None
        verdicts.append(scheduler.lose_machine(slot, first_step=0))
    assert verdicts == [False] * (MAX_LOSSES - 1) + [True]


def test_a_machine_that_cannot_read_gives_its_jobs_to_others(tiny_training: Training) -> None:
    jobs = [job_of(tiny_training, name) for name in "abcd"]
    scheduler = Scheduler(jobs)
    bad, good = scheduler.join(place_of(0, "bad")), scheduler.join(place_of(0, "good"))
    scheduler.hand_out()
    assert good.job is not None
    failed = []
    for _ in range(2):
        assert bad.job is not None
        failed.append(bad.job.name)
        assert not scheduler.fail_on_machine(bad)
        assert scheduler.is_machine_struck(bad) == (len(failed) == 2)
        scheduler.hand_out()
        # A job that failed there goes there no more.
        assert bad.job is None or bad.job.name not in failed
    scheduler.retire(bad)
    if bad.job is not None:
        scheduler.put_back(bad)
    done = []
    while scheduler.num_remaining:
        scheduler.hand_out()
        assert good.job is not None
        done.append(good.job.name)
        scheduler.finish(good, is_done=True)
    assert sorted(done) == ["a", "b", "c", "d"]


def test_a_job_that_fails_on_every_machine_ends(tiny_training: Training) -> None:
    scheduler = Scheduler([job_of(tiny_training, "a")])
    slots = [scheduler.join(place_of(0, machine)) for machine in ("one", "two")]
    scheduler.hand_out()
    first = slot_with(scheduler, "a")
    assert not scheduler.fail_on_machine(first)
    scheduler.hand_out()
    second = slot_with(scheduler, "a")
    assert {first, second} == set(slots)
    assert scheduler.fail_on_machine(second)
    assert scheduler.num_remaining == 0


def test_two_reasons_against_two_places_block_no_job(tiny_training: Training) -> None:
    scheduler = Scheduler([job_of(tiny_training, "a", device="cuda")])
    slots = [scheduler.join(Place(id=name, machine=name, device="cuda")) for name in ("one", "two")]
    (first,) = scheduler.hand_out()
    scheduler.bury(first, first_step=None)
    (second,) = scheduler.hand_out()
    assert {first, second} == set(slots)
    assert not scheduler.fail_on_machine(second)
    assert scheduler.hand_out()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # The fixture is a frozen record.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), num_jobs=st.integers(1, 30), num_places=st.integers(1, 6))
def test_every_job_ends_once_whatever_happens(
    seed: int, num_jobs: int, num_places: int, tiny_training: Training
) -> None:
    draw = random.Random(seed)
    jobs = [
        job_of(
            dataclasses.replace(tiny_training, num_steps=draw.randint(1, 5)),
            f"job-{n}",
            draw.randint(1, 4),
            draw.choice(["cpu", "cuda"]),
        )
        for n in range(num_jobs)
    ]
    scheduler = Scheduler(jobs)
    number = 0

    def join() -> None:
        nonlocal number
        machine, device = f"m{draw.randrange(3)}", draw.choice(["cpu", "cuda"])
        scheduler.join(Place(id=f"p{number}", machine=machine, device=device))
        number += 1

    for _ in range(num_places):
        join()
    ended: list[str] = []
    for _ in range(10_000):
        if not scheduler.num_remaining:
            break
        for job in scheduler.stranded():
            if draw.random() < 0.5:
                scheduler.drop(job)
                ended.append(job.name)
        scheduler.hand_out()
        held = [slot.job.name for slot in scheduler.slots if slot.job is not None]
        assert len(held) == len(set(held))
        busy = [slot for slot in scheduler.slots if slot.job is not None]
        if not busy:
            join()
            continue
        slot = draw.choice(busy)
        assert slot.job is not None
        name, step = slot.job.name, draw.choice([None, 0, draw.randint(0, 9)])
        match draw.choice(["done", "failed", "died", "left", "gpu", "disk", "join", "step"]):
            case "done" | "failed" as outcome:
                scheduler.finish(slot, is_done=outcome == "done")
                has_ended = True
            case "died":
                has_ended = scheduler.bury(slot, step)
                if scheduler.is_struck(slot):
                    scheduler.retire(slot)
            case "left":
                scheduler.leave(slot.place.id)
                has_ended = scheduler.lose_machine(slot, step)
            case "gpu":
                has_ended = scheduler.lose_gpu(slot)
                scheduler.retire(slot)
            case "disk":
                has_ended = scheduler.fail_on_machine(slot)
            case "join":
                join()
                has_ended = False
            case _:
                scheduler.stepped(slot)
                has_ended = False
        if has_ended:
            ended.append(name)
    assert sorted(ended) == sorted(job.name for job in jobs)


@pytest.mark.parametrize("num_jobs", [2_000])
def test_handing_out_does_not_walk_over_all_that_waits(
    tiny_training: Training, num_jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regmix.swarm import scheduler as module

    scheduler = Scheduler([job_of(tiny_training, f"j{n}") for n in range(num_jobs)])
    slots = [scheduler.join(place_of(n)) for n in range(8)]
    assert scheduler.stranded() == []
    looked = [0]
    suits = module._suits

    def counted(job: StackJob, slot: Slot) -> bool:
        looked[0] += 1
        return suits(job, slot)

    monkeypatch.setattr(module, "_suits", counted)
    while scheduler.num_remaining:
        scheduler.hand_out()
        scheduler.stranded()
        for slot in slots:
            if slot.job is not None:
                scheduler.finish(slot, is_done=True)
    assert looked[0] < 30 * num_jobs
