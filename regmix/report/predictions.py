"""Held-out predictions beside the truth, as `fit` wrote them.

Enters: `predictions.csv` (older ones hold no standard deviations). Leaves: `Predictions` by target,
with the study's objective made of its targets. Judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from regmix.data.mixtures import read_index_table
from regmix.large.comparison import damaged

OBJECTIVE = "objective"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Target -> losses [K] in nats; rows are the proxies `indices`.

    sd: target -> standard deviation [K] of each prediction, where they are known.
    """

    indices: tuple[int, ...]
    true: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]
    sd: dict[str, np.ndarray] = field(default_factory=dict)


def numbers(cells: Sequence[str], path: Path) -> list[float]:
    """Return a row of a table; an empty cell is not a number, text is a `StudyError`."""
    try:
        return [float(cell) if cell.strip() else math.nan for cell in cells]
    except ValueError as error:
        raise damaged(path, str(error)) from error


def read_predictions(path: Path, objective: Mapping[str, float]) -> Predictions:
    """Read the predictions; the objective is added where all of its targets are there."""
    header, indices, rows = read_index_table(path)
    values = np.array([numbers(cells, path) for cells in rows]).reshape(len(rows), len(header))
    columns = dict(zip(header, values.T, strict=True))
    parts = {
        part: {
            name.removeprefix(f"{part}/"): column
            for name, column in columns.items()
            if name.startswith(f"{part}/")
        }
        for part in ("true", "predicted", "sd")
    }
    names = [target for target in parts["true"] if target in parts["predicted"]]
    if not names:
        raise damaged(path, "no columns 'true/<target>' and 'predicted/<target>'")
    true, predicted, sd = (
        {target: part[target] for target in names if target in part} for part in parts.values()
    )
    if OBJECTIVE not in predicted and set(objective) <= set(predicted):
        total = math.fsum(objective.values())
        shares = {target: weight / total for target, weight in objective.items()}
        errors = {target: predicted[target] - true[target] for target in shares}
        for part in (true, predicted):
            part[OBJECTIVE] = np.asarray(sum(w * part[target] for target, w in shares.items()))
        if set(objective) <= set(sd):
            sd[OBJECTIVE] = _combined(shares, sd, errors)
    return Predictions(indices=tuple(indices), true=true, predicted=predicted, sd=sd)


def _combined(
    shares: Mapping[str, float], sd: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the standard deviation [K] of a weighted mean whose errors go together as seen."""
    scaled = np.stack([share * sd[target] for target, share in shares.items()])
    if len(scaled) == 1:
        return np.asarray(scaled[0])
    held_out = np.stack(list(errors.values()))
    held_out = held_out[:, np.isfinite(held_out).all(0)]
    spread = held_out.std(1) if held_out.shape[1] > 1 else np.zeros(len(held_out))
    # Fewer than two runs, or errors that are all the same, say nothing: taken to go together.
    together = np.ones((len(scaled), len(scaled)))
    if (spread > 0).all():
        together = np.corrcoef(held_out)
    variance = np.einsum("tk,tu,uk->k", scaled, together, scaled)
    return np.asarray(np.sqrt(np.maximum(variance, 0)))
