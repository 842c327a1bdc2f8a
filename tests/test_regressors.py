"""Regressors: each recovers what it can express, repeats its bits, and refuses too few runs."""

from __future__ import annotations

import numpy as np
import pytest

from regmix.decision.regressors.interface import Regressor
from regmix.decision.regressors.linear import Linear
from regmix.decision.regressors.powerlaw import PowerLaw
from regmix.decision.regressors.registry import REGRESSORS, make_regressor
from regmix.decision.regressors.trees import Trees
from regmix.decision.surrogate import fit
from regmix.decision.validation import fold_of_runs, held_out_predictions, score, spearman
from regmix.errors import ConfigError, LossTableError, MixtureError

RATES = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])


def law(weights: np.ndarray) -> np.ndarray:
    return 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4


def draws(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.7), num)


@pytest.mark.parametrize("name", sorted(REGRESSORS))
def test_regressor_has_the_interface_and_repeats_its_bits(name: str) -> None:
    weights = draws(60)
    losses = law(weights)
    scale = np.full(2, 0.1)
    first, again = (make_regressor(name, 1).fit(weights, losses, scale) for _ in range(2))
    mean, std = first.predict(draws(7, 2))
    assert mean.shape == std.shape == (7, 2)
    assert (std > 0).all()
    assert mean.tobytes() == again.predict(draws(7, 2))[0].tobytes()
    chosen = first.select([1])
    assert np.allclose(chosen.predict(draws(7, 2))[0][:, 0], mean[:, 1], rtol=1e-12)
    assert chosen.mean(draws(7, 2)).shape == (7, 1)


def test_power_law_recovers_itself_and_its_exchange_rates() -> None:
    weights = draws(80)
    model = PowerLaw(ridge=1e-8).fit(weights, law(weights))
    unseen = draws(200, 1)
    assert np.abs(model.mean(unseen) - law(unseen)).max() < 5e-3
    expected = RATES / RATES.max(1, keepdims=True)
    assert np.abs(model.exchange_rates() - expected).max() < 0.05


def test_power_law_shrugs_off_a_diverged_run() -> None:
    weights = draws(60)
    losses = law(weights)
    losses[7] += 5.0
    model = PowerLaw().fit(weights, losses)
    unseen = draws(200, 1)
    assert np.abs(model.mean(unseen) - law(unseen)).mean() < 0.03


def test_power_law_gradient_is_the_slope_of_its_mean() -> None:
    weights = draws(40)
    model = PowerLaw().fit(weights, law(weights))
    point = draws(3, 5)
    step = 1e-6
    for domain in range(5):
        ahead, behind = point.copy(), point.copy()
        ahead[:, domain] += step
        behind[:, domain] -= step
        slope = (model.mean(ahead) - model.mean(behind)) / (2 * step)
        assert np.allclose(model.gradient(point)[:, :, domain], slope, rtol=1e-5)


