"""Schedules: read and refused, followed step by step, and resumed to the same bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from regmix.cli import cli
from regmix.data.mixtures import Mixture, write_mixture_yaml
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.schedules import (
    FIRST_INDEX,
    Schedule,
    ScheduleTable,
    Segment,
    bounds_of,
    mean_between,
    read_schedule_yaml,
    write_schedule_yaml,
)
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, MixtureError, StudyError
from regmix.large.train import TrainRequest, resolve_mixture, resolve_recipe, run_training
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.engine import StoppedError
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.schedules import ScheduleRequest
from regmix.swarm.sweep import scheduled_member, stack_job, study_member
from regmix.swarm.worker import train_job

FIRST = Mixture({"animals": 0.5, "colours": 0.25, "numbers": 0.25})
SECOND = Mixture({"animals": 0.0, "colours": 0.125, "numbers": 0.875})
THIRDS = Schedule((Segment(share=1 / 3, mixture=FIRST), Segment(share=2 / 3, mixture=SECOND)))


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=4),
        training=dataclasses.replace(tiny_training, eval_every=4),
        objective={"animals": 1.0},
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_schedule_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_schedule_yaml(path, THIRDS)
    assert read_schedule_yaml(path) == THIRDS


def test_a_plain_mixture_is_no_schedule(tmp_path: Path) -> None:
    write_mixture_yaml(tmp_path / "m.yaml", FIRST)
    assert read_schedule_yaml(tmp_path / "m.yaml") is None


def test_the_mean_counts_every_segment_by_its_share() -> None:
    assert THIRDS.mean["numbers"] == pytest.approx(0.25 / 3 + 0.875 * 2 / 3)


def test_bounds_fall_on_the_nearest_whole_step() -> None:
    assert [first for first, _ in THIRDS.at_steps(12)] == [0, 4]
    assert [first for first, _ in THIRDS.at_steps(10)] == [0, 3]
    assert bounds_of(3, 10) == [3, 7, 10]


def test_a_segment_of_no_step_is_refused() -> None:
    with pytest.raises(MixtureError, match=r"segment 1 of 2 has 33\.33% of a run of 1 steps"):
        THIRDS.at_steps(1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("segments: 3", "is no list"),
        ("segments: []", "is no list"),
        ("segments: [{train: {train_a: 1}}]", "segment 1: its share is 'None'"),
        ("segments: [{share: 0, train: {train_a: 1}}]", "segment 1: its share is '0'"),
        ("segments: [{share: true, train: {train_a: 1}}]", "segment 1: its share is 'True'"),
        ("segments: [{share: 0.5, train: {train_a: 1}}]", "sum to 0.5, not 1"),
        ("segments: [{share: 1}]", "segment 1: no section 'train'"),
        ("segments: [{share: 1, train: {a: 0.5}}]", "segment 1: the weights sum to 0.5"),
        (
            "segments: [{share: 0.5, train: {a: 1}}, {share: 0.5, train: {b: 1}}]",
            "name different domains",
        ),
    ],
)
def test_a_schedule_that_is_none_is_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(MixtureError, match=match):
        read_schedule_yaml(write(tmp_path / "m.yaml", text))


def test_the_table_of_schedules_survives_its_file(tmp_path: Path, study: Study) -> None:
    request = ScheduleRequest(num=3, num_segments=4)
    drawn = request.draw(SwarmRequest(num=9), study.config.prior, study.config.proxy)
    drawn.write_csv(tmp_path / "s.csv")
    again = ScheduleTable.read_csv(tmp_path / "s.csv")
    assert again.indices == (FIRST_INDEX, FIRST_INDEX + 1, FIRST_INDEX + 2)
    assert again.named(2) == drawn.named(2)
    assert [first for first, _ in again.segments[1]] == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("7,4,1,0\n", "first step '4'"),
        ("7,0,1,0\n7,0,0,1\n", "not in order"),
        ("7,0,1,1\n", "sum to 2"),
        ("7,x,1,0\n", "first step 'x'"),
    ],
)
def test_a_table_of_no_schedules_is_refused(tmp_path: Path, rows: str, match: str) -> None:
    path = write(tmp_path / "s.csv", "index,first_step,train_a,train_b\n" + rows)
    with pytest.raises(MixtureError, match=match):
        ScheduleTable.read_csv(path)


def test_the_mixture_between_two_steps_counts_the_steps_of_each() -> None:
    segments = [(0, np.array([1.0, 0.0])), (4, np.array([0.0, 1.0]))]
    assert mean_between(segments, 0, 4).tolist() == [1.0, 0.0]
    assert mean_between(segments, 2, 10).tolist() == [0.25, 0.75]
    assert mean_between(segments, 5, 6).tolist() == [0.0, 1.0]


def job_of(study: Study, members: list[Member], name: str) -> StackJob:
    return stack_job(study, name, tuple(members), study.config.proxy, 1)


def changing(study: Study, name: str) -> Member:
    return scheduled_member(study, name, THIRDS.at_steps(12), 12)


def test_a_schedule_is_its_first_mixture_up_to_the_bound_and_then_another(study: Study) -> None:
    members = [study_member(study, "1", dict(FIRST)), changing(study, "2")]
    table = train_job(job_of(study, members, "stack-0000"))
    by_step = dict(table["evaluations"])
    assert by_step[4][0] == by_step[4][1]
    assert by_step[8][0] != by_step[8][1]


@pytest.mark.parametrize("stopped_after", [3, 4, 5, 9])
def test_a_stop_around_a_bound_changes_no_bit(study: Study, stopped_after: int) -> None:
    """4 is the bound itself, 5 and 9 lie inside the second segment."""
    straight = job_of(study, [changing(study, "1")], "stack-0000")
    stopped = job_of(study, [changing(study, "1")], "stack-0001")
    whole = train_job(straight)
    steps = iter(range(1, 13))
    with pytest.raises(StoppedError):
        train_job(stopped, should_stop=lambda: next(steps) == stopped_after)
    again = train_job(stopped)
    assert again["evaluations"] == whole["evaluations"]
    for name in ("1.safetensors", "1.npy"):
        one, other = Path(straight.folder) / name, Path(stopped.folder) / name
        assert one.read_bytes() == other.read_bytes()


def request_of(study: Study, training: Training) -> TrainRequest:
    name, recipe = resolve_recipe(study, str(study.path / "plan.yaml"))
    return TrainRequest(
        mixtures={name: recipe}, replicates=1, training=training, num_workers=1, threads=1
    )


def test_a_model_follows_a_file_of_segments_and_counts_its_epochs(
    study: Study, tiny_training: Training
) -> None:
    write_schedule_yaml(study.path / "plan.yaml", THIRDS)
    assert run_training(study, request_of(study, tiny_training)) == ["plan-0"]
    summary = json.loads((study.models_path / "plan-0" / "summary.json").read_text())
    assert [s["first_step"] for s in summary["member"]["segments"]] == [0, 4]
    sampler = MixtureSampler(study.open_shards(), THIRDS.at_steps(12), seq_len=32, batch_size=4)
    expected = {domain: use.epochs for domain, use in sampler.plan(12).items()}
    assert summary["epochs"] == expected
    # 8 of 16 sequences in the first third, none of 32 after.
    assert sampler.counts(12)["animals"] == 8
    assert run_training(study, request_of(study, tiny_training)) == ["plan-0"]


def test_a_schedule_where_one_mixture_is_needed_is_refused(study: Study) -> None:
    write_schedule_yaml(study.path / "plan.yaml", THIRDS)
    with pytest.raises(MixtureError, match="a schedule of 2 segments"):
        resolve_mixture(study, str(study.path / "plan.yaml"))


def test_train_says_the_steps_of_every_segment(study: Study) -> None:
    write_schedule_yaml(study.path / "plan.yaml", THIRDS)
    arguments = ["train", str(study.path), "--mixture", str(study.path / "plan.yaml"), "--model"]
    shape = write(study.path / "m.toml", "num_layers = 1\nwidth = 32\nnum_heads = 2\nhidden = 32\n")
    arguments += [str(shape), "--tokens", "1536", "--batch-size", "4", "--seq-len", "32"]
    answer = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert answer.exit_code == 0, answer.output
    assert "plan: a mixture each for the steps 1 to 4, 5 to 12" in answer.output


def test_export_writes_one_segment_and_says_which(study: Study, tmp_path: Path) -> None:
    plan = study.path / "plan.yaml"
    write_schedule_yaml(plan, THIRDS)
    out = tmp_path / "second.yaml"
    arguments = ["export", str(study.path), "--format", "regmix", "--mixture", str(plan)]
    refused = CliRunner().invoke(cli, [*arguments, "--out", str(out)])
    assert isinstance(refused.exception, MixtureError)
    assert not out.exists()
    answer = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--segment", "2"])
    assert answer.exit_code == 0, answer.output
    assert "segment 2 of 2 (33.3% to 100.0% of the run)" in answer.output
    assert resolve_mixture(study, str(out))[1] == SECOND
    missing = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--segment", "3"])
    assert isinstance(missing.exception, MixtureError)


def test_a_schedule_changed_after_its_proxy_is_refused(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    from regmix.swarm.ledger import Ledger
    from regmix.swarm.sweep import SweepOptions, plan_stacks, scheduled_members

    study = make_study(
        tmp_path / "changing",
        tiny_shards,
        swarm=SwarmRequest(num=3),
        training=tiny_training,
        objective={"animals": 1.0},
        schedules=ScheduleRequest(num=2, num_segments=2),
    )
    from regmix.data.mixtures import MixtureTable

    table = MixtureTable.read_csv(study.mixtures_path)
    with Ledger(study.ledger_path) as ledger:
        jobs = plan_stacks(study, ledger, table, tiny_shards, SweepOptions(num_workers=1))
        ledger.add_stacks(jobs)
        assert scheduled_members(study, ledger) == []
        drawn = ScheduleTable.read_csv(study.schedules_path)
        swapped = ScheduleTable(drawn.domains, drawn.indices, drawn.segments[::-1])
        swapped.write_csv(study.schedules_path)
        with pytest.raises(StudyError, match="not the one its proxy was trained on"):
            scheduled_members(study, ledger)


def test_mixtures_draws_schedules_and_evaluates_at_their_bounds(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    arguments = ["mixtures", str(tmp_path / "new"), "--shards", str(tiny_shards.path), "--num", "3"]
    arguments += ["--tokens", "1280", "--batch-size", "4", "--seq-len", "32", "--model", "cpu-64"]
    answer = CliRunner().invoke(cli, [*arguments, "--schedules", "2", "--segments", "3"])
    assert answer.exit_code == 0, answer.output
    assert "2 proxies more change their mixture, in 3 segments" in answer.output
    study = Study.open(tmp_path / "new")
    assert study.config.proxy.eval_steps == (3, 7)
    assert len(ScheduleTable.read_csv(study.schedules_path)) == 2


def test_segments_without_schedules_are_refused(tiny_shards: ShardSet, tmp_path: Path) -> None:
    arguments = ["mixtures", str(tmp_path / "new"), "--shards", str(tiny_shards.path)]
    answer = CliRunner().invoke(cli, [*arguments, "--segments", "3"])
    assert isinstance(answer.exception, ConfigError)
    assert "--segments has no use without --schedules" in str(answer.exception)


def test_schedules_beside_mixtures_from_a_file_are_refused(
    study: Study, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="schedules are drawn over all domains"):
        make_study(
            tmp_path / "other",
            tiny_shards,
            swarm=None,
            training=study.config.proxy,
            objective={"animals": 1.0},
            mixtures_from=study.mixtures_path,
            schedules=ScheduleRequest(num=2, num_segments=2),
        )


def test_a_request_for_one_segment_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 schedules of 1 segments"):
        ScheduleRequest(num=3, num_segments=1)
