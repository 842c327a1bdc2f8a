"""Active rounds replayed on published runs, against runs drawn at random.

Enters: tables of mixtures and losses in RegMix's format to choose from and, where given, unseen
runs to judge by; without them a quarter of the runs, another one for each start, is kept aside.
Leaves: records of regret, of Spearman x 100 on the best quarter and on all, by rule, as means over
starts: 24 random runs and 5 rounds of 8, against 64 and 128 random ones.

    python -m regmix_bench.replay --mixtures CSV --losses CSV --target pile_cc --json FILE \\
        [--test-mixtures CSV --test-losses CSV]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np

from regmix.decision.active.acquisition import DEFAULT_EXPLORE, DEFAULT_RULE, RULES
from regmix.decision.active.replay import ReplayPlan, ReplayPoint, replay
from regmix.decision.objective import Objective, make_objective
from regmix.decision.runs import Runs, read_runs
from regmix_bench.harness import Record, append, table

NUM_STARTS = 8
_HELD_OUT = 0.25
_RANDOM = (64, 128)
_SUITE = "replay"


def plans(rules: Sequence[str]) -> dict[str, ReplayPlan]:
    """Return what is compared, by case: random runs, each rule alone, the default with its share
    of random runs."""
    found = {f"{num} random": ReplayPlan(start=num, num_rounds=0) for num in _RANDOM}
    for rule in rules:
        found[f"64 by {rule}"] = ReplayPlan(rule=rule, explore=0.0)
    share = f"{DEFAULT_EXPLORE:.0%} of each round random"
    found[f"64 by {DEFAULT_RULE}, {share}"] = ReplayPlan()
    return found


def measure(
    runs: Runs, unseen: Runs | None, objective: Objective, plan: ReplayPlan, num_starts: int
) -> list[ReplayPoint]:
    """Return the end of a replay for each start; the starts are the same for every plan."""
    weights, losses = np.asarray(runs.weights), np.asarray(runs.losses)
    ends = []
    for seed in range(num_starts):
        # Not the generator of the start, which `replay` seeds with the same number.
        order = np.random.default_rng([seed, len(runs)]).permutation(len(runs))
        aside = round(_HELD_OUT * len(runs)) if unseen is None else 0
        pool, held = order[aside:], order[:aside]
        judged = weights[held], losses[held]
        if unseen is not None:
            judged = np.asarray(unseen.weights), np.asarray(unseen.losses)
        curve = replay(
            weights[pool], losses[pool], *judged, objective=objective, plan=plan, seed=seed
        )
        ends.append(curve[-1])
    return ends


def records(case: str, ends: Sequence[ReplayPoint], judged_by: str) -> Iterator[Record]:
    """Return the means over starts, and the standard error of the two that decide."""
    columns = {
        "regret": ([end.regret_nats for end in ends], "nats"),
        "true loss of the chosen": ([end.loss_nats for end in ends], "nats"),
        "Spearman x 100, best quarter": (_ranks([e.spearman_best for e in ends]), "points"),
        "Spearman x 100, all": (_ranks([end.spearman for end in ends]), "points"),
    }
    for metric, (values, unit) in columns.items():
        words = f"{metric}, {judged_by}, mean of {len(values)} starts"
        yield Record(suite=_SUITE, case=case, metric=words, value=float(np.mean(values)), unit=unit)
        if metric.startswith(("regret", "Spearman x 100, best")) and len(values) > 1:
            error = float(np.std(values, ddof=1) / len(values) ** 0.5)
            words = f"standard error of {words}"
            yield Record(suite=_SUITE, case=case, metric=words, value=error, unit=unit)


def _ranks(values: Sequence[float | None]) -> list[float]:
    return [100 * value if value is not None else 0.0 for value in values]


def main() -> None:
    """Measure and print, and append to a file of records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ("--mixtures", "--losses"):
        parser.add_argument(option, required=True, metavar="CSV")
    for option in ("--test-mixtures", "--test-losses"):
        parser.add_argument(option, metavar="CSV")
    parser.add_argument("--target", required=True)
    parser.add_argument("--rules", nargs="+", default=[*RULES])
    parser.add_argument("--starts", type=int, default=NUM_STARTS)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if (options.test_mixtures is None) != (options.test_losses is None):
        parser.error("unseen runs need both --test-mixtures and --test-losses")
    runs = read_runs(options.mixtures, options.losses).select([options.target])
    unseen = None
    judged_by = "runs kept aside"
    if options.test_mixtures is not None:
        unseen = read_runs(options.test_mixtures, options.test_losses, targets=runs.targets)
        judged_by = f"{len(unseen)} unseen runs"
    objective = make_objective(0, runs.targets)
    measured: list[Record] = []
    for case, plan in plans(options.rules).items():
        ends = measure(runs, unseen, objective, plan, options.starts)
        measured += records(f"{runs.targets[0]}, {case}", ends, judged_by)
        print(table(measured[-6:]), flush=True)
    if options.json:
        append(options.json, measured)


if __name__ == "__main__":
    main()
