"""Charts of the surrogate: predictions beside the truth, learning curve, influence of domains.

Enters: held-out predictions, and what `fit` learned. Leaves: `Chart`s as `plots` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regmix.report.estimates import ByTarget, Estimate
from regmix.report.fitted import CurvePoint, LearningCurve
from regmix.report.plots import Chart, label, row_height
from regmix.report.predictions import Predictions
from regmix.report.words import change_words, signed

# Half the width of a 90% interval, in standard deviations.
_HALF_WIDTH = 1.645
# The colour of a change of this share of the largest is full: single cells do not pale the rest.
_FULL_COLOUR = 0.98


def prediction_scatter(
    predictions: Predictions, notes: Mapping[str, str], mixtures: Mapping[int, str]
) -> Chart:
    """Return held-out prediction against truth, a variant for each target of `notes`, in order.

    notes: what to say about a target; mixtures: proxy -> its largest weights in words.
    """
    variants = {}
    for target, note in notes.items():
        true, predicted = predictions.true[target], predictions.predicted[target]
        finite = np.isfinite(true) & np.isfinite(predicted)
        both = np.concatenate([true[finite], predicted[finite]])
        low, high = (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)
        edge = 0.04 * (high - low or 1.0)
        line = [low - edge, high + edge]
        rows = np.flatnonzero(finite)
        indices = [predictions.indices[row] for row in rows]
        points: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "x": predicted[rows].tolist(),
            "y": true[rows].tolist(),
            "marker": {"color": "@optimum", "size": 8, "opacity": 0.75},
            "text": [
                label(f"proxy {index}" + (f": {mixtures[index]}" if mixtures.get(index) else ""))
                for index in indices
            ],
            "hovertemplate": "%{text}<br>predicted %{x:.4f} nats<br>true %{y:.4f} nats"
            "<extra></extra>",
        }
        sd = predictions.sd.get(target)
        if sd is not None:
            width = np.where(np.isfinite(sd[rows]), _HALF_WIDTH * sd[rows], 0.0)
            points["error_x"] = {
                "type": "data",
                "array": width.tolist(),
                "color": "@optimum:55",
                "thickness": 1,
                "width": 0,
            }
            points["customdata"] = width.tolist()
            points["hovertemplate"] = (
                "%{text}<br>predicted %{x:.4f} ± %{customdata:.4f} nats (90% interval)"
                "<br>true %{y:.4f} nats<extra></extra>"
            )
        variants[target] = {
            "data": [_identity(line), points],
            "layout": {
                "showlegend": False,
                "xaxis": {"title": {"text": "predicted loss, held out [nats per token]"}},
                "yaxis": {"title": {"text": "true loss [nats per token]"}},
                "annotations": [_note(note)],
                "hovermode": "closest",
            },
        }
    return Chart(identity="prediction", height=430, variants=variants)


def _identity(line: list[float]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": line,
        "y": line,
        "line": {"color": "@muted", "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _note(text: str) -> dict[str, Any]:
    """Return a remark above the plot, where it covers no point."""
    return {
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "align": "left",
        "showarrow": False,
        "text": label(text),
    }


def learning_curve(curve: LearningCurve) -> Chart:
    """Return error against proxies on log axes, its spread, and what twice the proxies would do.

    A second variant shows Spearman. The spread is over random subsets; the last point, of all
    proxies, has none.
    """
    points = curve.points
    runs = [point.num_runs for point in points]
    spread = [point for point in points if point.rmse_sd_nats > 0]
    band = [*((p, 1) for p in spread), *((p, -1) for p in reversed(spread))]
    shown: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "± one standard deviation over subsets",
            "x": [point.num_runs for point, _ in band],
            "y": [_edge(point, sign) for point, sign in band],
            "fill": "toself",
            "fillcolor": "@optimum:33",
            "line": {"color": "@optimum:00", "width": 0},
            "hoverinfo": "skip",
        },
        _curve_line(runs, [point.rmse_nats for point in points], "RMSE", ":.4f", " nats"),
    ]
    last = points[-1]
    numbers = list(runs)
    if curve.exponent is not None and curve.exponent > 0:
        numbers.append(2 * last.num_runs)
        shown.append(_extrapolated(last, curve.exponent))
    error = {
        "data": shown,
        "layout": {
            "showlegend": True,
            "xaxis": _proxies_axis(numbers),
            "yaxis": {
                "type": "log",
                "title": {"text": "held-out RMSE [nats]"},
                **_log_ticks([y for trace in shown for y in trace["y"]]),
            },
        },
    }
    variants = {"error [nats]": error}
    ranked = [(point.num_runs, point.spearman) for point in points if point.spearman is not None]
    if ranked:
        at, values = [run for run, _ in ranked], [rank for _, rank in ranked]
        variants["Spearman"] = {
            "data": [_curve_line(at, values, "Spearman", ":.3f", "")],
            "layout": {
                "showlegend": False,
                "xaxis": _proxies_axis(at),
                "yaxis": {"title": {"text": "Spearman, held out"}},
            },
        }
    return Chart(identity="learning", height=380, variants=variants)


def _extrapolated(last: CurvePoint, exponent: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "extrapolated",
        "x": [last.num_runs, 2 * last.num_runs],
        "y": [last.rmse_nats, last.rmse_nats * 2**-exponent],
        "line": {"color": "@natural", "width": 2, "dash": "dash"},
        "marker": {"color": "@natural", "size": 8, "symbol": "circle-open"},
        "hovertemplate": "%{x} proxies: about %{y:.4f} nats<extra></extra>",
    }


def _edge(point: CurvePoint, sign: int) -> float:
    # A logarithmic axis has no room for zero: the band stops at a tenth of the error.
    return max(point.rmse_nats + sign * point.rmse_sd_nats, 0.1 * point.rmse_nats)


def _curve_line(
    runs: Sequence[int], values: Sequence[float], name: str, digits: str, unit: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(runs),
        "y": list(values),
        "line": {"color": "@optimum", "width": 2},
        "marker": {"color": "@optimum", "size": 8},
        "hovertemplate": f"%{{x}} proxies: {name} %{{y{digits}}}{unit}<extra></extra>",
    }


def _proxies_axis(runs: Sequence[int]) -> dict[str, Any]:
    return {
        "type": "log",
        "title": {"text": "number of proxies"},
        "tickvals": list(runs),
        "ticktext": [str(run) for run in runs],
        "range": [float(np.log10(min(runs) * 0.92)), float(np.log10(max(runs) * 1.08))],
        "minor": {"showgrid": False},
    }


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return ticks at 1, 2 and 5 times powers of ten that lie among `values`, and one beyond."""
    low, high = min(values), max(values)
    powers = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    steps = [factor * 10.0**power for power in powers for factor in (1, 1.5, 2, 3, 5, 7)]
    ticks = [step for step in steps if low / 1.1 <= step <= high * 1.1]
    return {"tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}


def influence_map(influence: ByTarget, domains: Sequence[str], raised_by: float) -> Chart:
    """Return the change of each target's loss when a domain's weight rises; blue is lower.

    Where the 90% interval leaves the sign open, the number stands in brackets.
    """
    targets = list(influence)
    cells = [[influence[target].get(domain) for target in targets] for domain in domains]
    sizes = [abs(cell.mean) for row in cells for cell in row if cell is not None]
    full = float(np.quantile(sizes, _FULL_COLOUR)) if sizes else 1.0
    full = full or 1.0
    data = [
        {
            **_cells(targets, domains),
            "z": [[None if cell is None else cell.mean for cell in row] for row in cells],
            "zmin": -full,
            "zmax": full,
            "colorscale": [[0, "@optimum"], [0.5, "@surface"], [1, "@natural"]],
            "text": [[_change(cell) for cell in row] for row in cells],
            "customdata": [
                ["" if cell is None else change_words(cell) for cell in row] for row in cells
            ],
            "colorbar": {"thickness": 12, "len": 0.9, "title": {"text": "nats"}},
            "hovertemplate": f"{raised_by:g} more of %{{y}}:<br>%{{x}} changes by %{{customdata}}"
            "<extra></extra>",
        }
    ]
    return _map("influence", data, domains)


def _change(cell: Estimate | None) -> str:
    if cell is None:
        return ""
    text = signed(cell.mean, 3)
    return f"({text})" if cell.includes_zero else text


def exchange_rates(rates: ByTarget, domains: Sequence[str]) -> Chart:
    """Return what a token of each domain is worth for each target, the best domain's being 1."""
    targets = list(rates)
    cells = [[rates[target].get(domain) for target in targets] for domain in domains]
    data = [
        {
            **_cells(targets, domains),
            "z": [[0.0 if cell is None else cell.mean for cell in row] for row in cells],
            "zmin": 0,
            "zmax": 1,
            "colorscale": "Cividis",
            "text": [["" if c is None else f"{c.mean:.2f}" for c in row] for row in cells],
            "customdata": [["" if c is None else _worth(c) for c in row] for row in cells],
            "colorbar": {"thickness": 12, "len": 0.9},
            "hovertemplate": "a token of %{y} is worth %{customdata} for %{x}<extra></extra>",
        }
    ]
    return _map("rates", data, domains)


def _worth(rate: Estimate) -> str:
    text = f"{rate.mean:.3f}"
    if rate.interval is None:
        return text
    return f"{text} (90% interval {rate.interval[0]:.3f} to {rate.interval[1]:.3f})"


def _cells(targets: Sequence[str], domains: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": [label(target) for target in targets],
        "y": [label(domain) for domain in domains],
        "texttemplate": "%{text}",
        "xgap": 2,
        "ygap": 2,
    }


def _map(identity: str, data: list[dict[str, Any]], domains: Sequence[str]) -> Chart:
    plain = {"showgrid": False, "type": "category"}
    layout = {"xaxis": plain, "yaxis": plain | {"autorange": "reversed"}}
    # Names of targets may be tilted, and then need their own room.
    height = row_height(len(domains), 30) + 70
    variants = {"": {"data": data, "layout": layout}}
    return Chart(identity=identity, height=height, variants=variants)
