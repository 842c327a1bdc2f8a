"""The Gaussian process: its kernel, posterior and derivatives against plain formulas."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from regmix.decision import parallel
from regmix.decision.regressors import kernel as kernel_module
from regmix.decision.regressors.gp import GaussianProcess, GPModel, Process
from regmix.decision.regressors.kernel import (
    Kernel,
    fit_kernel,
    negative_log_posterior,
    prior_mean,
)

RATES = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])


def draws(num: int, seed: int = 0, strength: float = 0.7) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(5, strength), num)


def surface(weights: np.ndarray) -> np.ndarray:
    law = 1.5 + 1.2 * (0.05 + weights @ RATES.T) ** -0.4
    return law + 0.3 * (weights[:, :1] * weights[:, 1:2]) ** 0.5


def noisy(weights: np.ndarray, seed: int = 1) -> np.ndarray:
    return surface(weights) + np.random.default_rng(seed).normal(0, 0.02, (len(weights), 2))


@functools.cache
def fitted() -> GPModel:
    weights = draws(40)
    return GaussianProcess().fit(weights, noisy(weights))


def some_kernel(num_domains: int) -> Kernel:
    lengths = np.linspace(0.3, 2.0, num_domains)
    return Kernel(lengths, matern=1.3, linear=0.4, noise=0.05)


def slow_covariance(kernel: Kernel, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    found = np.empty((len(left), len(right)))
    for i, x in enumerate(left):
        for j, z in enumerate(right):
            distance = np.sqrt(5 * sum(((x - z) / kernel.lengths) ** 2))
            matern = (1 + distance + distance**2 / 3) * np.exp(-distance)
            found[i, j] = kernel.matern * matern + kernel.linear * sum(x * z)
    return found


@pytest.mark.parametrize(("num", "num_runs", "num_domains"), [(1, 1, 1), (5, 3, 2), (7, 23, 17)])
def test_covariance_is_that_of_two_plain_loops(num: int, num_runs: int, num_domains: int) -> None:
    rng = np.random.default_rng(0)
    left, right = (
        rng.normal(0, 0.4, (num, num_domains)),
        rng.normal(0, 0.4, (num_runs, num_domains)),
    )
    left[0] = right[0]
    kernel = some_kernel(num_domains)
    expected = slow_covariance(kernel, left, right)
    assert np.allclose(kernel.between(left, right), expected, rtol=1e-12, atol=1e-12)
    own = np.diag(slow_covariance(kernel, left, left))
    assert np.allclose(kernel.own(left), own, rtol=1e-12)


@pytest.mark.parametrize("num_domains", [1, 2, 17])
def test_pull_is_the_slope_of_the_weighted_covariances(num_domains: int) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.normal(0, 0.4, (3, num_domains)), rng.normal(0, 0.4, (11, num_domains))
    left[0] = right[0]
    kernel, alpha, step = some_kernel(num_domains), rng.normal(size=11), 1e-5
    found = kernel.pull(left, right, alpha)
    for domain in range(num_domains):
        ahead, behind = left.copy(), left.copy()
        ahead[:, domain] += step
        behind[:, domain] -= step
        change = slow_covariance(kernel, ahead, right) - slow_covariance(kernel, behind, right)
        assert np.allclose(found[:, domain], change @ alpha / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_runs", [1, 2, 31])
def test_inverse_undoes_the_covariance_with_noise(num_runs: int) -> None:
    rows, kernel = np.random.default_rng(2).normal(0, 0.4, (num_runs, 3)), some_kernel(3)
    covariance = slow_covariance(kernel, rows, rows)
    covariance += (kernel.noise + kernel.jitter) * np.eye(num_runs)
    assert np.allclose(kernel.inverse(rows) @ covariance, np.eye(num_runs), atol=1e-10)


@pytest.mark.parametrize(("num_runs", "num_domains"), [(1, 1), (7, 2), (31, 17)])
def test_posterior_is_the_textbook_one(num_runs: int, num_domains: int) -> None:
    rng = np.random.default_rng(3)
    rows, target = rng.normal(0, 0.4, (num_runs, num_domains)), rng.normal(size=num_runs)
    rows -= rows.mean(0)
    first, second = (prior_mean(num_domains) + rng.normal(0, 0.3, num_domains + 3) for _ in "ab")

    def textbook(theta: np.ndarray) -> float:
        kernel = Kernel.at(theta)
        noise = (kernel.noise + kernel.jitter) * np.eye(num_runs)
        covariance = slow_covariance(kernel, rows, rows) + noise
        fit = 0.5 * target @ np.linalg.solve(covariance, target)
        sd = np.concatenate([np.full(num_domains, kernel_module.PRIOR_SD[0]), [1.5, 2.0, 2.0]])
        prior = 0.5 * (((theta - prior_mean(num_domains)) / sd) ** 2).sum()
        return float(fit + 0.5 * np.linalg.slogdet(covariance)[1] + prior)

    found = [negative_log_posterior(theta, rows, target)[0] for theta in (first, second)]
    difference = (textbook(first) - textbook(second)) / num_runs
    assert found[0] - found[1] == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize(("num_runs", "num_domains"), [(1, 1), (7, 2), (31, 17)])
def test_gradient_of_the_posterior_is_its_slope(num_runs: int, num_domains: int) -> None:
    rng = np.random.default_rng(3)
    rows, target = rng.normal(0, 0.4, (num_runs, num_domains)), rng.normal(size=num_runs)
    rows[-1] = rows[0]
    theta = prior_mean(num_domains) + rng.normal(0, 0.3, num_domains + 3)
    gradient, step = negative_log_posterior(theta, rows, target)[1], 1e-5
    for place in range(len(theta)):
        shift = step * (np.arange(len(theta)) == place)
        ahead, behind = (
            negative_log_posterior(theta + sign * shift, rows, target)[0] for sign in (1, -1)
        )
        assert gradient[place] == pytest.approx((ahead - behind) / (2 * step), rel=1e-5, abs=1e-8)


def test_hyperparameters_are_at_a_maximum_of_their_posterior() -> None:
    weights = draws(40)
    process = fitted().processes[0][0]
    logs = np.log(noisy(weights)[:, 0])
    target = (logs - logs.mean()) / logs.std()
    kernel = process.kernel
    theta = np.log([*kernel.lengths, kernel.matern, kernel.linear, kernel.noise])
    best, gradient = negative_log_posterior(theta, process.feature.rows, target)
    assert np.abs(gradient).max() < 1e-3
    assert best < negative_log_posterior(prior_mean(5), process.feature.rows, target)[0] - 0.1


def textbook(process: Process, target: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean [N] and covariance [N, N] of the surface at `points`, by solving (R and W, eq. 2.25)."""
    kernel, rows, x = process.kernel, process.feature.rows, process.feature(points)
    covariance = slow_covariance(kernel, rows, rows)
    covariance += (kernel.noise + kernel.jitter) * np.eye(len(rows))
    cross = slow_covariance(kernel, x, rows)
    known = cross @ np.linalg.solve(covariance, cross.T)
    return cross @ np.linalg.solve(covariance, target), slow_covariance(kernel, x, x) - known


