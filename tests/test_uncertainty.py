"""How sure a decision is: draws of the surface, intervals, noise floor and verdict."""

import numpy as np
import pytest

from regmix.decision.baselines import Baseline
from regmix.decision.calibration import coverage, widening
from regmix.decision.noise import noise_floor, objective_noise, replicate_groups
from regmix.decision.objective import make_objective
from regmix.decision.regressors.gp import GaussianProcess, GPModel
from regmix.decision.rivals import around
from regmix.decision.searching.constraints import make_constraints
from regmix.decision.searching.guard import make_guard
from regmix.decision.searching.penalty import Penalty
from regmix.decision.searching.predictor import Predictor
from regmix.decision.surrogate import Surrogate, fit
from regmix.decision.uncertainty import (
    Interval,
    draw_surfaces,
    error_process,
    predicted_interval,
    sureness,
    target_correlation,
)
from regmix.decision.validation import fold_of_mixtures
from regmix.decision.verdict import judge

RATES = np.array([[4.0, 1.0, 0.3, 0.1], [0.2, 3.0, 1.0, 0.5]])


def true_losses(weights: np.ndarray) -> np.ndarray:
    """Two targets that follow a power law of effective data."""
    return np.asarray(2 + 1.2 * (0.05 + weights @ RATES.T) ** -0.35)


def swarm(num_runs: int, seed: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(4), num_runs)
    return weights, true_losses(weights) + rng.normal(0, noise, (num_runs, 2))


def surrogate(num_runs: int = 48, seed: int = 0, regressor: str = "auto") -> Surrogate:
    weights, losses = swarm(num_runs, seed)
    return fit(weights, losses, regressor=regressor)


@pytest.fixture(scope="module")
def fitted() -> Surrogate:
    return surrogate()


def test_draws_have_the_mean_and_the_spread_that_the_surrogate_claims(fitted: Surrogate) -> None:
    points = swarm(12, 9)[0]
    draws = draw_surfaces(fitted, [0, 1], points, number=4000)
    mean = fitted.mean(points)
    process, factor = error_process(fitted)
    sd = np.sqrt(np.stack([np.diag(block) for block in process.covariance(points)], axis=1))
    assert draws.shape == (4000, 12, 2)
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * (sd * factor).max() / 4000**0.5)
    np.testing.assert_allclose(draws.std(0), sd * factor, rtol=0.06)


def test_draws_of_neighbours_move_together(fitted: Surrogate) -> None:
    near = np.array([[0.4, 0.3, 0.2, 0.1], [0.41, 0.29, 0.2, 0.1], [0.01, 0.01, 0.01, 0.97]])
    draws = draw_surfaces(fitted, [0], near)[:, :, 0]
    correlation = np.corrcoef(draws.T)
    assert correlation[0, 1] > 0.95
    assert abs(correlation[0, 2]) < 0.6


def test_errors_of_targets_are_correlated_as_held_out(fitted: Surrogate) -> None:
    errors = fitted.held_out - fitted.losses
    found = target_correlation(fitted, [0, 1])
    shrunk = np.corrcoef(errors.T)[0, 1] * 48 / 50
    assert found[0, 1] == pytest.approx(shrunk)
    assert np.linalg.eigvalsh(found).min() > 0


@pytest.mark.parametrize("regressor", ["auto", "powerlaw", "linear"])
def test_intervals_on_gains_hold_the_truth(regressor: str) -> None:
    held, widths = 0, []
    natural, uniform = np.array([0.1, 0.1, 0.3, 0.5]), np.full(4, 0.25)
    optimum = np.array([0.5, 0.5, 0.0, 0.0])
    truth = true_losses(np.stack([natural, uniform, optimum])).mean(1)
    for seed in range(12):
        # Past 160 runs nothing is refitted by folds.
        weights, losses = swarm(164, seed, noise=0.05)
        model = fit(weights, losses, regressor=regressor)
        mean = make_objective("mean", model.targets)
        limits = make_constraints(model.domains)
        found = sureness(Predictor(model, mean), model, limits, optimum, [natural, uniform])
        for gain, true in zip(found.gains, truth[:2] - truth[2], strict=True):
            held += gain.low <= true <= gain.high
            widths.append(gain.high - gain.low)
    # 24 intervals of 90 %: 17 or fewer would happen by chance once in 150 times.
    assert held >= 18
    # An interval that holds everything would prove nothing: the gains are 0.2 to 0.5 nats.
    assert np.mean(widths) < 0.35


def test_more_runs_narrow_the_intervals_on_weights_and_gain() -> None:
    weights, gains = [], []
    optimum = np.array([0.8, 0.2, 0.0, 0.0])
    for num_runs in (16, 120):
        for seed in range(3):
            model = surrogate(num_runs, seed)
            target = make_objective(0, model.targets)
            limits = make_constraints(model.domains, upper=0.8)
            found = sureness(Predictor(model, target), model, limits, optimum, [np.full(4, 0.25)])
            assert (found.weights[:, 0] <= optimum).all()
            assert (found.weights[:, 1] >= optimum).all()
            assert found.weights.min() >= 0
            assert found.weights.max() <= 0.8 + 1e-9
            weights.append(np.ptp(found.weights, axis=1).sum())
            gains.append(found.gains[0].high - found.gains[0].low)
    assert np.mean(weights[3:]) < 0.8 * np.mean(weights[:3])
    assert np.mean(gains[3:]) < 0.6 * np.mean(gains[:3])


