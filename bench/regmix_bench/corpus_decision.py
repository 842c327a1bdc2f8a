"""The decision on the real corpus, checked: on proxies trained again, and on larger models.

Enters: the folder that `corpus_study` left. Leaves: the optimum for one target with its intervals;
proxies of the swarm's size trained at the optimum, natural, uniform, best observed and a random
mixture, three seeds each, beside the predicted intervals; models three times as large at the same
mixtures, three seeds each, beside the predicted order and the predicted gains. Stopped and run
again, it goes on where it was.

    python -m regmix_bench.corpus_decision --out FOLDER --json FILE --picture FILE
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regmix.data.mixtures import Mixture, MixtureTable, write_mixture_yaml
from regmix.decision.objective import make_objective
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.runs import read_runs
from regmix.decision.surrogate import Surrogate, fit
from regmix.decision.uncertainty import Interval, predicted_interval
from regmix.files import read_json
from regmix.large.train import TrainRequest, resolve_mixture, run_training
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix_bench.corpus_study import (
    TARGET,
    WORKERS,
    Clock,
    proxy_training,
    spearman,
    sweep,
    with_progress,
)
from regmix_bench.harness import Record, append, table

SEEDS = 3
RANDOM_SEED = 3
MAX_EPOCHS = 4.0
OPTIMUM, NATURAL, UNIFORM, BEST, RANDOM = "optimum", "natural", "uniform", "best observed", "random"


def final_training() -> Training:
    """Return the final model: 1.02M parameters, three times the proxy's; twice its tokens."""
    proxy = proxy_training()
    shape = dataclasses.replace(proxy.shape, width=128, num_layers=3, num_heads=4, hidden=256)
    num_steps = 1536
    optim = dataclasses.replace(proxy.optim, lr=4e-3, total_steps=num_steps)
    return dataclasses.replace(
        proxy, shape=shape, optim=optim, num_steps=num_steps, eval_tokens=None
    )


def random_mixture(study: Study) -> dict[str, float]:
    """Return one mixture drawn as the swarm's are, with a seed of its own."""
    return dict(SwarmRequest(num=1, seed=RANDOM_SEED).draw(study.config.prior).mixture(0))