def test_prediction_is_the_textbook_posterior_in_nats() -> None:
    weights, points, model = draws(40), draws(6, 5), fitted()
    mean, sd = model.predict(points)
    joint = model.covariance(points)
    logs = np.log(noisy(weights))
    targets = (logs - logs.mean(0)) / logs.std(0)
    for column, pair in enumerate(model.processes):
        parts = [textbook(process, targets[:, column], points) for process in pair]
        centre, spread = logs[:, column].mean(), logs[:, column].std()
        expected = np.exp(centre + spread * (parts[0][0] + parts[1][0]) / 2)
        assert np.allclose(mean[:, column], expected, rtol=1e-9)
        surface_covariance = (parts[0][1] + parts[1][1]) / 2
        scale = expected * spread
        assert np.allclose(joint[column], surface_covariance * np.outer(scale, scale), atol=1e-10)
        noise = (pair[0].kernel.noise + pair[1].kernel.noise) / 2
        variance = scale**2 * (np.diag(surface_covariance) + noise)
        assert np.allclose(sd[:, column] ** 2, variance, rtol=1e-7)


def test_closed_form_leaves_each_run_out_as_doing_it_does() -> None:
    weights, model = draws(40), fitted()
    logs = np.log(noisy(weights))
    targets = (logs - logs.mean(0)) / logs.std(0)
    rng = np.random.default_rng(0)
    for column, pair in enumerate(model.processes):
        for process in pair:
            mean, variance = process.left_out(targets[:, column])
            for run in rng.choice(40, 8, replace=False):
                rows = np.delete(process.feature.rows, run, axis=0)
                inverse = process.kernel.inverse(rows)
                cross = process.kernel.between(process.feature.rows[[run]], rows)[0]
                alone = cross @ inverse @ np.delete(targets[:, column], run)
                own = process.kernel.own(process.feature.rows[[run]])[0]
                spread = (
                    own - cross @ inverse @ cross + process.kernel.noise + process.kernel.jitter
                )
                assert mean[run] == pytest.approx(alone, abs=1e-8)
                assert variance[run] == pytest.approx(spread, abs=1e-8)


