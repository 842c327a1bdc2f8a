"""The laws: derivatives, recovery of a known truth, convexity, and errors that can be believed."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from regmix.decision.regressors.laws import Law, LawModel, LawRegressor
from regmix.decision.regressors.loglinear import LogLinearLaw
from regmix.decision.regressors.powerlaw import PowerLaw, exchange_rates

LAWS: list[Law] = [PowerLaw(), LogLinearLaw()]
RATES = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])


def draws(num: int, seed: int = 0, num_domains: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(num_domains, 0.7), num)


def power(weights: np.ndarray) -> np.ndarray:
    return 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4


def loglinear(weights: np.ndarray) -> np.ndarray:
    return 1.5 + np.exp(weights @ np.log(RATES.T))


def noisy(weights: np.ndarray, sd: float = 0.03, seed: int = 3) -> np.ndarray:
    return power(weights) + np.random.default_rng(seed).normal(0, sd, (len(weights), 2))


@functools.cache
def fitted(name: str) -> LawModel:
    law = {law.name: law for law in LAWS}[name]
    return LawRegressor(law=law).fit(draws(60), noisy(draws(60)))


def some_theta(law: Law, num_problems: int, num_domains: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(0, 0.4, (num_problems, law.num_head + num_domains))


every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
shapes = pytest.mark.parametrize(("num", "num_problems", "num_domains"), [(1, 1, 1), (7, 3, 17)])


@every_law
@shapes
def test_jacobian_is_the_slope_by_every_parameter(
    law: Law, num: int, num_problems: int, num_domains: int
) -> None:
    theta, x = some_theta(law, num_problems, num_domains), draws(num, 2, num_domains)
    found, step = law.jacobian(theta, x), 1e-6
    assert found.shape == (num_problems, num, theta.shape[1])
    for place in range(theta.shape[1]):
        shift = step * (np.arange(theta.shape[1]) == place)
        slope = (law.losses(theta + shift, x) - law.losses(theta - shift, x)) / (2 * step)
        assert np.allclose(found[:, :, place], slope, rtol=1e-7, atol=1e-8)


@every_law
@shapes
def test_slopes_are_those_by_every_weight(
    law: Law, num: int, num_problems: int, num_domains: int
) -> None:
    theta, x = some_theta(law, num_problems, num_domains), draws(num, 2, num_domains)
    found, step = law.slopes(theta, x), 1e-6
    assert found.shape == (num_problems, num, num_domains)
    for domain in range(num_domains):
        shift = step * (np.arange(num_domains) == domain)
        slope = (law.losses(theta, x + shift) - law.losses(theta, x - shift)) / (2 * step)
        assert np.allclose(found[:, :, domain], slope, rtol=1e-7, atol=1e-8)


@every_law
def test_laws_are_convex_in_the_weights(law: Law) -> None:
    theta = some_theta(law, 20, 5) * 3
    left, right = draws(200, 4), draws(200, 5)
    middle = law.losses(theta, (left + right) / 2)
    ends = (law.losses(theta, left) + law.losses(theta, right)) / 2
    assert (middle <= ends * (1 + 1e-12)).all()
    assert (middle < ends - 1e-3).mean() > 0.3


@pytest.mark.parametrize(("law", "truth"), list(zip(LAWS, (power, loglinear), strict=True)))
def test_a_law_recovers_itself_from_few_runs_without_noise(law: Law, truth: object) -> None:
    weights, unseen = draws(40), draws(200, 1)
    regressor = LawRegressor(law=law, ridge=1e-9, head_ridge=1e-9, last_steps=200)
    assert callable(truth)
    model = regressor.fit(weights, truth(weights))
    assert np.abs(model.mean(unseen) - truth(unseen)).max() < 5e-3


def test_exchange_rates_of_a_known_power_law_are_found() -> None:
    weights = draws(80)
    exact = LawRegressor(law=PowerLaw(), ridge=1e-8, head_ridge=1e-8)
    expected = RATES / RATES.max(1, keepdims=True)
    found = exchange_rates(exact.fit(weights, power(weights)).theta)
    assert found.max(1).tolist() == [1.0, 1.0]
    assert np.abs(found - expected).max() < 0.05
    usual = exchange_rates(LawRegressor(law=PowerLaw()).fit(weights, power(weights)).theta)
    assert np.abs(usual - expected).max() < 0.15
    assert (usual.argsort(1)[:, -2:] == expected.argsort(1)[:, -2:]).all()


@every_law
def test_a_diverged_run_moves_a_law_little(law: Law) -> None:
    weights, unseen = draws(60), draws(200, 1)
    losses = power(weights)
    losses[7] += 5.0
    clean = LawRegressor(law=law).fit(weights, power(weights)).mean(unseen)
    shifted = LawRegressor(law=law).fit(weights, losses).mean(unseen) - clean
    assert np.abs(shifted).mean() < 0.03
    wide = LawRegressor(law=law, huber_delta=100.0)
    moved = wide.fit(weights, losses).mean(unseen) - wide.fit(weights, power(weights)).mean(unseen)
    assert np.abs(moved).mean() > 2 * np.abs(shifted).mean()


@every_law
def test_left_out_predictions_are_close_to_those_of_a_fit_without_the_run(law: Law) -> None:
    weights, losses, model = draws(60), noisy(draws(60)), fitted(law.name)
    regressor = LawRegressor(law=law)
    runs = [0, 7, 23, 41]
    alone = np.stack(
        [
            regressor.fit(np.delete(weights, run, 0), np.delete(losses, run, 0)).mean(
                weights[[run]]
            )[0]
            for run in runs
        ]
    )
    moved = alone - model.mean(weights)[runs]
    assert np.abs(moved).max() > 3e-3
    assert np.abs(model.held_out[runs] - alone).max() < 0.35 * np.abs(moved).max()


@every_law
def test_draws_have_the_covariance_that_they_claim(law: Law) -> None:
    model = fitted(law.name)
    sample = model.draws(20_000, seed=0)
    assert sample.shape == (20_000, *model.theta.shape)
    for column in range(2):
        claimed = model.covariance[column] * model.scale[column] ** 2
        sd = np.sqrt(np.diag(claimed))
        found = np.cov(sample[:, column].T)
        assert np.abs(found - claimed).max() < 0.05 * np.outer(sd, sd).max()
        assert np.allclose(np.sqrt(np.diag(found)), sd, rtol=0.03)
        assert (np.abs(sample[:, column].mean(0) - model.theta[column]) < 0.04 * sd).all()


def test_draws_repeat_for_a_seed() -> None:
    model = fitted("powerlaw")
    assert np.array_equal(model.draws(3, seed=1), model.draws(3, seed=1))
    assert not np.array_equal(model.draws(3, seed=1), model.draws(3, seed=2))


def test_deviations_grow_away_from_the_runs() -> None:
    weights = draws(60)
    near = weights * [0.5, 1, 1, 1, 1]
    near /= near.sum(1, keepdims=True)
    model = LawRegressor(law=PowerLaw()).fit(near[near[:, 0] < 0.2], noisy(near[near[:, 0] < 0.2]))
    inside, outside = near[:1] * 0 + 0.2, np.array([[1.0, 0, 0, 0, 0]])
    assert (model.predict(outside)[1] > 1.5 * model.predict(inside)[1]).all()


def test_predictions_of_many_mixtures_are_those_of_each() -> None:
    model, points = fitted("powerlaw"), draws(5000, 6)
    mean, sd = model.predict(points)
    for row in (0, 4095, 4096, 4999):
        one = model.predict(points[[row]])
        assert np.allclose(one[0][0], mean[row], rtol=1e-12)
        assert np.allclose(one[1][0], sd[row], rtol=1e-12)


def test_seeds_change_the_starts_and_not_the_answer() -> None:
    weights, unseen = draws(60), draws(50, 1)
    regressor = LawRegressor(law=PowerLaw())
    other = dataclasses.replace(regressor, seed=5)
    first, second = (r.fit(weights, noisy(weights)) for r in (regressor, other))
    assert not np.array_equal(first.theta, second.theta)
    assert np.abs(first.mean(unseen) - second.mean(unseen)).max() < 2e-3


@every_law
def test_bits_do_not_depend_on_the_threads_of_linear_algebra(law: Law) -> None:
    weights = draws(300, 0, 40)
    rates = np.random.default_rng(5).lognormal(0, 1, (6, 40))
    losses = 1.5 + 1.2 * (0.05 + weights @ rates.T) ** -0.4
    found = set()
    for threads in (1, 2):
        with threadpool_limits(threads):
            model = LawRegressor(law=law, first_steps=5, last_steps=5).fit(weights, losses)
        found.add((model.theta.tobytes(), model.held_out.tobytes()))
    assert len(found) == 1


@every_law
@pytest.mark.parametrize("num_domains", [1, 2])
def test_domains_that_are_absent_or_alone_do_no_harm(law: Law, num_domains: int) -> None:
    weights = np.hstack([draws(30, 0, num_domains), np.zeros((30, 1))])
    losses = 2.0 + np.random.default_rng(0).normal(0, 0.1, (30, 1))
    model = LawRegressor(law=law).fit(weights, losses)
    mean, sd = model.predict(weights)
    assert np.abs(mean - losses.mean()).max() < 0.1
    assert np.isfinite(sd).all()
    assert np.isfinite(model.draws(5, 0)).all()


def test_exchange_rates_of_losses_of_very_different_size_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    weights, rates = rng.dirichlet(np.ones(5), 40), rng.gamma(0.5, 1, (3, 5))
    losses = 2 + 1.2 * (0.1 + weights @ rates.T) ** -0.3 + rng.normal(0, 0.01, (40, 3))
    model = LawRegressor(law=PowerLaw()).fit(weights, losses * [1e-3, 1.0, 1e4])
    found = exchange_rates(model.draws(400, 0))
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() == 1
