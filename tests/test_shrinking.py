"""A stack that ran out of GPU memory: smaller ones in its place, and nothing lost or doubled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from regmix.data.shards import ShardSet
from regmix.study import Study, Training
from regmix.swarm import shrinking
from regmix.swarm.checkpoint import checkpoints
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.engine import StackTrainer, StoppedError
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.shrinking import halved, replace_stack, with_smaller_micro_batch
from regmix.swarm.sweep import SweepOptions, plan_stacks, run_sweep
from regmix.swarm.worker import train_job


class KilledError(BaseException):
    """Stands for a kill at this instant."""


def killed(*_: object, **__: object) -> None:
    raise KilledError


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=5),
        training=tiny_training,
        objective={"animals": 1.0},
    )


def planned_stack(study: Study, ledger: Ledger) -> StackJob:
    from regmix.data.mixtures import MixtureTable

    table = MixtureTable.read_csv(study.mixtures_path)
    options = SweepOptions(num_workers=1, stack_size=5)
    (job,) = plan_stacks(study, ledger, table, study.open_shards(), options)
    ledger.add_stacks([job])
    return job


def train_until(job: StackJob, shards: ShardSet, step: int) -> None:
    trainer = StackTrainer(job, shards)
    with pytest.raises(StoppedError):
        trainer.run(should_stop=lambda: trainer.step >= step)


def test_halves_go_on_from_the_stacks_checkpoint_with_the_same_bits(
    study: Study, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    with Ledger(study.ledger_path) as ledger:
        job = planned_stack(study, ledger)
        whole = train_job(dataclasses.replace(job, folder=str(tmp_path / "whole")))
        train_until(job, tiny_shards, 7)
        parts, remark = replace_stack(ledger, job)
    assert [len(part.members) for part in parts] == [3, 2]
    assert "stacks of 3 and 2" in remark
    assert not Path(job.folder).exists()
    losses = []
    for part in parts:
        (checkpoint,) = checkpoints(Path(part.folder))
        assert checkpoint.name == "step-00000007.safetensors"
        result = train_job(part)
        per_step = len(part.members) * part.training.batch_size * part.training.shape.seq_len
        assert result["tokens"] == 5 * per_step
        losses += result["losses"]
        for member in part.members:
            assert np.array_equal(
                np.load(Path(part.folder) / f"{member.name}.npy"),
                np.load(tmp_path / "whole" / f"{member.name}.npy"),
            )
    assert losses == whole["losses"]


@pytest.mark.parametrize("moment", ["checkpoints", "ledger", "folder"])
def test_a_kill_while_a_stack_is_halved_loses_and_doubles_nothing(
    study: Study,
    tiny_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    with Ledger(study.ledger_path) as ledger, monkeypatch.context() as patch:
        job = planned_stack(study, ledger)
        whole = train_job(dataclasses.replace(job, folder=str(tmp_path / "whole")))
        train_until(job, tiny_shards, 7)
        if moment == "checkpoints":
            patch.setattr(shrinking, "split_checkpoint", killed)
        elif moment == "ledger":
            patch.setattr(Ledger, "replace_stack", killed)
        else:
            patch.setattr(shrinking.shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            replace_stack(ledger, job)
        pending = [job.name for job in ledger.pending_stacks()]
    assert pending == ([f"{job.name}-0", f"{job.name}-1"] if moment == "folder" else [job.name])
    result = run_sweep(study, SweepOptions(num_workers=1))
    assert (result.num_done, result.num_failed, result.num_pending) == (5, 0, 0)
    assert list(study.stacks_path.iterdir()) == []
    table = np.loadtxt(study.losses_path, delimiter=",", skiprows=1)
    assert table[:, 1:].tolist() == whole["losses"]


def test_a_ledger_replaces_a_stack_whole_or_not_at_all(study: Study) -> None:
    with Ledger(study.ledger_path) as ledger:
        job = planned_stack(study, ledger)
        first, second = halved(job)
        twice = dataclasses.replace(second, name=first.name)
        with pytest.raises(Exception, match="UNIQUE"):
            ledger.replace_stack(job, [first, twice], "a remark")
        assert ledger.pending_stacks() == [job]
        assert ledger.remarks() == []
        assert {row.stack for row in ledger.proxies()} == {job.name}
        ledger.replace_stack(job, [first, second])
        assert ledger.pending_stacks() == [first, second]


def test_a_name_that_was_split_is_not_given_again(study: Study, tiny_shards: ShardSet) -> None:
    from regmix.swarm.drawing import add_mixtures

    with Ledger(study.ledger_path) as ledger:
        replace_stack(ledger, planned_stack(study, ledger))
    add_mixtures(study, SwarmRequest(num=3, seed=4))
    result = run_sweep(study, SweepOptions(num_workers=1, stack_size=1))
    assert result.num_done == 8


def test_a_smaller_micro_batch_is_another_job_in_another_folder(study: Study) -> None:
    with Ledger(study.ledger_path) as ledger:
        job = planned_stack(study, ledger)
    smaller = with_smaller_micro_batch(job)
    assert (smaller.micro_batch, smaller.name) == (2, f"{job.name}-m2")
    assert smaller.identity() != job.identity()
    assert smaller.folder != job.folder
    again = with_smaller_micro_batch(smaller)
    assert (again.micro_batch, again.name) == (1, f"{job.name}-m2-m1")


def test_a_ledger_without_remarks_is_read_and_stays_as_it_is(study: Study) -> None:
    with Ledger(study.ledger_path) as ledger:
        planned_stack(study, ledger)
    study.ledger_path.chmod(0o444)
    before = study.ledger_path.read_bytes()
    with Ledger.read(study.ledger_path) as reader:
        assert reader.remarks() == []
    assert study.ledger_path.read_bytes() == before
