"""Charts of losses: of the final models, and of training.

Enters: losses in nats by mixture, target and proxy. Leaves: `Chart`s as `plots` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from regmix.large.comparison import MixtureResult, mean_and_spread, pair_losses
from regmix.report.plots import Chart, label, roles, row_height

# Each curve is thinned to this many points, and this many curves are drawn.
CURVE_POINTS = 160
MOST_CURVES = 48


def model_objective(results: Sequence[MixtureResult]) -> Chart:
    """Return the final models' objective by mixture: a dot a model, the mean and its spread."""
    colours = roles([result.mixture for result in results])
    data: list[dict[str, Any]] = []
    for result in results:
        spread = result.spread or 0.0
        name, colour = label(result.mixture), colours[result.mixture]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "y": [name],
                "x": [result.mean],
                "error_x": {"type": "data", "array": [spread], "color": colour, "thickness": 2},
                "marker": {"color": colour, "size": 15, "symbol": "diamond"},
                "hovertemplate": f"mean %{{x:.4f}} ± {spread:.4f} nats<extra>{name}</extra>",
            }
        )
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "y": [name] * len(result.losses),
                "x": list(result.losses),
                "marker": {
                    "color": "@surface",
                    "size": 9,
                    "line": {"color": colour, "width": 2},
                },
                "text": [f"seed {replicate}" for replicate in result.replicates],
                "hovertemplate": f"%{{text}}: %{{x:.4f}} nats<extra>{name}</extra>",
            }
        )
    layout = {
        "showlegend": False,
        "xaxis": {
            "title": {"text": "objective on held-out text [nats per token], lower is better"}
        },
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    return Chart(
        identity="models",
        height=row_height(len(results), 46),
        variants={"": {"data": data, "layout": layout}},
    )


def model_targets(
    results: Sequence[MixtureResult], targets: Sequence[str], reference: MixtureResult
) -> Chart:
    """Return loss by target and mixture, as it is and as the paired difference from `reference`."""
    variants: dict[str, dict[str, Any]] = {}
    differences = {
        result.mixture: {target: pair_losses(reference, result, target) for target in targets}
        for result in results
        if result is not reference and set(result.replicates) & set(reference.replicates)
    }
    if differences:
        base = reference.mixture
        title = f"loss minus that of {label(base)} [nats per token], left is better"
        variants[f"difference from {base}"] = _target_dots(differences, targets, title, True)
    losses = {
        result.mixture: {target: result.losses_of(target) for target in targets}
        for result in results
    }
    variants["loss"] = _target_dots(losses, targets, "loss [nats per token]", False)
    return Chart(
        identity="targets",
        height=row_height(len(targets), 13 * len(results) + 12),
        variants=variants,
    )


def _target_dots(
    losses: Mapping[str, Mapping[str, Sequence[float]]],
    targets: Sequence[str],
    title: str,
    centred: bool,
) -> dict[str, Any]:
    colours = roles(list(losses))
    data: list[dict[str, Any]] = []
    for position, (mixture, by_target) in enumerate(losses.items()):
        # Mixtures lie beside each other within the row of a target.
        shift = (position - (len(losses) - 1) / 2) * 0.22
        colour, name = colours[mixture], label(mixture)
        rows = [row + shift for row in range(len(targets))]
        means = [mean_and_spread(by_target[target]) for target in targets]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "y": rows,
                "x": [mean for mean, _ in means],
                "error_x": {
                    "type": "data",
                    "array": [spread or 0.0 for _, spread in means],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 3,
                },
                "marker": {"color": colour, "size": 10, "symbol": "diamond"},
                "text": [label(target) for target in targets],
                "hovertemplate": "%{text}: %{x:.4f} nats<extra>" + name + "</extra>",
            }
        )
        dots = [
            (row, value)
            for row, target in zip(rows, targets, strict=True)
            for value in by_target[target]
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "showlegend": False,
                "hoverinfo": "skip",
                "y": [row for row, _ in dots],
                "x": [value for _, value in dots],
                "marker": {"color": colour, "size": 5, "opacity": 0.55},
            }
        )
    layout = {
        "xaxis": {
            "title": {"text": title},
            "zeroline": centred,
            "rangemode": "tozero" if centred else "normal",
        },
        "yaxis": {
            "tickvals": list(range(len(targets))),
            "ticktext": [label(target) for target in targets],
            "range": [len(targets) - 0.4, -0.6],
            "zeroline": False,
        },
    }
    return {"data": data, "layout": layout}


def model_curves(curves: Mapping[str, np.ndarray]) -> Chart:
    """Return the final models' training loss by step and mixture, smoothed as the proxies' is."""
    colours = roles(list(curves))
    data: list[dict[str, Any]] = []
    for mixture, curve in curves.items():
        steps, losses = _thinned(curve)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": label(mixture),
                "x": steps,
                "y": losses,
                "line": {"color": colours[mixture], "width": 2},
                "hovertemplate": "step %{x}: %{y:.3f} nats<extra>" + label(mixture) + "</extra>",
            }
        )
    layout = {"showlegend": True, **_curve_axes()}
    return Chart(identity="training", height=380, variants={"": {"data": data, "layout": layout}})


def _curve_axes() -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "training loss [nats per token]"}},
    }


def proxy_curves(curves: Mapping[int, np.ndarray], best: int | None) -> Chart:
    """Return the proxies' training loss by step, smoothed; the best proxy stands out."""
    data: list[dict[str, Any]] = []
    shown = sorted(curves)
    if len(shown) > MOST_CURVES:
        chosen = np.linspace(0, len(shown) - 1, MOST_CURVES).round().astype(int)
        shown = [shown[place] for place in chosen]
    if best in curves:
        shown = [index for index in shown if index != best] + [int(best or 0)]
    for index in shown:
        steps, losses = _thinned(curves[index])
        standout = index == best
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"proxy {index}",
                "x": steps,
                "y": losses,
                "opacity": 1.0 if standout else 0.35,
                "line": {
                    "color": "@best" if standout else "@muted",
                    "width": 2.5 if standout else 1,
                },
                "hovertemplate": f"proxy {index}, step %{{x}}: %{{y:.3f}} nats<extra></extra>",
            }
        )
    layout = {"showlegend": False, **_curve_axes()}
    return Chart(identity="curves", height=380, variants={"": {"data": data, "layout": layout}})


def _thinned(curve: np.ndarray) -> tuple[list[float], list[float]]:
    """Return (steps, mean loss) of equal blocks of a curve; a non-finite block is left out."""
    blocks = np.array_split(np.asarray(curve, dtype=np.float64), min(CURVE_POINTS, len(curve)))
    ends = np.cumsum([len(block) for block in blocks])
    pairs = [
        (float(end - (len(block) - 1) / 2), round(float(block.mean()), 5))
        for end, block in zip(ends, blocks, strict=True)
        if np.isfinite(block).all()
    ]
    return [step for step, _ in pairs], [loss for _, loss in pairs]
