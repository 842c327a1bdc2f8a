"""The report of a study: one HTML file that opens without a network.

Enters: a study. Leaves: a page as text, the same for the same study apart from its "made on" line.
Everything a file or a name says is escaped; plotly.js is inlined once, and the page's own policy
forbids it to load anything. Computes no result: `facts` reads them, `plots` draws them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from regmix.report.facts import OBJECTIVE, Facts, finite, read_facts
from regmix.report.loss_plots import (
    exchange_rates,
    model_curves,
    model_objective,
    model_targets,
    prediction_scatter,
    proxy_curves,
)
from regmix.report.plots import Chart, epoch_bars, mixture_bars, swarm_strip
from regmix.report.tables import (
    domain_rows,
    environments,
    model_rows,
    settings,
    swarm_rows,
    target_rows,
)
from regmix.report.verdict import cards, gain_words, headline, nats, percent, scores_words
from regmix.study import Study

TEMPLATE = Path(__file__).with_name("page.html")


def render_report(study: Study, *, made: str | None = None) -> str:
    """Return the report of a study as HTML; `made` is shown as its date."""
    import jinja2
    from markupsafe import Markup

    facts = read_facts(study)
    charts = _charts(facts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"nats": nats, "percent": percent, "gain": gain_words}
    return environment.get_template(TEMPLATE.name).render(
        facts=facts,
        made=made,
        name=study.path.name,
        headline=headline(facts),
        cards=cards(facts),
        charts=charts,
        domains=domain_rows(facts),
        mixtures=list(facts.known_mixtures),
        targets=target_rows(facts),
        models=model_rows(facts),
        swarm=swarm_rows(facts),
        settings=settings(facts),
        environments=environments(facts),
        charts_json=Markup(script_json({name: _plain(chart) for name, chart in charts.items()})),
        plotly=Markup(_plotly()) if charts else "",
    )


def script_json(value: Any) -> str:
    """Return JSON that can lie inside a script element: no text in it ends or opens one."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # The release contains neither; a later one that does must not end the script early.
    return str(get_plotlyjs()).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _plain(chart: Chart) -> dict[str, Any]:
    return {"height": chart.height, "variants": chart.variants}


def _charts(facts: Facts) -> dict[str, Chart]:
    """Return the charts that the study has numbers for, by the element they go into."""
    charts = []
    domains = facts.ordered_domains
    if facts.optimum is not None:
        charts.append(mixture_bars(domains, facts.known_mixtures))
        epochs = facts.epochs
        if epochs:
            limit = facts.optimum.get("max_epochs")
            charts.append(epoch_bars(epochs, float(limit) if finite(limit) else None))
    compared = facts.compared
    if compared:
        charts.append(model_objective(compared))
        targets = _shared_targets(facts)
        if targets:
            natural = [result for result in compared if result.mixture == "natural"]
            charts.append(model_targets(compared, targets, (natural or compared)[0]))
        curves = facts.model_curves
        if curves:
            charts.append(model_curves(curves))
    if facts.predictions is not None:
        charts.append(_prediction_chart(facts))
    rates = (facts.fit or {}).get("exchange_rates") or {}
    if rates:
        charts.append(exchange_rates(rates, domains))
    if facts.mixtures is not None and len(facts.mixtures):
        charts.append(_swarm_chart(facts, domains))
    if facts.curves:
        charts.append(proxy_curves(facts.curves, facts.best_proxy))
    return {chart.identity: chart for chart in charts}


def _shared_targets(facts: Facts) -> list[str]:
    """Return the targets that every compared model was evaluated on, in the study's order."""
    models = [model for result in facts.compared for model in result.models]
    return [t for t in facts.study.config.targets if all(t in model.losses for model in models)]


def _prediction_chart(facts: Facts) -> Chart:
    predictions = facts.predictions
    assert predictions is not None
    names = [OBJECTIVE] if OBJECTIVE in predictions.true else []
    names += [target for target in predictions.true if target != OBJECTIVE]
    fit = facts.fit or {}
    notes = {}
    for name in names:
        scores = fit.get("targets", {}).get(name)
        if name == OBJECTIVE and facts.other_fit_objective is None:
            scores = fit.get(OBJECTIVE)
        notes[name] = scores_words(scores or {})
    pairs = {name: (predictions.true[name], predictions.predicted[name]) for name in names}
    return prediction_scatter(pairs, notes, predictions.indices)


def _swarm_chart(facts: Facts, domains: list[str]) -> Chart:
    import numpy as np

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