@pytest.mark.parametrize(
    "regressor",
    [Linear(), PowerLaw(), Trees(num_rounds=60, learning_rate=0.1)],
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

    from regmix.decision.regressors.trees import Forest

    weights = draws(300)
    loss = law(weights)[:, 0]
    settings = {"objective": "regression", "verbosity": -1, "num_threads": 1}
    booster = lightgbm.train(settings, lightgbm.Dataset(weights, loss), 50)
    forest = Forest.parse(booster.model_to_string())
    unseen = draws(500, 1)
    assert np.allclose(forest.predict(unseen), booster.predict(unseen), rtol=0, atol=1e-12)
    first = booster.predict(unseen, num_iteration=5)
    assert np.allclose(forest.predict(unseen, num_trees=5), first, rtol=0, atol=1e-12)


def test_forest_without_a_split_predicts_the_mean() -> None:
    weights = draws(30)
    losses = law(weights)[:, :1]
    model = Trees(samples_per_leaf=20).fit(weights, losses, np.zeros(1))
    assert np.allclose(model.mean(draws(4, 1)), losses.mean(), atol=1e-6)


def test_coarse_mean_of_trees_orders_mixtures_nearly_as_all_rounds_do() -> None:
    weights = draws(200)
    model = Trees().fit(weights, law(weights)[:, :1], np.zeros(1))
    unseen = draws(500, 1)
    rank = spearman(model.mean(unseen)[:, 0], model.coarse_mean(unseen)[:, 0])
    assert rank is not None
    assert rank > 0.95


def test_held_out_predictions_do_not_see_their_own_run() -> None:
    weights = draws(40)
    losses = law(weights)
    folds = fold_of_runs(40, seed=2)
    changed = losses.copy()
    changed[folds == 1] += 1.0
    before, after = (
        held_out_predictions(make_regressor("linear", 0), weights, y, seed=2)
        for y in (losses, changed)
    )
    assert np.array_equal(before[folds == 1], after[folds == 1])
    assert not np.allclose(before[folds == 0], after[folds == 0])


def test_folds_are_balanced_and_depend_on_the_seed() -> None:
    sizes = np.bincount(fold_of_runs(43, seed=0))
    assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(fold_of_runs(43, seed=0), fold_of_runs(43, seed=1))


def test_score_is_a_rank_correlation_and_an_error_in_nats() -> None:
    entry = score("web", np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert entry.spearman == pytest.approx(0.8)
    assert entry.rmse_nats == pytest.approx(np.sqrt(0.5))
    assert spearman(np.ones(4), np.arange(4.0)) is None


def test_auto_prefers_the_law_where_it_is_the_truth_and_says_why() -> None:
    weights = draws(60)
    model = fit(weights, law(weights))
    shares = {member.name: member.share for member in model.members}
    assert shares == {"powerlaw": 1.0}
    assert "cross-validation on 60 runs" in model.reason
    assert model.held_out.shape == (60, 2)


def test_auto_blends_trees_in_where_the_law_fails_and_keeps_a_quarter_law() -> None:
    weights = draws(200)
    steps = 2.0 + (weights[:, :2] > 0.3) * 0.5 + (weights[:, 2:4] > 0.1) * 0.3
    shares = {member.name: member.share for member in fit(weights, steps).members}
    assert shares == {"lightgbm": 0.75, "powerlaw": 0.25}


def test_auto_falls_back_to_linear_where_runs_are_few() -> None:
    weights = draws(8)
    model = fit(weights, law(weights))
    assert [member.name for member in model.members] == ["linear"]
    assert "too few" in model.reason


def test_surrogate_takes_data_frames_with_columns_in_any_order() -> None:
    class Frame:
        def __init__(self, values: np.ndarray, columns: list[str]) -> None:
            self.values, self.columns = values, columns

        def __getitem__(self, names: list[str]) -> Frame:
            return Frame(self.values[:, [self.columns.index(n) for n in names]], names)

        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            return self.values.astype(np.float64)

    weights = draws(30)
    names = [f"train_{name}" for name in "abcde"]
    indexed = np.hstack([np.arange(30)[:, None], weights])
    losses = Frame(law(weights), ["metric/x_val_loss", "metric/y_val_loss"])
    model = fit(Frame(indexed, ["index", *names]), losses, regressor="linear")
    assert (model.domains, model.targets) == (tuple("abcde"), ("x", "y"))
    shuffled = model.mean(Frame(weights[:, ::-1], names[::-1]))
    assert np.allclose(shuffled, model.mean(weights))


@pytest.mark.parametrize("name", ["lightgbm", "powerlaw", "linear"])
def test_too_few_runs_are_refused_with_the_number_needed(name: str) -> None:
    needed = make_regressor(name, 0).fewest_runs(5)
    weights = draws(needed - 1)
    with pytest.raises(LossTableError, match=f"at least {needed} proxies"):
        fit(weights, law(weights), regressor=name)


def test_unknown_regressor_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'powerlaw'"):
        fit(draws(30), law(draws(30)), regressor="powrlaw")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308])
def test_losses_that_are_none_are_refused_with_their_row(bad: float) -> None:
    losses = law(draws(30))
    losses[4, 1] = bad
    with pytest.raises(LossTableError, match="row 4, target '1'"):
        fit(draws(30), losses)


def test_constant_target_is_refused() -> None:
    losses = law(draws(30))
    losses[:, 1] = 2.0
    with pytest.raises(LossTableError, match="target '1': all 30 runs"):
        fit(draws(30), losses)


def test_weights_that_are_no_mixtures_are_refused() -> None:
    with pytest.raises(MixtureError, match="sum to 2"):
        fit(2 * draws(30), law(draws(30)))


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(LossTableError, match="for 30 runs"):
        fit(draws(30), law(draws(29)))
    model = fit(draws(30), law(draws(30)), regressor="linear")
    with pytest.raises(LossTableError, match="4 weights for a surrogate of 5"):
        model.predict(draws(3)[:, :4])