def decide(study: Study, surrogate: Surrogate) -> Optimum:
    """Return the optimum of the target under at most `MAX_EPOCHS` of any domain."""
    config = study.config
    return optimize(
        surrogate,
        objective=TARGET,
        prior=config.prior,
        available_tokens=config.available_tokens,
        budget_tokens=final_training().tokens,
        max_epochs=MAX_EPOCHS,
        baselines={RANDOM: random_mixture(study)},
        seed=0,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreseen:
    """A mixture and what was predicted of it: the loss of a proxy, the optimum's gain over it."""

    weights: dict[str, float]
    loss: Interval
    gain: Interval | None


def foresee(model: Surrogate, best: Optimum) -> dict[str, Foreseen]:
    """Return what is predicted of the optimum and of the four mixtures beside it."""
    objective = make_objective(TARGET, model.targets)

    def loss(weights: Mapping[str, float]) -> Interval:
        row = np.array([weights.get(domain, 0.0) for domain in model.domains])
        return predicted_interval(model, objective, row)[0]

    found = {OPTIMUM: Foreseen(weights=dict(best.mixture), loss=loss(best.mixture), gain=None)}
    for entry in best.baselines:
        if entry.name in (NATURAL, UNIFORM, BEST, RANDOM):
            found[entry.name] = Foreseen(
                weights=entry.weights, loss=loss(entry.weights), gain=entry.gain_interval
            )
    return found


def check_study(folder: Path, study: Study, mixtures: Mapping[str, Mapping[str, float]]) -> Study:
    """Open the study of the proxies trained again, or make it: every mixture three times.

    The first of each has the swarm's seeds, the others their own.
    """
    path = folder / "check"
    if (path / "study.toml").exists():
        return Study.open(path)
    domains = study.config.train_domains
    rows = [[weights.get(domain, 0.0) for domain in domains] for weights in mixtures.values()]
    weights = np.repeat(np.array(rows), SEEDS, axis=0)
    source = folder / "check.csv"
    MixtureTable(domains, tuple(range(1, len(weights) + 1)), weights).write_csv(source)
    return make_study(
        path,
        study.open_shards(),
        swarm=None,
        training=proxy_training(),
        objective={TARGET: 1.0},
        mixtures_from=source,
    )


def target_losses(study: Study, names: list[str]) -> dict[str, np.ndarray]:
    """Return mixture -> loss on the target [seeds] of the proxies trained again."""
    runs = read_runs(study.mixtures_path, study.losses_path)
    column = np.asarray(runs.losses)[:, runs.targets.index(TARGET)]
    return dict(zip(names, column.reshape(len(names), SEEDS), strict=True))


def train_final(study: Study, folder: Path, foreseen: Mapping[str, Foreseen]) -> None:
    """Train the final models: the five mixtures, three seeds each."""
    mixtures = {}
    for name, found in foreseen.items():
        if name in (NATURAL, UNIFORM):
            mixtures[name] = resolve_mixture(study, name)[1]
        else:
            path = folder / f"{_model_name(name)}.yaml"
            if not path.exists():
                write_mixture_yaml(path, Mixture(found.weights))
            mixtures[path.stem] = resolve_mixture(study, str(path))[1]
    request = TrainRequest(
        mixtures=mixtures,
        replicates=SEEDS,
        training=final_training(),
        num_workers=WORKERS,
        threads=1,
    )
    on_start, on_event = with_progress("final models")
    run_training(study, request, on_start=on_start, on_event=on_event)


def _model_name(mixture: str) -> str:
    """Return what the final models of a mixture are called."""
    # The name `optimum` is the study's own optimum.yaml.
    return f"{mixture}-{TARGET}" if mixture == OPTIMUM else mixture.replace(" ", "-")


def final_losses(study: Study, names: list[str]) -> dict[str, np.ndarray]:
    """Return mixture -> loss on the target [seeds] of the final models, over whole sets."""
    found = {}
    for name in names:
        files = [
            study.models_path / f"{_model_name(name)}-{seed}" / "evaluation.json"
            for seed in range(SEEDS)
        ]
        found[name] = np.array([read_json(file)["targets"][TARGET]["loss_nats"] for file in files])
    return found


def records(
    best: Optimum,
    foreseen: Mapping[str, Foreseen],
    proxies: Mapping[str, np.ndarray],
    finals: Mapping[str, np.ndarray],
) -> list[Record]:
    """Return every number: the optimum, and predicted against measured at both sizes."""
    out: list[Record] = []

    def note(case: str, metric: str, value: float, unit: str = "nats") -> None:
        suite = "corpus_decision"
        out.append(Record(suite=suite, case=case, metric=metric, value=float(value), unit=unit))

    for domain, weight, (low, high) in zip(best.domains, best.weights, best.interval, strict=True):
        note(f"optimum for {TARGET}, {domain}", "weight", weight, "1")
        note(f"optimum for {TARGET}, {domain}", "weight_low_90", low, "1")
        note(f"optimum for {TARGET}, {domain}", "weight_high_90", high, "1")
    note(f"optimum for {TARGET}", "shortfall", best.shortfall_nats)
    held = []
    for name, found in foreseen.items():
        interval, seeds = found.loss, proxies[name]
        held += [interval.low <= loss <= interval.high for loss in seeds]
        note(f"proxy on {name}", "predicted", interval.mean)
        note(f"proxy on {name}", "predicted_low_90", interval.low)
        note(f"proxy on {name}", "predicted_high_90", interval.high)
        for seed, loss in enumerate(seeds):
            note(f"proxy on {name}, seed {seed}", "loss", loss)
    note(f"{len(held)} proxies trained again", "inside the 90% interval", float(np.mean(held)), "1")
    predicted = [found.loss.mean for found in foreseen.values()]
    for size, losses in (("proxy", proxies), ("final model", finals)):
        means = [losses[name].mean() for name in foreseen]
        rank = spearman(np.array(predicted), np.array(means))
        note(f"{size}, 5 mixtures", "spearman of predicted and measured loss", rank, "1")
        for name, found in foreseen.items():
            note(f"{size} on {name}", "mean of 3 seeds", losses[name].mean())
            note(f"{size} on {name}", "sd of 3 seeds", losses[name].std(ddof=1))
            if found.gain is None:
                continue
            # The same seed on both sides: paired differences.
            gain = losses[name] - losses[OPTIMUM]
            case = f"{size}, optimum against {name}"
            note(case, "measured gain", gain.mean())
            note(case, "standard error of the measured gain", gain.std(ddof=1) / SEEDS**0.5)
            note(case, "predicted gain", found.gain.mean)
            note(case, "predicted_gain_low_90", found.gain.low)
            note(case, "predicted_gain_high_90", found.gain.high)
    return out


def draw(
    picture: Path,
    foreseen: Mapping[str, Foreseen],
    proxies: Mapping[str, np.ndarray],
    finals: Mapping[str, np.ndarray],
) -> None:
    """Draw predicted intervals with the proxies trained again, and the final models' losses."""
    from matplotlib.figure import Figure

    names = sorted(foreseen, key=lambda name: foreseen[name].loss.mean)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        interval = foreseen[name].loss
        left.plot(
            [interval.low, interval.high],
            [row, row],
            color="#9db7da",
            linewidth=9,
            solid_capstyle="butt",
        )
        left.plot(interval.mean, row, "|", color="#1f3f73", markersize=14)
        left.scatter(proxies[name], [row] * SEEDS, s=18, color="#d1663a", zorder=3)
        seeds = finals[name]
        right.errorbar(
            seeds.mean(), row, xerr=seeds.std(ddof=1), fmt="o", color="#d1663a", capsize=4
        )
        right.scatter(seeds, [row] * SEEDS, s=12, color="#d1663a", alpha=0.5)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title(f"proxies, loss on {TARGET}: 90% interval, 3 seeds")
    right.set_title(f"models three times as large, loss on {TARGET}")
    for axis in (left, right):
        axis.set_xlabel("loss [nats/token]")
        axis.grid(axis="x", alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Run what is not done, then write the records and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of corpus_study")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    clock = Clock(options.out / "decision-seconds.json")
    study = Study.open(options.out / "swarm")
    runs = read_runs(study.mixtures_path, study.losses_path)
    surrogate = fit(runs.weights, runs.losses, seed=0)
    best = decide(study, surrogate)
    print(f"Verdict: {best.verdict}", flush=True)
    foreseen = foresee(surrogate, best)
    mixtures = {name: found.weights for name, found in foreseen.items()}
    check = check_study(options.out, study, mixtures)
    clock.run("proxies trained again", lambda: sweep(check))
    clock.run("final models", lambda: train_final(study, options.out, foreseen))
    proxies = target_losses(check, list(foreseen))
    finals = final_losses(study, list(foreseen))
    measured = records(best, foreseen, proxies, finals)
    measured += [
        Record(suite="corpus_decision", case=stage, metric="wall", value=seconds, unit="s")
        for stage, seconds in clock.seconds.items()
    ]
    print(table(measured))
    if options.json:
        append(options.json, measured)
    if options.picture:
        draw(options.picture, foreseen, proxies, finals)


if __name__ == "__main__":
    main()
