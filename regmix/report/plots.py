"""Charts of mixtures, as plain figures that plotly.js draws; other charts are in `*_plots`.

Enters: weights by domain and mixture. Leaves: `Chart`s whose colours are roles ("@optimum", or
"@optimum:33" with an opacity), which the page resolves to its light or dark palette. Draws nothing
itself, and needs no plotly in Python; names are escaped, since plotly.js reads labels as markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Roles that the page knows a colour for; any other mixture takes one of the "@otherN".
_NAMED_ROLES = {
    "optimum": "@optimum",
    "natural": "@natural",
    "uniform": "@uniform",
    "best observed": "@best",
}
NUM_OTHER_ROLES = 3


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of one or more variants that a reader picks from.

    identity: the element it is drawn in; height in pixels.
    variants: name -> {"data": [...], "layout": {...}} as plotly.js takes them.
    """

    identity: str
    height: int
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CrossChart(Chart):
    """A chart of two numbers that a reader picks, each by its own list.

    names: what can be picked; values: group -> a list of numbers for each name. A trace with a
    "group" takes both of its coordinates from there, one with "front" only the points of it that
    no other one is below in both. start: what is picked at first.
    """

    names: tuple[str, ...]
    values: dict[str, list[list[float]]]
    start: tuple[int, int]


def label(name: str) -> str:
    """Return a name as text that plotly.js shows letter for letter."""
    return html.escape(name, quote=False)


def roles(mixtures: Sequence[str]) -> dict[str, str]:
    """Return the colour role of each mixture."""
    others = [name for name in mixtures if name not in _NAMED_ROLES]
    named = {name: _NAMED_ROLES[name] for name in mixtures if name in _NAMED_ROLES}
    return named | {
        name: f"@other{position % NUM_OTHER_ROLES}" for position, name in enumerate(others)
    }


def row_height(num_rows: int, per_row: int) -> int:
    """Return the height of a chart of rows, in pixels."""
    return 110 + per_row * max(1, num_rows)


def shares_axis(highest: float) -> dict[str, Any]:
    """Return an axis of square roots of shares: small weights stay apart, zero stays at zero."""
    ticks = [0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    shown = [tick for tick in ticks if tick <= highest * 1.1]
    return {
        "tickvals": [math.sqrt(tick) for tick in shown],
        "ticktext": [f"{tick:.0%}" for tick in shown],
        "range": [-0.02, math.sqrt(highest) * 1.05],
        "zeroline": False,
    }


def mixture_bars(domains: Sequence[str], mixtures: Mapping[str, Mapping[str, float]]) -> Chart:
    """Return bars of weight by domain, the mixtures side by side."""
    colours = roles(list(mixtures))
    names = [label(domain) for domain in domains]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": label(mixture),
            "y": names,
            "x": [100 * weights.get(domain, 0.0) for domain in domains],
            "marker": {"color": colours[mixture]},
            "hovertemplate": "%{y}: %{x:.2f} %<extra>" + label(mixture) + "</extra>",
        }
        for mixture, weights in mixtures.items()
    ]
    layout = {
        "barmode": "group",
        "bargap": 0.28,
        "bargroupgap": 0.08,
        "xaxis": {"title": {"text": "share of training tokens [%]"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "showgrid": False},
        "legend": {"traceorder": "normal"},
    }
    per_bar = 12 if len(domains) <= 8 else 8
    height = row_height(len(domains), (per_bar + 1) * len(mixtures) + 10)
    return Chart(identity="mixture", height=height, variants={"": {"data": data, "layout": layout}})


def epoch_bars(epochs: Mapping[str, float], max_epochs: float | None) -> Chart:
    """Return bars of epochs by domain, with the limit that was set."""
    names = [label(domain) for domain in epochs]
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "y": names,
            "x": list(epochs.values()),
            "marker": {"color": "@optimum"},
            "hovertemplate": "%{y}: %{x:.3g} epochs<extra></extra>",
        }
    ]
    layout: dict[str, Any] = {
        "showlegend": False,
        "bargap": 0.4,
        "xaxis": {"title": {"text": "epochs of what exists"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "showgrid": False},
    }
    if max_epochs is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": max_epochs,
                "x1": max_epochs,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": "@muted", "width": 1.5, "dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "x": max_epochs,
                "yref": "paper",
                "y": 1,
                "yanchor": "bottom",
                "text": f"limit: {max_epochs:g} epochs",
                "showarrow": False,
            }
        ]
    return Chart(
        identity="epochs",
        height=row_height(len(epochs), 24),
        variants={"": {"data": data, "layout": layout}},
    )


def swarm_strip(
    domains: Sequence[str],
    weights: np.ndarray,
    indices: Sequence[int],
    prior: Mapping[str, float],
    optimum: Mapping[str, float] | None,
    losses: np.ndarray | None,
) -> Chart:
    """Return every mixture's weight by domain, coloured by its objective where it is known.

    weights [K, D]; losses [K] in nats or None. Rows are jittered, the same way each time.
    """
    jitter = np.random.default_rng(0).uniform(-0.3, 0.3, size=weights.shape)
    rows = np.arange(len(domains))[None, :] + jitter
    values = np.sqrt(weights)
    marker: dict[str, Any] = {"size": 6, "opacity": 0.7, "color": "@muted"}
    if losses is not None:
        marker |= {
            "color": np.repeat(losses, len(domains)).tolist(),
            "colorscale": "Cividis",
            "reversescale": True,
            "line": {"color": "@muted", "width": 0.5},
            "colorbar": {
                "title": {"text": "objective<br>[nats]"},
                "thickness": 12,
                "len": 0.9,
            },
        }
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "a proxy's mixture",
            "x": values.reshape(-1).tolist(),
            "y": rows.reshape(-1).tolist(),
            "marker": marker,
            "text": [
                f"proxy {i}: {w:.2%}" for i, row in zip(indices, weights, strict=True) for w in row
            ],
            "hovertemplate": "%{text}<extra></extra>",
        },
        ticks("natural", domains, prior, "@natural"),
    ]
    if optimum is not None:
        data.append(ticks("optimum", domains, optimum, "@optimum"))
    layout = {
        "xaxis": shares_axis(float(weights.max()))
        | {"title": {"text": "share of training tokens (square-root scale)"}},
        "yaxis": {
            "tickvals": list(range(len(domains))),
            "ticktext": [label(domain) for domain in domains],
            "range": [len(domains) - 0.4, -0.6],
            "zeroline": False,
        },
    }
    height = row_height(len(domains), 34)
    return Chart(identity="swarm", height=height, variants={"": {"data": data, "layout": layout}})


def ticks(
    name: str, domains: Sequence[str], weights: Mapping[str, float], colour: str
) -> dict[str, Any]:
    """Return a mixture as one upright line a domain, on an axis of `shares_axis`."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [math.sqrt(weights.get(domain, 0.0)) for domain in domains],
        "y": list(range(len(domains))),
        "marker": {
            "symbol": "line-ns",
            "size": 24,
            "line": {"color": colour, "width": 3},
            "color": colour,
        },
        "text": [f"{name}: {weights.get(domain, 0.0):.2%}" for domain in domains],
        "hovertemplate": "%{text}<extra></extra>",
    }
