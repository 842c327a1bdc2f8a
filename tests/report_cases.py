"""A study with every part a report can show, written as the commands write it; and its page."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.mixtures import MixtureTable
from regmix.files import write_json
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.provenance import environment_record
from regmix.study import Study, StudyConfig, Training

DOMAINS = ("code", "legal", "maths", "web")
TARGETS = ("code", "maths", "wiki")
PRIOR = {"code": 0.2, "legal": 0.1, "maths": 0.05, "web": 0.65}
OPTIMUM = {"code": 0.35, "legal": 0.02, "maths": 0.25, "web": 0.38}
NUM_PROXIES = 24
OLDER = ("mixtures", "losses", "fit", "optimum", "models", "steps", "sweep")
PARTS = (*OLDER, "sure")


def training() -> Training:
    shape = ModelShape(num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=512, seq_len=64)
    optim = OptimConfig(lr=3e-3, warmup_steps=5, schedule="cosine", total_steps=60)
    return Training(shape=shape, optim=optim, batch_size=8, num_steps=60)


def true_losses(weights: np.ndarray) -> np.ndarray:
    useful = np.array([[1.0, 0.1, 0.2, 0.2], [0.3, 0.05, 1.0, 0.1], [0.1, 0.3, 0.1, 1.0]])
    return 2.0 + 1.2 * (weights @ useful.T + 0.05) ** -0.3


def make_study(
    folder: Path,
    parts: tuple[str, ...] = PARTS,
    *,
    domains: tuple[str, ...] = DOMAINS,
    gains: tuple[float, float, float] = (0.05, 0.04, 0.06),
) -> Study:
    rename = dict(zip(DOMAINS, domains, strict=True))
    targets = tuple(rename.get(target, target) for target in TARGETS)
    config = StudyConfig(
        shards="../shards",
        shards_checksum="0123456789abcdef",
        train_domains=domains,
        targets=targets,
        objective=dict.fromkeys(targets, 1 / 3),
        prior={rename[d]: w for d, w in PRIOR.items()},
        available_tokens=dict.fromkeys(domains, 2_000_000),
        proxy=training(),
        swarm={"sampler": "bounded", "seed": "0"},
    )
    study = Study.create(folder, config)
    random = np.random.default_rng(1)
    weights = random.dirichlet([1.0] * 4, size=NUM_PROXIES)
    losses = true_losses(weights) + random.normal(0, 0.003, size=(NUM_PROXIES, 3))
    table = MixtureTable(domains, tuple(range(1, NUM_PROXIES + 1)), weights)
    if "mixtures" in parts:
        table.write_csv(study.mixtures_path)
    if "losses" in parts:
        columns = [f"metric/{target}_val_loss" for target in targets]
        write_csv(study.losses_path, columns, losses)
    if "fit" in parts:
        write_fit(study, targets, losses, losses + random.normal(0, 0.01, size=losses.shape))
    if "optimum" in parts:
        write_optimum(study, rename, targets)
    if "sure" in parts:
        add_sureness(study, losses)
    if "models" in parts:
        write_models(study, rename, targets, gains)
    if "steps" in parts:
        study.steps_path.mkdir()
        for index in range(1, NUM_PROXIES + 1):
            curve = 3 + 3 * np.exp(-np.arange(60) / 12) + random.normal(0, 0.05, 60)
            np.save(study.steps_path / f"{index}.npy", curve.astype(np.float32))
    if "sweep" in parts:
        speed = {"num_proxies": NUM_PROXIES, "workers": 2, "tokens_per_second": 123456.7}
        write_json(study.path / "sweep.json", {**speed, "environment": environment_record()})
    return study


def write_csv(path: Path, columns: list[str], values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["index", *columns])
        writer.writerows([i, *row] for i, row in enumerate(values.tolist(), start=1))


def write_fit(
    study: Study, targets: tuple[str, ...], true: np.ndarray, predicted: np.ndarray
) -> None:
    columns = [f"true/{t}" for t in targets] + [f"predicted/{t}" for t in targets]
    study.surrogate_path.mkdir()
    write_csv(study.surrogate_path / "predictions.csv", columns, np.hstack([true, predicted]))
    scores = {"spearman": 0.9719, "rmse_nats": 0.0123}
    write_json(
        study.surrogate_path / "fit.json",
        {
            "regressor": "powerlaw",
            "choice": {"why": "lowest error"},
            "dropped": [{"index": 99, "reason": "its losses are not finite"}],
            "exchange_rates": {t: dict.fromkeys(study.config.train_domains, 0.5) for t in targets},
            "seed": 0,
            "num_runs": NUM_PROXIES,
            "targets": dict.fromkeys(targets, scores),
            "objective": {"spearman": 0.9345, "rmse_nats": 0.0101},
        },
    )


def write_optimum(study: Study, rename: dict[str, str], targets: tuple[str, ...]) -> None:
    losses = dict.fromkeys(targets, 3.1)
    write_json(
        study.path / "optimum.json",
        {
            "domains": [rename[d] for d in OPTIMUM],
            "weights": list(OPTIMUM.values()),
            "objective": study.config.objective,
            "predicted": {"objective": 3.1234, "targets": losses},
            "baselines": {"natural": {"weights": list(PRIOR.values()), "objective": 3.2}},
            "gain_nats": {"natural": 0.0766, "uniform": 0.0321, "best observed": 0.0042},
            "epochs": {rename["code"]: 1.4, rename["maths"]: 3.9, rename["web"]: 0.6},
            "budget_tokens": 5_000_000,
            "max_epochs": 4.0,
            "method": "exact",
            "verdict": "use the optimum: 0.077 nats below 'natural'",
        },
    )


def change(path: Path, **entries: Any) -> None:
    """Give a stored JSON table other entries."""
    write_json(path, {**json.loads(path.read_text()), **entries})


def add_sureness(study: Study, losses: np.ndarray) -> None:
    """Add to a fit and an optimum what older ones lack: intervals, noise, curve, trade-offs."""
    domains, targets = study.config.train_domains, study.config.targets
    estimates = {t: {d: [-0.02, -0.03, -0.01] for d in domains} for t in targets}
    estimates[targets[0]][domains[1]] = [0.004, -0.002, 0.01]
    rates = {t: {d: [0.5, 0.4, 0.7] for d in domains} for t in targets}
    sizes = ((6, 0.04, 0.01, 0.8), (12, 0.02, 0.005, 0.9), (NUM_PROXIES, 0.0101, 0.0, 0.9345))
    keys = ("num_runs", "rmse_nats", "rmse_sd_nats", "spearman")
    points = [dict(zip(keys, size, strict=True)) for size in sizes]
    fit = study.surrogate_path / "fit.json"
    scores = {"spearman": 0.9719, "rmse_nats": 0.0123, "coverage": 0.9167}
    change(
        fit,
        held_out_by="leave-one-out",
        targets=dict.fromkeys(targets, scores),
        objective={"spearman": 0.9345, "rmse_nats": 0.0101, "noise_nats": 0.0031},
        noise={"source": "3 pairs of replicates", "measured": True},
        learning_curve={"points": points, "exponent": 1.0, "advice": "twice as many would help"},
        influence={
            "at": study.config.prior,
            "raised_by": 0.05,
            "change_nats": estimates,
        },
        exchange_rates=rates,
    )
    predictions = study.surrogate_path / "predictions.csv"
    header, *rows = predictions.read_text().splitlines()
    header = ",".join([header, *(f"sd/{target}" for target in targets)])
    predictions.write_text("\n".join([header, *(f"{row},0.01,0.02,0.03" for row in rows)]) + "\n")
    optimum = json.loads((study.path / "optimum.json").read_text())
    names, weights = optimum["domains"], optimum["weights"]
    change(
        study.path / "optimum.json",
        baseline="natural",
        intervals={d: [max(0, w - 0.1), w + 0.1] for d, w in zip(names, weights, strict=True)},
        objective_interval_nats=[3.1, 3.15],
        gain_intervals_nats={"natural": [0.05, 0.1], "uniform": [-0.01, 0.07]},
        better={"natural": 1.0, "uniform": 0.8125},
        shortfall_nats=0.0021,
        noise_nats=0.0031,
        action="use",
        more_proxies=None,
        bounds={names[0]: [0.0, 0.35], names[1]: [0.02, 0.5]},
        at_edge=[names[2]],
        kl=0.05,
        divergence_nats=0.4,
        guard={
            "name": "natural",
            "weights": list(PRIOR.values()),
            "tolerance_nats": 0.02,
            "changes_nats": dict(zip(targets, (-0.05, 0.02, 0.01), strict=True)),
        },
    )
    write_tradeoffs(study, losses)


def write_tradeoffs(study: Study, losses: np.ndarray) -> None:
    """Write trade-offs whose points are the proxies' mixtures."""
    table = MixtureTable.read_csv(study.mixtures_path)
    targets = study.config.targets
    optimum = json.loads((study.path / "optimum.json").read_text())
    order = [optimum["domains"].index(domain) for domain in table.domains]
    row = {"losses_nats": [3.0, 3.1, 3.2], "objective_nats": 3.1}
    changes = {target: [0.01, -0.01, 0.03] for target in targets}
    write_json(
        study.path / "optimum-tradeoffs.json",
        {
            "domains": list(table.domains),
            "targets": list(targets),
            "reference": "optimum",
            "num_judged": 1800,
            "num_allowed": 600,
            "mixtures": {
                "optimum": {"weights": [optimum["weights"][at] for at in order], **row},
                "uniform": {"weights": [0.25] * 4, **row},
            },
            "points": {
                "weights": table.weights.tolist(),
                "losses_nats": losses.tolist(),
                "objective_nats": losses.mean(1).tolist(),
                "front": [True] * len(losses),
            },
            "payoff": {
                target: {"change_nats": changes, "objective_change_nats": [0.02, 0.01, 0.03]}
                for target in targets
            },
        },
    )


