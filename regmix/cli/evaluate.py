"""`regmix-fast evaluate`: a model's loss on every validation set, or its score on tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.large.comparison import MixtureResult
    from regmix.study import Study


@click.command()
@click.argument("study", required=False)
@click.option("--model", "models", multiple=True, help="A model's name; default: all of them.")
@click.option(
    "--hf",
    "checkpoints",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A Hugging Face Llama checkpoint; alone, no model of the study is evaluated.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="Tokens of a window for --hf; default: what it was trained for, at most 2048.",
)
@click.option(
    "--tasks",
    multiple=True,
    help="Downstream tasks of lm-eval instead of losses: names, or paper for RegMix's 13. "
    "lm-eval downloads their data.",
)
@click.option(
    "--shots", default="0", show_default=True, help="Examples in a prompt: 0, or 0-5 for each."
)
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path),
    help="Tasks of your own, as YAML for lm-eval. What they say is run.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Questions of a task, for a try.")
@click.option("--gpu", is_flag=True, help="Compute on the GPU, in bfloat16; default: the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
def command(
    study: str | None,
    models: tuple[str, ...],
    checkpoints: tuple[Path, ...],
    seq_len: int | None,
    tasks: tuple[str, ...],
    shots: str,
    task_folder: Path | None,
    limit: int | None,
    gpu: bool,
    as_json: bool,
) -> None:
    """Measure the models of STUDY on all of its validation sets: nats per token, bits per byte.

    \b
    Examples:
      regmix-fast evaluate study --model optimum-0
      regmix-fast evaluate study --model optimum-0 --hf checkpoint --seq-len 256
      regmix-fast evaluate study --tasks paper --shots 0-5
    """
    from regmix.errors import ConfigError
    from regmix.study import Study, find_study

    opened = Study.open(find_study(study))
    chosen = _chosen(opened, models, checkpoints)
    if seq_len is not None and (tasks or not checkpoints):
        raise ConfigError(
            "--seq-len is the length of the windows that --hf is evaluated on",
            cure="Give it with --hf; a model of the study is evaluated as it was trained",
        )
    if tasks:
        from regmix.cli.tasks import ask_models

        ask_models(opened, chosen, checkpoints, tasks, shots, task_folder, limit, gpu, as_json)
        return
    if task_folder is not None or limit is not None or shots != "0":
        raise ConfigError(
            "--task-folder, --limit and --shots are about tasks", cure="Name some with --tasks"
        )
    tables = _measure(opened, chosen, checkpoints, seq_len, gpu)
    results = _comparison(opened, chosen)
    if as_json:
        click.echo(json.dumps({"models": tables, **_plain(opened, results)}))
        return
    _show(opened, tables)
    _show_comparison(opened, results)
    click.echo(f"Next: regmix-fast report {study or ''}".rstrip())


def _chosen(study: Study, models: Sequence[str], checkpoints: Sequence[Path]) -> list[str]:
    """Return the names of the study's models to measure; with --hf only those that are named."""
    from regmix.errors import ModelError, nearest

    known = sorted(path.parent.name for path in study.models_path.glob("*/summary.json"))
    for name in models:
        if name not in known:
            raise ModelError(f"no model '{name}' ({nearest(name, known)})", cure="Name one of them")
    chosen = list(models) or ([] if checkpoints else known)
    if not chosen and not checkpoints:
        raise ModelError(
            f"{study.path} has no trained model", cure="Train one with: regmix-fast train"
        )
    return chosen


def _measure(
    study: Study, chosen: Sequence[str], checkpoints: Sequence[Path], seq_len: int | None, gpu: bool
) -> dict[str, dict[str, Any]]:
    """Return a table by model; those of the study's own models are stored with them."""
    from regmix.display import Progress
    from regmix.files import write_json
    from regmix.large.evaluate import evaluate_hugging_face, evaluate_model

    shards = study.open_shards()
    tokens = sum(shards.stats("valid", target).tokens - 1 for target in study.config.targets)
    done, others, tables = 0, {}, {}
    total = tokens * (len(chosen) + len(checkpoints))
    with Progress("evaluate", total=total, unit="tokens") as progress:

        def report(more: int) -> None:
            nonlocal done
            done += more
            progress.update(done)

        # First what may be refused: a model of the study was made for its corpus.
        for folder in checkpoints:
            others[str(folder)] = evaluate_hugging_face(
                study, folder, seq_len=seq_len, gpu=gpu, report=report
            )
        for name in chosen:
            place = study.models_path / name
            tables[name] = evaluate_model(study, place, gpu=gpu, report=report)
            write_json(place / "evaluation.json", tables[name])
    return tables | others


def _comparison(study: Study, chosen: Sequence[str]) -> list[MixtureResult]:
    """Return the mixtures side by side where there is something to compare."""
    from regmix.large.comparison import compare_models

    results = compare_models(study) if chosen else []
    return results if sum(len(result.models) for result in results) > 1 else []


def _plain(study: Study, results: Sequence[MixtureResult]) -> dict[str, Any]:
    from regmix.large.comparison import gains_of, mean_and_error

    mixtures = {}
    for result in results:
        cells = {target: result.losses_of(target) for target in study.config.targets}
        rows = {"objective": result.losses, **cells}
        mixtures[result.mixture] = {
            "seeds": list(result.replicates),
            **{
                name: dict(zip(("mean_nats", "error_nats"), mean_and_error(losses), strict=True))
                for name, losses in rows.items()
            },
        }
    gains = {
        gain.baseline: {"mean_nats": gain.mean_nats, "error_nats": gain.error_nats}
        for gain in gains_of(results)
    }
    return {"mixtures": mixtures, "gains": gains}


def _show(study: Study, tables: Mapping[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from regmix.display import console

    table = Table(title="nats per token (bits per byte)", title_justify="left")
    table.add_column("target")
    for name in tables:
        table.add_column(name, justify="right", overflow="fold")
    for target in study.config.targets:
        table.add_row(target, *(_shown(t["targets"][target]) for t in tables.values()))
    objectives = (f"{t['objective']['loss_nats']:.4f}" for t in tables.values())
    table.add_row("objective", *objectives)
    console().print(table)
    if any("bits_per_byte" not in row for t in tables.values() for row in t["targets"].values()):
        click.echo("No bits per byte (–): these token files do not tell the bytes of their text")
    measured = {name: f"{t['seq_len']} tokens, {t['computed_in']}" for name, t in tables.items()}
    if len(set(measured.values())) > 1:
        words = "; ".join(f"{name}: {how}" for name, how in measured.items())
        click.echo(f"Compare with care, windows or precision differ ({words})")


def _show_comparison(study: Study, results: Sequence[MixtureResult]) -> None:
    from rich.table import Table

    from regmix.display import console
    from regmix.large.comparison import gains_of, mean_and_error

    if not results:
        return
    title = "By mixture: mean ± standard error over seeds, nats per token"
    table = Table(title=title, title_justify="left")
    table.add_column("target")
    for result in results:
        table.add_column(f"{result.mixture} ({len(result.models)})", justify="right")
    for target in (*study.config.targets, None):
        cells = [mean_and_error(result.losses_of(target)) for result in results]
        words = (f"{mean:.4f}" + ("" if e is None else f" ± {e:.4f}") for mean, e in cells)
        table.add_row("objective" if target is None else target, *words)
    console().print(table)
    for gain in gains_of(results):
        click.echo(f"The optimum is {gain}")


def _shown(cell: dict[str, Any]) -> str:
    bits = cell.get("bits_per_byte")
    return f"{cell['loss_nats']:.4f} ({'–' if bits is None else format(bits, '.4f')})"
