"""The published runs (sail-sg/regmix): the paper's numbers are reached, and its format is read."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

import regmix
from regmix.data.mixtures import read_mixture_yaml
from regmix.decision.regressors.registry import make_regressor
from regmix.decision.runs import Runs
from regmix.decision.validation import score, spearman


@functools.cache
def published(folder: Path, part: str) -> Runs:
    return regmix.read_runs(folder / f"{part}_mixture_1m.csv", folder / f"{part}_pile_loss_1m.csv")


@pytest.fixture
def train(shared: Path) -> Runs:
    return published(shared / "published_runs", "train")


@pytest.fixture
def unseen(shared: Path) -> Runs:
    return published(shared / "published_runs", "test")


def rank(regressor: str, train: Runs, unseen: Runs, target: str, num_runs: int = 512) -> float:
    ours, theirs = train.select([target]), unseen.select([target])
    fitted = make_regressor(regressor, 0).fit(
        np.asarray(ours.weights)[:num_runs], np.asarray(ours.losses)[:num_runs]
    )
    found = spearman(np.asarray(theirs.losses)[:, 0], fitted.mean(theirs.weights)[:, 0])
    assert found is not None
    return found


def test_published_tables_are_read_as_they_are(train: Runs, unseen: Runs) -> None:
    assert (train.weights.shape, train.losses.shape) == ((512, 17), (512, 13))
    assert len(unseen) == 256
    assert train.domains == unseen.domains
    assert not train.dropped
    assert np.abs(np.asarray(train.weights).sum(1) - 1).max() < 1e-12


def test_lightgbm_reaches_the_paper_without_stopping_early(train: Runs, unseen: Runs) -> None:
    assert rank("lightgbm", train, unseen, "pile_cc") >= 0.985


def test_linear_reaches_the_paper(train: Runs, unseen: Runs) -> None:
    assert rank("linear", train, unseen, "pile_cc") == pytest.approx(0.902, abs=0.01)


@pytest.mark.parametrize(("num_runs", "least"), [(64, 0.945), (512, 0.96)])
def test_power_law_orders_unseen_mixtures(
    train: Runs, unseen: Runs, num_runs: int, least: float
) -> None:
    assert rank("powerlaw", train, unseen, "pile_cc", num_runs) >= least


def test_power_law_fits_all_targets_at_once(train: Runs, unseen: Runs) -> None:
    model = make_regressor("powerlaw", 0).fit(
        np.asarray(train.weights)[:128], np.asarray(train.losses)[:128]
    )
    predicted, std = model.predict(np.asarray(unseen.weights))
    true = np.asarray(unseen.losses)
    ranks = [score(t, true[:, j], predicted[:, j]).spearman for j, t in enumerate(unseen.targets)]
    assert np.mean([r for r in ranks if r is not None]) > 0.96
    assert 0.5 < np.sqrt(np.mean(((true - predicted) / std) ** 2)) < 1.5


def test_public_interface_finds_pile_cc_as_the_paper_does(train: Runs, shared: Path) -> None:
    one = train.select(["pile_cc"])
    model = regmix.fit(one.weights[:256], one.losses[:256], regressor="auto", seed=0)
    mean, std = model.predict(one.weights[:5])
    assert mean.shape == std.shape == (5, 1)
    natural = read_mixture_yaml(shared / "published_runs" / "human.yaml", normalise=True)
    for method in ("simulate", "exact"):
        best = regmix.optimize(model, objective="pile_cc", prior=natural, method=method)
        assert max(best.mixture, key=best.mixture.__getitem__) == "the_pile_pile_cc"
        assert best.mixture["the_pile_pile_cc"] > 0.5
        assert best.gain > 0.2
        assert best.verdict.startswith("use the optimum")


def test_paper_mixture_comes_out_of_the_paper_method(train: Runs, shared: Path) -> None:
    natural = read_mixture_yaml(shared / "published_runs" / "human.yaml", normalise=True)
    one = train.select(["pile_cc"])
    model = regmix.fit(one.weights, one.losses, regressor="lightgbm")
    best = regmix.optimize(model, objective="pile_cc", prior=natural, method="simulate")
    assert best.mixture["the_pile_pile_cc"] == pytest.approx(0.87, abs=0.04)