def test_a_bad_optimum_has_a_large_shortfall_and_a_good_one_a_small(fitted: Surrogate) -> None:
    target = make_objective(0, fitted.targets)
    limits = make_constraints(fitted.domains)
    bad, good = np.array([0.0, 0.0, 0.1, 0.9]), np.array([1.0, 0.0, 0.0, 0.0])
    found = [
        sureness(Predictor(fitted, target), fitted, limits, one, [np.full(4, 0.25)])
        for one in (bad, good)
    ]
    assert found[0].shortfall_nats > 0.2 > 0.05 > found[1].shortfall_nats
    assert found[0].better[0] == 0
    assert found[1].better[0] == 1


def test_a_tight_guard_leaves_rivals_and_does_not_make_the_optimum_certain(
    fitted: Surrogate,
) -> None:
    target = make_objective(0, fitted.targets)
    limits = make_constraints(fitted.domains)
    optimum = np.array([0.5, 0.5, 0.0, 0.0])
    guard = make_guard(fitted, Baseline("optimum", optimum), 0.01)
    predictor = Predictor(fitted, target, guard=guard)
    found = sureness(predictor, fitted, limits, optimum, [np.full(4, 0.25)])
    assert np.ptp(found.weights, axis=1).max() > 0.01
    assert found.shortfall_nats > 0
    free = sureness(Predictor(fitted, target), fitted, limits, optimum, [np.full(4, 0.25)])
    assert np.ptp(found.weights, axis=1).sum() < 0.5 * np.ptp(free.weights, axis=1).sum()


def test_sureness_repeats_itself(fitted: Surrogate) -> None:
    target = make_objective("mean", fitted.targets)
    limits = make_constraints(fitted.domains)
    optimum = np.array([0.6, 0.4, 0.0, 0.0])
    pair = [
        sureness(Predictor(fitted, target), fitted, limits, optimum, [np.full(4, 0.25)], seed=3)
        for _ in range(2)
    ]
    np.testing.assert_array_equal(pair[0].weights, pair[1].weights)
    assert pair[0].gains == pair[1].gains


def test_rivals_respect_the_bounds_and_drop_domains() -> None:
    limits = make_constraints(["a", "b", "c"], lower={"a": 0.1}, upper={"b": 0.5})
    rivals = around(np.array([[0.9, 0.1, 0.0]]), 200, limits, np.random.default_rng(0))
    assert limits.satisfied(rivals).all()
    np.testing.assert_allclose(rivals.sum(1), 1)
    assert 0.4 < (rivals[:, 2] == 0).mean() < 0.9
    assert rivals[:, 1].std() > 0.02


def test_the_interval_of_a_mean_of_targets_knows_their_correlation(fitted: Surrogate) -> None:
    weights = np.array([0.3, 0.3, 0.2, 0.2])
    whole, sd = predicted_interval(fitted, make_objective("mean", fitted.targets), weights)
    own = fitted.predict(weights)[1][0]
    share = target_correlation(fitted, [0, 1])[0, 1]
    expected = np.sqrt(own @ own + 2 * share * own[0] * own[1]) / 2
    assert sd == pytest.approx(expected)
    assert whole.high - whole.low == pytest.approx(2 * 1.6448536 * sd)


def test_noise_of_a_mean_knows_the_correlation_of_its_targets(fitted: Surrogate) -> None:
    noise = noise_floor(fitted)
    assert noise is not None
    assert not noise.measured
    weighted = noise.sd / 2
    expected = weighted @ target_correlation(fitted, [0, 1]) @ weighted
    mean = make_objective("mean", fitted.targets)
    assert objective_noise(fitted, mean) == pytest.approx(np.sqrt(expected))


def test_surfaces_are_as_wide_as_the_errors_of_the_blend_ask() -> None:
    # No power law: its deviations are far wider than those of the process.
    weights = swarm(48, 0)[0]
    bent = (
        3 + np.sin(8 * np.sqrt(weights[:, :2])) + np.random.default_rng(0).normal(0, 0.02, (48, 2))
    )
    fitted = fit(weights, bent)
    folds = fold_of_mixtures(weights, 0)
    process, factor = error_process(fitted)
    assert isinstance(process, GPModel)
    sd = np.empty_like(fitted.losses)
    for fold in range(10):
        inside = folds != fold
        part = GaussianProcess().refit(process, fitted.weights[inside], fitted.losses[inside])
        sd[~inside] = part.predict(fitted.weights[~inside])[1]
    held = (np.abs(fitted.held_out - fitted.losses) <= 1.6448536 * factor * sd).mean()
    assert 0.87 <= held <= 0.95


