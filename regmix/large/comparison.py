"""Final models side by side: each mixture's losses over its replicates, paired by replicate.

Enters: a study's models with their evaluations and metrics. Leaves: the models trained alike, by
mixture, with mean and spread, gains over the same seeds, and mean training curves. The demo and
the report both tell what is found here. Trains, evaluates and plots nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.config import finite
from regmix.errors import StudyError
from regmix.files import read_json, read_text
from regmix.large.scores import TaskScore, read_scores
from regmix.study import Study

_FIRST_SHOWN = ("optimum", "natural", "uniform")


@dataclass(frozen=True, kw_only=True)
class FinalModel:
    """A trained large model; losses in nats per token, absent where it was not evaluated.

    objective: None before the evaluation; training and summary as its files have them; scores on
    downstream tasks, if it was asked any.
    """

    name: str
    mixture: str
    replicate: int
    folder: Path
    training: dict[str, Any]
    summary: dict[str, Any]
    objective: float | None
    losses: dict[str, float]
    bits_per_byte: dict[str, float]
    scores: tuple[TaskScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MixtureResult:
    """models [R]: the evaluated models of one mixture, by replicate."""

    mixture: str
    models: tuple[FinalModel, ...]

    @property
    def replicates(self) -> tuple[int, ...]:
        """The replicate of each model [R]; models with the same one share their seeds."""
        return tuple(model.replicate for model in self.models)

    @property
    def losses(self) -> tuple[float, ...]:
        """The objective of each model [R], nats per token."""
        return self.losses_of(None)

    @property
    def mean(self) -> float:
        """Mean objective over the replicates."""
        return mean_and_spread(self.losses)[0]

    @property
    def spread(self) -> float | None:
        """Standard deviation of the objective over the replicates; None for a single one."""
        return mean_and_spread(self.losses)[1]

    def losses_of(self, target: str | None) -> tuple[float, ...]:
        """Return each model's loss on a target, None for the objective [R], nats per token."""
        if target is not None:
            return tuple(model.losses[target] for model in self.models)
        found = [model.objective for model in self.models]
        return tuple(loss for loss in found if loss is not None)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much lower the optimum's objective is than a baseline's, over the same seeds.

    error_nats: standard error of the mean difference; None for a single seed.
    pairs_nats: the differences that the mean is of, one a replicate; above 0 the optimum is better.
    """

    baseline: str
    mean_nats: float
    error_nats: float | None
    pairs_nats: tuple[float, ...] = ()

    @property
    def num_better(self) -> int:
        """Pairs in which the optimum is better."""
        return sum(pair > 0 for pair in self.pairs_nats)

    def __str__(self) -> str:
        error = "" if self.error_nats is None else f" ± {self.error_nats:.4f}"
        word = "ahead of" if self.mean_nats > 0 else "behind"
        return f"{word} {self.baseline} by {abs(self.mean_nats):.4f}{error} nats"


def compare_models(study: Study) -> list[MixtureResult]:
    """Return the results of the final models that were trained alike, best mixture first."""
    return group_models(read_models(study))


def read_models(study: Study) -> tuple[FinalModel, ...]:
    """Read every finished model of a study; `StudyError` names a file that cannot be used."""
    paths = sorted(study.models_path.glob("*/summary.json"))
    return tuple(_read_model(path.parent) for path in paths)


def group_models(models: Iterable[FinalModel]) -> list[MixtureResult]:
    """Return evaluated models by mixture, best first; the largest group trained alike counts.

    Losses of another length of training, shape or batch would say nothing about the mixture.
    """
    groups: dict[str, list[FinalModel]] = {}
    for model in models:
        if model.objective is not None:
            groups.setdefault(repr(model.training), []).append(model)
    mixtures: dict[str, list[FinalModel]] = {}
    for model in max(groups.values(), key=len, default=[]):
        mixtures.setdefault(model.mixture, []).append(model)
    results = [
        MixtureResult(mixture=name, models=tuple(sorted(found, key=lambda m: m.replicate)))
        for name, found in mixtures.items()
    ]
    return sorted(results, key=lambda result: (result.mean, result.mixture))


def gains_of(results: Sequence[MixtureResult], mixture: str = "optimum") -> list[Gain]:
    """Return the gains of `mixture` over every other mixture, over the seeds that both have."""
    ours = next((result for result in results if result.mixture == mixture), None)
    gains = []
    for other in results:
        pairs = () if ours is None or other is ours else pair_losses(ours, other)
        if not pairs:
            continue
        mean, error = mean_and_error(pairs)
        gains.append(
            Gain(baseline=other.mixture, mean_nats=mean, error_nats=error, pairs_nats=pairs)
        )
    return gains


def pair_losses(
    ours: MixtureResult, other: MixtureResult, target: str | None = None
) -> tuple[float, ...]:
    """Return the other's loss minus ours for each replicate that both have, nats per token.

    target: None for the objective.
    """
    mine = dict(zip(ours.replicates, ours.losses_of(target), strict=True))
    theirs = zip(other.replicates, other.losses_of(target), strict=True)
    return tuple(loss - mine[replicate] for replicate, loss in theirs if replicate in mine)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation; the latter is None for a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and its standard error; the latter is None for a single value."""
    mean, spread = mean_and_spread(values)
    return mean, None if spread is None else spread / math.sqrt(len(values))


