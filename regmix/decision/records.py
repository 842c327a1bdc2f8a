"""What a study keeps of a fit and of an optimum, as files.

Enters: a surrogate or an optimum. Leaves: `fit.json` and `predictions.csv`; `optimum.json` and
`optimum.yaml` (RegMix's format and a section of ours). No time and no path is in them, so the same
command writes the same bytes.
"""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.mixtures import write_mixture_yaml
from regmix.data.schedules import schedule_section
from regmix.decision.influence import RAISED_BY, exchange_table, influence
from regmix.decision.learning import LearningCurve
from regmix.decision.noise import noise_floor, objective_noise
from regmix.decision.objective import Objective
from regmix.decision.optimum import Optimum
from regmix.decision.regressors.gp import GPModel
from regmix.decision.runs import Runs
from regmix.decision.schedules.plan import SegmentPlan
from regmix.decision.surrogate import Surrogate
from regmix.decision.validation import Score, score
from regmix.files import atomic_open, write_json


def fit_record(
    model: Surrogate,
    runs: Runs,
    objective: Objective,
    *,
    curve: LearningCurve | None = None,
    mixture: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return what `fit.json` holds: the choice, its reason, held-out errors, noise, influences.

    mixture [D]: where the influence of domains is told, by default the mean of the runs.
    """
    true, predicted = objective.of_all(model.losses), objective.of_all(model.held_out)
    noise, exchange = noise_floor(model), exchange_table(model)
    centre = model.weights.mean(0) if mixture is None else mixture
    return {
        "regressor": model.regressor,
        "choice": {
            "why": model.reason,
            "members": {member.name: member.share for member in model.members},
        },
        "seed": model.seed,
        "num_runs": len(runs),
        "dropped": [asdict(run) for run in runs.dropped],
        "domains": list(model.domains),
        "constant_domains": list(runs.constant_domains),
        "held_out_by": model.how,
        "targets": {
            entry.target: _numbers(entry) | {"coverage": float(share)}
            for entry, share in zip(model.scores, model.coverage, strict=True)
        },
        "objective": {
            "name": objective.name,
            **_numbers(score("objective", true, predicted)),
            "noise_nats": objective_noise(model, objective),
        },
        "members": {
            name: {entry.target: _numbers(entry) for entry in scores}
            for name, scores in model.member_scores.items()
        },
        "retries": {
            member.name: member.model.num_retries
            for member in model.members
            if isinstance(member.model, GPModel)
        },
        "noise": noise
        and {
            "source": noise.words,
            "measured": noise.measured,
            "targets_nats": dict(zip(model.targets, noise.sd.tolist(), strict=True)),
        },
        "learning_curve": curve and curve.record(),
        "influence": {
            "at": dict(zip(model.domains, centre.tolist(), strict=True)),
            "raised_by": RAISED_BY,
            "change_nats": influence(model, centre).record(),
        },
        "exchange_rates": {} if exchange is None else exchange.record(),
    }


def _numbers(entry: Score) -> dict[str, float | None]:
    return {"spearman": entry.spearman, "rmse_nats": entry.rmse_nats}


def write_fit(folder: Path, model: Surrogate, runs: Runs, record: dict[str, Any]) -> None:
    """Write `predictions.csv` (index, true and held-out losses and their sd), then `fit.json`."""
    parts = {"true": model.losses, "predicted": model.held_out, "sd": model.held_out_sd}
    header = [f"{part}/{name}" for part in parts for name in model.targets]
    table = np.hstack(list(parts.values()))
    with atomic_open(folder / "predictions.csv", "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["index", *header])
        for index, row in zip(runs.indices, table.tolist(), strict=True):
            writer.writerow([index, *(repr(value) for value in row)])
    write_json(folder / "fit.json", record)


def optimum_record(
    best: Optimum, model: Surrogate, plan: SegmentPlan | None = None
) -> dict[str, Any]:
    """Return what `optimum.json` holds."""
    limits, names = best.constraints, best.domains
    targets = [model.targets[column] for column in best.objective.columns]
    pairs = zip(targets, best.objective.shares.tolist(), strict=True)
    bounds = zip(names, limits.lower.tolist(), limits.upper.tolist(), strict=True)
    return {
        "domains": list(names),
        "weights": best.weights.tolist(),
        "objective": dict(pairs),
        "objective_name": best.objective.name,
        "predicted": {
            "objective": best.loss,
            "targets": {name: mean for name, (mean, _) in best.per_target.items()},
            "standard_deviations": {name: std for name, (_, std) in best.per_target.items()},
        },
        "baselines": {
            entry.name: {
                "weights": list(entry.weights.values()),
                "objective": entry.loss,
                "feasible": entry.feasible,
            }
            for entry in best.baselines
        },
        "baseline": best.baseline,
        "gain_nats": {entry.name: entry.gain for entry in best.baselines},
        "gain_intervals_nats": {
            entry.name: [entry.gain_interval.low, entry.gain_interval.high]
            for entry in best.baselines
        },
        "better": {entry.name: entry.better for entry in best.baselines},
        "intervals": dict(zip(names, best.interval.tolist(), strict=True)),
        "objective_interval_nats": [best.loss_interval.low, best.loss_interval.high],
        "shortfall_nats": best.shortfall_nats,
        "noise_nats": best.noise_nats,
        "epochs": best.epochs,
        "budget_tokens": limits.budget_tokens and round(limits.budget_tokens),
        "max_epochs": limits.max_epochs,
        "bounds": {name: [low, high] for name, low, high in bounds if low > 0 or high < 1},
        "at_edge": list(best.at_edge),
        "kl": best.kl,
        "divergence_nats": best.divergence_nats,
        "guard": best.guard
        and {
            "name": best.guard.name,
            "weights": best.guard.weights.tolist(),
            "tolerance_nats": best.guard.tolerance_nats,
            "changes_nats": best.guard_changes,
        },
        "remarks": list(best.remarks),
        "method": best.method,
        "seed": best.seed,
        "surrogate": {member.name: member.share for member in model.members},
        "scale": "proxies: losses of larger models lie elsewhere, their order carries over",
        "action": best.action,
        "more_proxies": best.more_proxies,
        "verdict": best.verdict,
        **({} if plan is None else {"schedule": plan.record()}),
    }


def write_optimum(
    path: Path, best: Optimum, model: Surrogate, plan: SegmentPlan | None = None
) -> None:
    """Write `optimum.json` beside `path`, then the mixture and the decision to `path` (YAML).

    A plan that is believed becomes the section `segments`, which `train` follows.
    """
    record = optimum_record(best, model, plan)
    write_json(path.with_suffix(".json"), record)
    told = {key: record[key] for key in record if key not in ("domains", "weights", "baselines")}
    told["baselines"] = {entry.name: entry.loss for entry in best.baselines}
    sections: dict[str, Any] = {"regmix_fast": told}
    if plan is not None and plan.believed:
        sections = {"segments": schedule_section(plan.schedule), **sections}
    write_mixture_yaml(path, best.mixture, valid=record["objective"], sections=sections)
