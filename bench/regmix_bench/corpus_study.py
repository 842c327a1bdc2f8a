"""RegMix on a real corpus, from shards to final models: does the decision hold?

Enters: a packed-able corpus (JSON lines by domain, train and valid) and an empty folder. Leaves:
two studies of small proxies there (the swarm, and unseen mixtures used for nothing but the final
figure), the final models, and records of how well losses were predicted and what was gained.
Every seed is fixed below. Stopped and run again, it goes on where it was.

    python -m regmix_bench.corpus_study --corpus CORPUS --out FOLDER --json FILE --picture FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regmix.cli.words import training_from
from regmix.data.mixtures import Mixture, MixtureTable, write_mixture_yaml
from regmix.data.packing.pack import pack
from regmix.data.shards import ShardSet
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.runs import Runs, read_runs
from regmix.decision.surrogate import Surrogate, fit
from regmix.display import Progress
from regmix.files import read_json, write_json
from regmix.large.train import TrainRequest, resolve_mixture, run_training
from regmix.study import Study, Training
from regmix.swarm.cost import Cost
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.executors import Event
from regmix.swarm.sweep import SweepOptions, Tally, run_sweep
from regmix_bench.harness import Record, append, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TARGET = "web"
VOCAB_SIZE = 2048
NUM_PROXIES, SWARM_SEED = 64, 1
NUM_UNSEEN, UNSEEN_SEED = 32, 2
FINAL_SEEDS = 3
MAX_EPOCHS = 4.0
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


def final_training() -> Training:
    """Return the final model: 1.02M parameters, three times the proxy's; twice its tokens."""
    proxy = proxy_training()
    shape = dataclasses.replace(proxy.shape, width=128, num_layers=3, num_heads=4, hidden=256)
    num_steps = 1536
    optim = dataclasses.replace(proxy.optim, lr=4e-3, total_steps=num_steps)
    return dataclasses.replace(
        proxy, shape=shape, optim=optim, num_steps=num_steps, eval_tokens=None
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
    mean, _ = surrogate.predict(unseen.weights)
    column = runs.targets.index(TARGET)
    true = np.asarray(unseen.losses)
    pairs = {
        TARGET: (np.asarray(mean)[:, column], true[:, column]),
        "mean": (np.asarray(mean).mean(axis=1), true.mean(axis=1)),
    }
    records = []
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


def decide(study: Study, surrogate: Surrogate, objective: str) -> Optimum:
    """Return the optimum of an objective under at most `MAX_EPOCHS` of any domain."""
    config = study.config
    return optimize(
        surrogate,
        objective=objective,
        prior=config.prior,
        available_tokens=config.available_tokens,
        budget_tokens=final_training().tokens,
        max_epochs=MAX_EPOCHS,
        seed=0,
    )


def train_final(study: Study, optima: dict[str, Path]) -> None:
    """Train the final models: each optimum, natural and uniform, three seeds each."""
    names = [*(str(path) for path in optima.values()), "natural", "uniform"]
    request = TrainRequest(
        mixtures=dict(resolve_mixture(study, name) for name in names),
        replicates=FINAL_SEEDS,
        training=final_training(),
        num_workers=WORKERS,
        threads=1,
    )
    on_start, on_event = with_progress("final models")
    run_training(study, request, on_start=on_start, on_event=on_event)


def final_losses(study: Study) -> dict[str, np.ndarray]:
    """Return mixture -> losses [seeds, targets] of the final models over whole sets."""
    losses = {}
    for path in sorted(study.models_path.glob("*-0/evaluation.json")):
        name = path.parent.name.removesuffix("-0")
        rows = [
            read_json(study.models_path / f"{name}-{seed}" / "evaluation.json")["targets"]
            for seed in range(FINAL_SEEDS)
        ]
        losses[name] = np.array(
            [[row[target]["loss_nats"] for target in study.config.targets] for row in rows]
        )
    return losses


def final_records(study: Study, losses: dict[str, np.ndarray]) -> list[Record]:
    """Return each mixture's objective, mean and spread over seeds, and gains over baselines."""
    column = study.config.targets.index(TARGET)
    by_objective = {
        TARGET: {name: values[:, column] for name, values in losses.items()},
        "mean": {name: values.mean(axis=1) for name, values in losses.items()},
    }
    records = []
    for objective, values in by_objective.items():
        for name, seeds in values.items():
            case = f"final model on {name}, loss on {objective}"
            records += mean_and_spread(case, "loss", seeds)
        best = values[f"optimum-{objective}"]
        for baseline in ("natural", "uniform"):
            # The same seed on both sides: paired differences.
            case = f"optimum-{objective} against {baseline}, loss on {objective}"
            records += mean_and_spread(case, "gain", values[baseline] - best)
    return records


def mean_and_spread(case: str, metric: str, seeds: np.ndarray) -> list[Record]:
    """Return two records: the mean over the seeds and the standard deviation [nats]."""
    values = {metric: seeds.mean(), f"{metric}_sd": seeds.std(ddof=1)}
    return [
        Record(suite="corpus_study", case=case, metric=name, value=float(value), unit="nats")
        for name, value in values.items()
    ]


def draw(
    picture: Path,
    pairs: dict[str, tuple[np.ndarray, np.ndarray]],
    study: Study,
    losses: dict[str, np.ndarray],
) -> None:
    """Draw predicted against true loss, and the final models' losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (objective, (predicted, true)) in zip(axes[0], pairs.items(), strict=True):
        axis.scatter(true, predicted, s=22, color="#3b6fb6")
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axis.plot(ends, ends, color="#999999", linewidth=1)
        axis.set_title(
            f"{objective}: {len(true)} unseen mixtures, Spearman {spearman(predicted, true):.3f}"
        )
        axis.set_xlabel("true loss [nats/token]")
        axis.set_ylabel("predicted loss [nats/token]")
    column = study.config.targets.index(TARGET)
    _bars(axes[1][0], TARGET, {name: value[:, column] for name, value in losses.items()})
    _bars(axes[1][1], "mean of all domains", {n: v.mean(axis=1) for n, v in losses.items()})
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _bars(axis: Axes, title: str, values: dict[str, np.ndarray]) -> None:
    names = sorted(values, key=lambda name: values[name].mean())
    for row, name in enumerate(names):
        seeds = values[name]
        colour = "#d1663a" if name.startswith("optimum") else "#8a8f98"
        axis.errorbar(
            seeds.mean(), row, xerr=seeds.std(ddof=1), fmt="o", color=colour, capsize=4, zorder=3
        )
        axis.scatter(seeds, [row] * len(seeds), s=12, color=colour, alpha=0.5)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_title(f"final models, loss on {title}")
    axis.set_xlabel("loss [nats/token], mean and spread of 3 seeds")
    axis.grid(axis="x", alpha=0.3)


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
    for regressor in ("linear", "lightgbm", "powerlaw", "auto"):
        surrogate = fit(runs.weights, runs.losses, regressor=regressor, seed=0)
        judged, pairs = judge(surrogate, regressor, runs, unseen)
        records += judged
    optima = {}
    for objective in (TARGET, "mean"):
        best = decide(study, surrogate, objective)
        optima[objective] = options.out / f"optimum-{objective}.yaml"
        if not optima[objective].exists():
            write_mixture_yaml(
                optima[objective], Mixture(dict(zip(runs.domains, best.weights, strict=True)))
            )
    clock.run("final models", lambda: train_final(study, optima))
    losses = final_losses(study)
    records += final_records(study, losses)
    records += [
        Record(suite="corpus_study", case=stage, metric="wall", value=seconds, unit="s")
        for stage, seconds in clock.seconds.items()
    ]
    print(table(records))
    if options.json:
        append(options.json, records)
    if options.picture:
        draw(options.picture, pairs, study, losses)


def refuse_shared_mixtures(study: Study, unseen: Study) -> None:
    """Raise where a mixture stands in both studies: it would not be unseen."""
    left = MixtureTable.read_csv(study.mixtures_path).weights
    right = MixtureTable.read_csv(unseen.mixtures_path).weights
    if any((np.abs(left - row).max(axis=1) < 1e-9).any() for row in right):
        raise SystemExit("an unseen mixture is also in the swarm: choose another seed")


if __name__ == "__main__":
    main()