def display_order(mixture: str) -> tuple[int, str]:
    """Return the key that sorts mixtures for a reader: optimum, natural, uniform, others."""
    known = mixture in _FIRST_SHOWN
    return (_FIRST_SHOWN.index(mixture) if known else len(_FIRST_SHOWN)), mixture


def mean_curve(result: MixtureResult) -> np.ndarray | None:
    """Return the training loss by step, mean over the replicates; None where one has no metrics."""
    paths = [model.folder / "metrics.jsonl" for model in result.models]
    if not all(path.is_file() for path in paths):
        return None
    curves = [_read_curve(path) for path in paths]
    for path, curve in zip(paths, curves, strict=True):
        if len(curve) != len(curves[0]):
            raise damaged(path, f"{len(curve)} steps, where {paths[0]} has {len(curves[0])}")
    return np.asarray(np.mean(curves, axis=0)) if len(curves[0]) else None


def damaged(path: Path, why: str) -> StudyError:
    """Return the error for a part of a study that cannot be used."""
    return StudyError(f"{path}: {why}", cure="Restore the file, or run the command that made it")


def read_table(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON table that has `keys`; `StudyError` where it is none or lacks one."""
    table = read_json(path)
    missing = [key for key in keys if not isinstance(table, dict) or key not in table]
    if not isinstance(table, dict) or missing:
        raise damaged(path, f"no '{missing[0]}' in it" if missing else "not a table")
    return table


def _read_model(folder: Path) -> FinalModel:
    summary = read_table(folder / "summary.json", "name", "mixture")
    replicate = summary.get("replicate", 0)
    if not isinstance(replicate, int) or not finite(summary.get("tokens", 0)):
        raise damaged(folder / "summary.json", "'replicate' or 'tokens' is no number")
    for name in (summary["name"], summary["mixture"]):
        if not isinstance(name, str) or not name.isprintable():
            raise damaged(folder / "summary.json", f"{name!r} is no name")
    for key in ("training", "member"):
        if not isinstance(summary.get(key, {}), dict):
            raise damaged(folder / "summary.json", f"'{key}' is not a table")
    evaluation_path = folder / "evaluation.json"
    evaluation: dict[str, Any] = {"targets": {}, "objective": {}}
    if evaluation_path.is_file():
        evaluation = read_table(evaluation_path, "targets", "objective")
    try:
        rows, objective = evaluation["targets"], evaluation["objective"].get("loss_nats")
        losses = {target: float(row["loss_nats"]) for target, row in rows.items()}
        bits = {target: float(row.get("bits_per_byte", math.nan)) for target, row in rows.items()}
        objective = None if objective is None else float(objective)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(evaluation_path, f"no losses by target ({error!r})") from error
    return FinalModel(
        name=summary["name"],
        mixture=summary["mixture"],
        replicate=replicate,
        folder=folder,
        training=dict(summary.get("training", {})),
        summary=summary,
        objective=objective,
        losses=losses,
        bits_per_byte=bits,
        scores=read_scores(folder),
    )


def _read_curve(path: Path) -> np.ndarray:
    try:
        losses = [float(json.loads(line)["loss_nats"]) for line in read_text(path).splitlines()]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise damaged(path, f"not the losses of a model's steps ({error!r})") from error
    return np.array(losses)
