"""Scores of a model on downstream tasks, as they are kept with it.

Enters: a table of lm-eval's, or a model's `tasks.json`. Leaves: a score by task, number of examples
in the prompt and limit; and columns of scores that several models share. Asks no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regmix.config import finite
from regmix.errors import StudyError
from regmix.files import read_table, write_json
from regmix.provenance import environment_record

TASKS = "tasks.json"
# The measure that stands for a task, the first of these that it has.
_HEADLINES = ("acc_norm", "acc", "exact_match", "f1")


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on a task.

    shots: examples in the prompt; metric: the measure that stands for the task; error: standard
    error over the questions; limit: questions asked at most, None for all; num_cut: prompts that
    were cut at their start to the trained length; version: lm-eval's.
    metrics: every measure of the task -> its value.
    """

    task: str
    shots: int
    metric: str
    value: float
    error: float | None
    higher_is_better: bool
    num_questions: int
    limit: int | None
    num_cut: int
    version: str
    metrics: dict[str, float]

    @property
    def key(self) -> tuple[str, int, int | None]:
        """What was asked: the same key on two models means the same questions."""
        return self.task, self.shots, self.limit


def read_results(
    results: Mapping[str, Any], *, shots: int, limit: int | None, num_cut: int, version: str
) -> list[TaskScore]:
    """Return the scores in a table of lm-eval; a group that has its own stands for its parts."""
    tables = results["results"]
    parts = results.get("group_subtasks", {})
    measures = {name: _measures(table) for name, table in tables.items()}
    hidden = {part for name in tables if measures[name] for part in parts.get(name, ())}
    scores = []
    for name in tables.keys() - hidden:
        found = measures[name]
        if not found:
            continue
        metric = next((m for m in _HEADLINES if m in found), next(iter(found)))
        higher = results.get("higher_is_better", {}).get(name, {}).get(metric)
        counts = [
            int(results.get("n-samples", {}).get(part, {}).get("effective", 0))
            for part in (name, *parts.get(name, ()))
        ]
        scores.append(
            TaskScore(
                task=name,
                shots=shots,
                metric=metric,
                value=found[metric][0],
                error=found[metric][1],
                higher_is_better=higher is not False,
                num_questions=sum(counts),
                limit=limit,
                num_cut=num_cut,
                version=version,
                metrics={measure: value for measure, (value, _) in found.items()},
            )
        )
    return sorted(scores, key=lambda score: score.task)


def _measures(table: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return measure -> (value, standard error) of one task; `acc,none` is the measure acc."""
    found: dict[str, tuple[float, float | None]] = {}
    for key, value in table.items():
        measure, comma, filtered = key.partition(",")
        number = _finite(value)
        if not comma or measure.endswith("_stderr") or number is None:
            continue
        # Of several filters of an answer, the first.
        error = _finite(table.get(f"{measure}_stderr,{filtered}"))
        found.setdefault(measure, (number, error))
    return found


def _finite(value: object) -> float | None:
    """Return a finite number, None for anything else: lm-eval writes `N/A`, and NaN."""
    return float(value) if finite(value) else None


def write_scores(folder: Path, scores: Iterable[TaskScore]) -> None:
    """Add scores to a model's `tasks.json`; one of the same questions is replaced."""
    merged = {score.key: score for score in (*read_scores(folder), *scores)}
    ordered = sorted(merged.values(), key=lambda s: (s.task, s.shots, s.limit or math.inf))
    rows = [{k: v for k, v in asdict(score).items() if v is not None} for score in ordered]
    write_json(folder / TASKS, {"scores": rows, "environment": environment_record()})


def read_scores(folder: Path) -> tuple[TaskScore, ...]:
    """Return the scores of a model, none where it has no `tasks.json`; `StudyError` if damaged."""
    path = folder / TASKS
    if not path.is_file():
        return ()
    rows = read_table(path, "scores")["scores"]
    try:
        return tuple(_score(row) for row in rows)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise StudyError(
            f"{path}: not the scores of a model ({error!r})",
            cure="Remove it, and run the tasks again: regmix-fast evaluate --tasks LIST",
        ) from error


def _score(row: Mapping[str, Any]) -> TaskScore:
    error, limit = row.get("error"), row.get("limit")
    if not math.isfinite(float(row["value"])):
        raise ValueError(f"the value {row['value']}")
    for name in (row["task"], row["metric"], *row["metrics"]):
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{name!r} is no name")
    return TaskScore(
        task=row["task"],
        shots=int(row["shots"]),
        metric=row["metric"],
        value=float(row["value"]),
        error=None if error is None else float(error),
        higher_is_better=bool(row["higher_is_better"]),
        num_questions=int(row["num_questions"]),
        limit=None if limit is None else int(limit),
        num_cut=int(row["num_cut"]),
        version=str(row["version"]),
        metrics={str(name): float(value) for name, value in row["metrics"].items()},
    )


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """Models by task: what was asked alike is one column.

    columns: task, examples in the prompt, measure. cells: model -> (value, standard error over
    the questions) by column, None where the model was not asked; the error is None over several
    numbers of examples. averages: model -> mean of the accuracies that all models have, if any.
    """

    columns: tuple[str, ...]
    cells: dict[str, tuple[tuple[float, float | None] | None, ...]]
    averages: dict[str, float | None]


def compare_scores(models: Mapping[str, Sequence[TaskScore]]) -> TaskTable:
    """Return the table of several models; a task asked with several numbers is their mean."""
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    accuracies: set[str] = set()
    for model, scores in models.items():
        groups: dict[tuple[str, str, int | None], list[TaskScore]] = {}
        for score in scores:
            groups.setdefault((score.task, score.metric, score.limit), []).append(score)
        found[model] = {}
        for (task, metric, limit), group in groups.items():
            label = f"{task}, {_span([score.shots for score in group])}-shot {metric}"
            label += "" if limit is None else f", first {limit}"
            value = math.fsum(score.value for score in group) / len(group)
            found[model][label] = (value, group[0].error if len(group) == 1 else None)
            if metric in _HEADLINES:
                accuracies.add(label)
    columns = sorted({label for cells in found.values() for label in cells})
    shared = [c for c in columns if c in accuracies and all(c in cells for cells in found.values())]
    return TaskTable(
        columns=tuple(columns),
        cells={model: tuple(cells.get(c) for c in columns) for model, cells in found.items()},
        averages={
            model: math.fsum(cells[c][0] for c in shared) / len(shared) if shared else None
            for model, cells in found.items()
        },
    )


def _span(numbers: Sequence[int]) -> str:
    """Return numbers shortly: `3`, `0–5`, `0, 5`."""
    ordered = sorted(numbers)
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}–{ordered[-1]}"
    return ", ".join(map(str, ordered))
