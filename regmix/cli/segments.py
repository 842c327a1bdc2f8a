"""What `optimize --segments` does: a mixture per segment of the run, and whether it is worth it.

Enters: a study, an objective, limits. Leaves: a plan, its file and a table of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from regmix.decision.objective import ObjectiveLike
    from regmix.decision.schedules.plan import SegmentPlan
    from regmix.study import Study


def refuse_unplanned(study: Study | None, *, kl: float, guard: str | None) -> Study:
    """Return the study that a schedule is planned for; raise where none can be planned."""
    from regmix.errors import ConfigError

    if study is None:
        raise ConfigError(
            "--segments needs losses along the way, which bare tables do not have",
            cure="Name a STUDY whose proxies were evaluated on the way",
        )
    for given, what in ((kl, "--kl"), (guard, "--guard"), (study.config.frozen, "frozen ratios")):
        if given:
            raise ConfigError(
                f"a schedule is not planned with {what}",
                cure="Leave that out, or --segments: bounds and the limit on epochs hold with it",
            )
    return study


def plan_for(
    study: Study,
    objective: ObjectiveLike,
    num_segments: int,
    *,
    lower: Mapping[str, float] | None,
    upper: Mapping[str, float] | None,
    available_tokens: Mapping[str, float] | None,
    budget_tokens: float | None,
    max_epochs: float,
    extrapolate: bool,
    seed: int,
) -> SegmentPlan:
    """Return the plan of a study's proxies; bounds hold in every segment, epochs over the run."""
    from regmix.decision.objective import make_objective
    from regmix.decision.schedules.histories import read_histories
    from regmix.decision.schedules.plan import plan_segments
    from regmix.decision.schedules.trajectories import read_trajectories
    from regmix.decision.schedules.transitions import NUM_FITS
    from regmix.decision.searching.constraints import make_constraints
    from regmix.display import Progress

    trajectories = read_trajectories(study)
    histories, remarks = read_histories(study, trajectories, num_segments)
    dropped = [f"Left out: proxy {run.index}, {run.reason}" for run in trajectories.dropped]
    domains = histories.domains
    with Progress("segments", total=NUM_FITS, unit="fits") as progress:
        return plan_segments(
            histories,
            make_objective(objective, histories.targets),
            bounds=make_constraints(domains, lower=lower, upper=upper),
            whole=make_constraints(
                domains,
                lower=lower,
                upper=upper,
                available_tokens=available_tokens,
                budget_tokens=budget_tokens,
                max_epochs=max_epochs,
            ),
            extrapolate=extrapolate,
            seed=seed,
            remarks=(*dropped, *remarks),
            on_progress=progress.update,
        )


def schedule_path(path: Path) -> Path:
    """Return where the schedule is written that belongs to the optimum at `path`."""
    return path.with_name(f"{path.stem}-schedule.yaml")


def write_plan(path: Path, plan: SegmentPlan) -> None:
    """Write the schedule beside the optimum at `path`, also one that is not believed."""
    from regmix.data.schedules import write_schedule_yaml

    write_schedule_yaml(schedule_path(path), plan.schedule, sections={"regmix_fast": plan.record()})


def show_plan(plan: SegmentPlan) -> None:
    """Show the mixtures by segment, what they are predicted to gain, and the verdict."""
    from rich.table import Table

    from regmix.display import console

    segments, mean = plan.schedule.segments, plan.schedule.mean
    table = Table(title="Schedule, a mixture per segment of the run", title_justify="left")
    table.add_column("domain")
    begin = 0.0
    for segment in segments:
        table.add_column(f"{begin:.0%} to {begin + segment.share:.0%}", justify="right")
        begin += segment.share
    table.add_column("whole run", justify="right")
    table.add_column("best constant", justify="right")
    if plan.epochs is not None:
        table.add_column("epochs", justify="right")
    for name in sorted(mean, key=lambda name: (-mean[name], name)):
        weights = [*(s.mixture[name] for s in segments), mean[name], plan.constant[name]]
        cells = [f"{weight:.2%}" for weight in weights]
        if plan.epochs is not None:
            cells.append(f"{plan.epochs[name]:.2f}")
        table.add_row(name, *cells)
    console().print(table)
    rank = "" if plan.spearman is None else f", Spearman {plan.spearman:.3f}"
    click.echo(
        f"Predicted at the proxies' scale: schedule {plan.loss:.4f} nats, best constant mixture "
        f"{plan.constant_loss:.4f} nats; of unseen proxies' schedules to {plan.rmse_nats:.4f} nats "
        f"(RMSE{rank})"
    )
    for remark in plan.remarks:
        click.echo(remark)
    click.echo(f"Verdict on the schedule: {plan.verdict}")
