"""The search for the optimum on published runs: how long it takes, and what `exact` gains.

Enters: tables of mixtures and losses in RegMix's format, a prior. Leaves: records of the seconds
of `optimize` and of the values that `simulate` and `exact` reach, by regressor, objective and
constraint, and of how many of the best 128 draws the screening of all 100,000 finds.

    python -m regmix_bench.search --mixtures CSV --losses CSV --prior YAML --target pile_cc \\
        --json FILE
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from regmix.data.mixtures import read_mixture_yaml
from regmix.decision.objective import make_objective
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.regressors.registry import REGRESSORS
from regmix.decision.runs import Runs, read_runs, resolve
from regmix.decision.searching.constraints import make_constraints, upper_is_own
from regmix.decision.searching.predictor import Predictor
from regmix.decision.searching.simulation import NUM_AVERAGED, all_draws, draw
from regmix.decision.surrogate import Surrogate, fit
from regmix_bench.harness import Record, append, table

SUITE = "search"
_LONGEST_SECONDS = 5.0
_MAX_EPOCHS, _KL, _TOLERANCE_NATS = 4.0, 0.05, 0.02


def constraints(prior: np.ndarray) -> dict[str, dict[str, Any]]:
    """Return the constraints by name; the run is as long as all tokens that exist."""
    epochs = {
        "available_tokens": np.maximum(prior, 1e-6) * 1e12,
        "budget_tokens": 1e12,
        "max_epochs": _MAX_EPOCHS,
    }
    guard = {"guard": "natural", "guard_tolerance": _TOLERANCE_NATS}
    return {
        "no constraint": {},
        f"{_MAX_EPOCHS:g} epochs": epochs,
        f"guard of {_TOLERANCE_NATS:g} nats": guard,
        f"KL of {_KL:g}": {"kl": _KL},
        "all three": {**epochs, **guard, "kl": _KL},
    }


def timed(model: Surrogate, method: str, **wanted: Any) -> tuple[float, Optimum]:
    """Return the seconds of `optimize` and what it found."""
    started = time.perf_counter()
    best = optimize(model, method=method, **wanted)
    return time.perf_counter() - started, best


def search_records(model: Surrogate, objective: str, prior: np.ndarray) -> list[Record]:
    """Return seconds and values of both methods under every constraint."""
    records = []
    for name, limits in constraints(prior).items():
        case = f"{model.regressor}, {objective}, {name}"
        wanted = {"objective": objective, "prior": prior, **limits}
        simulated = timed(model, "simulate", **wanted)[1]
        seconds, exact = timed(model, "exact", **wanted)
        records += [
            Record(
                suite=SUITE,
                case=case,
                metric="optimize",
                value=seconds,
                unit="s",
                ceiling=f"{_LONGEST_SECONDS:g} s",
                ratio_to_ceiling=seconds / _LONGEST_SECONDS,
            ),
            Record(
                suite=SUITE,
                case=case,
                metric="exact",
                value=exact.minimised,
                unit="nats",
                peer="simulate",
                ratio_to_peer=exact.minimised / simulated.minimised,
            ),
            Record(
                suite=SUITE,
                case=case,
                metric="exact below simulate",
                value=simulated.minimised - exact.minimised,
                unit="nats",
            ),
        ]
    return records


def found_record(model: Surrogate, objective: str, prior: np.ndarray) -> Record:
    """Return the share of the best 128 of all draws that the screened draws hold."""
    predictor = Predictor(model, make_objective(objective, model.targets))
    limits = make_constraints(model.domains).within(
        model.weights.max(0), upper_is_own(None, model.domains)
    )
    centre = np.maximum(prior, 1e-6)
    draws = all_draws(limits, centre, 0)
    best = draws[np.argsort(predictor.value(draws), kind="stable")[:NUM_AVERAGED]]
    screened = draw(predictor, limits, centre, 0).draws[:NUM_AVERAGED]
    kept = {row.tobytes() for row in screened} & {row.tobytes() for row in best}
    return Record(
        suite=SUITE,
        case=f"{model.regressor}, {objective}",
        metric="best 128 draws found",
        value=100 * len(kept) / NUM_AVERAGED,
        unit="%",
    )


def measure(runs: Runs, prior: np.ndarray, target: str, name: str) -> list[Record]:
    """Return the records of the named regressor."""
    model = fit(runs.weights, runs.losses, regressor=name)
    # What is compiled at first use is no part of a search.
    model.mean(model.weights[:2])
    records = []
    for objective in (target, "mean", "worst"):
        records += search_records(model, objective, prior)
        records.append(found_record(model, objective, prior))
    return records


def main() -> None:
    """Measure and print, and append to a file of records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--mixtures", "--losses"):
        parser.add_argument(option, required=True, metavar="CSV")
    parser.add_argument("--prior", metavar="YAML", help="natural mixture; else the runs' mean")
    parser.add_argument("--target", required=True)
    parser.add_argument("--regressors", nargs="+", default=[*REGRESSORS, "auto"])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    runs = read_runs(options.mixtures, options.losses)
    prior = np.asarray(runs.weights).mean(0)
    if options.prior:
        prior = read_mixture_yaml(options.prior, normalise=True).array(runs.domains)
    target = resolve(options.target, runs.targets, "target")
    for name in options.regressors:
        records = measure(runs, prior, target, name)
        if options.json:
            append(options.json, records)
        print(table(records), flush=True)


if __name__ == "__main__":
    main()
