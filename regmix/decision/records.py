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
from regmix.decision.objective import Objective
from regmix.decision.optimum import Optimum
from regmix.decision.regressors.powerlaw import PowerLawModel
from regmix.decision.runs import Runs
from regmix.decision.surrogate import Surrogate
from regmix.decision.validation import Score, score
from regmix.files import atomic_open, write_json


def fit_record(model: Surrogate, runs: Runs, objective: Objective) -> dict[str, Any]:
    """Return what `fit.json` holds: the choice, its reason, held-out errors, exchange rates."""
    true, predicted = objective.of_all(model.losses), objective.of_all(model.held_out)
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
        "targets": {entry.target: _numbers(entry) for entry in model.scores},
        "objective": {
            "name": objective.name,
            **_numbers(score("objective", true, predicted)),
        },
        "members": {
            name: {entry.target: _numbers(entry) for entry in scores}
            for name, scores in model.member_scores.items()
        },
        "exchange_rates": _exchange_rates(model),
    }


def _numbers(entry: Score) -> dict[str, float | None]:
    return {"spearman": entry.spearman, "rmse_nats": entry.rmse_nats}


def _exchange_rates(model: Surrogate) -> dict[str, dict[str, float]]:
    """Return, by target, what a token of each domain is worth by the power law (the best: 1)."""
    for member in model.members:
        if isinstance(member.model, PowerLawModel):
            rates = member.model.exchange_rates().tolist()
            return {
                target: dict(zip(model.domains, row, strict=True))
                for target, row in zip(model.targets, rates, strict=True)
            }
    return {}


def write_fit(folder: Path, model: Surrogate, runs: Runs, objective: Objective) -> None:
    """Write `predictions.csv` (index, true and held-out losses), then `fit.json`."""
    header = [f"true/{name}" for name in model.targets]
    header += [f"predicted/{name}" for name in model.targets]
    table = np.hstack([model.losses, model.held_out])
    with atomic_open(folder / "predictions.csv", "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["index", *header])
        for index, row in zip(runs.indices, table.tolist(), strict=True):
            writer.writerow([index, *(repr(value) for value in row)])
    write_json(folder / "fit.json", fit_record(model, runs, objective))


def optimum_record(best: Optimum, model: Surrogate) -> dict[str, Any]:
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
        "gain_error_nats": best.gain_error,
        "epochs": best.epochs,
        "budget_tokens": limits.budget_tokens and round(limits.budget_tokens),
        "max_epochs": limits.max_epochs,
        "bounds": {name: [low, high] for name, low, high in bounds if low > 0 or high < 1},
        "at_edge": list(best.at_edge),
        "method": best.method,
        "seed": best.seed,
        "surrogate": {member.name: member.share for member in model.members},
        "scale": "proxies: losses of larger models lie elsewhere, their order carries over",
        "verdict": best.verdict,
    }


def write_optimum(path: Path, best: Optimum, model: Surrogate) -> None:
    """Write `optimum.json` beside `path`, then the mixture and the decision to `path` (YAML)."""
    record = optimum_record(best, model)
    write_json(path.with_suffix(".json"), record)
    told = {key: record[key] for key in record if key not in ("domains", "weights", "baselines")}
    told["baselines"] = {entry.name: entry.loss for entry in best.baselines}
    write_mixture_yaml(
        path, best.mixture, valid=record["objective"], sections={"regmix_fast": told}
    )