def test_left_out_predictions_of_the_model_average_its_processes() -> None:
    model = fitted()
    logs = np.log(noisy(draws(40)))
    target = (logs[:, 1] - logs[:, 1].mean()) / logs[:, 1].std()
    parts = [process.left_out(target) for process in model.processes[1]]
    mean = np.exp(logs[:, 1].mean() + logs[:, 1].std() * (parts[0][0] + parts[1][0]) / 2)
    assert np.allclose(model.held_out[:, 1], mean, rtol=1e-12)
    sd = mean * logs[:, 1].std() * np.sqrt((parts[0][1] + parts[1][1]) / 2)
    assert np.allclose(model.held_out_sd[:, 1], sd, rtol=1e-12)


@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-5])
def test_gradient_holds_near_weights_of_zero(smallest: float) -> None:
    model, point = fitted(), draws(3, 5)
    point[:, 1] = smallest
    for domain in range(5):
        step = 1e-3 * point[:, domain]
        shift = step[:, None] * (np.arange(5) == domain)
        change = model.mean(point + shift) - model.mean(point - shift)
        slope = change / (2 * step[:, None])
        assert np.allclose(model.gradient(point)[:, :, domain], slope, rtol=1e-4, atol=1e-5)


def test_gradient_at_weights_of_zero_is_finite_and_points_the_right_way() -> None:
    model, point = fitted(), draws(3, 5)
    point[:, 1] = 0.0
    gradient = model.gradient(point)
    assert np.isfinite(gradient).all()
    step = 1e-6 * (np.arange(5) == 1)
    ahead = model.mean(point + step) - model.mean(point)
    assert (np.sign(gradient[:, :, 1]) == np.sign(ahead)).all()


def test_bits_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, points = draws(40), draws(600, 5)
    found = set()
    for cores in (1, 2, 5):
        monkeypatch.setattr(parallel, "available_cores", lambda cores=cores: cores)
        model = GaussianProcess().fit(weights, noisy(weights))
        mean, sd = model.predict(points)
        found.add((mean.tobytes(), sd.tobytes(), model.held_out.tobytes()))
    assert len(found) == 1


def test_subset_of_the_runs_gives_nearly_the_same_surface() -> None:
    weights, points = draws(80), draws(50, 5)
    whole = GaussianProcess().fit(weights, noisy(weights)).mean(points)
    started = GaussianProcess(subset=40).fit(weights, noisy(weights)).mean(points)
    assert not np.array_equal(whole, started)
    assert np.abs(whole - started).max() < 0.02


def test_failed_factorisation_is_retried_with_jitter_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = negative_log_posterior, []

    def fails_twice(
        theta: np.ndarray, rows: np.ndarray, target: np.ndarray, jitter: float
    ) -> tuple[float, np.ndarray]:
        calls.append(jitter)
        if jitter < 1e-6 * 0.99:
            raise np.linalg.LinAlgError("the covariance is not positive definite")
        return real(theta, rows, target, jitter)

    monkeypatch.setattr(kernel_module, "negative_log_posterior", fails_twice)
    rows, target = np.sqrt(draws(20)), np.random.default_rng(0).normal(size=20)
    kernel, retries = fit_kernel(rows, target, subset=np.arange(20), max_steps=(5, 5))
    assert retries == 2
    assert kernel.jitter == pytest.approx(1e-6)
    assert calls[:2] == pytest.approx([1e-8, 1e-7])
    model = GaussianProcess().fit(draws(20), surface(draws(20)))
    assert model.num_retries == 2 * 4


def test_factorisation_that_never_succeeds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise np.linalg.LinAlgError("the covariance is not positive definite")

    monkeypatch.setattr(kernel_module, "negative_log_posterior", fails)
    with pytest.raises(np.linalg.LinAlgError):
        fit_kernel(np.sqrt(draws(9)), np.ones(9), subset=np.arange(9), max_steps=(5, 5))


def test_replicates_without_noise_do_not_break_the_factorisation() -> None:
    weights = np.repeat(draws(10), 4, axis=0)
    mean, sd = GaussianProcess().fit(weights, surface(weights)).predict(weights)
    assert np.abs(mean - surface(weights)).max() < 0.02
    assert (sd > 0).all()


def test_runs_of_one_loss_are_predicted_as_that_loss() -> None:
    mean, sd = GaussianProcess().fit(draws(12), np.ones((12, 1))).predict(draws(5, 3))
    assert np.allclose(mean, 1.0)
    assert np.isfinite(sd).all()


def test_noise_of_replicates_is_found() -> None:
    weights = np.repeat(draws(30), 4, axis=0)
    model = GaussianProcess().fit(weights, noisy(weights))
    assert np.allclose(model.noise_sd(), 0.02, rtol=0.35)
