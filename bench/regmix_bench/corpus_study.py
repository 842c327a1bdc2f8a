"""RegMix on a real corpus, from shards to predicted losses: are unseen mixtures foreseen?

Enters: a packed-able corpus (JSON lines by domain, train and valid) and an empty folder. Leaves:
two studies of small proxies there (the swarm, and unseen mixtures used for nothing but the final
figure), and records of how well losses were predicted. `corpus_decision` goes on from here.
Every seed is fixed below. Stopped and run again, it goes on where it was.

    python -m regmix_bench.corpus_study --corpus CORPUS --out FOLDER --json FILE --picture FILE
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from regmix.cli.words import training_from
from regmix.data.mixtures import MixtureTable
from regmix.data.packing.pack import pack
from regmix.data.shards import ShardSet
from regmix.decision.calibration import inside
from regmix.decision.regressors.registry import REGRESSORS
from regmix.decision.runs import Runs, read_runs
from regmix.decision.surrogate import Surrogate, fit
from regmix.display import Progress
from regmix.files import read_json, write_json
from regmix.study import Study, Training
from regmix.swarm.cost import Cost
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.events import Event
from regmix.swarm.sweep import SweepOptions, Tally, run_sweep
from regmix_bench.harness import Record, append, table

TARGET = "web"
VOCAB_SIZE = 2048
NUM_PROXIES, SWARM_SEED = 64, 1
NUM_UNSEEN, UNSEEN_SEED = 32, 2
BOOTSTRAP = 2000
WORKERS = 2


def proxy_training() -> Training:
    """Return the proxy: 0.34M parameters, 0.77M tokens."""
    return training_from(
        model="cpu-64",
        vocab_size=VOCAB_SIZE,
        seq_len=128,
        batch_size=8,
        tokens=768_000,
        learning_rate=6e-3,
        warmup_steps=50,
        schedule="cosine",
        eval_tokens=8192,
    )


class Clock:
    """Adds up the seconds of each stage over all runs of the script."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def run(self, stage: str, work: Callable[[], object]) -> None:
        """Do `work` and add its time to `stage`, also when it is interrupted."""
        started = time.monotonic()
        try:
            work()
        finally:
            spent = time.monotonic() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            write_json(self.path, self.seconds)


def open_study(folder: Path, name: str, shards: ShardSet, num: int, seed: int) -> Study:
    """Open the study `name`, or draw it."""
    if (folder / name / "study.toml").exists():
        return Study.open(folder / name)
    return make_study(
        folder / name,
        shards,
        swarm=SwarmRequest(num=num, seed=seed),
        training=proxy_training(),
        objective={TARGET: 1.0},
    )


def with_progress(
    title: str,
) -> tuple[Callable[[Cost, Tally], None], Callable[[Event, Tally], None]]:
    """Return callbacks that print the cost, then plain progress lines."""
    shown: list[Progress] = []

    def on_start(cost: Cost, tally: Tally) -> None:
        print(f"{title}: {cost}", flush=True)
        shown.append(Progress(title, total=tally.total_tokens, unit="tokens"))

    def on_event(_event: Event, tally: Tally) -> None:
        shown[0].update(tally.tokens, models=tally.models_done, loss=f"{tally.loss_nats:.3f} nats")

    return on_start, on_event


