"""A mixture per segment: found where the law rewards it, and only believed there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from regmix.cli import cli
from regmix.data.mixtures import MixtureTable, read_mixture_yaml
from regmix.data.schedules import ScheduleTable, read_schedule_yaml
from regmix.data.shards import ShardSet
from regmix.decision.objective import make_objective
from regmix.decision.schedules.histories import Histories, read_histories
from regmix.decision.schedules.plan import SegmentPlan, plan_segments
from regmix.decision.schedules.trajectories import read_trajectories
from regmix.decision.schedules.transitions import State, calibrated_chain, fit_chain
from regmix.decision.searching.constraints import make_constraints
from regmix.errors import ConfigError, ConstraintError, LossTableError
from regmix.large.train import resolve_recipe
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.schedules import ScheduleRequest

DOMAINS, TARGETS = ("a", "b", "c"), ("x", "y")
Law = Callable[[np.ndarray], np.ndarray]


def late(weights: np.ndarray) -> np.ndarray:
    """Losses [K, N, M] where a and b help at first, and c in the last segment only."""
    early = np.array([[1.0, 0.5, 0.1], [0.4, 1.0, 0.1]])
    last = np.array([[0.1, 0.0, 1.0], [0.0, 0.1, 1.0]])
    logs, found = np.full((len(weights), 2), 1.2), []
    for number in range(weights.shape[1]):
        effect = last if number == weights.shape[1] - 1 else early
        logs = logs - 0.25 * (1 - np.exp(-3 * weights[:, number] @ effect.T))
        found.append(np.exp(logs))
    return np.stack(found, axis=1)


def cumulative(weights: np.ndarray) -> np.ndarray:
    """Losses [K, N, M] that the mixture so far decides: no schedule beats its own mean."""
    effect = np.array([[1.0, 0.5, 0.3], [0.2, 0.6, 1.0]])
    number = weights.shape[1]
    read = np.cumsum(weights, axis=1) / number
    return np.asarray(np.exp(1.2 - 0.3 * np.sqrt(read) @ effect.T))


def histories_of(law: Law, *, num: int = 40, changed: int = 20, seed: int = 0) -> Histories:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(3), (num, 2))
    weights[changed:] = weights[changed:, :1]
    losses = law(weights) * np.exp(0.003 * rng.normal(size=(num, 2, 2)))
    return Histories(tuple(range(num)), DOMAINS, TARGETS, (50, 100), weights, losses)


def plan_of(histories: Histories, **limits: float) -> SegmentPlan:
    whole = make_constraints(DOMAINS)
    if limits:
        available = {name: limits.get(name, 1e9) for name in DOMAINS}
        whole = make_constraints(
            DOMAINS, available_tokens=available, budget_tokens=1000, max_epochs=1
        )
    return plan_segments(
        histories,
        make_objective("mean", TARGETS),
        bounds=make_constraints(DOMAINS),
        whole=whole,
    )


def true_gain(law: Law, plan: SegmentPlan) -> float:
    segments = np.stack([s.mixture.array(DOMAINS) for s in plan.schedule.segments])
    constant = np.tile(plan.constant.array(DOMAINS), (len(segments), 1))
    ours, theirs = law(np.stack([segments, constant]))[:, -1].mean(1)
    return float(theirs - ours)


@pytest.fixture(scope="module")
def late_plan() -> SegmentPlan:
    return plan_of(histories_of(late))


def test_a_domain_that_helps_only_late_comes_late(late_plan: SegmentPlan) -> None:
    first, second = (segment.mixture for segment in late_plan.schedule.segments)
    assert first["c"] < 0.1
    assert second["c"] > 0.6
    assert late_plan.believed
    assert late_plan.verdict.startswith("use the schedule")


def test_the_interval_of_the_gain_holds_the_true_one(late_plan: SegmentPlan) -> None:
    true = true_gain(late, late_plan)
    assert late_plan.gain.low < true < late_plan.gain.high
    assert true > 0.05
    assert late_plan.better > 0.99


def test_where_only_the_whole_counts_a_constant_mixture_is_as_good() -> None:
    for seed in (0, 1, 2):
        plan = plan_of(histories_of(cumulative, seed=seed))
        assert plan.constant_loss >= plan.loss
        assert not plan.believed
        assert plan.verdict.startswith("a constant mixture is as good: a predicted gain")
        assert true_gain(cumulative, plan) < plan.gain.high


def test_proxies_of_one_mixture_each_prove_no_schedule() -> None:
    plan = plan_of(histories_of(late, changed=0))
    assert not plan.believed
    assert "as good as these proxies can tell: 0 of them changed" in plan.verdict
    assert any("mixtures --schedules" in remark for remark in plan.remarks)


def test_the_limit_on_epochs_holds_over_the_whole_run(late_plan: SegmentPlan) -> None:
    assert late_plan.schedule.mean["c"] > 0.3
    plan = plan_of(histories_of(late), c=200.0)
    assert plan.schedule.mean["c"] <= 0.2 + 1e-8
    assert plan.constant["c"] <= 0.2 + 1e-8
    # More than the limit in one segment, for less in the other.
    assert plan.schedule.segments[1].mixture["c"] > 0.3
    assert plan.epochs is not None
    assert plan.epochs["c"] == pytest.approx(1.0, abs=1e-3)


def test_bounds_hold_in_every_segment() -> None:
    limits = make_constraints(DOMAINS, lower={"a": 0.15}, upper={"c": 0.4})
    objective = make_objective("worst", TARGETS)
    plan = plan_segments(histories_of(late), objective, bounds=limits, whole=limits)
    for mixture in [plan.constant, *(segment.mixture for segment in plan.schedule.segments)]:
        assert mixture["a"] >= 0.15 - 1e-9
        assert mixture["c"] <= 0.4 + 1e-9


def test_no_weight_goes_beyond_what_proxies_had_in_that_segment() -> None:
    histories = histories_of(late)
    capped = histories.weights.copy()
    high = capped[:, 1, 2] > 0.5
    kept = np.flatnonzero(~high)
    seen = dataclasses.replace(
        histories,
        indices=tuple(kept.tolist()),
        weights=capped[kept],
        losses=histories.losses[kept],
    )
    plan = plan_of(seen)
    assert plan.schedule.segments[1].mixture["c"] <= capped[kept, 1, 2].max() + 1e-9


def test_bounds_that_leave_no_constant_mixture_are_refused() -> None:
    histories = histories_of(late)
    first = np.tile([1.0, 0.0, 0.0], (40, 1))
    second = np.tile([0.0, 0.5, 0.5], (40, 1))
    apart = dataclasses.replace(histories, weights=np.stack([first, second], axis=1))
    with pytest.raises(ConstraintError, match="no constant mixture"):
        plan_of(apart)


def test_too_few_proxies_are_refused() -> None:
    with pytest.raises(LossTableError, match="15 proxies with losses along the way"):
        plan_of(histories_of(late, num=15, changed=8))


def test_slopes_of_a_chain_are_its_differences() -> None:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(3), (30, 3))
    histories = Histories(tuple(range(30)), DOMAINS, TARGETS, (10, 30, 60), weights, late(weights))
    chain = fit_chain(histories, (0, 1))
    schedule, shares = rng.dirichlet(np.ones(3) * 3, 3), np.array([0.3, 0.7])
    found = chain.slopes(schedule, shares)
    for place in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[place] = 1e-6
        ends = chain.losses(np.stack([schedule + step, schedule - step])) @ shares
        assert found[place] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-5)


def test_draws_scatter_around_the_prediction_and_agree_on_equal_schedules() -> None:
    histories = histories_of(late, num=24, changed=12)
    chain = calibrated_chain(histories, (0, 1), seed=0).chain
    schedule = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    drawn = chain.draws(np.stack([schedule, schedule]), 300, seed=1)
    assert np.abs(drawn[:, 0] - drawn[:, 1]).max() < 1e-3
    spread = drawn[:, 0].std(0)
    assert (spread > 1e-4).all()
    error = np.abs(drawn[:, 0].mean(0) - chain.losses(schedule[None])[0])
    assert (error < spread).all()
    assert np.array_equal(drawn, chain.draws(np.stack([schedule, schedule]), 300, seed=1))


def test_a_state_keeps_within_what_the_proxies_showed() -> None:
    losses = np.exp(np.random.default_rng(0).normal(size=(30, 2)))
    state = State.of(losses)
    assert state(losses).std(0) == pytest.approx(0.15, abs=0.02)
    assert state(np.full((1, 2), 1e6)).max() <= 0.98
    assert (state.slopes(np.full(2, 1e9)) == 0).any()


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    """A study whose losses are those of `late`, at half-way and at the end, without training."""
    study = make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=16),
        training=tiny_training,
        objective={"animals": 0.5, "colours": 0.5},
        schedules=ScheduleRequest(num=16, num_segments=2),
    )
    table = MixtureTable.read_csv(study.mixtures_path)
    changing = ScheduleTable.read_csv(study.schedules_path)
    weights = {i: np.stack([row, row]) for i, row in zip(table.indices, table.weights, strict=True)}
    for index, segments in zip(changing.indices, changing.segments, strict=True):
        weights[index] = np.stack([mixture for _, mixture in segments])
    losses = late(np.stack(list(weights.values())))
    header = ",".join(f"metric/{target}_val_loss" for target in study.config.targets)
    rows = [f"index,step,{header}"]
    final = [f"index,{header}"]
    for index, (middle, end) in zip(weights, losses.tolist(), strict=True):
        # The third target is the mean of the others.
        for step, values in ((6, middle), (12, end)):
            rows.append(f"{index},{step},{values[0]},{values[1]},{sum(values) / 2}")
        if index in table.indices:
            final.append(f"{index},{end[0]},{end[1]},{sum(end) / 2}")
    study.trajectories_path.write_text("\n".join(rows) + "\n")
    study.losses_path.write_text("\n".join(final) + "\n")
    return study


def test_segments_end_where_the_proxies_were_evaluated(study: Study) -> None:
    histories, remarks = read_histories(study, read_trajectories(study), 2)
    assert histories.bounds == (6, 12)
    assert histories.shares.tolist() == [0.5, 0.5]
    assert histories.num_changed == 16
    assert histories.num_mixed == 0
    assert remarks == ()


def test_more_segments_than_evaluations_are_refused(study: Study) -> None:
    with pytest.raises(ConfigError, match="3 segments, and the proxies were evaluated at 2 steps"):
        read_histories(study, read_trajectories(study), 3)


def test_bounds_between_the_evaluations_move_to_the_nearest_and_say_so(study: Study) -> None:
    text = study.trajectories_path.read_text().replace(",6,", ",5,")
    study.trajectories_path.write_text(text)
    histories, remarks = read_histories(study, read_trajectories(study), 2)
    assert histories.bounds == (5, 12)
    assert "steps 5, 12" in remarks[0]
    # Those that change at step 6 do so inside the second segment.
    assert histories.num_mixed == 16


def test_optimize_writes_a_believed_schedule_that_train_follows(study: Study) -> None:
    arguments = ["optimize", str(study.path), "--segments", "2", "--regressor", "gp", "--json"]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    record = json.loads(answer.output[answer.output.index("{") :])
    assert record["schedule"]["believed"]
    assert record["schedule"]["proxies"] == {"all": 32, "changed": 16}
    name, recipe = resolve_recipe(study, "optimum")
    assert name == "optimum"
    assert recipe == read_schedule_yaml(study.path / "optimum-schedule.yaml")
    stored = [dict(segment["weights"]) for segment in record["schedule"]["segments"]]
    assert [dict(s.mixture) for s in recipe.segments] == stored  # type: ignore[union-attr]
    # Who cannot follow a schedule finds the constant optimum where it always is.
    constant = read_mixture_yaml(study.optimum_path)
    assert list(constant.values()) == pytest.approx(record["weights"])


def test_a_schedule_that_is_not_believed_is_not_followed(study: Study) -> None:
    text = study.trajectories_path.read_text().splitlines()
    kept = [line for line in text if not line.startswith("100000")]
    study.trajectories_path.write_text("\n".join(kept) + "\n")
    arguments = ["optimize", str(study.path), "--segments", "2", "--regressor", "gp"]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    assert "a constant mixture is as good as these proxies can tell" in answer.output
    assert read_schedule_yaml(study.optimum_path) is None
    assert read_schedule_yaml(study.path / "optimum-schedule.yaml") is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [(["--kl", "0.05"], "not planned with --kl"), (["--guard", "natural"], "with --guard")],
)
def test_what_a_schedule_is_not_planned_with_is_refused(
    study: Study, options: list[str], match: str
) -> None:
    answer = CliRunner().invoke(cli, ["optimize", str(study.path), "--segments", "2", *options])
    assert isinstance(answer.exception, ConfigError)
    assert match in str(answer.exception)


def test_tables_without_a_study_have_no_segments(study: Study) -> None:
    tables = ["--mixtures", str(study.mixtures_path), "--losses", str(study.losses_path)]
    answer = CliRunner().invoke(cli, ["optimize", *tables, "--segments", "2"])
    assert isinstance(answer.exception, ConfigError)
    assert "--segments needs losses along the way" in str(answer.exception)


def test_fit_says_how_early_would_have_been_enough(study: Study) -> None:
    arguments = ["fit", str(study.path), "--no-curve", "--regressor", "gp"]
    answer = CliRunner().invoke(cli, arguments)
    assert answer.exit_code == 0, answer.output
    assert "Cheaper proxies:" in answer.output
    early = json.loads((study.surrogate_path / "fit.json").read_text())["early"]
    assert [point["step"] for point in early["points"]] == [6, 12]
    assert early["num_runs"] == 16
