"""Cost growth as a picture: a sweep's wall time over its proxies, for numbers of workers.

Enters: records of sweep_scaling.py. Leaves: a PNG, readable at 800 pixels.

    python -m regmix_bench.sweep_chart --json sweep.jsonl --picture sweep.png
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from regmix_bench.chart import BLUE, GREEN, ORANGE, PURPLE
from regmix_bench.harness import Record

_CASE = re.compile(r"(\d+) proxies, (\d+) workers")
_LOOKS = {1: (BLUE, "o"), 2: (ORANGE, "s"), 8: (GREEN, "^"), 64: (PURPLE, "D")}


def wall_times(records: Sequence[Record], how: str) -> dict[int, list[tuple[int, float]]]:
    """Return (proxies, seconds) for each number of workers; how: "measured" or "simulated"."""
    found: dict[int, dict[int, float]] = {}
    for record in records:
        match = _CASE.fullmatch(record.case)
        if match and record.metric == f"wall time, {how}":
            found.setdefault(int(match[2]), {})[int(match[1])] = record.value
    return {workers: sorted(points.items()) for workers, points in sorted(found.items())}


def draw(records: Sequence[Record], picture: Path) -> None:
    """Draw the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for workers, points in wall_times(records, "simulated").items():
        colour, marker = _LOOKS[workers]
        label = "1 worker" if workers == 1 else f"{workers} workers"
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    for workers, points in wall_times(records, "measured").items():
        axes.plot(
            *zip(*points, strict=True),
            color=_LOOKS[workers][0],
            linestyle="none",
            marker="x",
            markersize=11,
            markeredgewidth=2,
            label=f"{workers} measured",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="proxies of the sweep",
        ylabel="wall time, seconds",
        title="A sweep's wall time: lines simulated from recorded proxies, crosses measured",
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main() -> None:
    """Draw a file of records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    options = parser.parse_args()
    lines = options.json.read_text(encoding="utf-8").splitlines()
    draw([Record(**json.loads(line)) for line in lines], options.picture)


if __name__ == "__main__":
    main()
