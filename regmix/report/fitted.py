"""What `fit` learned besides predictions, as `fit.json` holds it.

Enters: that file (older ones hold plain exchange rates and neither curve, influence nor noise).
Leaves: `Fitted`, whose parts are None or empty where the file lacks them. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.config import finite
from regmix.decision.learning import CurvePoint, LearningCurve
from regmix.large.comparison import damaged
from regmix.report.estimates import ByTarget, by_target, entries, estimate, number, table


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit says of itself.

    held_out_by: how the error was found; curve: of the objective; influence: target -> domain ->
    change in nats when the weight rises by `raised_by` from the mixture `at`; rates: what a token
    of a domain is worth for a target; noise_nats: between seeds, of the objective.
    """

    held_out_by: str
    curve: LearningCurve | None
    influence: ByTarget
    raised_by: float
    at: dict[str, float]
    rates: ByTarget
    noise_nats: float | None
    noise_source: str
    noise_measured: bool


def read_fitted(found: Mapping[str, Any], path: Path) -> Fitted:
    """Return what a fit that was read from `path` holds; `StudyError` names what cannot be used."""
    influence = table(found.get("influence"), path, "influence")
    noise = table(found.get("noise"), path, "noise")
    objective = table(found.get("objective"), path, "objective")
    raised = number(influence.get("raised_by"))
    at = entries(influence.get("at"), path, "at", estimate)
    return Fitted(
        held_out_by=str(found.get("held_out_by") or ""),
        curve=_curve(found.get("learning_curve"), path),
        influence=by_target(influence.get("change_nats"), path, "change_nats"),
        raised_by=0.05 if raised is None else raised,
        at={domain: weight.mean for domain, weight in at.items()},
        rates=by_target(found.get("exchange_rates"), path, "exchange_rates"),
        noise_nats=number(objective.get("noise_nats")),
        noise_source=str(noise.get("source") or ""),
        noise_measured=bool(noise.get("measured")),
    )


def _curve(value: Any, path: Path) -> LearningCurve | None:
    found = table(value, path, "learning_curve")
    if not found:
        return None
    try:
        points = tuple(
            CurvePoint(
                num_runs=int(point["num_runs"]),
                rmse_nats=float(point["rmse_nats"]),
                rmse_sd_nats=float(point.get("rmse_sd_nats") or 0.0),
                spearman=number(point.get("spearman")),
            )
            for point in found["points"]
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"'learning_curve' has no points to draw ({error!r})") from error
    usable = (p for p in points if p.num_runs > 0 and finite(p.rmse_nats) and p.rmse_nats > 0)
    return LearningCurve(
        points=tuple(sorted(usable, key=lambda point: point.num_runs)),
        exponent=number(found.get("exponent")),
        advice=str(found.get("advice") or ""),
    )
