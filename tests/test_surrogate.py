"""The surrogate: what it blends and why, when it falls back, and what it refuses."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from regmix.decision import parallel
from regmix.decision.blend import LAW_SHARES, choose
from regmix.decision.regressors.registry import make_regressor
from regmix.decision.runs import read_runs
from regmix.decision.surrogate import Surrogate, fit
from regmix.decision.validation import fold_of_runs, spearman
from regmix.errors import ConfigError, LossTableError, MixtureError

RATES = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])


def draws(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, 0.7), num)


def law(weights: np.ndarray) -> np.ndarray:
    return 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4


def bumpy(weights: np.ndarray) -> np.ndarray:
    """Losses that no law has: they rise and fall along a domain."""
    bump = np.cos(6 * np.sqrt(weights[:, :1])) * np.sin(5 * weights[:, 1:2])
    return law(weights) + 0.4 * bump


def noisy(weights: np.ndarray) -> np.ndarray:
    return law(weights) + np.random.default_rng(1).normal(0, 0.03, (len(weights), 2))


@functools.cache
def fitted(kind: str) -> Surrogate:
    truth = {"law": noisy, "bumpy": bumpy, "noise": None}[kind]
    weights = draws(60)
    if truth is None:
        return fit(weights, np.random.default_rng(2).uniform(2, 3, (60, 2)))
    return fit(weights, truth(weights))


def shares(model: Surrogate) -> dict[str, float]:
    return {member.name: member.share for member in model.members}


@pytest.mark.parametrize("kind", ["law", "bumpy", "noise"])
def test_shares_sum_to_1_and_the_law_keeps_a_quarter(kind: str) -> None:
    model = fitted(kind)
    assert list(shares(model)) == ["gp", "powerlaw"]
    assert sum(shares(model).values()) == 1
    assert shares(model)["powerlaw"] >= 0.25
    for word in ("gp", "powerlaw", "quarter", "held-out error"):
        assert word in model.reason


def test_law_gets_more_where_it_is_the_truth_and_no_more_where_it_fails() -> None:
    assert shares(fitted("law"))["powerlaw"] > 0.25
    assert "gets more" in fitted("law").reason
    assert shares(fitted("bumpy"))["powerlaw"] == 0.25
    assert "gets more" not in fitted("bumpy").reason
    worse = fitted("bumpy").member_scores
    assert worse["powerlaw"][0].rmse_nats > 2 * worse["gp"][0].rmse_nats


def test_prediction_is_the_weighted_mean_of_the_members() -> None:
    model, points = fitted("law"), draws(7, 3)
    mean, sd = model.predict(points)
    gp, power = (member.model.predict(points) for member in model.members)
    smooth, rest = (member.share for member in model.members)
    assert np.allclose(mean, smooth * gp[0] + rest * power[0], rtol=1e-12)
    widths = [
        member.widening * part[1] for member, part in zip(model.members, (gp, power), strict=True)
    ]
    assert np.allclose(sd, model.widening * (smooth * widths[0] + rest * widths[1]), rtol=1e-12)
    assert np.array_equal(model.mean(points), mean)


def test_share_of_a_fold_is_chosen_without_its_own_runs() -> None:
    rng, folds = np.random.default_rng(0), np.arange(40) % 4
    losses = rng.uniform(2, 3, (40, 2))
    smooth = losses + rng.normal(0, 0.05, (40, 2))
    lawful = losses + rng.normal(0, 0.2, (40, 2))
    # Only in fold 1 is the law right, and the process wildly wrong: all runs together favour it.
    fold = folds == 1
    smooth[fold] += 3.0
    lawful[fold] = losses[fold]
    sds = {"gp": np.full((40, 2), 0.1), "powerlaw": np.full((40, 2), 0.5)}
    choice = choose(losses, {"gp": smooth, "powerlaw": lawful}, sds, folds)
    assert choice.shares["powerlaw"] > 0.25
    expected = 0.75 * smooth[fold] + 0.25 * lawful[fold]
    assert np.allclose(choice.mean[fold], expected)
    assert np.allclose(choice.sd[fold], 0.75 * 0.1 + 0.25 * 0.5)


@pytest.mark.parametrize("share", LAW_SHARES)
def test_share_is_the_one_with_the_least_error(share: float) -> None:
    rng = np.random.default_rng(0)
    losses, away = rng.uniform(2, 3, (60, 2)), rng.normal(0, 0.3, (60, 2))
    # Errors that cancel exactly at this share.
    means = {"gp": losses + share * away, "powerlaw": losses - (1 - share) * away}
    sds = dict.fromkeys(means, np.ones((60, 2)))
    assert choose(losses, means, sds, np.arange(60) % 5).shares["powerlaw"] == share


@pytest.mark.parametrize(
    ("num_runs", "members"), [(7, ["linear"]), (8, ["gp"]), (9, ["gp"]), (10, ["gp", "powerlaw"])]
)
def test_auto_falls_back_where_runs_are_few_and_says_so(num_runs: int, members: list[str]) -> None:
    model = fit(draws(num_runs), noisy(draws(num_runs)))
    assert list(shares(model)) == members
    if len(members) == 1:
        assert f"{num_runs} runs" in model.reason
        assert members[0] in model.reason
    mean, sd = model.predict(draws(20, 1))
    assert np.isfinite(mean).all()
    assert (sd > 0).all()


def test_deviations_are_larger_far_from_the_runs() -> None:
    weights = draws(60) * [0.2, 1, 1, 1, 1]
    weights /= weights.sum(1, keepdims=True)
    model = fit(weights, law(weights))
    near = model.predict(weights.mean(0))[1]
    far = model.predict(np.array([1.0, 0, 0, 0, 0]))[1]
    assert (far > 2 * near).all()


def test_held_out_predictions_are_of_the_blend_and_have_not_seen_their_run() -> None:
    model = fitted("law")
    weights, losses = model.weights, model.losses
    kept = fold_of_runs(60, 0) != 3
    parts = [
        make_regressor(name, 0).fit(weights[kept], losses[kept]).mean(weights[~kept])
        for name in ("gp", "powerlaw")
    ]
    blends = [(1 - share) * parts[0] + share * parts[1] for share in LAW_SHARES]
    # The process is refitted from its own hyperparameters: the same surface, not the same bits.
    assert any(np.allclose(model.held_out[~kept], blend, rtol=2e-4) for blend in blends)
    seen = model.mean(weights[~kept])
    assert not np.allclose(model.held_out[~kept], seen, rtol=2e-4)
    assert model.how == "10-fold cross-validation"
    rmse = np.sqrt(((model.held_out - model.losses) ** 2).mean(0))
    assert [score.rmse_nats for score in model.scores] == pytest.approx(rmse.tolist())
    assert set(model.member_scores) == {"gp", "powerlaw"}


def test_bits_depend_on_the_seed_and_not_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, points = draws(30), draws(300, 2)

    def bits(cores: int, seed: int) -> bytes:
        monkeypatch.setattr(parallel, "available_cores", lambda: cores)
        model = fit(weights, noisy(weights), seed=seed)
        mean, sd = model.predict(points)
        return mean.tobytes() + sd.tobytes() + model.held_out.tobytes()

    assert bits(1, 0) == bits(2, 0) == bits(4, 0)
    assert bits(1, 0) != bits(1, 1)


def test_replicates_are_fitted_and_both_kept() -> None:
    weights = np.repeat(draws(15), 2, axis=0)
    model = fit(weights, noisy(weights))
    assert np.array_equal(model.weights[0], model.weights[1])
    assert np.isfinite(model.predict(weights)[1]).all()


def test_constant_domain_is_no_obstacle() -> None:
    weights = np.hstack([0.8 * draws(30)[:, :4] / draws(30)[:, :4].sum(1, keepdims=True)])
    weights = np.hstack([weights, np.full((30, 1), 0.2), np.zeros((30, 1))])
    losses = law(weights[:, :5])
    model = fit(weights, losses)
    assert all(score.spearman is not None and score.spearman > 0.95 for score in model.scores)


@pytest.mark.parametrize("scale", [0.3, 1.0, 1e3])
def test_losses_of_any_size_are_fitted(scale: float) -> None:
    weights, points = draws(40), draws(50, 1)
    mean, sd = fit(weights, scale * law(weights)).predict(points)
    assert np.abs(mean / scale - law(points)).max() < 0.1
    assert np.isfinite(sd).all()


def test_losses_that_hardly_differ_are_fitted() -> None:
    losses = 3 + 1e-4 * np.random.default_rng(0).normal(size=(30, 1))
    mean, sd = fit(draws(30), losses).predict(draws(9, 1))
    assert np.abs(mean - 3).max() < 3e-4
    assert ((sd > 5e-5) & (sd < 1e-3)).all()


def test_a_fold_whose_other_runs_have_one_loss_is_held_out_all_the_same() -> None:
    losses = np.ones((20, 1))
    losses[3] = 1.5
    model = fit(draws(20), losses)
    assert np.isfinite(model.held_out).all()
    assert np.isfinite(model.predict(draws(5, 1))[1]).all()


@pytest.mark.parametrize("num_domains", [1, 2])
def test_few_domains_are_enough(num_domains: int) -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(num_domains), 20)
    losses = 2 + weights[:, 0] ** 2 + np.random.default_rng(1).normal(0, 0.01, 20)
    model = fit(weights, losses)
    assert model.losses.shape == (20, 1)
    assert np.abs(model.mean(weights)[:, 0] - losses).max() < 0.1


class Frame:
    """As much of a data frame as is needed."""

    def __init__(self, values: np.ndarray, columns: list[str]) -> None:
        self.values, self.columns = values, columns

    def __getitem__(self, names: list[str]) -> Frame:
        return Frame(self.values[:, [self.columns.index(n) for n in names]], names)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self.values.astype(np.float64)


def test_data_frames_give_names_and_their_columns_may_come_in_any_order() -> None:
    weights = draws(30)
    names = [f"train_{name}" for name in "abcde"]
    indexed = np.hstack([np.arange(30)[:, None], weights])
    losses = Frame(law(weights), ["metric/x_val_loss", "metric/y_val_loss"])
    model = fit(Frame(indexed, ["index", *names]), losses, regressor="linear")
    assert (model.domains, model.targets) == (tuple("abcde"), ("x", "y"))
    shuffled = model.mean(Frame(weights[:, ::-1], names[::-1]))
    assert np.allclose(shuffled, model.mean(weights))
    with pytest.raises(LossTableError, match="without 'e'"):
        model.mean(Frame(weights, [*names[:4], "train_other"]))


@pytest.mark.parametrize("name", ["lightgbm", "powerlaw", "linear", "gp"])
def test_too_few_runs_are_refused_with_the_number_needed(name: str) -> None:
    needed = make_regressor(name, 0).fewest_runs(5)
    weights = draws(needed - 1)
    with pytest.raises(LossTableError, match=f"at least {needed} proxies"):
        fit(weights, law(weights), regressor=name)


@pytest.mark.parametrize("num_runs", [0, 1, 2])
def test_hardly_any_runs_are_refused_with_the_number_needed(num_runs: int) -> None:
    with pytest.raises(LossTableError, match=r"at least 3 proxies\.$"):
        fit(draws(num_runs), law(draws(num_runs)))


def test_unknown_regressor_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'powerlaw'"):
        fit(draws(30), law(draws(30)), regressor="powrlaw")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e308, 0.0, -1.0])
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


def test_target_that_is_there_twice_is_refused() -> None:
    with pytest.raises(LossTableError, match="target 'x' is there twice"):
        fit(draws(30), law(draws(30)), targets=["x", "x"])


def test_losses_of_no_target_are_refused() -> None:
    with pytest.raises(LossTableError, match="no target"):
        fit(draws(30), np.empty((30, 0)))


@pytest.mark.parametrize("losses", [[["a"]] * 30, [[1.0, 2.0], [1.0]]])
def test_losses_that_are_no_numbers_are_refused(losses: object) -> None:
    with pytest.raises(LossTableError, match="not of numbers"):
        fit(draws(30), losses)


def test_weights_that_do_not_sum_to_1_are_refused_with_the_tolerance() -> None:
    with pytest.raises(MixtureError, match=r"mixture 0: the weights sum to 2.*0\.01 is accepted"):
        fit(2 * draws(30), law(draws(30)))


def test_weight_that_is_not_finite_is_named() -> None:
    weights = draws(30)
    weights[3, 1] = np.nan
    with pytest.raises(MixtureError, match="mixture 3, '1': weight nan"):
        fit(weights, law(draws(30)))


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(LossTableError, match="for 30 runs"):
        fit(draws(30), law(draws(29)))
    with pytest.raises(LossTableError, match=r"shape \(1, 30, 5\)"):
        fit(draws(30)[None], law(draws(30)))
    model = fit(draws(30), law(draws(30)), regressor="linear")
    with pytest.raises(LossTableError, match="4 weights for a surrogate of 5"):
        model.predict(draws(3)[:, :4])


def test_few_published_runs_order_the_others(shared: Path) -> None:
    folder = shared / "published_runs"
    runs = read_runs(folder / "train_mixture_1m.csv", folder / "train_pile_loss_1m.csv")
    runs = runs.select(["pile_cc"])
    order = np.random.default_rng(0).permutation(len(runs))
    seen, others = order[:64], order[64:]
    model = fit(runs.weights[seen], runs.losses[seen])
    assert shares(model)["powerlaw"] >= 0.25
    found = spearman(np.asarray(runs.losses)[others, 0], model.mean(runs.weights[others])[:, 0])
    assert found is not None
    assert found > 0.97


@pytest.mark.parametrize("row", [[0.4] * 5, [0.5, np.nan, 0.5, 0, 0], [1.2, -0.2, 0, 0, 0]])
def test_what_is_no_mixture_is_not_predicted(row: list[float]) -> None:
    model = fit(draws(30), noisy(draws(30)), regressor="linear")
    assert model.mean([[0.2, 0.2, 0.2, 0.2, 0.2001]]).shape == (1, 2)
    with pytest.raises(MixtureError, match="mixture 1: weights from"):
        model.predict([[0.2] * 5, row])
