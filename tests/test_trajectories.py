"""Losses along training: kept whole, the same after a kill, and read as a table."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from regmix.data.mixtures import MixtureTable
from regmix.data.shards import ShardSet
from regmix.decision.objective import make_objective
from regmix.decision.runs import NamedArray, Runs
from regmix.decision.schedules.trajectories import (
    Trajectories,
    best_spearman,
    early_enough,
    num_judged,
    read_trajectories,
    read_trajectory_table,
)
from regmix.errors import LossTableError, StudyError
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.engine import StoppedError
from regmix.swarm.events import Done
from regmix.swarm.export import export
from regmix.swarm.ledger import Ledger
from regmix.swarm.schedules import ScheduleRequest
from regmix.swarm.sweep import (
    SweepOptions,
    collect,
    plan_stacks,
    run_sweep,
)
from regmix.swarm.worker import train_job


def new_study(shards: ShardSet, training: Training, path: Path) -> Study:
    return make_study(
        path,
        shards,
        swarm=SwarmRequest(num=4),
        training=dataclasses.replace(training, eval_every=5, eval_tokens=512),
        objective={"animals": 1.0},
        schedules=ScheduleRequest(num=3, num_segments=3),
    )


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return new_study(tiny_shards, tiny_training, tmp_path / "study")


def test_a_sweep_keeps_every_evaluation_of_every_proxy(study: Study) -> None:
    result = run_sweep(study, SweepOptions(num_workers=1))
    assert (result.num_done, result.num_pending) == (7, 0)
    found = read_trajectories(study)
    assert found.indices == (1, 2, 3, 4, 1_000_001, 1_000_002, 1_000_003)
    # Every 5 steps, at the bounds of three segments of 12 steps, and at the end.
    assert found.steps == (4, 5, 8, 10, 12)
    assert found.losses.shape == (7, 5, 3)
    assert found.losses[:, -1].mean() < found.losses[:, 0].mean()
    # One mixture each in losses.csv, with the same final losses.
    lines = study.losses_path.read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert [float(cell) for cell in lines[2].split(",")[1:]] == found.losses[1, -1].tolist()


def train_stopping(study: Study, shards: ShardSet, stops: tuple[int, ...]) -> bytes:
    """Train and collect all proxies, stopped after these steps, and return the trajectories."""
    with Ledger(study.ledger_path) as ledger:
        options = SweepOptions(num_workers=1, stack_size=7)
        table = MixtureTable.read_csv(study.mixtures_path)
        (job,) = plan_stacks(study, ledger, table, shards, options)
        ledger.add_stacks([job])
        for already, stop in pairwise((0, *stops)):
            answers = iter([False] * (stop - already - 1) + [True])
            with pytest.raises(StoppedError):
                train_job(job, should_stop=answers.__next__)
        collect(study, ledger, Done(job=job, result=train_job(job)))
        export(study, ledger)
    return study.trajectories_path.read_bytes()


def test_proxies_stopped_on_the_way_have_the_same_trajectories(
    study: Study, tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    other = new_study(tiny_shards, tiny_training, tmp_path / "other")
    straight = train_stopping(study, tiny_shards, ())
    assert straight == train_stopping(other, tiny_shards, (4, 6, 12))


def test_a_study_without_evaluations_on_the_way_says_how_to_get_them(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    plain = make_study(
        tmp_path / "plain",
        tiny_shards,
        swarm=SwarmRequest(num=3),
        training=tiny_training,
        objective={"animals": 1.0},
    )
    with pytest.raises(StudyError, match="--eval-every"):
        read_trajectories(plain)


HEADER = "index,step,metric/a_val_loss\n"


def test_steps_that_not_every_proxy_has_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "1,5,3\n1,10,2\n1,20,1\n2,10,4\n2,20,3\n")
    found = read_trajectory_table(path)
    assert found.steps == (10, 20)
    assert found.losses[:, :, 0].tolist() == [[2, 1], [4, 3]]


def test_a_proxy_with_a_loss_missing_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "1,5,3\n1,10,2\n7,5,\n7,10,3\n")
    found = read_trajectory_table(path)
    assert found.indices == (1,)
    assert [(run.index, run.reason) for run in found.dropped] == [(7, "no finite losses at step 5")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("index,metric/a_val_loss\n1,2\n", "its columns are not"),
        ("index,step,a\n1,2,3\n", "its columns are not"),
        ("index,step\n1,2\n", "its columns are not"),
        (HEADER + "1,x,2\n", "step 'x' is no number"),
        (HEADER + "1,5,2\n1,5,2\n", "there twice"),
        (HEADER + "1,5,oops\n", "'oops' is not a number"),
        (HEADER + "1,5,-1\n", "a loss of -1 nats"),
    ],
)
def test_a_table_of_no_trajectories_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(LossTableError, match=match):
        read_trajectory_table(path)


def swarm_of(noises: list[float], num: int = 40) -> tuple[Trajectories, Runs]:
    """Losses that are the final ones, further up, plus noise that is given for each step."""
    rng = np.random.default_rng(3)
    weights = rng.dirichlet(np.ones(3), num)
    final = np.exp(1 - 0.4 * np.sqrt(weights) @ np.array([[1.0, 0.2], [0.3, 1.0], [0.1, 0.1]]))
    early = [1 + 2 * final + noise * rng.normal(size=final.shape) for noise in noises]
    losses = np.stack([*early, final], axis=1)
    indices, targets = tuple(range(1, num + 1)), ("x", "y")
    runs = Runs(
        weights=NamedArray.of(weights, "abc"),
        losses=NamedArray.of(final, targets),
        domains=("a", "b", "c"),
        targets=targets,
        indices=indices,
    )
    return Trajectories(
        indices, tuple(range(10, 10 * losses.shape[1] + 1, 10)), losses, targets
    ), runs


def test_losses_that_rank_as_the_final_ones_are_early_enough() -> None:
    trajectories, runs = swarm_of([1.0, 0.0, 0.0])
    found = early_enough(trajectories, runs, make_objective("mean", runs.targets))
    assert found is not None
    assert found.enough is not None
    assert found.enough.step == 20
    assert "50% of the tokens would have been enough: Spearman 1.000 against 1.000" in found.verdict
    # A line brings the early losses, which lie elsewhere, to the final ones.
    assert found.points[1].rmse_nats < 0.01
    first = found.points[0].rank
    assert first is not None
    assert first < 0.5
    assert found.points[1].rank == pytest.approx(1.0)


def test_losses_that_rank_only_at_the_end_are_not_early_enough() -> None:
    trajectories, runs = swarm_of([1.0, 0.0, 1.0])
    found = early_enough(trajectories, runs, make_objective("x", runs.targets))
    assert found is not None
    assert found.enough is None
    assert "the whole training was needed" in found.verdict
    third, full = best_spearman(found.points[2]), best_spearman(found.points[-1])
    assert (third or 0) < (full or 0) - found.tolerance


def test_at_most_eight_steps_are_judged_the_last_among_them() -> None:
    trajectories, runs = swarm_of([0.0] * 19, num=12)
    assert num_judged(trajectories) == 8
    found = early_enough(trajectories, runs, make_objective("x", runs.targets))
    assert found is not None
    assert len(found.points) == 8
    assert found.points[-1].share == 1.0


def test_too_few_runs_say_nothing_of_earliness() -> None:
    trajectories, runs = swarm_of([0.0], num=9)
    assert early_enough(trajectories, runs, make_objective("x", runs.targets)) is None


def test_runs_without_a_trajectory_are_not_used() -> None:
    trajectories, runs = swarm_of([0.0], num=30)
    known = trajectories.of(runs.indices[5:])
    found = early_enough(known, runs, make_objective("x", runs.targets))
    assert found is not None
    assert found.num_runs == 25
