"""Regressors: each recovers what it can express, repeats its bits, and refuses too few runs."""

from __future__ import annotations

import numpy as np
import pytest

from regmix.decision.regressors.interface import Regressor, SmoothModel
from regmix.decision.regressors.linear import Linear
from regmix.decision.regressors.registry import REGRESSORS, check_enough_runs, make_regressor
from regmix.decision.regressors.trees import Forest, Trees
from regmix.decision.validation import (
    CLOSED_FORM_RUNS,
    fold_of_mixtures,
    fold_of_runs,
    hold_out,
    score,
    spearman,
)
from regmix.errors import ConfigError, LossTableError

RATES = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])


def law(weights: np.ndarray) -> np.ndarray:
    return 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4


def draws(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.7), num)


@pytest.mark.parametrize("name", sorted(REGRESSORS))
def test_regressor_has_the_interface_and_repeats_its_bits(name: str) -> None:
    weights, points = draws(60), draws(7, 2)
    first, again = (make_regressor(name, 1).fit(weights, law(weights)) for _ in range(2))
    assert make_regressor(name, 1).name == name
    mean, std = first.predict(points)
    assert mean.shape == std.shape == (7, 2)
    assert (std > 0).all()
    assert mean.tobytes() == again.predict(points)[0].tobytes()
    assert std.tobytes() == again.predict(points)[1].tobytes()
    assert np.array_equal(first.mean(points), mean)


@pytest.mark.parametrize("name", sorted(REGRESSORS))
def test_selected_targets_are_the_columns_of_the_whole(name: str) -> None:
    weights, points = draws(60), draws(7, 2)
    model = make_regressor(name, 1).fit(weights, law(weights))
    whole, chosen = model.predict(points), model.select([1]).predict(points)
    for kept, column in zip(whole, chosen, strict=True):
        assert column.shape == (7, 1)
        assert np.allclose(column[:, 0], kept[:, 1], rtol=1e-12)


@pytest.mark.parametrize("name", sorted(REGRESSORS))
def test_a_target_is_fitted_as_if_it_were_alone(name: str) -> None:
    weights, points = draws(60), draws(7, 2)
    both = make_regressor(name, 1).fit(weights, law(weights))
    alone = make_regressor(name, 1).fit(weights, law(weights)[:, 1:])
    assert np.allclose(both.mean(points)[:, 1:], alone.mean(points), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(REGRESSORS) - {"lightgbm"}))
def test_gradient_is_the_slope_of_the_mean(name: str) -> None:
    weights, point = draws(40), 0.9 * draws(3, 5) + 0.02
    model = make_regressor(name, 0).fit(weights, law(weights))
    assert isinstance(model, SmoothModel)
    step = 1e-6
    for domain in range(5):
        ahead, behind = point.copy(), point.copy()
        ahead[:, domain] += step
        behind[:, domain] -= step
        slope = (model.mean(ahead) - model.mean(behind)) / (2 * step)
        assert np.allclose(model.gradient(point)[:, :, domain], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "regressor",
    [
        Linear(),
        make_regressor("loglinear", 0),
        make_regressor("powerlaw", 0),
        make_regressor("gp", 0),
    ],
    ids=lambda regressor: regressor.name,
)
def test_own_estimate_of_the_error_matches_the_error_on_unseen_runs(regressor: Regressor) -> None:
    rng = np.random.default_rng(3)
    weights, unseen = draws(60), draws(400, 1)
    losses = law(weights) + rng.normal(0, 0.03, (60, 2))
    model = regressor.fit(weights, losses)
    mean, std = model.predict(unseen)
    error = law(unseen) + rng.normal(0, 0.03, (400, 2)) - mean
    assert 0.6 < np.sqrt(np.mean((error / std) ** 2)) < 1.5


def test_forest_sums_its_trees_as_lightgbm_does() -> None:
    import lightgbm

    weights = draws(300)
    loss = law(weights)[:, 0]
    settings = {"objective": "regression", "verbosity": -1, "num_threads": 1}
    booster = lightgbm.train(settings, lightgbm.Dataset(weights, loss), 50)
    forest = Forest.parse(booster.model_to_string())
    unseen = draws(500, 1)
    assert np.allclose(forest.predict(unseen), booster.predict(unseen), rtol=0, atol=1e-12)


def test_forest_without_a_split_predicts_the_mean() -> None:
    weights = draws(30)
    losses = law(weights)[:, :1]
    model = Trees(samples_per_leaf=20).fit(weights, losses)
    assert np.allclose(model.mean(draws(4, 1)), losses.mean(), atol=1e-6)


def test_folds_hold_out_every_run_from_its_own_prediction() -> None:
    weights = draws(40)
    losses = law(weights)
    folds = fold_of_runs(40, seed=2)
    changed = losses.copy()
    changed[folds == 1] += 1.0
    regressor = make_regressor("linear", 0)
    before, after = (
        hold_out(regressor, regressor.fit(weights, y), weights, y, seed=2)
        for y in (losses, changed)
    )
    assert before.how == "10-fold cross-validation"
    for first, second in ((before.mean, after.mean), (before.sd, after.sd)):
        assert np.array_equal(first[folds == 1], second[folds == 1])
        assert not np.allclose(first[folds == 0], second[folds == 0])


