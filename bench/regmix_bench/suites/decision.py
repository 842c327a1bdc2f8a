"""The decision on made-up runs whose law is known: how long it takes, how well it ranks.

Enters: settings. Leaves: seconds of a fit and of `optimize`, rank correlation on unseen mixtures,
and how far the optimum found is from the law's own best, as records. The runs follow the law of
data mixing (loss = c + k exp(-t w), arXiv 2403.16952) with noise; `regressors`, `search` and
`replay` measure the same on published runs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from regmix.decision.optimum import optimize
from regmix.decision.runs import NamedArray, Runs
from regmix.decision.surrogate import fit
from regmix_bench import regressors, search
from regmix_bench.harness import Record
from regmix_bench.suites.registry import Settings

SUITE = "decision"
NUM_DOMAINS, NUM_TARGETS, NUM_RUNS, NUM_UNSEEN = 6, 4, 64, 256
NOISE_NATS = 0.005
NUM_GUESSES = 100_000
DOMAINS = tuple(f"domain-{number}" for number in range(NUM_DOMAINS))
TARGETS = tuple(f"target-{number}" for number in range(NUM_TARGETS))


class Law:
    """Losses of mixtures: c + k exp(-t w) for each target."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.floor_M = draw.uniform(2.0, 3.0, NUM_TARGETS)
        self.scale_M = draw.uniform(0.8, 1.5, NUM_TARGETS)
        self.rate_MD = draw.gamma(0.7, 2.0, (NUM_TARGETS, NUM_DOMAINS))

    def losses(self, weights_KD: np.ndarray) -> np.ndarray:
        """Return the losses [K, M] of weights [K, D], without noise, in nats."""
        return self.floor_M + self.scale_M * np.exp(-weights_KD @ self.rate_MD.T)


def made_up(law: Law, num: int, seed: int, noise: float) -> Runs:
    """Return runs on random mixtures."""
    draw = np.random.default_rng(seed)
    weights = draw.dirichlet(np.full(NUM_DOMAINS, 1.0), num)
    losses = law.losses(weights) + draw.normal(0.0, noise, (num, NUM_TARGETS))
    return Runs(
        NamedArray.of(weights, DOMAINS),
        NamedArray.of(losses, TARGETS),
        DOMAINS,
        TARGETS,
        tuple(range(num)),
    )


def measure(settings: Settings) -> list[Record]:
    """Fit every regressor, search with the default one, and compare with the law."""
    law = Law()
    runs = made_up(law, NUM_RUNS, 1, NOISE_NATS)
    unseen = made_up(law, NUM_UNSEEN, 2, 0.0)
    names = ["linear", "lightgbm"] if settings.quick else list(regressors.REGRESSORS)
    settings.say(f"{NUM_RUNS} made-up runs of {NUM_DOMAINS} domains and {NUM_TARGETS} targets")
    found = regressors.measure(runs, unseen, 0, [NUM_RUNS], [*names, "auto"])
    records = regressors.records(found, TARGETS[0], NUM_UNSEEN, NUM_TARGETS)
    records = [record for record in records if "sd over" not in record.metric]
    model = fit(runs.weights, runs.losses)
    prior = np.arange(1.0, NUM_DOMAINS + 1) / np.arange(1, NUM_DOMAINS + 1).sum()
    if settings.quick:
        seconds, best = search.timed(model, "exact", objective="mean", prior=prior)
        case = f"{model.regressor}, mean, no constraint"
        records.append(
            Record(suite="search", case=case, metric="optimize", value=seconds, unit="s")
        )
    else:
        # How far below is in the other two, and more of it would not read as better.
        found_by_search = search.search_records(model, "mean", prior)
        records += [r for r in found_by_search if r.metric != "exact below simulate"]
        best = optimize(model, objective="mean", prior=prior.tolist())
    records = [dataclasses.replace(record, suite=SUITE) for record in records]
    return [*records, shortfall(law, best.weights)]


def shortfall(law: Law, weights_D: np.ndarray) -> Record:
    """Return how much more the law's mean loss is at the optimum found than at its own best."""
    draw = np.random.default_rng(3)
    guesses = np.concatenate(
        [np.eye(NUM_DOMAINS), draw.dirichlet(np.full(NUM_DOMAINS, 0.5), NUM_GUESSES)]
    )
    best = law.losses(guesses).mean(1).min()
    reached = law.losses(np.asarray(weights_D)[None]).mean()
    return Record(
        suite=SUITE,
        case=f"auto, {NUM_RUNS} runs, mean of {NUM_TARGETS} targets",
        metric="true loss at the optimum, above the best of 100,000 guesses",
        value=float(reached - best),
        unit="nats",
    )
