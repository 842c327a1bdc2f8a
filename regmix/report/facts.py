"""What a report tells: the parts of a study that exist, read from its files.

Enters: a study. Leaves: `Facts`, whose parts are None or empty where the study has none yet. The
final models are read and compared by `large.comparison`. Writes nothing and words nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from regmix.config import finite
from regmix.data.mixtures import MixtureTable, read_index_table
from regmix.data.npy import read_numbers
from regmix.decision.objective import make_objective
from regmix.decision.tradeoffs import tradeoffs_path
from regmix.large.comparison import (
    FinalModel,
    Gain,
    MixtureResult,
    damaged,
    display_order,
    gains_of,
    group_models,
    mean_curve,
    read_models,
    read_table,
)
from regmix.report.decided import Decided, read_decided, read_optimum
from regmix.report.estimates import Interval, table, tables_in
from regmix.report.fitted import Fitted, read_fitted
from regmix.report.predictions import OBJECTIVE, Predictions, numbers, read_predictions
from regmix.report.tradeoffs import Traded, read_traded
from regmix.study import Study

# Weights that went through a file differ by less.
_SAME_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that is known of a study; a part it does not have yet is None or empty."""

    study: Study
    mixtures: MixtureTable | None
    losses: dict[int, dict[str, float]]
    fit: dict[str, Any] | None
    fitted: Fitted | None
    predictions: Predictions | None
    optimum: dict[str, Any] | None
    decided: Decided | None
    traded: Traded | None
    models: tuple[FinalModel, ...]
    curves: dict[int, np.ndarray] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None

    def objective_of(self, losses: Mapping[str, float]) -> float | None:
        """Return the study's objective for one row of losses, None where one is missing."""
        return weighted(self.study.config.objective, losses)

    @property
    def optimum_weights(self) -> dict[str, float] | None:
        """Domain -> weight of the optimum."""
        if self.optimum is None:
            return None
        return dict(zip(self.optimum["domains"], self.optimum["weights"], strict=True))

    @property
    def model_curves(self) -> dict[str, np.ndarray]:
        """Mixture -> training loss by step [nats], mean over the compared final models."""
        curves = {result.mixture: mean_curve(result) for result in self.compared}
        return {mixture: curve for mixture, curve in curves.items() if curve is not None}

    @property
    def objective_scores(self) -> dict[str, Any]:
        """How well the objective was predicted; its coverage is known where it is one target."""
        fit = self.fit or {}
        scores = dict(fit.get(OBJECTIVE) or {})
        only = list(self.study.config.objective)
        if scores and len(only) == 1 and self.other_fit_objective is None:
            scores["coverage"] = (fit["targets"].get(only[0]) or {}).get("coverage")
        return scores

    @property
    def other_fit_objective(self) -> str | None:
        """The objective that the surrogate was judged by, where it is not the study's."""
        name = ((self.fit or {}).get(OBJECTIVE) or {}).get("name")
        return None if name in (None, self._objective_name) else str(name)

    @property
    def other_optimum_objective(self) -> str | None:
        """The objective that the optimum was found for, where it is not the study's."""
        name = (self.optimum or {}).get("objective_name")
        return None if name in (None, self._objective_name) else str(name)

    @property
    def _objective_name(self) -> str:
        config = self.study.config
        targets = [target for target in config.targets if target in config.objective]
        return make_objective({t: config.objective[t] for t in targets}, config.targets).name

    @property
    def best_proxy(self) -> int | None:
        """The proxy of the lowest objective, None before any has all of its losses."""
        values = {index: self.objective_of(losses) for index, losses in self.losses.items()}
        known = {index: value for index, value in values.items() if value is not None}
        return min(known, key=lambda index: (known[index], index), default=None)

    @property
    def known_mixtures(self) -> dict[str, dict[str, float]]:
        """The mixtures to show side by side: optimum, natural, uniform, best observed."""
        config = self.study.config
        shown = {
            "natural": dict(config.prior),
            "uniform": {domain: 1 / len(config.train_domains) for domain in config.train_domains},
        }
        if self.optimum_weights is not None:
            shown = {"optimum": self.optimum_weights, **shown}
        best = self.best_proxy
        if best is not None and self.mixtures is not None and best in self.mixtures.indices:
            row = self.mixtures.indices.index(best)
            shown["best observed"] = dict(self.mixtures.mixture(row))
        return shown

    @property
    def ordered_domains(self) -> list[str]:
        """The domains, the heaviest in the optimum (or naturally) first."""
        config = self.study.config
        weights = self.optimum_weights or config.prior
        names = sorted({*config.train_domains, *weights})
        return sorted(names, key=lambda domain: -weights.get(domain, 0.0))

    @property
    def epochs(self) -> dict[str, float]:
        """Domain -> epochs under the optimum, where they are known."""
        epochs = (self.optimum or {}).get("epochs") or {}
        return {d: float(epochs[d]) for d in self.ordered_domains if finite(epochs.get(d))}

    @property
    def observed(self) -> dict[str, Interval]:
        """Domain -> its smallest and largest weight in any mixture that was trained on, or drawn.

        Those without losses count only where none has losses yet.
        """
        if self.mixtures is None or not len(self.mixtures):
            return {}
        trained = [index in self.losses for index in self.mixtures.indices]
        weights = self.mixtures.weights[trained if any(trained) else slice(None)]
        ends = zip(weights.min(0).tolist(), weights.max(0).tolist(), strict=True)
        return dict(zip(self.mixtures.domains, ends, strict=True))

    @property
    def influence_from(self) -> str:
        """Where the influence of the domains was told, in words."""
        at, prior = {} if self.fitted is None else self.fitted.at, self.study.config.prior
        # Frozen domains stand there as one, whose weight is theirs together.
        known = [abs(weight - prior[d]) < _SAME_WEIGHT for d, weight in at.items() if d in prior]
        return "the natural mixture" if all(known) else "the mean of the runs"

    @property
    def compared(self) -> list[MixtureResult]:
        """The final models that were trained alike, by mixture; the optimum comes first."""
        return sorted(group_models(self.models), key=lambda r: display_order(r.mixture))

    @property
    def gains(self) -> list[Gain]:
        """What the optimum gains over each other mixture."""
        return gains_of(self.compared)


