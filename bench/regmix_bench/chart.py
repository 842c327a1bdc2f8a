"""The sampler suite as a picture: speed of all systems, and how exactly they keep the weights.

Enters: records. Leaves: a PNG, readable at 800 pixels; colours from Okabe and Ito's set, which
colour-blind readers can tell apart, and a marker or a hatch beside every colour.

    python -m regmix_bench.chart --json sampler.jsonl --picture sampler.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from regmix_bench.harness import Record

BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#8A8A8A",
    "#56B4E9",
)
# Name at the start of a case -> colour, marker.
SYSTEMS: dict[str, tuple[str, str]] = {
    "regmix": (BLUE, "o"),
    "reference": (ORANGE, "s"),
    "litdata": (GREEN, "^"),
    "megatron": (PURPLE, "D"),
    "mosaicml-streaming": (SKY, "v"),
    "gather": (GREY, "x"),
}
AFTER = re.compile(r"worst weight error after ([\d,]+) sequences")


def style(case: str) -> tuple[str, str]:
    """Return colour and marker of a case."""
    return next((look for name, look in SYSTEMS.items() if case.startswith(name)), (GREY, "x"))


def speeds(records: list[Record]) -> list[tuple[str, float]]:
    """Return (case, sequences per second), each case once, the fastest last."""
    found = {
        record.case: record.value
        for record in records
        if record.metric == "speed" and record.unit == "sequences/s"
    }
    return sorted(found.items(), key=lambda pair: pair[1])


def errors(records: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """Return, for each system, (sequences, worst weight error); the last run of a file counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        match = AFTER.fullmatch(record.metric)
        if match and record.value > 0:
            found.setdefault(record.case, {})[int(match[1].replace(",", ""))] = record.value
    return {case: sorted(points.items()) for case, points in found.items()}


def short(value: float) -> str:
    """Return a speed in few characters."""
    return f"{value / 1e6:.2f} M" if value >= 999_500 else f"{value / 1e3:.3g} k"


def _draw_speeds(axes: Any, records: list[Record]) -> None:
    pairs = speeds(records)
    for place, (case, value) in enumerate(pairs):
        ceiling = case.startswith("gather")
        axes.barh(
            place,
            value,
            color="white" if ceiling else style(case)[0],
            edgecolor=style(case)[0],
            hatch="///" if ceiling else None,
            height=0.72,
        )
        axes.text(value * 1.08, place, short(value), va="center", fontsize=9)
    axes.set_yticks(range(len(pairs)), [case for case, _ in pairs], fontsize=9)
    axes.set_xscale("log")
    axes.set_xlim(left=1000, right=max((value for _, value in pairs), default=1e6) * 3)
    axes.set_xlabel("sequences of 2049 tokens per second (hatched: ceilings)")
    axes.set_title("Speed in one process, warm", loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)


def _draw_errors(axes: Any, records: list[Record]) -> None:
    for case, points in errors(records).items():
        colour, marker = style(case)
        numbers, values = zip(*points, strict=True)
        axes.plot(
            numbers, values, color=colour, marker=marker, markersize=4, label=case.split(",")[0]
        )
    everything = [number for points in errors(records).values() for number, _ in points]
    if everything:
        ends = [min(everything), max(everything)]
        line = [1 / number for number in ends]
        axes.plot(ends, line, color="black", linestyle="--", linewidth=1, label="one sequence")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("sequences drawn")
    axes.set_ylabel("worst error of a weight")
    axes.set_title("How exactly the mixture is kept", loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.legend(fontsize=9, frameon=False)


def draw(records: list[Record], path: Path) -> None:
    """Draw both parts into a PNG of 1600 x 1900 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, parts = pyplot.subplots(
        2, 1, figsize=(8, 9.5), height_ratios=(1.35, 1), facecolor="white", layout="constrained"
    )
    _draw_speeds(parts[0], records)
    _draw_errors(parts[1], records)
    for axes in parts:
        axes.spines[["top", "right"]].set_visible(False)
    if records:
        figure.supxlabel(f"{records[0].machine}; revision {records[0].revision}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Draw the records of files."""
    from regmix_bench.targets import read_records

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", action="append", required=True, help="records")
    parser.add_argument("--picture", metavar="FILE", required=True, help="PNG to write")
    arguments = parser.parse_args()
    draw(read_records(arguments.json), Path(arguments.picture))


if __name__ == "__main__":
    main()
