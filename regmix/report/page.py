"""The report of a study: one HTML file that opens without a network.

Enters: a study. Leaves: a page as text, the same for the same study apart from its "made on" line.
Everything a file or a name says is escaped; plotly.js is inlined once, and the page's own policy
forbids it to load anything. Computes no result: `facts` reads them, `charts` picks what is drawn.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from regmix.report.charts import make_charts
from regmix.report.decision_tables import (
    bound_rows,
    gain_rows,
    guard_rows,
    payoff_columns,
    payoff_rows,
)
from regmix.report.facts import read_facts
from regmix.report.plots import Chart, CrossChart, label
from regmix.report.tables import (
    domain_rows,
    environments,
    model_rows,
    settings,
    swarm_rows,
    target_rows,
)
from regmix.report.task_table import task_table
from regmix.report.verdict import cards, headline
from regmix.report.words import gain_words, nats, percent, span
from regmix.study import Study

TEMPLATE = Path(__file__).with_name("page.html")


def render_report(study: Study, *, made: str | None = None) -> str:
    """Return the report of a study as HTML; `made` is shown as its date."""
    import jinja2
    from markupsafe import Markup

    facts = read_facts(study)
    charts = make_charts(facts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"nats": nats, "percent": percent, "gain": gain_words, "span": span}
    text = environment.get_template(TEMPLATE.name).render(
        facts=facts,
        made=made,
        name=study.path.name,
        headline=headline(facts),
        cards=cards(facts),
        charts=charts,
        domains=domain_rows(facts),
        mixtures=list(facts.known_mixtures),
        gains=gain_rows(facts),
        bounds=bound_rows(facts),
        guard=guard_rows(facts),
        payoff=payoff_rows(facts),
        payoff_columns=payoff_columns(facts),
        targets=target_rows(facts),
        models=model_rows(facts),
        tasks=task_table(facts),
        swarm=swarm_rows(facts),
        settings=settings(facts),
        environments=environments(facts),
        charts_json=Markup(script_json({name: _plain(chart) for name, chart in charts.items()})),
        plotly=Markup(_plotly()) if charts else "",
    )
    # JSON can hold halves of characters, which no file of UTF-8 can.
    return text.encode("utf-8", "replace").decode("utf-8")


def script_json(value: Any) -> str:
    """Return JSON that can lie inside a script element: no text in it ends or opens one."""
    text = json.dumps(
        _without_nan(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _without_nan(value: Any) -> Any:
    """Return a value whose numbers are finite or None, which plotly leaves out."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # The release contains neither; a later one that does must not end the script early.
    return str(get_plotlyjs()).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _plain(chart: Chart) -> dict[str, Any]:
    plain: dict[str, Any] = {"height": chart.height, "variants": chart.variants}
    if isinstance(chart, CrossChart):
        names = [label(name) for name in chart.names]
        plain |= {"names": names, "values": chart.values, "start": chart.start}
    return plain
