"""`regmix-fast evaluate`: a model's loss on every validation set."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command()
@click.argument("study", required=False)
@click.option("--model", "models", multiple=True, help="A model's name; default: all of them.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
def command(study: str | None, models: tuple[str, ...], as_json: bool) -> None:
    """Measure the models of STUDY on all of its validation sets: nats per token, bits per byte.

    \b
    Example:  regmix-fast evaluate study --model optimum-0
    """
    from rich.table import Table

    from regmix.display import console
    from regmix.errors import ModelError, nearest
    from regmix.files import write_json
    from regmix.large.evaluate import evaluate_model
    from regmix.study import Study, find_study

    opened = Study.open(find_study(study))
    known = sorted(path.parent.name for path in opened.models_path.glob("*/summary.json"))
    for name in models:
        if name not in known:
            raise ModelError(f"no model '{name}' ({nearest(name, known)})", cure="Name one of them")
    chosen = list(models) or known
    if not chosen:
        raise ModelError(
            f"{opened.path} has no trained model", cure="Train one with: regmix-fast train"
        )
    tables = {}
    for name in chosen:
        tables[name] = evaluate_model(opened, opened.models_path / name)
        write_json(opened.models_path / name / "evaluation.json", tables[name])
    if as_json:
        click.echo(json.dumps(tables))
        return
    table = Table(title="nats per token (bits per byte)", title_justify="left")
    table.add_column("target")
    for name in chosen:
        table.add_column(name, justify="right")
    for target in opened.config.targets:
        cells = [tables[name]["targets"][target] for name in chosen]
        table.add_row(target, *map(_shown, cells))
    table.add_row(
        "objective", *(f"{tables[name]['objective']['loss_nats']:.4f}" for name in chosen)
    )
    console().print(table)
    if any("bits_per_byte" not in row for t in tables.values() for row in t["targets"].values()):
        click.echo("No bits per byte (–): these token files do not tell the bytes of their text")
    click.echo(f"Next: regmix-fast report {study or ''}".rstrip())


def _shown(cell: dict[str, Any]) -> str:
    bits = cell.get("bits_per_byte")
    return f"{cell['loss_nats']:.4f} ({'–' if bits is None else format(bits, '.4f')})"
