"""What `fit` says of cheaper proxies: how early their training could have ended.

Enters: a study, its runs, an objective. Leaves: the part `early` of `fit.json`, and a table of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.decision.objective import Objective
    from regmix.decision.runs import Runs
    from regmix.study import Study


def early_record(
    study: Study | None, runs: Runs, objective: Objective, seed: int
) -> dict[str, Any] | None:
    """Return how early is enough; None where the study keeps no losses along the way."""
    from regmix.decision.schedules.trajectories import early_enough, num_judged, read_trajectories
    from regmix.display import Progress

    if study is None or not study.trajectories_path.is_file():
        return None
    found = read_trajectories(study)
    with Progress("cheaper proxies", total=num_judged(found), unit="steps") as progress:
        early = early_enough(found, runs, objective, seed=seed, on_progress=progress.update)
    return None if early is None else early.record()


def show_early(record: dict[str, Any]) -> None:
    """Show the steps and the verdict."""
    from rich.table import Table

    from regmix.display import console

    title = f"Losses along the way, {record['num_runs']} runs (objective; held-out runs)"
    table = Table(title=title, title_justify="left")
    for heading in (
        *("step", "share of the tokens", "Spearman, same run"),
        *("Spearman, held out", "with a line", "RMSE, nats"),
    ):
        table.add_column(heading, justify="right")
    for point in record["points"]:
        ranks = [point[name] for name in ("rank", "spearman", "mapped")]
        cells = ["-" if rank is None else f"{rank:.4f}" for rank in ranks]
        share, error = f"{point['share']:.0%}", f"{point['rmse_nats']:.4f}"
        table.add_row(str(point["step"]), share, *cells, error)
    console().print(table)
    click.echo(f"Cheaper proxies: {record['verdict']}")