def test_gains_are_of_the_objective_without_its_penalty(fitted: Surrogate) -> None:
    target, limits = make_objective("mean", fitted.targets), make_constraints(fitted.domains)
    optimum, prior = np.array([0.1, 0.1, 0.8, 0.0]), np.array([0.3, 0.3, 0.4, 0.0])
    penalty = Penalty(0.5, prior)
    both = [
        sureness(Predictor(fitted, target, one), fitted, limits, optimum, [np.full(4, 0.25)])
        for one in (None, penalty)
    ]
    truth = true_losses(np.stack([np.full(4, 0.25), optimum])).mean(1)
    assert truth[0] < truth[1]
    for found in both:
        # The prior lacks a domain of the baseline: its penalty is infinite, its loss is not.
        assert found.gains[0].high < 0
        assert found.better[0] < 0.05


def test_widening_makes_nine_in_ten_hold() -> None:
    rng = np.random.default_rng(0)
    true = np.zeros((4000, 2))
    predicted = rng.normal(0, [1.0, 3.0], (4000, 2))
    factor = widening(true, predicted, np.ones((4000, 2)))
    np.testing.assert_allclose(factor, [1.0, 3.0], rtol=0.06)


def test_coverage_leaves_a_run_out_of_the_factor_that_judges_it() -> None:
    true, sd = np.zeros((20, 1)), np.ones((20, 1))
    folds = np.arange(20) % 2
    predicted = np.where(folds == 0, 10.0, 0.1)[:, None]
    # Widened by the other fold's small errors alone, no large error is inside.
    assert coverage(true, predicted, sd, folds)[0] == pytest.approx(0.5)


def test_noise_is_what_replicates_differ_by() -> None:
    weights, losses = swarm(24, 5, noise=0.0)
    weights[20:22] = weights[0]
    weights[22:] = weights[1]
    losses[[0, 20, 21]] = [[3.0, 3.0], [3.2, 3.0], [3.1, 3.3]]
    losses[[1, 22, 23]] = [[2.9, 2.8], [2.9, 2.8], [2.9, 2.9]]
    model = fit(weights, losses)
    assert replicate_groups(model.weights) == ((0, 20, 21), (1, 22, 23))
    noise = noise_floor(model)
    assert noise is not None
    assert noise.measured
    # Squares within the groups, over the 4 runs that are no first of their mixture.
    np.testing.assert_allclose(noise.sd, np.sqrt([0.02 / 4, (0.06 + 0.02 / 3) / 4]))
    mean = make_objective("mean", model.targets)
    assert objective_noise(model, mean) == pytest.approx(np.sqrt((0.02 + 0.005 / 3) / 4))


def test_copies_of_a_run_are_no_replicates() -> None:
    weights, losses = swarm(24, 5)
    model = fit(np.concatenate([weights, weights[:4]]), np.concatenate([losses, losses[:4]]))
    noise = noise_floor(model)
    assert noise is not None
    assert not noise.measured


def test_without_replicates_the_noise_is_said_to_be_an_estimate(fitted: Surrogate) -> None:
    noise = noise_floor(fitted)
    assert noise is not None
    assert not noise.measured
    assert "estimated" in noise.words
    assert noise_floor(surrogate(regressor="linear")) is None


def gain_of(mean: float, low: float, high: float) -> Interval:
    return Interval(mean=mean, low=low, high=high)


COMMON = {"baseline": "natural", "feasible": True, "num_runs": 64, "held_out_spearman": 0.95}


def test_a_gain_above_zero_is_used() -> None:
    verdict = judge(gain=gain_of(0.1, 0.02, 0.18), better=0.99, **COMMON)
    assert verdict.action == "use"
    assert "0.1000 nats below 'natural'" in verdict.text


def test_an_unsure_gain_asks_for_the_proxies_that_would_show_it() -> None:
    verdict = judge(gain=gain_of(0.1, -0.02, 0.22), better=0.9, exponent=0.5, **COMMON)
    assert verdict.action == "train more"
    # The half-width is 1.2 times the gain, so the error must fall by 1.2: 1.44 times the runs.
    assert verdict.more_proxies == 28


def test_a_gain_too_small_to_prove_keeps_the_baseline() -> None:
    verdict = judge(gain=gain_of(0.01, -0.1, 0.12), better=0.55, exponent=0.3, **COMMON)
    assert verdict.action == "keep"
    assert "'natural'" in verdict.text


def test_an_optimum_that_is_worse_keeps_the_baseline() -> None:
    verdict = judge(gain=gain_of(-0.05, -0.1, 0.0), better=0.05, **COMMON)
    assert verdict.action == "keep"
    assert "0.0500 nats worse" in verdict.text


def test_a_baseline_that_breaks_the_constraints_is_never_kept() -> None:
    settings = COMMON | {"feasible": False}
    verdict = judge(gain=gain_of(-0.05, -0.1, 0.0), better=0.05, **settings)
    assert verdict.action == "use"
    assert "breaks the constraints" in verdict.text


def test_a_surrogate_that_ranks_nothing_is_not_believed() -> None:
    settings = COMMON | {"held_out_spearman": 0.2}
    verdict = judge(gain=gain_of(0.5, 0.4, 0.6), better=1.0, **settings)
    assert verdict.action == "train more"
    assert "0.20" in verdict.text
