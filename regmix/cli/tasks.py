"""What `evaluate --tasks` does: asks models the questions of tasks, and shows their scores.

Enters: click's parameters. Leaves: the scores in the study, and a table or JSON. Names no task
itself and scores none: `large.tasks` does, by lm-eval.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.large.scores import TaskScore
    from regmix.large.tasks import TaskRunner
    from regmix.study import Study

_MOST_SHOTS = 64


def ask_models(
    study: Study,
    models: Sequence[str],
    checkpoints: Sequence[Path],
    tasks: Sequence[str],
    shots: str,
    folder: Path | None,
    limit: int | None,
    gpu: bool,
    as_json: bool,
) -> None:
    """Run tasks on models of the study, whose scores are kept there, and on checkpoints."""
    from regmix.large.scores import read_scores
    from regmix.large.tasks import TaskRunner, expand_tasks, run_on_model

    names, numbers = expand_tasks(tasks), parse_shots(shots)
    runner = TaskRunner(names, folder=folder, limit=limit)
    found: dict[str, list[TaskScore]] = {}
    for checkpoint in checkpoints:
        asked = runner.run(checkpoint, runner.waiting(numbers), gpu=gpu)
        found[str(checkpoint)] = list(_told(str(checkpoint), asked))
    for name in models:
        there = len(read_scores(study.models_path / name))
        new = list(_told(name, run_on_model(study, name, runner, numbers, gpu=gpu)))
        kept = read_scores(study.models_path / name)
        if there and len(new) < len(runner.waiting(numbers)):
            click.echo(f"{name}: some scores were there already, in its tasks.json", err=True)
        found[name] = [score for score in kept if _asked(score, runner, numbers, new)]
    if as_json:
        rows = {name: [_row(score) for score in scores] for name, scores in found.items()}
        click.echo(json.dumps(rows))
        return
    _show(found)
    if checkpoints:
        click.echo("The scores of --hf are shown only; those of the study's models are kept")
    click.echo(f"Next: regmix-fast report {study.path}")


def parse_shots(text: str) -> tuple[int, ...]:
    """Return the numbers that `0`, `0-5` or `0,5` say."""
    from regmix.errors import ConfigError

    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _MOST_SHOTS:
            raise ConfigError(
                f"--shots is '{text}'", cure=f"Give 0, 0-5 or 0,5; {_MOST_SHOTS} at most"
            )
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def _asked(
    score: TaskScore, runner: TaskRunner, numbers: Sequence[int], new: Sequence[TaskScore]
) -> bool:
    """Return whether a stored score answers this call: by its name, or as a part of a group."""
    by_name = score.task in runner.tasks and score.shots in numbers
    return (by_name and score.limit == runner.limit) or score in new


def _told(name: str, asked: Iterator[list[TaskScore]]) -> Iterator[TaskScore]:
    """Pass scores on, and say each as it comes."""
    from regmix.display import duration

    before = time.monotonic()
    for scores in asked:
        now = time.monotonic()
        for score in scores:
            error = "" if score.error is None else f" ± {score.error:.4f}"
            words = f"{score.num_questions} questions, {duration(now - before)}"
            if score.num_cut:
                words += f"; {score.num_cut} prompts cut to the trained length"
            line = f"{score.metric} {score.value:.4f}{error} ({words})"
            click.echo(f"{name}: {score.task}, {score.shots}-shot: {line}", err=True)
            yield score
        before = time.monotonic()


def _row(score: TaskScore) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(score).items() if value is not None}


def _show(found: dict[str, list[TaskScore]]) -> None:
    from rich.table import Table

    from regmix.display import console
    from regmix.large.scores import compare_scores

    compared = compare_scores(found)
    title = "Downstream tasks (± standard error over the questions)"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for name in found:
        table.add_column(name, justify="right", overflow="fold")
    for place, column in enumerate(compared.columns):
        cells = [compared.cells[name][place] for name in found]
        table.add_row(column, *("–" if cell is None else _shown(*cell) for cell in cells))
    averages = list(compared.averages.values())
    if len(compared.columns) > 1 and None not in averages:
        table.add_row("average", *(f"{value:.4f}" for value in averages))
    console().print(table)


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
