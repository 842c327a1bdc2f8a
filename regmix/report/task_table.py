"""The report's table of downstream tasks: a row a model, and a row a mixture over its seeds.

Enters: the facts of a study. Leaves: words and numbers for the page's template, not yet escaped;
None where no model was asked anything. Compares only what was asked alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regmix.large.comparison import display_order, mean_and_error
from regmix.large.scores import compare_scores
from regmix.report.facts import Facts
from regmix.report.words import NONE


def task_table(facts: Facts) -> dict[str, Any] | None:
    """Return `columns`, and `rows` of a name and cells; a mean over seeds has its own row."""
    asked = [model for model in facts.models if model.scores]
    if not asked:
        return None
    asked.sort(key=lambda model: (*display_order(model.mixture), model.replicate))
    table = compare_scores({model.name: model.scores for model in asked})
    columns = list(table.columns)
    cells = {name: list(row) for name, row in table.cells.items()}
    if len(columns) > 1 and None not in table.averages.values():
        columns.append("average")
        for name, value in table.averages.items():
            cells[name].append(None if value is None else (value, None))
    rows = []
    for mixture in dict.fromkeys(model.mixture for model in asked):
        names = [model.name for model in asked if model.mixture == mixture]
        rows += [
            {"name": name, "cells": [_shown(cell) for cell in cells[name]], "is_mean": False}
            for name in names
        ]
        if len(names) > 1:
            over = [_over_seeds([cells[name][at] for name in names]) for at in range(len(columns))]
            name = f"{mixture}, mean of {len(names)}"
            rows.append({"name": name, "cells": over, "is_mean": True})
    return {"columns": columns, "rows": rows}


def _shown(cell: tuple[float, float | None] | None) -> str:
    if cell is None:
        return NONE
    value, error = cell
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _over_seeds(cells: Sequence[tuple[float, float | None] | None]) -> str:
    """Return mean and standard error over seeds; nothing where a model lacks the score."""
    values = [cell[0] for cell in cells if cell is not None]
    return _shown(mean_and_error(values)) if len(values) == len(cells) else NONE
