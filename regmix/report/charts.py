"""Which charts a report has: those that the study has numbers for.

Enters: the facts of a study. Leaves: its charts by the element that they go into. Draws nothing
itself: `plots` and the `*_plots` do.
"""

from __future__ import annotations

import math

import numpy as np

from regmix.config import finite
from regmix.report.decision_plots import gain_bars, tradeoff_scatter, weight_intervals
from regmix.report.estimates import ByTarget
from regmix.report.facts import Facts
from regmix.report.fit_plots import (
    exchange_rates,
    influence_map,
    learning_curve,
    prediction_scatter,
)
from regmix.report.loss_plots import model_curves, model_objective, model_targets, proxy_curves
from regmix.report.plots import Chart, epoch_bars, mixture_bars, swarm_strip
from regmix.report.predictions import OBJECTIVE, Predictions
from regmix.report.words import heaviest, scores_words


def make_charts(facts: Facts) -> dict[str, Chart]:
    """Return the charts that the study has numbers for, by the element they go into."""
    domains = facts.ordered_domains
    charts = [
        *_decision_charts(facts, domains),
        *_model_charts(facts),
        *_fit_charts(facts, domains),
    ]
    if facts.mixtures is not None and len(facts.mixtures):
        charts.append(_swarm_chart(facts, domains))
    if facts.curves:
        charts.append(proxy_curves(facts.curves, facts.best_proxy))
    return {chart.identity: chart for chart in charts}


def _decision_charts(facts: Facts, domains: list[str]) -> list[Chart]:
    decided, weights = facts.decided, facts.optimum_weights
    if facts.optimum is None or decided is None or weights is None:
        return []
    charts = [mixture_bars(domains, facts.known_mixtures)]
    if decided.intervals:
        natural = facts.study.config.prior
        observed = {d: ends for d, ends in facts.observed.items() if d in domains}
        charts.append(
            weight_intervals(domains, weights, decided.intervals, natural, observed, decided.limits)
        )
    if facts.epochs:
        limit = facts.optimum.get("max_epochs")
        charts.append(epoch_bars(facts.epochs, float(limit) if finite(limit) else None))
    if any(gain.interval for gain in decided.gains.values()):
        charts.append(gain_bars(decided.gains, decided.better, facts.gains))
    if facts.traded is not None and len(facts.traded.losses):
        name = facts.optimum.get("objective_name")
        objective = OBJECTIVE if name is None else f"{OBJECTIVE} ({name})"
        charts.append(tradeoff_scatter(facts.traded, objective))
    return charts


def _model_charts(facts: Facts) -> list[Chart]:
    compared = facts.compared
    if not compared:
        return []
    charts = [model_objective(compared)]
    targets = _shared_targets(facts)
    if targets:
        natural = [result for result in compared if result.mixture == "natural"]
        charts.append(model_targets(compared, targets, (natural or compared)[0]))
    if facts.model_curves:
        charts.append(model_curves(facts.model_curves))
    return charts


def _shared_targets(facts: Facts) -> list[str]:
    """Return the targets that every compared model was evaluated on, in the study's order."""
    models = [model for result in facts.compared for model in result.models]
    return [t for t in facts.study.config.targets if all(t in model.losses for model in models)]


def _fit_charts(facts: Facts, domains: list[str]) -> list[Chart]:
    charts = []
    if facts.predictions is not None:
        charts.append(_prediction_chart(facts, facts.predictions))
    fitted = facts.fitted
    if fitted is None:
        return charts
    if fitted.curve is not None and fitted.curve.points:
        charts.append(learning_curve(fitted.curve))
    if fitted.influence:
        rows = _rows(fitted.influence, domains)
        charts.append(influence_map(fitted.influence, rows, fitted.raised_by))
    if fitted.rates:
        charts.append(exchange_rates(fitted.rates, _rows(fitted.rates, domains)))
    return charts


def _rows(table: ByTarget, domains: list[str]) -> list[str]:
    """Return the domains that a table speaks of, in their order; frozen ones are one of its own."""
    told = dict.fromkeys(domain for row in table.values() for domain in row)
    return [d for d in domains if d in told] + [d for d in told if d not in domains]


def _prediction_chart(facts: Facts, predictions: Predictions) -> Chart:
    names = [OBJECTIVE] if OBJECTIVE in predictions.true else []
    names += [target for target in predictions.true if target != OBJECTIVE]
    fit = facts.fit or {}
    notes = {}
    for name in names:
        scores = fit.get("targets", {}).get(name) or {}
        if name == OBJECTIVE and facts.other_fit_objective is None:
            scores = facts.objective_scores
        notes[name] = scores_words(scores)
    mixtures = {}
    if facts.mixtures is not None:
        for row, index in enumerate(facts.mixtures.indices):
            mixtures[index] = heaviest(facts.mixtures.mixture(row))
    return prediction_scatter(predictions, notes, mixtures)


def _swarm_chart(facts: Facts, domains: list[str]) -> Chart:
    table = facts.mixtures
    assert table is not None
    known = [domain for domain in domains if domain in table.domains]
    weights = table.weights[:, [table.domains.index(domain) for domain in known]]
    values = [facts.objective_of(facts.losses.get(index, {})) for index in table.indices]
    losses = np.array([math.nan if value is None else value for value in values])
    kept = np.isfinite(losses)
    if not kept.any():
        return swarm_strip(
            known, weights, table.indices, facts.study.config.prior, facts.optimum_weights, None
        )
    # A mixture whose proxy has no losses yet has no colour, so it is left to the table below.
    indices = [index for index, keep in zip(table.indices, kept, strict=True) if keep]
    prior = facts.study.config.prior
    return swarm_strip(known, weights[kept], indices, prior, facts.optimum_weights, losses[kept])