def weighted(objective: Mapping[str, float], losses: Mapping[str, float]) -> float | None:
    """Return the weighted mean of losses, weights scaled to 1; None where a loss is missing."""
    total = math.fsum(objective.values())
    values = [losses.get(target) for target in objective]
    if total <= 0 or any(value is None or not math.isfinite(value) for value in values):
        return None
    pairs = zip(objective.values(), values, strict=True)
    return math.fsum(weight * float(value or 0.0) for weight, value in pairs) / total


def read_facts(study: Study) -> Facts:
    """Read every part of a study that exists; `StudyError` names a file that cannot be used."""
    optimum_path = study.path / "optimum.json"
    fit_path = study.surrogate_path / "fit.json"
    predictions_path = study.surrogate_path / "predictions.csv"
    sweep_path = study.path / "sweep.json"
    fit = read_table(fit_path, "targets") if fit_path.is_file() else None
    if fit is not None:
        tables_in(table(fit["targets"], fit_path, "targets"), fit_path, "targets")
        table(fit.get("choice"), fit_path, "choice")
        dropped = fit.get("dropped") or []
        if not isinstance(dropped, list) or not all(
            isinstance(run, dict) and {"index", "reason"} <= run.keys() for run in dropped
        ):
            raise damaged(fit_path, "'dropped' is no list of runs")
    optimum = read_optimum(optimum_path, study.config.prior) if optimum_path.is_file() else None
    return Facts(
        study=study,
        mixtures=MixtureTable.read_csv(study.mixtures_path)
        if study.mixtures_path.is_file()
        else None,
        losses=_read_losses(study.losses_path) if study.losses_path.is_file() else {},
        fit=fit,
        fitted=None if fit is None else read_fitted(fit, fit_path),
        predictions=read_predictions(predictions_path, study.config.objective)
        if predictions_path.is_file()
        else None,
        optimum=optimum,
        decided=None if optimum is None else read_decided(optimum, optimum_path),
        traded=_read_tradeoffs(study, optimum),
        models=read_models(study),
        curves=_read_curves(study.steps_path),
        sweep=read_table(sweep_path) if sweep_path.is_file() else None,
    )


def _read_tradeoffs(study: Study, optimum: Mapping[str, Any] | None) -> Traded | None:
    path = tradeoffs_path(study.optimum_path)
    if optimum is None or not path.is_file():
        return None
    return read_traded(path, dict(zip(optimum["domains"], optimum["weights"], strict=True)))


def _read_losses(path: Path) -> dict[int, dict[str, float]]:
    header, indices, rows = read_index_table(path)
    targets = [name.removeprefix("metric/").removesuffix("_val_loss") for name in header]
    return {
        index: dict(zip(targets, numbers(cells, path), strict=True))
        for index, cells in zip(indices, rows, strict=True)
    }


def _read_curves(folder: Path) -> dict[int, np.ndarray]:
    curves = {}
    for path in sorted(folder.glob("*.npy")):
        if not path.stem.isdecimal():
            continue
        try:
            curve = read_numbers(path)
        except (ValueError, OSError) as error:
            raise damaged(path, f"not the losses of a proxy's steps ({error})") from error
        if curve.ndim == 1 and len(curve):
            curves[int(path.stem)] = curve
    return curves
