"""The optimum: right where it is known, within its constraints, repeatable, and honest."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from regmix.cli import fit as fit_cli
from regmix.cli import optimize as optimize_cli
from regmix.data.mixtures import MixtureTable, read_mixture_yaml, write_mixture_yaml
from regmix.decision.optimum import optimize
from regmix.decision.surrogate import Surrogate, fit
from regmix.errors import ConfigError, RegmixError
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.study import Study, StudyConfig, Training

DOMAINS = ("a", "b", "c", "d")
TARGETS = ("x", "y", "z")
RATES = np.array([[3.0, 0.5, 0.2, 0.1], [0.2, 2.5, 0.4, 0.1], [0.1, 0.2, 0.3, 2.0]])
PRIOR = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}


def law(weights: np.ndarray) -> np.ndarray:
    return 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4


def draws(num: int = 60) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(4, 0.6), num)


@pytest.fixture(scope="module")
def smooth() -> Surrogate:
    weights = draws()
    return fit(weights, law(weights), regressor="powerlaw", domains=DOMAINS, targets=TARGETS)


@pytest.fixture(scope="module")
def trees() -> Surrogate:
    weights = draws()
    return fit(weights, law(weights), regressor="lightgbm", domains=DOMAINS, targets=TARGETS)


def test_exact_finds_the_best_mixture_of_a_convex_law(smooth: Surrogate) -> None:
    from scipy.optimize import minimize

    best = optimize(smooth, objective="mean", prior=PRIOR)
    true = minimize(
        lambda p: float(smooth.mean(p[None]).mean()),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
    )
    assert best.loss <= true.fun + 1e-6
    assert np.abs(best.weights - true.x).max() < 0.01


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("smooth", "mean"),
        ("smooth", "worst"),
        ("smooth", {"x": 0.7, "z": 0.3}),
        ("trees", "worst"),
        ("trees", "x"),
    ],
)
def test_exact_is_never_worse_than_simulate_and_quick(
    kind: str, objective: str | dict[str, float], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    limits: dict[str, Any] = {"upper": {"a": 0.4}, "lower": {"c": 0.1}, "prior": PRIOR}
    simulated = optimize(model, objective=objective, method="simulate", **limits)
    started = time.process_time()
    exact = optimize(model, objective=objective, method="exact", **limits)
    assert time.process_time() - started < 10  # CPU seconds: 5 on two cores
    assert exact.loss <= simulated.loss + 1e-12
    for best in (simulated, exact):
        assert best.mixture["a"] <= 0.4 + 1e-9
        assert best.mixture["c"] >= 0.1 - 1e-9
        assert math.fsum(best.weights) == 1.0


@pytest.mark.parametrize("method", ["simulate", "exact"])
def test_optimum_repeats_its_bits(smooth: Surrogate, method: str) -> None:
    first, again = (optimize(smooth, prior=PRIOR, method=method, seed=5) for _ in range(2))
    assert first.weights.tobytes() == again.weights.tobytes()


def test_epochs_are_limited_and_realised(smooth: Surrogate) -> None:
    available = {"a": 1e9, "b": 3e9, "c": 20e9, "d": 20e9}
    best = optimize(
        smooth, objective="x", prior=PRIOR, available_tokens=available, budget_tokens=20e9
    )
    assert best.epochs is not None
    assert best.epochs["a"] == pytest.approx(4.0, abs=1e-6)
    assert max(best.epochs.values()) <= 4 + 1e-6
    assert best.epochs["b"] == pytest.approx(best.mixture["b"] * 20 / 3)


def test_no_domain_exceeds_what_any_run_had_unless_allowed() -> None:
    weights = np.random.default_rng(0).dirichlet([1, 8, 8, 8], 60)
    model = fit(weights, law(weights), regressor="powerlaw", domains=DOMAINS, targets=TARGETS)
    best = optimize(model, objective="x")
    assert best.mixture["a"] == pytest.approx(weights[:, 0].max())
    assert "a" in best.at_edge
    assert optimize(model, objective="x", extrapolate=True).mixture["a"] > 0.9
    assert optimize(model, objective="x", upper={"a": 0.6}).mixture["a"] == pytest.approx(0.6)


def test_gain_is_over_the_chosen_baseline_and_all_are_compared(smooth: Surrogate) -> None:
    extra = {"mine": {"a": 0.5, "b": 0.5}}
    best = optimize(smooth, prior=PRIOR, baselines=extra, baseline="mine")
    by_name = {entry.name: entry for entry in best.baselines}
    assert set(by_name) == {"natural", "uniform", "best observed", "mine"}
    assert best.gain == by_name["mine"].gain == by_name["mine"].loss - best.loss
    observed = smooth.losses.mean(1)
    row = smooth.weights[observed.argmin()]
    assert list(by_name["best observed"].weights.values()) == row.tolist()


def test_verdict_believes_no_gain_that_is_noise() -> None:
    weights = draws()
    noise = 2 + np.random.default_rng(1).normal(0, 0.05, (60, 1))
    model = fit(weights, noise, regressor="linear", domains=DOMAINS, targets=("x",))
    unsure = optimize(model, objective="x", prior=PRIOR)
    assert unsure.action == "train more"
    assert "held-out losses are not predicted yet" in unsure.verdict
    clear = fit(weights, law(weights), regressor="powerlaw", domains=DOMAINS, targets=TARGETS)
    assert optimize(clear, objective="x", prior=PRIOR).verdict.startswith("use the optimum")


def test_verdict_never_advises_a_baseline_that_breaks_the_constraints(smooth: Surrogate) -> None:
    best = optimize(smooth, lower={"a": 0.1, "b": 0.2, "c": 0.7})
    assert best.gain < 0
    assert best.verdict.startswith("use the optimum: 'swarm mean' breaks the constraints")


@pytest.mark.parametrize("regressor", ["lightgbm", "linear", "powerlaw"])
def test_the_optimum_of_one_domain_is_that_domain(regressor: str) -> None:
    losses = 2 + np.random.default_rng(0).normal(0, 0.1, (20, 1))
    model = fit(np.ones((20, 1)), losses, regressor=regressor, domains=("a",), targets=("x",))
    assert optimize(model).weights.tolist() == [1.0]


@pytest.mark.parametrize("command", [fit_cli.command, optimize_cli.command])
def test_negative_seed_is_refused(command: Any) -> None:
    result = CliRunner().invoke(command, ["study", "--seed", "-1"])
    assert result.exit_code == 2
    assert "x>=0" in result.output


def test_infinite_epochs_are_no_limit_and_stay_out_of_the_json(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    words = ["--tokens", "4M", "--max-epochs", "inf", "--regressor", "linear", "--json"]
    told = run(optimize_cli.command, study.path, *words)
    assert "Infinity" not in told
    assert json.loads(told)["max_epochs"] is None


def test_two_baselines_of_one_name_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    files = [tmp_path / "one" / "mine.yaml", tmp_path / "two" / "mine.yaml"]
    for file in files:
        write_mixture_yaml(file, PRIOR)
    words = [str(study.path), "--regressor", "linear"]
    words += [word for file in files for word in ("--baseline", str(file))]
    with pytest.raises(ConfigError, match="another baseline is called 'mine'"):
        CliRunner().invoke(optimize_cli.command, words, catch_exceptions=False)


def test_unknown_method_baseline_and_domain_are_refused(smooth: Surrogate) -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        optimize(smooth, method="exakt")
    with pytest.raises(ConfigError, match="unknown baseline 'natrual'"):
        optimize(smooth, prior=PRIOR, baseline="natrual")
    with pytest.raises(RegmixError, match="unknown domain 'e'"):
        optimize(smooth, upper={"e": 0.3})


def make_study(folder: Path, losses: np.ndarray | None = None) -> Study:
    shape = ModelShape(num_layers=1, width=8, num_heads=1, hidden=8, vocab_size=16, seq_len=8)
    optim = OptimConfig(lr=1e-3, warmup_steps=1, schedule="cosine", total_steps=4)
    config = StudyConfig(
        shards="../shards",
        shards_checksum="0" * 16,
        train_domains=DOMAINS,
        targets=TARGETS,
        objective={"x": 0.5, "y": 0.5},
        prior=PRIOR,
        available_tokens=dict.fromkeys(DOMAINS, 1_000_000),
        proxy=Training(shape=shape, optim=optim, batch_size=1, num_steps=4),
    )
    study = Study.create(folder, config)
    weights = draws(40)
    MixtureTable(DOMAINS, tuple(range(1, 41)), weights).write_csv(study.mixtures_path)
    write_losses(study.losses_path, law(weights) if losses is None else losses)
    return study


def write_losses(path: Path, losses: np.ndarray) -> None:
    rows = [f"{i}," + ",".join(map(repr, row)) for i, row in enumerate(losses.tolist(), 1)]
    header = "index," + ",".join(f"metric/{name}_val_loss" for name in TARGETS)
    path.write_text("\n".join([header, *rows]) + "\n")


def run(command: Any, *words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_study_is_fitted_and_optimised_with_the_same_bytes_twice(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    files = [
        study.surrogate_path / "fit.json",
        study.surrogate_path / "predictions.csv",
        study.optimum_path,
        study.path / "optimum.json",
    ]
    contents = []
    for _ in range(2):
        output = run(fit_cli.command, study.path, "--regressor", "powerlaw", "--seed", 3)
        assert f"Next: regmix-fast optimize {study.path}" in output
        output = run(optimize_cli.command, study.path, "--tokens", "4M", "--lower", "c=0.05")
        assert "Verdict: " in output
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
    record = json.loads(contents[0][3])
    assert record["surrogate"] == {"powerlaw": 1.0}
    assert record["seed"] == 3
    assert record["objective"] == {"x": 0.5, "y": 0.5}
    assert max(record["epochs"].values()) <= 4 + 1e-9
    assert record["bounds"]["c"][0] == 0.05
    mixture = read_mixture_yaml(study.optimum_path)
    assert [mixture[name] for name in record["domains"]] == record["weights"]
    told = json.loads(contents[0][0])
    assert told["num_runs"] == 40
    assert told["targets"]["x"]["spearman"] > 0.98


def test_report_reads_what_fit_and_optimize_write(tmp_path: Path) -> None:
    from regmix.report.facts import read_facts

    study = make_study(tmp_path / "study")
    run(fit_cli.command, study.path, "--regressor", "linear")
    run(optimize_cli.command, study.path)
    facts = read_facts(study)
    assert facts.predictions is not None
    assert set(facts.predictions.predicted) == {*TARGETS, "objective"}
    assert facts.optimum_weights is not None
    assert math.fsum(facts.optimum_weights.values()) == 1.0


def test_run_left_out_is_named_on_the_screen(tmp_path: Path) -> None:
    losses = law(draws(40))
    losses[4, 0] = np.nan
    study = make_study(tmp_path / "study", losses)
    output = run(fit_cli.command, study.path, "--regressor", "linear")
    assert "Left out: run 5, loss of 'x' is not finite" in output
    record = json.loads((study.surrogate_path / "fit.json").read_text())
    assert record["dropped"] == [{"index": 5, "reason": "loss of 'x' is not finite"}]


def test_bare_tables_are_fitted_tested_and_optimised(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    tables = ["--mixtures", study.mixtures_path, "--losses", study.losses_path]
    unseen = ["--test-mixtures", study.mixtures_path, "--test-losses", study.losses_path]
    words = [*tables, *unseen, "--target", "x", "--regressor", "powerlaw", "--json"]
    told = json.loads(run(fit_cli.command, *words))
    assert told["unseen"]["x"]["spearman"] > 0.98
    assert not study.surrogate_path.exists()
    write_mixture_yaml(tmp_path / "mine.yaml", PRIOR)
    words = [*tables, "--objective", "x", "--regressor", "powerlaw", "--out", tmp_path / "o.yaml"]
    words += ["--prior", tmp_path / "mine.yaml", "--baseline", tmp_path / "mine.yaml", "--json"]
    told = json.loads(run(optimize_cli.command, *words))
    assert told["gain_nats"]["natural"] == told["gain_nats"]["mine"] > 0
    assert read_mixture_yaml(tmp_path / "o.yaml")["a"] == max(told["weights"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixtures", "m.csv"], "both --mixtures and --losses"),
        (["missing"], "holds no study"),
        (["--prior", "natural", "--mixtures", "{m}", "--losses", "{l}"], "--prior natural.yaml"),
        (["--tokens", "1B", "--mixtures", "{m}", "--losses", "{l}"], "--available DOMAIN=TOKENS"),
        (["--available", "a=1B", "--mixtures", "{m}", "--losses", "{l}"], "Add its tokens.*--tok"),
        (
            ["--available", "a=1B,a=2B", "--tokens", "1B", "--mixtures", "{m}", "--losses", "{l}"],
            "'a' is given twice",
        ),
        (["--guard-tolerance", "0.1"], "Add the mixture, for example --guard natural"),
        (["--guard", "missing.yaml", "--mixtures", "{m}", "--losses", "{l}"], "missing.yaml"),
        (["--kl", "0.05", "--mixtures", "{m}", "--losses", "{l}"], "needs a prior"),
        (["--objective", "x=1,x=2", "--mixtures", "{m}", "--losses", "{l}"], "'x' is given twice"),
    ],
)
def test_optimize_says_what_is_missing(tmp_path: Path, words: list[str], message: str) -> None:
    study = make_study(tmp_path / "study")
    filled = [w.format(m=study.mixtures_path, l=study.losses_path) for w in words]
    if "--mixtures" in filled:
        filled += ["--regressor", "linear"]
    with pytest.raises(RegmixError, match=message):
        CliRunner().invoke(optimize_cli.command, filled, catch_exceptions=False)


def test_penalty_and_guard_are_told_and_recorded(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    write_mixture_yaml(tmp_path / "mine.yaml", PRIOR)
    words = [study.path, "--regressor", "powerlaw", "--objective", "x", "--kl", 0.05]
    words += ["--guard", tmp_path / "mine.yaml", "--guard-tolerance", 0.02, "--tokens", "4M"]
    told = run(optimize_cli.command, *words)
    assert "KL from the prior: " in told
    assert "Guard: no target more than 0.02 nats above 'mine'" in told
    record = json.loads((study.path / "optimum.json").read_text())
    assert record["kl"] == 0.05
    prior = np.array(list(PRIOR.values()))
    weights = np.array(record["weights"])
    held = weights > 0
    kl = float((weights[held] * np.log(weights[held] / prior[held])).sum())
    assert record["divergence_nats"] == pytest.approx(kl)
    guard = record["guard"]
    assert (guard["name"], guard["tolerance_nats"]) == ("mine", 0.02)
    assert guard["weights"] == pytest.approx(list(PRIOR.values()))
    assert set(guard["changes_nats"]) == set(TARGETS)
    assert max(guard["changes_nats"].values()) == pytest.approx(0.02, abs=1e-5)
    assert {"mine", "unimax"} <= set(record["baselines"])
    plain = json.loads(run(optimize_cli.command, study.path, "--regressor", "linear", "--json"))
    assert (plain["kl"], plain["guard"]) == (0.0, None)
    assert plain["objective_name"] == "mean of x, y"


def test_prior_by_short_names_and_by_position(smooth: Surrogate) -> None:
    named: Mapping[str, float] = PRIOR
    by_name = optimize(smooth, objective="x", prior=named, method="simulate")
    by_place = optimize(smooth, objective="x", prior=list(named.values()), method="simulate")
    assert by_name.weights.tobytes() == by_place.weights.tobytes()
