"""`regmix-fast fit`: regress loss on mixture, show the held-out error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
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
    help="auto, powerlaw, lightgbm or linear.",
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

    from regmix.cli.decide import open_source, wanted_objective
    from regmix.decision.objective import make_objective
    from regmix.decision.records import fit_record, write_fit
    from regmix.decision.runs import read_runs
    from regmix.decision.surrogate import fit
    from regmix.errors import ConfigError

    if (test_mixtures is None) != (test_losses is None):
        raise ConfigError("a test needs both tables", cure="Give --test-mixtures and --test-losses")
    opened, mixtures_path, losses_path = open_source(study, mixtures, losses)
    runs = read_runs(mixtures_path, losses_path, targets=targets or None, partial=partial)
    asked = wanted_objective(objective, opened, runs.targets)
    chosen = make_objective(asked, runs.targets)
    model = fit(runs.weights, runs.losses, regressor=regressor, seed=seed)
    record = fit_record(model, runs, chosen)
    folder = opened.surrogate_path if opened else out
    if folder is not None:
        with opened.lock() if opened else contextlib.nullcontext():
            write_fit(folder, model, runs, chosen)
    if test_mixtures is not None and test_losses is not None:
        unseen = read_runs(test_mixtures, test_losses, targets=runs.targets)
        record["unseen"] = _unseen(model, unseen, chosen)
    if as_json:
        click.echo(json.dumps(record))
        return
    _show(record, runs)
    if folder is not None:
        click.echo(f"Written: {folder / 'fit.json'}, {folder / 'predictions.csv'}")
    tables = f"--mixtures {mixtures_path} --losses {losses_path} --out optimum.yaml"
    click.echo(f"Next: regmix-fast optimize {(study or '') if opened else tables}".rstrip())


def _unseen(model: Surrogate, runs: Runs, objective: Objective) -> dict[str, Any]:
    from regmix.decision.validation import score

    predicted = model.mean(runs.weights)
    pairs = {name: (runs.losses[:, j], predicted[:, j]) for j, name in enumerate(runs.targets)}
    pairs["objective"] = objective.of_all(runs.losses), objective.of_all(predicted)
    scores = {name: score(name, true, guess) for name, (true, guess) in pairs.items()}
    return {
        "num_runs": len(runs),
        **{n: {"spearman": s.spearman, "rmse_nats": s.rmse_nats} for n, s in scores.items()},
    }


def _show(record: dict[str, Any], runs: Runs) -> None:
    from rich.markup import escape
    from rich.table import Table

    from regmix.display import console

    for run in runs.dropped:
        click.echo(f"Left out: run {run.index}, {run.reason}")
    for name in runs.constant_domains:
        click.echo(f"Domain '{name}' has the same weight in all runs: nothing is learned about it")
    unseen = record.get("unseen")
    table = Table(title=f"Held-out error, {record['num_runs']} runs", title_justify="left")
    table.add_column("target")
    headings = ["Spearman", "RMSE, nats"]
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
        table.add_row(escape(name), *cells)
    console().print(table)
    shares = ", ".join(f"{share:.0%} {name}" for name, share in record["choice"]["members"].items())
    click.echo(f"Surrogate: {shares}; {record['choice']['why']}")


def _cells(numbers: dict[str, Any]) -> list[str]:
    rank = numbers["spearman"]
    return ["-" if rank is None else f"{rank:.4f}", f"{numbers['rmse_nats']:.4f}"]
