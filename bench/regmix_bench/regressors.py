"""Every regressor side by side on published runs: rank correlation and coverage on unseen ones.

Enters: tables of mixtures and losses in RegMix's format, to fit on and to judge on. Leaves: records
of Spearman x 100 and RMSE by regressor and number of runs, the coverage of the default's 90%
intervals, and the seconds of a whole fit. Random subsets of the runs are fitted, the same ones for
every regressor; the unseen runs are used for nothing but the figures.

    python -m regmix_bench.regressors --mixtures CSV --losses CSV --test-mixtures CSV \\
        --test-losses CSV --target pile_cc --json FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from regmix.decision.calibration import inside
from regmix.decision.regressors.registry import REGRESSORS, make_regressor
from regmix.decision.runs import Runs, read_runs, resolve
from regmix.decision.surrogate import fit
from regmix.decision.validation import spearman
from regmix_bench.harness import Record, append, table

SIZES = (32, 64, 128, 256, 512)
NUM_SUBSETS = 8
_AUTO = "auto"


@dataclass
class Tally:
    """What one regressor reached with one number of runs: a number per subset of runs."""

    target: list[float] = field(default_factory=list)
    every: list[float] = field(default_factory=list)
    relative_rmse: list[float] = field(default_factory=list)
    target_coverage: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    lowest_coverage: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, true: np.ndarray, mean: np.ndarray, column: int, seconds: float) -> None:
        """Count predictions [N, M] of the unseen losses."""
        ranks = [spearman(true[:, j], mean[:, j]) for j in range(true.shape[1])]
        known = [100 * rank if rank is not None else 0.0 for rank in ranks]
        self.target.append(known[column])
        self.every.append(float(np.mean(known)))
        error = np.sqrt(((mean - true) ** 2).mean(0) / true.var(0))
        self.relative_rmse.append(float(error.mean()))
        self.seconds.append(seconds)

    def add_coverage(self, shares: np.ndarray, column: int) -> None:
        """Count the shares [M] of unseen losses inside their 90% intervals."""
        self.target_coverage.append(float(shares[column]))
        self.coverage.append(float(shares.mean()))
        self.lowest_coverage.append(float(shares.min()))


def subsets(num_runs: int, size: int) -> Iterator[np.ndarray]:
    """Yield the rows of the random subsets, one of all runs where `size` is their number."""
    for seed in range(NUM_SUBSETS if size < num_runs else 1):
        yield np.sort(np.random.default_rng([size, seed]).permutation(num_runs)[:size])


def measure(
    runs: Runs, unseen: Runs, column: int, sizes: Sequence[int], names: Sequence[str]
) -> dict[tuple[int, str], Tally]:
    """Return what every regressor reaches at every size."""
    weights, losses = np.asarray(runs.weights), np.asarray(runs.losses)
    points, true = np.asarray(unseen.weights), np.asarray(unseen.losses)
    found: dict[tuple[int, str], Tally] = {}
    for size in sizes:
        for rows in subsets(len(runs), size):
            for name in names:
                tally = found.setdefault((size, name), Tally())
                started = time.perf_counter()
                if name == _AUTO:
                    surrogate = fit(weights[rows], losses[rows])
                    seconds = time.perf_counter() - started
                    mean, sd = surrogate.predict(points)
                    tally.add_coverage(inside(true, mean, sd), column)
                else:
                    regressor = make_regressor(name, 0)
                    if size < regressor.fewest_runs(weights.shape[1]):
                        continue
                    model = regressor.fit(weights[rows], losses[rows])
                    seconds = time.perf_counter() - started
                    mean = model.mean(points)
                tally.add(true, mean, column, seconds)
        print(f"{size} runs done", flush=True)
    return found


def records(
    found: dict[tuple[int, str], Tally], target: str, num_unseen: int, num_targets: int
) -> list[Record]:
    """Return the means over subsets, and their standard deviations for the target."""
    out = []
    for (size, name), tally in found.items():
        if not tally.target:
            continue
        case = f"{name}, {size} runs"
        of_target, of_all = f"{target}, {num_unseen} unseen", f"mean of {num_targets} targets"
        values: dict[str, tuple[list[float], str]] = {
            f"Spearman x 100, {of_target}": (tally.target, "points"),
            f"Spearman x 100, {of_all}": (tally.every, "points"),
            f"RMSE over the spread of the losses, {of_all}": (tally.relative_rmse, "1"),
            f"coverage of 90% intervals, {of_target}": (tally.target_coverage, "1"),
            f"coverage of 90% intervals, {of_all}": (tally.coverage, "1"),
            "coverage of 90% intervals, lowest target": (tally.lowest_coverage, "1"),
            "fit of all targets": (tally.seconds, "s"),
        }
        for metric, (numbers, unit) in values.items():
            if numbers:
                value = float(np.mean(numbers))
                out.append(
                    Record(suite="regressors", case=case, metric=metric, value=value, unit=unit)
                )
        spread = float(np.std(tally.target))
        metric = f"Spearman x 100, {of_target}, sd over {len(tally.target)} subsets"
        out.append(
            Record(suite="regressors", case=case, metric=metric, value=spread, unit="points")
        )
    return out


def main() -> None:
    """Measure and print, and append to a file of records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--mixtures", "--losses", "--test-mixtures", "--test-losses"):
        parser.add_argument(option, required=True, metavar="CSV")
    parser.add_argument("--target", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--regressors", nargs="+", default=[*REGRESSORS, _AUTO])
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    runs = read_runs(options.mixtures, options.losses)
    unseen = read_runs(options.test_mixtures, options.test_losses, targets=runs.targets)
    target = resolve(options.target, runs.targets, "target")
    column = runs.targets.index(target)
    sizes = [size for size in options.sizes if size <= len(runs)]
    found = measure(runs, unseen, column, sizes, options.regressors)
    measured = records(found, target, len(unseen), len(runs.targets))
    if options.json:
        append(options.json, measured)
    print(table(measured))


if __name__ == "__main__":
    main()
