"""One model on several ranks is the model of one rank, through stops and other numbers of ranks."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from large_cases import NUM_STEPS, engine_losses, job_of, losses_in, run_ranks, training_of

from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.errors import ModelError
from regmix.large.distributed.job import TrainJob, rows_of, switched
from regmix.large.distributed.loop import DivergedError, LargeTrainer
from regmix.large.distributed.parallel import Place
from regmix.large.distributed.splitting import refuse_uneven
from regmix.large.distributed.watch import MOST_NOT_FINITE, MOST_SPIKES, LossWatch
from regmix.swarm.engine import StoppedError
from regmix.swarm.jobs import Member, MemberSegment

ALONE = Place(0, 1, torch.device("cpu"))
STOPPED_AT = 20
# Float32 rounding over 50 steps: another order of sums, some 1e-7 of a loss of some nats.
ROUNDING = 2e-6
ODD_KINDS: dict[str, dict[str, Any]] = {
    "tied": {
        "parallel": "fsdp",
        "training": training_of(20, tied=True),
        "within_documents": True,
        "micro_batch": 2,
    },
    "bfloat16": {"parallel": "fsdp", "training": training_of(20), "dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stopped(trainer: LargeTrainer, at: int) -> None:
    """Train until `at` steps are done, as if told to stop by then."""
    with pytest.raises(StoppedError):
        trainer.run(should_stop=lambda: trainer.step + 1 >= at)
    assert trainer.step == at


@dataclasses.dataclass(frozen=True)
class Runs:
    """What the ranks found: runs of 50 steps, and of parts of them; [rank][call]."""

    shards: ShardSet
    one: TrainJob
    whole: dict[str, TrainJob]
    resumed_by_two: dict[str, TrainJob]
    resumed_by_one: dict[str, TrainJob]
    odd: dict[str, TrainJob]
    found: list[list[Any]]


@pytest.fixture(scope="module")
def runs(tiny_shards_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run of this module on two ranks, in one start of them."""
    torch.set_num_threads(1)
    root, shards = tmp_path_factory.mktemp("large"), ShardSet.open(tiny_shards_path)
    one = job_of(shards, root / "one", micro_batch=4)
    LargeTrainer(one, shards, ALONE).run()
    kinds: dict[str, dict[str, Any]] = {
        "ddp": {"parallel": "ddp", "micro_batch": 3},
        "fsdp": {"parallel": "fsdp", "micro_batch": 2, "recompute": True},
    }
    whole, by_two, by_one = (
        {kind: job_of(shards, root / f"{kind}-{word}", **how) for kind, how in kinds.items()}
        for word in ("whole", "by-two", "by-one")
    )
    for job in by_two.values():
        stopped(LargeTrainer(job, shards, ALONE), STOPPED_AT)
    odd = {name: job_of(shards, root / f"{name}-two", **how) for name, how in ODD_KINDS.items()}
    for name, how in ODD_KINDS.items():
        job = job_of(shards, root / f"{name}-one", **{**how, "parallel": "ddp"})
        LargeTrainer(job, shards, ALONE).run()
    calls = [
        ("train", [*whole.values(), *odd.values()], {}),
        ("batches", [job_of(shards, root / "fresh")], {"first": 0}),
        ("batches", [*by_two.values()], {"first": STOPPED_AT}),
        ("train", [*by_two.values()], {}),
        ("stop_after", [*by_one.values()], {"step": STOPPED_AT}),
    ]
    found = run_ranks(2, calls, root / "two")
    return Runs(shards, one, whole, by_two, by_one, odd, found)


def test_one_rank_trains_as_the_engine_of_proxies_does(runs: Runs) -> None:
    curve, losses = engine_losses(runs.one, runs.shards)
    assert np.abs(np.array(losses_in(runs.one.folder)) - curve).max() < ROUNDING
    assert curve[-1] < curve[0] - 1.0
    again = LargeTrainer(runs.one, runs.shards, ALONE)
    assert again.step == NUM_STEPS
    assert list(again.run().losses.values()) == pytest.approx(losses, abs=ROUNDING)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_give_the_losses_of_one(runs: Runs, kind: str) -> None:
    one, two = losses_in(runs.one.folder), losses_in(runs.whole[kind].folder)
    assert len(two) == NUM_STEPS
    assert np.abs(np.array(one) - np.array(two)).max() < ROUNDING
    place = list(runs.whole).index(kind)
    ends = [rank[0][place] for rank in runs.found]
    assert ends[0]["losses"] == ends[1]["losses"]
    assert ends[0]["squares"] == ends[1]["squares"]