def sweep(study: Study) -> None:
    """Train the proxies that are not trained."""
    on_start, on_event = with_progress(study.path.name)
    run_sweep(study, SweepOptions(num_workers=WORKERS), on_start=on_start, on_event=on_event)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def interval(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return the 95% bootstrap interval of Spearman's correlation over the unseen runs."""
    draw = np.random.default_rng(0)
    values = []
    for _ in range(BOOTSTRAP):
        rows = draw.integers(0, len(true), len(true))
        values.append(spearman(predicted[rows], true[rows]))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def judge(
    surrogate: Surrogate, regressor: str, runs: Runs, unseen: Runs
) -> tuple[list[Record], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return records of predicted against true loss on the unseen, for `web` and for the mean."""
    mean, sd = surrogate.predict(unseen.weights)
    covered = inside(np.asarray(unseen.losses), mean, sd)
    column = runs.targets.index(TARGET)
    true = np.asarray(unseen.losses)
    pairs = {
        TARGET: (np.asarray(mean)[:, column], true[:, column]),
        "mean": (np.asarray(mean).mean(axis=1), true.mean(axis=1)),
    }
    case = f"{regressor}, {len(runs)} proxies, {len(unseen)} unseen"
    shares = {"mean of targets": covered.mean(), "lowest target": covered.min()}
    records = [
        Record(
            suite="corpus_study",
            case=case,
            metric=f"share inside the 90% interval, {which}",
            value=float(share),
            unit="1",
        )
        for which, share in shares.items()
    ]
    for objective, (predicted, measured) in pairs.items():
        case = f"{regressor}, {len(runs)} proxies, {len(unseen)} unseen, {objective}"
        low, high = interval(predicted, measured)
        rmse = float(np.sqrt(np.mean((predicted - measured) ** 2)))
        values = {
            "spearman": (spearman(predicted, measured), "1"),
            "spearman_low_95": (low, "1"),
            "spearman_high_95": (high, "1"),
            "rmse": (rmse, "nats"),
            "true_loss_sd": (float(measured.std()), "nats"),
        }
        records += [
            Record(suite="corpus_study", case=case, metric=name, value=value, unit=unit)
            for name, (value, unit) in values.items()
        ]
    return records, pairs


def draw(picture: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw predicted against true loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (objective, (predicted, true)) in zip(axes, pairs.items(), strict=True):
        axis.scatter(true, predicted, s=22, color="#3b6fb6")
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axis.plot(ends, ends, color="#999999", linewidth=1)
        axis.set_title(
            f"{objective}: {len(true)} unseen mixtures, Spearman {spearman(predicted, true):.3f}"
        )
        axis.set_xlabel("true loss [nats/token]")
        axis.set_ylabel("predicted loss [nats/token]")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Run what is not done, then write the records and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--sweep-only", action="store_true", help="stop after the proxies")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.out / "seconds.json")
    packed = options.out / "shards"
    clock.run("pack", lambda: pack([options.corpus], packed, train_bpe=VOCAB_SIZE))
    shards = ShardSet.open(packed)
    study = open_study(options.out, "swarm", shards, NUM_PROXIES, SWARM_SEED)
    unseen_study = open_study(options.out, "unseen", shards, NUM_UNSEEN, UNSEEN_SEED)
    refuse_shared_mixtures(study, unseen_study)
    clock.run("proxies", lambda: sweep(study))
    clock.run("unseen proxies", lambda: sweep(unseen_study))
    if options.sweep_only:
        return
    runs = read_runs(study.mixtures_path, study.losses_path)
    unseen = read_runs(unseen_study.mixtures_path, unseen_study.losses_path)
    records = []
    for regressor in (*REGRESSORS, "auto"):
        surrogate = fit(runs.weights, runs.losses, regressor=regressor, seed=0)
        judged, pairs = judge(surrogate, regressor, runs, unseen)
        records += judged
    records += [
        Record(suite="corpus_study", case=stage, metric="wall", value=seconds, unit="s")
        for stage, seconds in clock.seconds.items()
    ]
    print(table(records))
    if options.json:
        append(options.json, records)
    if options.picture:
        draw(options.picture, pairs)


def refuse_shared_mixtures(study: Study, unseen: Study) -> None:
    """Raise where a mixture stands in both studies: it would not be unseen."""
    left = MixtureTable.read_csv(study.mixtures_path).weights
    right = MixtureTable.read_csv(unseen.mixtures_path).weights
    if any((np.abs(left - row).max(axis=1) < 1e-9).any() for row in right):
        raise SystemExit("an unseen mixture is also in the swarm: choose another seed")


if __name__ == "__main__":
    main()
