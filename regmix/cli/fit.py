"""`regmix-fast fit`: regress loss on mixture, show the held-out error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.decision.learning import LearningCurve
    from regmix.decision.objective import Objective
    from regmix.decision.runs import Runs
    from regmix.decision.surrogate import Surrogate


@click.command()
@click.argument("study", required=False)
@click.option("--mixtures", type=click.Path(), help="Table of mixtures, instead of a study.")
@click.option("--losses", type=click.Path(), help="Table of losses, instead of a study.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for fit.json, with --losses.")
@click.option(
    "--regressor",
    default="auto",
    show_default=True,
    help="auto, gp, powerlaw, loglinear, lightgbm or linear.",
)
@click.option("--target", "targets", multiple=True, help="Fit this target only; repeatable.")
@click.option("--objective", help="Target, mean, worst or a=0.5,b=0.5.  [default: the study's]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of folds and starts.",
)
@click.option("--partial", is_flag=True, help="Go on without the proxies that have no losses yet.")
@click.option(
    "--curve/--no-curve",
    default=True,
    show_default=True,
    help="Fit subsets of the runs too, to tell what more proxies would bring.",
)
@click.option("--test-mixtures", type=click.Path(), help="Mixtures of unseen runs to test on.")
@click.option("--test-losses", type=click.Path(), help="Losses of unseen runs to test on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    study: str | None,
    mixtures: str | None,
    losses: str | None,
    out: Path | None,
    regressor: str,
    targets: tuple[str, ...],
    objective: str | None,
    seed: int,
    partial: bool,
    curve: bool,
    test_mixtures: str | None,
    test_losses: str | None,
    as_json: bool,
) -> None:
    """Regress loss on mixture over the proxies of STUDY, and show the held-out error.

    \b
    Examples:
      regmix-fast fit study
      regmix-fast fit --mixtures train_mixture_1m.csv --losses train_pile_loss_1m.csv \\
          --target pile_cc
    """
    import contextlib
    import shlex

    from regmix.cli.decide import natural_of, open_source, wanted_objective
    from regmix.cli.early import early_record
    from regmix.decision.objective import make_objective
    from regmix.decision.records import fit_record, write_fit
    from regmix.decision.reuse import groups_of, reduce_runs
    from regmix.decision.runs import read_runs
    from regmix.decision.surrogate import fit
    from regmix.errors import ConfigError

    if (test_mixtures is None) != (test_losses is None):
        raise ConfigError("a test needs both tables", cure="Give --test-mixtures and --test-losses")
    opened, mixtures_path, losses_path = open_source(study, mixtures, losses)
    runs = read_runs(mixtures_path, losses_path, targets=targets or None, partial=partial)
    groups = groups_of(opened, runs)
    runs = reduce_runs(runs, groups)
    asked = wanted_objective(objective, opened, runs.targets)
    chosen = make_objective(asked, runs.targets)
    model = fit(runs.weights, runs.losses, regressor=regressor, seed=seed)
    record = fit_record(
        model,
        runs,
        chosen,
        curve=_curve(model, chosen) if curve else None,
        mixture=natural_of(opened, model.domains),
    )
    record["early"] = early_record(opened, runs, chosen, seed)
    folder = opened.surrogate_path if opened else out
    if folder is not None:
        with opened.decision_lock() if opened else contextlib.nullcontext():
            write_fit(folder, model, runs, record)
    if test_mixtures is not None and test_losses is not None:
        unseen = reduce_runs(read_runs(test_mixtures, test_losses, targets=runs.targets), groups)
        record["unseen"] = _unseen(model, unseen, chosen)
    if as_json:
        click.echo(json.dumps(record))
        return
    _show(record, runs)
    if folder is not None:
        click.echo(f"Written: {folder / 'fit.json'}, {folder / 'predictions.csv'}")
    told = [study] if study else []
    if not opened:
        told = ["--mixtures", str(mixtures_path), "--losses", str(losses_path)]
        told += ["--out", "optimum.yaml", "--regressor", regressor, "--seed", str(seed)]
    if objective or targets:
        told += ["--objective", objective or ",".join(targets)]
    click.echo(f"Next: regmix-fast optimize {shlex.join(told)}".rstrip())


def _curve(model: Surrogate, objective: Objective) -> LearningCurve:
    from regmix.decision.learning import REPEATS, curve_sizes, learning_curve
    from regmix.display import Progress

    total = REPEATS * len(curve_sizes(model))
    with Progress("learning curve", total=total, unit="fits") as progress:
        return learning_curve(model, objective, on_progress=progress.update)


def _unseen(model: Surrogate, runs: Runs, objective: Objective) -> dict[str, Any]:
    from regmix.decision.calibration import inside
    from regmix.decision.validation import score

    predicted, sd = model.predict(runs.weights)
    covered = inside(runs.losses, predicted, sd)
    pairs = {name: (runs.losses[:, j], predicted[:, j]) for j, name in enumerate(runs.targets)}
    pairs["objective"] = objective.of_all(runs.losses), objective.of_all(predicted)
    found = {name: score(name, true, guess) for name, (true, guess) in pairs.items()}
    shares = dict(zip(runs.targets, covered.tolist(), strict=True))
    return {
        "num_runs": len(runs),
        **{
            name: {"spearman": s.spearman, "rmse_nats": s.rmse_nats, "coverage": shares.get(name)}
            for name, s in found.items()
        },
    }


def _show(record: dict[str, Any], runs: Runs) -> None:
    from regmix.cli.early import show_early

    for run in runs.dropped:
        click.echo(f"Left out: run {run.index}, {run.reason}")
    for name in runs.constant_domains:
        click.echo(f"Domain '{name}' has the same weight in all runs: nothing is learned about it")
    _show_scores(record)
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record["choice"]["members"].items())
    click.echo(f"Surrogate: {shares}; {record['choice']['why']}")
    for name, retries in record["retries"].items():
        if retries:
            click.echo(f"{name}: {retries} factorisations needed a larger diagonal to succeed")
    noise = record["objective"]["noise_nats"]
    if noise is not None:
        source = record["noise"]["source"]
        click.echo(f"Noise between seeds: {noise:.4f} nats on the objective ({source})")
    curve = record["learning_curve"]
    if curve:
        _show_curve(curve)
    if record["early"]:
        show_early(record["early"])


def _show_scores(record: dict[str, Any]) -> None:
    from rich.table import Table

    from regmix.display import console

    unseen = record.get("unseen")
    title = f"Held-out error, {record['num_runs']} runs ({record['held_out_by']})"
    table = Table(title=title, title_justify="left")
    table.add_column("target")
    headings = ["Spearman", "RMSE, nats", "in 90% interval"]
    if unseen:
        headings += [f"{heading} ({unseen['num_runs']} unseen)" for heading in headings]
    for heading in headings:
        table.add_column(heading, justify="right")
    rows = {**record["targets"], f"objective ({record['objective']['name']})": record["objective"]}
    if len(record["targets"]) == 1:
        rows = record["targets"]
    for name, numbers in rows.items():
        cells = _cells(numbers)
        if unseen:
            cells += _cells(unseen.get(name, unseen["objective"]))
        table.add_row(name, *cells)
    console().print(table)


def _show_curve(curve: dict[str, Any]) -> None:
    from rich.table import Table

    from regmix.display import console

    table = Table(title="Learning curve of the objective, on runs left out", title_justify="left")
    for heading in ("proxies", "RMSE, nats", "Spearman"):
        table.add_column(heading, justify="right")
    for point in curve["points"]:
        rank = point["spearman"]
        error = f"{point['rmse_nats']:.4f}"
        table.add_row(str(point["num_runs"]), error, "-" if rank is None else f"{rank:.4f}")
    console().print(table)
    click.echo(f"More proxies: {curve['advice']}")


def _cells(numbers: dict[str, Any]) -> list[str]:
    rank, coverage = numbers["spearman"], numbers.get("coverage")
    return [
        "-" if rank is None else f"{rank:.4f}",
        f"{numbers['rmse_nats']:.4f}",
        "-" if coverage is None else f"{coverage:.0%}",
    ]