def test_many_runs_are_held_out_one_by_one_where_that_has_a_closed_form() -> None:
    weights = draws(CLOSED_FORM_RUNS + 1)
    losses = law(weights)
    regressor = make_regressor("linear", 0)
    model = regressor.fit(weights, losses)
    found = hold_out(regressor, model, weights, losses, seed=0)
    assert found.how == "leave-one-out"
    assert np.array_equal(found.sd, model.held_out_sd)
    assert 0.8 < np.sqrt((((found.mean - losses) / found.sd) ** 2).mean()) < 1.2
    # The mean loss, which the ridge draws towards, has seen the run: hence the tolerance.
    for run in (0, 50):
        kept = np.arange(len(weights)) != run
        alone = regressor.fit(weights[kept], losses[kept]).mean(weights[[run]])
        assert np.abs(found.mean[run] - alone).max() < 2e-4
        assert np.abs(found.mean[run] - losses[run]).max() > 1e-3


def test_many_runs_are_held_out_by_folds_where_there_is_no_closed_form() -> None:
    weights = draws(CLOSED_FORM_RUNS + 1)
    losses = law(weights)[:, :1]
    trees = Trees(num_rounds=3)
    found = hold_out(trees, trees.fit(weights, losses), weights, losses, seed=4)
    folds = fold_of_runs(len(weights), 4, 5)
    kept = folds != 2
    assert found.how == "5-fold cross-validation"
    alone = trees.fit(weights[kept], losses[kept]).mean(weights[~kept])
    assert np.array_equal(found.mean[~kept], alone)


@pytest.mark.parametrize("num_runs", [2, 9, 43])
def test_folds_are_balanced_and_no_more_than_the_runs(num_runs: int) -> None:
    sizes = np.bincount(fold_of_runs(num_runs, seed=0))
    assert len(sizes) == min(10, num_runs)
    assert sizes.max() - sizes.min() <= 1


def test_replicates_of_a_mixture_share_their_fold() -> None:
    order = np.random.default_rng(1).permutation(60)
    weights = np.repeat(draws(20), 3, axis=0)[order]
    folds = fold_of_mixtures(weights, seed=0)
    assert all(len(set(folds[order // 3 == mixture])) == 1 for mixture in range(20))
    assert np.bincount(folds).tolist() == [6] * 10
    assert np.array_equal(fold_of_mixtures(draws(43), 5), fold_of_runs(43, 5))


@pytest.mark.parametrize(("distinct", "how"), [(174, "leave-one-out"), (90, "5-fold")])
def test_many_replicates_are_held_out_together(distinct: int, how: str) -> None:
    weights = draws(180)
    weights[distinct:] = weights[: 180 - distinct]
    losses = law(weights) + np.random.default_rng(0).normal(0, 0.1, (180, 2))
    linear = Linear()
    found = hold_out(linear, linear.fit(weights, losses), weights, losses, seed=0)
    assert found.how.startswith(how)


def test_error_of_replicates_is_that_of_new_mixtures() -> None:
    weights, fresh = np.repeat(draws(20), 3, axis=0), draws(300, 1)
    losses = law(weights) + np.random.default_rng(0).normal(0, 0.005, (60, 2))
    gp = make_regressor("gp", 0)
    model = gp.fit(weights, losses)
    found = hold_out(gp, model, weights, losses, seed=0)
    claimed = np.sqrt(((found.mean - losses) ** 2).mean())
    real = np.sqrt(((model.mean(fresh) - law(fresh)) ** 2).mean())
    assert claimed > 0.5 * real


def test_folds_depend_on_the_seed() -> None:
    assert not np.array_equal(fold_of_runs(43, seed=0), fold_of_runs(43, seed=1))


def test_score_is_a_rank_correlation_and_an_error_in_nats() -> None:
    entry = score("web", np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert entry.spearman == pytest.approx(0.8)
    assert entry.rmse_nats == pytest.approx(np.sqrt(0.5))
    assert spearman(np.ones(4), np.arange(4.0)) is None


@pytest.mark.parametrize(
    ("name", "needed"),
    [("linear", 3), ("lightgbm", 20), ("loglinear", 7), ("powerlaw", 10), ("gp", 8)],
)
def test_fewest_runs_are_stated_and_enough(name: str, needed: int) -> None:
    regressor = make_regressor(name, 0)
    assert regressor.fewest_runs(5) == needed
    weights = draws(needed)
    mean, sd = regressor.fit(weights, law(weights)).predict(draws(50, 1))
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()
    assert ((mean > 1.0) & (mean < 6.0)).all()


def test_too_few_runs_are_refused_with_the_number_needed() -> None:
    check_enough_runs(make_regressor("powerlaw", 0), 10, 5)
    with pytest.raises(LossTableError, match=r"9 runs are too few .* at least 10 proxies"):
        check_enough_runs(make_regressor("powerlaw", 0), 9, 5)


def test_unknown_regressor_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'powerlaw'"):
        make_regressor("powrlaw", 0)