@pytest.mark.parametrize("name", ["tied", "bfloat16"])
def test_tied_masked_and_bfloat16_models_are_shared_as_well(runs: Runs, name: str) -> None:
    two = losses_in(runs.odd[name].folder)
    one = losses_in(runs.odd[name].folder.replace("-two", "-one"))
    # bfloat16 rounds each of the ranks' products by 2^-9, float32 by 2^-24.
    limit = 5e-3 if name == "bfloat16" else ROUNDING
    assert np.abs(np.array(one) - np.array(two)).max() < limit


def test_fsdp_keeps_a_part_of_the_state_on_each_rank_and_ddp_all_of_it(runs: Runs) -> None:
    for rank in runs.found:
        ddp, fsdp = rank[0][:2]
        # Parameters and two moments.
        assert ddp["bytes"] == 3 * ddp["parameter_bytes"]
        assert fsdp["bytes"] == 3 * fsdp["parameter_bytes"] / 2


def test_any_number_of_ranks_reads_the_same_global_batches(runs: Runs) -> None:
    job = runs.one
    sampler = MixtureSampler(
        runs.shards,
        job.member.weights,
        seq_len=job.training.shape.seq_len,
        batch_size=job.training.batch_size,
        data_seed=job.member.data_seed,
    )
    expected = [sampler.batch(step) for step in range(STOPPED_AT + 3)]
    fresh = dataclasses.replace(job, folder=job.folder + "-three")
    of_three = []
    for rank in range(3):
        place = Place(rank, 3, torch.device("cpu"))
        with LargeTrainer(fresh, runs.shards, place)._batches() as ring:
            of_three.append([batch.copy() for _, batch in islice(ring, 3)])
    for ranks in ([rank[1][0] for rank in runs.found], of_three):
        for step in range(3):
            assert np.array_equal(np.concatenate([rank[step] for rank in ranks]), expected[step])
    for place in range(2):
        resumed = [rank[2][place] for rank in runs.found]
        for turn in range(3):
            read = np.concatenate([rank[turn] for rank in resumed])
            assert np.array_equal(read, expected[STOPPED_AT + turn])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_go_on_with_what_one_began(runs: Runs, kind: str) -> None:
    place = list(runs.resumed_by_two).index(kind)
    assert [rank[3][place]["begun_at"] for rank in runs.found] == [STOPPED_AT] * 2
    losses = losses_in(runs.resumed_by_two[kind].folder)
    assert np.abs(np.array(losses) - np.array(losses_in(runs.one.folder))).max() < ROUNDING


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_rank_goes_on_with_what_two_began(runs: Runs, kind: str) -> None:
    place = list(runs.resumed_by_one).index(kind)
    # The last rank alone was told to stop, and all did at the same step.
    assert [rank[4][place] for rank in runs.found] == [{"stopped_at": STOPPED_AT}] * 2
    trainer = LargeTrainer(runs.resumed_by_one[kind], runs.shards, ALONE)
    assert trainer.step == STOPPED_AT
    trainer.run()
    losses = losses_in(runs.resumed_by_one[kind].folder)
    assert np.abs(np.array(losses) - np.array(losses_in(runs.one.folder))).max() < ROUNDING


def test_a_stop_on_one_rank_changes_no_bit(tiny_shards: ShardSet, tmp_path: Path) -> None:
    whole, parts = (job_of(tiny_shards, tmp_path / name) for name in ("whole", "parts"))
    LargeTrainer(whole, tiny_shards, ALONE).run()
    for at in (7, 31):
        stopped(LargeTrainer(parts, tiny_shards, ALONE), at)
    LargeTrainer(parts, tiny_shards, ALONE).run()
    assert losses_in(parts.folder) == losses_in(whole.folder)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    whole, parts = (job_of(tiny_shards, tmp_path / name) for name in ("whole", "parts"))
    LargeTrainer(whole, tiny_shards, ALONE).run()
    for at in (10, 20):
        stopped(LargeTrainer(parts, tiny_shards, ALONE), at)
    (shard,) = (tmp_path / "parts" / "step-00000020").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    trainer = LargeTrainer(parts, tiny_shards, ALONE)
    assert trainer.step == 10
    trainer.run()
    assert losses_in(parts.folder) == losses_in(whole.folder)


