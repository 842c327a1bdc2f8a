"""One stack: resumed, stopped, damaged, and with a member that breaks."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from regmix.data.shards import ShardSet
from regmix.errors import ModelError, ShardError, StorageError
from regmix.model.fused.stack import FusedStack
from regmix.study import Training
from regmix.swarm.checkpoint import CheckpointWriter, checkpoints, load_newest
from regmix.swarm.engine import (
    Listener,
    StackKeeper,
    StackResult,
    StackTrainer,
    StoppedError,
)
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.resuming import split_checkpoint
from regmix.swarm.worker import read_parameters, train_job

MIXTURES = [
    {"animals": 1.0, "colours": 0.0, "numbers": 0.0},
    {"animals": 0.2, "colours": 0.3, "numbers": 0.5},
    {"animals": 0.0, "colours": 0.9, "numbers": 0.1},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def job(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> StackJob:
    members = tuple(
        Member(name=str(i), weights=weights, data_seed=3, init_seed=7)
        for i, weights in enumerate(MIXTURES)
    )
    return StackJob(
        name="stack",
        members=members,
        training=tiny_training,
        targets=tiny_shards.domains("valid"),
        shards=str(tiny_shards.path),
        shards_checksum=tiny_shards.checksum,
        folder=str(tmp_path / "stack"),
    )


def moved(job: StackJob, folder: Path) -> StackJob:
    return dataclasses.replace(job, folder=str(folder))


def assert_same(left: StackResult, right: StackResult) -> None:
    np.testing.assert_array_equal(left.losses, right.losses)
    np.testing.assert_array_equal(left.train_losses, right.train_losses)
    for name, value in left.parameters.items():
        assert torch.equal(value, right.parameters[name]), name


def stop_after(trainer: StackTrainer, step: int) -> None:
    with pytest.raises(StoppedError):
        trainer.run(should_stop=lambda: trainer.step >= step)


def test_training_lowers_the_loss_of_what_it_saw(job: StackJob, tiny_shards: ShardSet) -> None:
    result = StackTrainer(job, tiny_shards).run()
    assert np.isfinite(result.losses).all()
    assert result.losses[0, 0] < np.log(320) - 0.5
    # Member 0 saw only animals, member 2 hardly any: each knows its own domain better.
    assert result.losses[0, 0] < result.losses[2, 0]
    assert result.losses[2, 1] < result.losses[0, 1]


@pytest.mark.parametrize("step", [1, 5, 11])
def test_resume_gives_the_bits_of_an_undisturbed_run(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path, step: int
) -> None:
    whole = StackTrainer(moved(job, tmp_path / "whole"), tiny_shards).run()
    stop_after(StackTrainer(job, tiny_shards), step)
    resumed = StackTrainer(job, tiny_shards)
    assert_same(resumed.run(), whole)
    assert resumed.step == 12


def test_evaluations_along_the_way_survive_a_stop(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    training = dataclasses.replace(job.training, eval_every=4)
    job = dataclasses.replace(job, training=training)
    whole = StackTrainer(moved(job, tmp_path / "whole"), tiny_shards).run()
    stop_after(StackTrainer(job, tiny_shards), 6)
    resumed = StackTrainer(job, tiny_shards).run()
    assert [step for step, _ in resumed.evaluations] == [4, 8, 12]
    for (_, left), (_, right) in zip(resumed.evaluations, whole.evaluations, strict=True):
        np.testing.assert_array_equal(left, right)
    assert_same(resumed, whole)


def test_a_stack_equals_single_models(job: StackJob, tiny_shards: ShardSet, tmp_path: Path) -> None:
    together = StackTrainer(job, tiny_shards).run()
    for position, member in enumerate(job.members):
        alone = dataclasses.replace(job, members=(member,), folder=str(tmp_path / member.name))
        single = StackTrainer(alone, tiny_shards).run()
        np.testing.assert_allclose(
            single.train_losses[:, 0], together.train_losses[:, position], rtol=1e-5
        )
        np.testing.assert_allclose(single.losses[0], together.losses[position], rtol=1e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = StackTrainer(moved(job, tmp_path / "whole"), tiny_shards).run()
    stop_after(StackTrainer(job, tiny_shards), 4)
    stop_after(StackTrainer(job, tiny_shards), 8)
    newest, _ = checkpoints(Path(job.folder))
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    found = load_newest(Path(job.folder))
    assert found is not None
    assert found[1]["step"] == 4
    assert newest.name in caplog.text
    assert_same(StackTrainer(job, tiny_shards).run(), whole)


def test_a_checkpoint_of_another_stack_is_refused(job: StackJob, tiny_shards: ShardSet) -> None:
    stop_after(StackTrainer(job, tiny_shards), 4)
    other = dataclasses.replace(job, members=job.members[::-1])
    with pytest.raises(ModelError, match="another stack"):
        StackTrainer(other, tiny_shards).run()


def test_a_model_with_too_small_a_vocabulary_is_refused(
    job: StackJob, tiny_shards: ShardSet
) -> None:
    shape = dataclasses.replace(job.training.shape, vocab_size=100)
    small = dataclasses.replace(job, training=dataclasses.replace(job.training, shape=shape))
    with pytest.raises(ModelError, match="vocabulary"):
        StackTrainer(small, tiny_shards)


def test_a_broken_member_is_marked_and_its_neighbours_are_not_changed(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    healthy = StackTrainer(moved(job, tmp_path / "healthy"), tiny_shards).run()
    trainer = StackTrainer(job, tiny_shards)
    for value in trainer.parameters.values():
        value[1] = float("nan")
    result = trainer.run()
    assert result.failed.tolist() == [False, True, False]
    for position in (0, 2):
        np.testing.assert_array_equal(result.losses[position], healthy.losses[position])


def test_a_trained_job_is_read_and_not_trained_again(job: StackJob, tiny_shards: ShardSet) -> None:
    first = train_job(job, shards=tiny_shards)
    steps = []
    second = train_job(job, shards=tiny_shards, listener=Listener(report=steps.append))
    assert second == first
    assert steps == []
    parameters = read_parameters(Path(job.folder) / "1.safetensors")
    assert all(value.shape[0] == 1 for value in parameters.values())


def test_a_job_survives_the_trip_to_a_worker(job: StackJob) -> None:
    assert StackJob.from_table(job.to_table()) == job


def fused_trainer(job: StackJob, shards: ShardSet) -> StackTrainer:
    """The GPU's stack, over its reference on the CPU: fed from a ring, in two bytes a token."""
    training = job.training
    stack = FusedStack(
        training.shape,
        training.optim,
        num_proxies=len(job.members),
        batch_size=training.batch_size,
        num_steps=training.num_steps,
        micro_batch=job.micro_batch,
        device="cpu",
    )
    stack.reset([member.init_seed for member in job.members])
    return StackTrainer(job, shards, stack=stack)


