"""Charts of the decision: the optimum's weights with intervals, gains, trade-offs of two targets.

Enters: what `optimize` decided, measured gains, trade-offs. Leaves: `Chart`s as `plots` describes
them; the one of trade-offs is drawn for the two targets that the reader picks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regmix.large.comparison import Gain
from regmix.report.estimates import Estimate, Interval
from regmix.report.plots import Chart, CrossChart, label, roles, row_height, shares_axis, ticks
from regmix.report.tradeoffs import Traded
from regmix.report.words import heaviest, percent_span, signed, span


def weight_intervals(
    domains: Sequence[str],
    weights: Mapping[str, float],
    intervals: Mapping[str, Interval],
    natural: Mapping[str, float],
    observed: Mapping[str, Interval],
    limits: Mapping[str, Interval],
) -> Chart:
    """Return each domain's weight with its 90% interval, over the range that the swarm covered.

    limits: bounds on a weight, by epochs or by themselves, where there are any.
    """
    rows = {domain: place for place, domain in enumerate(domains)}
    data: list[dict[str, Any]] = []
    if observed:
        data.append(_observed(rows, observed))
    data += [
        _optimum_points(rows, weights, intervals),
        ticks("natural", domains, natural, "@natural"),
    ]
    bounded = [d for d in domains if d in limits and (limits[d][1] < 1 or limits[d][0] > 0)]
    if bounded:
        data.append(_limits(rows, bounded, limits))
    ends = (*intervals.values(), *observed.values())
    highest = max([*weights.values(), *natural.values(), *(end[1] for end in ends), 0.01])
    layout = {
        "xaxis": shares_axis(min(highest, 1.0))
        | {"title": {"text": "share of training tokens (square-root scale)"}},
        "yaxis": {
            "tickvals": list(rows.values()),
            "ticktext": [label(domain) for domain in domains],
            "range": [len(domains) - 0.4, -0.6],
            "zeroline": False,
            "showgrid": False,
        },
        "hovermode": "closest",
    }
    return Chart(
        identity="intervals",
        height=row_height(len(domains), 30),
        variants={"": {"data": data, "layout": layout}},
    )


def _optimum_points(
    rows: Mapping[str, int], weights: Mapping[str, float], intervals: Mapping[str, Interval]
) -> dict[str, Any]:
    drawn = [domain for domain in rows if domain in intervals]
    own = [weights.get(domain, 0.0) for domain in drawn]
    ends = [intervals[domain] for domain in drawn]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "optimum, 90% interval",
        "x": [_root(weight) for weight in own],
        "y": [rows[domain] for domain in drawn],
        "marker": {"color": "@optimum", "size": 12, "symbol": "diamond"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_root(end[1]) - _root(w) for end, w in zip(ends, own, strict=True)],
            "arrayminus": [_root(w) - _root(end[0]) for end, w in zip(ends, own, strict=True)],
            "color": "@optimum",
            "thickness": 2.5,
            "width": 5,
        },
        "text": [
            f"{label(domain)}: {weight:.2%}, 90% interval {percent_span(intervals[domain])}"
            for domain, weight in zip(drawn, own, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _root(share: float) -> float:
    return math.sqrt(max(share, 0.0))


def _observed(rows: Mapping[str, int], observed: Mapping[str, Interval]) -> dict[str, Any]:
    names = [domain for domain in rows if domain in observed]
    return {
        "type": "bar",
        "orientation": "h",
        "name": "range of the swarm",
        "base": [_root(observed[domain][0]) for domain in names],
        "x": [_root(observed[domain][1]) - _root(observed[domain][0]) for domain in names],
        "y": [rows[domain] for domain in names],
        "width": 0.62,
        "marker": {"color": "@muted:2e"},
        "text": [f"range of the swarm: {percent_span(observed[domain])}" for domain in names],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }


def _limits(
    rows: Mapping[str, int], domains: Sequence[str], limits: Mapping[str, Interval]
) -> dict[str, Any]:
    ends = [(domain, 1, "at most") for domain in domains if limits[domain][1] < 1]
    ends += [(domain, 0, "at least") for domain in domains if limits[domain][0] > 0]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "limit (bound or epochs)",
        "x": [_root(limits[domain][end]) for domain, end, _ in ends],
        "y": [rows[domain] for domain, _, _ in ends],
        "marker": {
            "symbol": "x-thin",
            "size": 9,
            "color": "@bad",
            "line": {"color": "@bad", "width": 2},
        },
        "text": [
            f"{label(domain)}: {word} {limits[domain][end]:.2%}" for domain, end, word in ends
        ],
        "hovertemplate": "%{text}<extra></extra>",
    }


def gain_bars(
    gains: Mapping[str, Estimate], better: Mapping[str, float], measured: Sequence[Gain]
) -> Chart:
    """Return the predicted gain over each baseline with its interval, and the measured one."""
    found = {gain.baseline: gain for gain in measured}
    names = [*gains, *(name for name in found if name not in gains)]
    shift = 0.16 if found else 0.0
    rows = {name: place for place, name in enumerate(names)}
    data = [_gain_points(gains, better, {name: rows[name] - shift for name in gains})]
    if found:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "measured on final models, ± standard error",
                "x": [gain.mean_nats for gain in found.values()],
                "y": [rows[name] + shift for name in found],
                "error_x": {
                    "type": "data",
                    "array": [gain.error_nats or 0.0 for gain in found.values()],
                    "color": "@other0",
                    "thickness": 2.5,
                    "width": 5,
                },
                "marker": {"color": "@other0", "size": 12, "symbol": "diamond"},
                "text": [
                    f"measured over {label(name)}: {signed(gain.mean_nats)} nats, better in "
                    f"{gain.num_better} of {len(gain.pairs_nats)} pairs"
                    for name, gain in found.items()
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = {
        "showlegend": True,
        "xaxis": {
            "title": {"text": "gain of the optimum [nats per token], right is better"},
            "zeroline": True,
            "rangemode": "tozero",
        },
        "yaxis": {
            "tickvals": list(rows.values()),
            "ticktext": [f"over {label(name)}" for name in names],
            "range": [len(names) - 0.4, -0.6],
            "zeroline": False,
        },
        "hovermode": "closest",
    }
    return Chart(
        identity="gains",
        height=row_height(len(names), 40),
        variants={"": {"data": data, "layout": layout}},
    )


def _gain_points(
    gains: Mapping[str, Estimate], better: Mapping[str, float], rows: Mapping[str, float]
) -> dict[str, Any]:
    ends = [gain.interval or (gain.mean, gain.mean) for gain in gains.values()]
    means = [gain.mean for gain in gains.values()]
    texts = []
    for name, gain in gains.items():
        text = f"predicted over {label(name)}: {signed(gain.mean)} nats"
        if gain.interval is not None:
            text += f"<br>90% interval {span(gain.interval)} nats"
        if name in better:
            text += f"<br>better on {better[name]:.0%} of surfaces"
        texts.append(text)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "predicted at the proxies' scale, 90% interval",
        "x": means,
        "y": list(rows.values()),
        "marker": {"color": "@optimum", "size": 11},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [end[1] - mean for end, mean in zip(ends, means, strict=True)],
            "arrayminus": [mean - end[0] for end, mean in zip(ends, means, strict=True)],
            "color": "@optimum",
            "thickness": 2.5,
            "width": 5,
        },
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
    }


def tradeoff_scatter(traded: Traded, objective: str) -> CrossChart:
    """Return allowed mixtures by their losses on two targets that the reader picks.

    The page joins those that no other one beats on both; the named mixtures stand out.
    """
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "allowed mixtures",
        "group": "points",
        "marker": {"color": "@muted", "size": 5, "opacity": 0.5},
        "text": _mixtures(traded),
        "hovertemplate": _HOVER,
    }
    front = {
        **points,
        "mode": "lines+markers",
        "name": "best on both (Pareto front)",
        "front": True,
        "line": {"color": "@text", "width": 1.5},
        "marker": {"color": "@text", "size": 6},
    }
    colours = roles(list(traded.named))
    data = [points, front]
    values = {"points": traded.losses.T.tolist()}
    for place, (name, (weights, losses)) in enumerate(traded.named.items()):
        group = f"named {place}"
        values[group] = losses[:, None].tolist()
        words = heaviest(dict(zip(traded.domains, weights.tolist(), strict=True)))
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label(name),
                "group": group,
                "marker": {
                    "color": colours[name],
                    "size": 15 if place == 0 else 12,
                    "symbol": "star" if place == 0 else "diamond",
                    "line": {"color": "@surface", "width": 1.5},
                },
                "text": [label(f"{name}: {words}")],
                "hovertemplate": _HOVER,
            }
        )
    return CrossChart(
        identity="tradeoffs",
        height=520,
        variants={"": {"data": data, "layout": {"hovermode": "closest", "showlegend": True}}},
        names=(objective, *traded.targets),
        values=values,
        start=(0, _opposed(traded.losses)),
    )


_HOVER = "%{text}<br>%{x:.4f} nats, %{y:.4f} nats<extra></extra>"


def _mixtures(traded: Traded) -> list[str]:
    return [
        label(heaviest(dict(zip(traded.domains, row, strict=True))))
        for row in traded.weights.tolist()
    ]


def _opposed(losses: np.ndarray) -> int:
    """Return the column of losses [N, 1 + M] that falls least where the first one falls."""
    centred = losses - losses.mean(0)
    spread = np.maximum(centred.std(0), 1e-12)
    together = centred.T @ centred[:, 0] / (spread * spread[0])
    return 1 + int(together[1:].argmin())