def test_what_was_recorded_after_the_checkpoint_is_recorded_once(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = job_of(tiny_shards, tmp_path / "run")
    stopped(LargeTrainer(job, tiny_shards, ALONE), 10)
    record = tmp_path / "run" / "metrics.jsonl"
    # As after a kill: steps past the checkpoint, the last line torn.
    record.write_text(record.read_text() + '{"step": 11, "loss_nats": 0.0}\n{"step": 12, "lo')
    LargeTrainer(job, tiny_shards, ALONE).run()
    losses = losses_in(job.folder)
    assert len(losses) == NUM_STEPS
    assert losses[10] > 1.0


def test_a_schedule_of_mixtures_is_followed_as_the_engine_follows_it(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    segments = (
        MemberSegment(first_step=0, weights={"animals": 1.0, "numbers": 0.0, "colours": 0.0}),
        MemberSegment(first_step=9, weights={"animals": 0.0, "numbers": 0.5, "colours": 0.5}),
    )
    job = job_of(tiny_shards, tmp_path / "run", training=training_of(16))
    job = dataclasses.replace(job, member=dataclasses.replace(job.member, segments=segments))
    LargeTrainer(job, tiny_shards, ALONE).run()
    curve, _ = engine_losses(job, tiny_shards)
    assert np.abs(np.array(losses_in(job.folder)) - curve).max() < ROUNDING


def test_what_differs_is_named(tiny_shards: ShardSet, tmp_path: Path) -> None:
    job = job_of(tiny_shards, tmp_path / "run")
    stopped(LargeTrainer(job, tiny_shards, ALONE), 5)
    optim = dataclasses.replace(job.training.optim, lr=1e-3)
    slower = dataclasses.replace(job, training=dataclasses.replace(job.training, optim=optim))
    with pytest.raises(ModelError, match=r"differs in training\.optim\.lr\."):
        LargeTrainer(slower, tiny_shards, ALONE)


def test_another_mixture_is_taken_up_only_with_consent_and_from_the_resumed_step_on(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = job_of(tiny_shards, tmp_path / "run")
    stopped(LargeTrainer(job, tiny_shards, ALONE), STOPPED_AT)
    other = dict.fromkeys(job.member.weights, 0.0) | {"numbers": 1.0}
    changed = dataclasses.replace(job, member=dataclasses.replace(job.member, weights=other))
    with pytest.raises(ModelError, match=r"member\.weights.*--allow-changes"):
        LargeTrainer(changed, tiny_shards, ALONE)
    trainer = LargeTrainer(dataclasses.replace(changed, allow_changes=True), tiny_shards, ALONE)
    assert [segment.first_step for segment in trainer.member.segments or ()] == [0, STOPPED_AT]
    stopped(trainer, 30)
    # The change is part of the run from now on, and needs no further consent.
    trainer = LargeTrainer(changed, tiny_shards, ALONE)
    trainer.run()
    counts = trainer.sampler.counts(NUM_STEPS)
    before = trainer.sampler.counts(STOPPED_AT)
    assert counts["animals"] == before["animals"]
    assert counts["numbers"] == before["numbers"] + 12 * (NUM_STEPS - STOPPED_AT)


def test_other_seeds_shapes_and_batches_are_refused_even_with_consent(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = job_of(tiny_shards, tmp_path / "run", allow_changes=True)
    stopped(LargeTrainer(job, tiny_shards, ALONE), 5)
    seeded = dataclasses.replace(job.member, data_seed=9)
    halved = dataclasses.replace(job.training, batch_size=6)
    for changes in ({"member": seeded}, {"training": halved}):
        with pytest.raises(ModelError, match=r"data_seed|batch_size"):
            LargeTrainer(dataclasses.replace(job, **changes), tiny_shards, ALONE)


def test_a_switch_keeps_what_was_read_and_later_segments() -> None:
    old = Member(name="m", weights={"a": 1.0}, data_seed=0, init_seed=0)
    later = (
        MemberSegment(first_step=0, weights={"b": 1.0}),
        MemberSegment(first_step=8, weights={"c": 1.0}),
    )
    new = dataclasses.replace(old, segments=later)
    found = switched(old, new, 5).segments or ()
    assert [(s.first_step, s.weights) for s in found] == [
        (0, {"a": 1.0}),
        (5, {"b": 1.0}),
        (8, {"c": 1.0}),
    ]
    assert switched(old, new, 0) == new


def test_one_step_without_a_finite_gradient_updates_nothing(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = job_of(tiny_shards, tmp_path / "run", training=training_of(6))
    trainer = LargeTrainer(job, tiny_shards, ALONE)
    backward, calls = trainer.model.backward, []

    def poisoned(tokens: torch.Tensor, scale: float, *, is_last: bool) -> torch.Tensor:
        calls.append(1)
        before.append(trainer.model.parameters["norm"].detach().clone())
        return backward(tokens, float("nan") if len(calls) == 3 else scale, is_last=is_last)

    before: list[torch.Tensor] = []
    trainer.model.backward = poisoned  # type: ignore[method-assign]
    trainer.run()
    assert trainer.optimizer.num_updates == 5
    assert torch.equal(before[2], before[3])
    assert not torch.equal(before[3], before[4])


def test_a_run_without_finite_losses_stops_at_its_last_good_checkpoint(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = job_of(tiny_shards, tmp_path / "run", checkpoint_seconds=0.0)
    stopped(LargeTrainer(job, tiny_shards, ALONE), 5)
    trainer = LargeTrainer(job, tiny_shards, ALONE)
    with torch.no_grad():
        trainer.model.parameters["norm"].fill_(float("nan"))
    with pytest.raises(DivergedError, match=f"step {5 + MOST_NOT_FINITE}") as caught:
        trainer.run()
    assert "--learning-rate 0.0015 --allow-changes" in caught.value.cure
    assert "step 5" in caught.value.cure
    slower = dataclasses.replace(job.training.optim, lr=0.0015)
    training = dataclasses.replace(job.training, optim=slower)
    again = LargeTrainer(
        dataclasses.replace(job, training=training, allow_changes=True), tiny_shards, ALONE
    )
    assert again.step == 5
    again.run()
    assert len(losses_in(job.folder)) == NUM_STEPS


def test_a_spike_that_comes_down_is_forgiven_and_one_that_stays_is_not() -> None:
    watch = LossWatch()
    for step in range(60):
        assert watch.judge(5.0 - 0.01 * step + 0.02 * (step % 3), 1.0) == "fine"
    assert watch.judge(7.0, 1.0) == "spike"
    assert watch.is_troubled
    assert watch.judge(4.5, 1.0) == "fine"
    assert not watch.is_troubled
    for _ in range(MOST_SPIKES):
        assert not watch.should_stop
        assert watch.judge(7.0, 1.0) == "spike"
    assert watch.should_stop
    assert "above" in watch.reason()


def test_a_loss_that_another_mixture_has_is_no_spike(
    tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regmix.large.distributed.watch.SPIKE_NATS", 0.01)
    monkeypatch.setattr("regmix.large.distributed.watch.MOST_SPIKES", 5)
    alone = {"animals": 1.0, "numbers": 0.0, "colours": 0.0}
    then = {"animals": 0.0, "numbers": 0.0, "colours": 1.0}
    segments = (
        MemberSegment(first_step=0, weights=alone),
        MemberSegment(first_step=150, weights=then),
    )
    job = job_of(tiny_shards, tmp_path / "run", training=training_of(180))
    job = dataclasses.replace(job, member=dataclasses.replace(job.member, segments=segments))
    trainer = LargeTrainer(job, tiny_shards, ALONE)
    trainer.run()
    losses = losses_in(job.folder)
    assert min(losses[150:155]) > max(losses[140:150]) + 1.0
    assert trainer.step == 180


def test_the_steep_start_of_a_run_is_no_spike() -> None:
    watch = LossWatch()
    verdicts = {watch.judge(10.0 - 0.3 * step if step < 20 else 4.0, 1.0) for step in range(80)}
    assert verdicts == {"fine"}


def test_batches_that_ranks_cannot_share_are_refused_with_what_fits() -> None:
    assert [rows_of(rank, 3, 12) for rank in range(3)] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(ModelError, match="Use 4 processes, or a batch of 15"):
        rows_of(0, 5, 12)
    with pytest.raises(ModelError, match="Use 2 processes"):
        refuse_uneven(training_of().shape, 3)