def test_the_fused_stack_trains_and_resumes_as_the_cpu_does(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    job = dataclasses.replace(job, micro_batch=2)
    cpu = StackTrainer(moved(job, tmp_path / "cpu"), tiny_shards).run()
    whole = fused_trainer(moved(job, tmp_path / "whole"), tiny_shards).run()
    np.testing.assert_allclose(whole.losses, cpu.losses, rtol=2e-4)
    np.testing.assert_allclose(whole.train_losses, cpu.train_losses, rtol=2e-4)
    stop_after(fused_trainer(job, tiny_shards), 5)
    assert_same(fused_trainer(job, tiny_shards).run(), whole)


def test_a_split_stack_goes_on_where_it_was(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    whole = StackTrainer(moved(job, tmp_path / "whole"), tiny_shards).run()
    stop_after(StackTrainer(job, tiny_shards), 5)
    parts = [
        dataclasses.replace(job, name=f"part-{i}", folder=str(tmp_path / f"part-{i}"), members=m)
        for i, m in enumerate((job.members[:1], job.members[1:]))
    ]
    split_checkpoint(job, parts)
    rows = []
    for part in parts:
        trainer = StackTrainer(part, tiny_shards)
        trainer._resume()
        assert trainer.step >= 5
        rows.append(trainer.run().losses)
    np.testing.assert_array_equal(np.concatenate(rows), whole.losses)


def test_splitting_a_stack_that_has_no_checkpoint_writes_none(
    job: StackJob, tmp_path: Path
) -> None:
    part = dataclasses.replace(job, members=job.members[:1], folder=str(tmp_path / "part"))
    split_checkpoint(job, [part])
    assert load_newest(tmp_path / "part") is None


def test_a_kept_stack_gives_the_bits_of_a_new_one(
    job: StackJob, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    keeper = StackKeeper()
    other = dataclasses.replace(
        job, members=tuple(dataclasses.replace(m, init_seed=1) for m in job.members)
    )
    StackTrainer(moved(other, tmp_path / "other"), tiny_shards, keeper=keeper).run()
    kept = keeper.stack_for(job)
    again = StackTrainer(moved(job, tmp_path / "kept"), tiny_shards, keeper=keeper)
    assert again.stack is kept
    new = StackTrainer(job, tiny_shards).run()
    assert_same(again.run(), new)
    smaller = dataclasses.replace(job, members=job.members[:1])
    assert keeper.stack_for(smaller) is not kept


def test_a_failed_write_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(tmp_path / "file" / "folder")
    writer.write(1, {"x": torch.ones(1)}, {}, wait=False)
    with pytest.raises(StorageError):
        writer.close()
    writer.close()


def test_jobs_of_before_there_were_devices_have_the_same_identity(job: StackJob) -> None:
    assert "device" not in job.identity()
    assert dataclasses.replace(job, device="cuda").identity()["device"] == "cuda"
    table = {k: v for k, v in job.to_table().items() if k != "device"}
    assert StackJob.from_table(table) == job


def test_nothing_is_kept_of_a_corpus_that_was_written_to_meanwhile(
    job: StackJob, tiny_shards_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(tiny_shards_path, copy)
    shards = ShardSet.open(copy)
    job = dataclasses.replace(job, shards=str(copy))
    trainer = StackTrainer(job, shards)

    def write_into_a_shard() -> bool:
        if trainer.step == 3:
            path = next(copy.glob("train/*.tokens"))
            content = path.read_bytes()
            with open(path, "r+b") as stream:
                stream.seek(len(content) // 2)
                stream.write(b"\0\0")
        return False

    with pytest.raises(ShardError, match="written to while it was read"):
        trainer.run(should_stop=write_into_a_shard, checkpoint_seconds=0.0)
    steps = [int(path.stem.split("-")[1]) for path in checkpoints(Path(job.folder))]
    assert steps
    assert max(steps) < 3