def write_models(
    study: Study, rename: dict[str, str], targets: tuple[str, ...], gains: tuple[float, ...]
) -> None:
    random = np.random.default_rng(2)
    offsets = {"optimum": 0.0, "natural": 1.0, "uniform": 0.6}
    for replicate, gain in enumerate(gains):
        seed_noise = random.normal(0, 0.01)
        for mixture, offset in offsets.items():
            folder = study.models_path / f"{mixture}-{replicate}"
            folder.mkdir(parents=True)
            losses = {t: 2.9 + 0.3 * i + seed_noise + offset * gain for i, t in enumerate(targets)}
            rows = {
                t: {"loss_nats": loss, "bits_per_byte": loss / 2.5} for t, loss in losses.items()
            }
            objective = sum(losses.values()) / len(losses)
            write_json(
                folder / "evaluation.json",
                {"targets": rows, "objective": {"loss_nats": objective}},
            )
            steps = [
                {"step": step, "loss_nats": 5 + replicate - 0.01 * step} for step in range(1, 61)
            ]
            lines = "".join(f"{json.dumps(step)}\n" for step in steps)
            (folder / "metrics.jsonl").write_text(lines)
            member = {
                "name": folder.name,
                "weights": {rename[d]: w for d, w in OPTIMUM.items()},
                "data_seed": replicate,
                "init_seed": replicate,
            }
            summary = {"name": folder.name, "mixture": mixture, "replicate": replicate}
            extra = {"tokens": 5_000_000, "environment": environment_record()}
            shared = {"member": member, "training": {"num_steps": 60}}
            write_json(folder / "summary.json", {**summary, **shared, **extra})


class Page(HTMLParser):
    """Collects the text, the scripts and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._inside is None:
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        (found,) = [s for attributes, s in self.scripts if attributes.get("id") == "charts"]
        return json.loads(found)
