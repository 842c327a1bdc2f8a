"""The learning curve, the influence of domains, and the exchange rates with their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from regmix.decision.influence import RAISED_BY, exchange_table, influence
from regmix.decision.learning import curve_sizes, learning_curve
from regmix.decision.objective import make_objective
from regmix.decision.surrogate import Surrogate, fit

RATES = np.array([[1.0, 0.3, 0.1, 0.02], [0.1, 1.0, 0.4, 0.2]])


def power_law_runs(num_runs: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(4), num_runs)
    losses = 2 + 1.2 * (0.05 + 4 * weights @ RATES.T) ** -0.35
    return weights, losses + rng.normal(0, noise, losses.shape)


@pytest.fixture(scope="module")
def fitted() -> Surrogate:
    return fit(*power_law_runs(120, 0.01))


def test_the_error_falls_along_the_curve_and_its_power_is_told(fitted: Surrogate) -> None:
    curve = learning_curve(fitted, make_objective("mean", fitted.targets))
    errors = [point.rmse_nats for point in curve.points]
    assert [point.num_runs for point in curve.points] == [*curve_sizes(fitted), 120]
    assert errors[-1] < 0.8 * errors[0]
    assert curve.exponent is not None
    assert 0.1 < curve.exponent < 1.5
    assert f"twice as many proxies ({2 * 120})" in curve.advice


def test_the_curve_is_of_the_objective_it_was_asked_for(fitted: Surrogate) -> None:
    sizes = [24, 48, 72]
    curves = [
        learning_curve(fitted, make_objective(target, fitted.targets), sizes=sizes, repeats=2)
        for target in (0, 1)
    ]
    true = [fitted.held_out[:, column] - fitted.losses[:, column] for column in (0, 1)]
    for curve, error in zip(curves, true, strict=True):
        assert curve.points[-1].rmse_nats == pytest.approx(np.sqrt(np.mean(error**2)))
    assert curves[0].points[0].rmse_nats != curves[1].points[0].rmse_nats


def test_every_fit_is_counted_as_progress(fitted: Surrogate) -> None:
    seen: list[int] = []
    objective = make_objective(0, fitted.targets)
    learning_curve(fitted, objective, sizes=[24, 32], repeats=3, on_progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_losses_that_weights_do_not_explain_promise_nothing() -> None:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.ones(3), 40)
    model = fit(weights, rng.uniform(2, 3, (40, 1)), regressor="linear")
    curve = learning_curve(model, make_objective(0, model.targets), sizes=[20, 26, 32])
    assert curve.exponent is not None
    # Noise is noise: twice as many runs would not halve it.
    assert curve.exponent < 0.3


def test_few_runs_say_nothing_of_more() -> None:
    weights, losses = power_law_runs(12, 0.01)
    model = fit(weights, losses)
    curve = learning_curve(model, make_objective(0, model.targets))
    assert curve.exponent is None
    assert "too few" in curve.advice


def test_influence_of_a_linear_surrogate_is_its_coefficients() -> None:
    rng = np.random.default_rng(2)
    weights = rng.dirichlet(np.ones(3), 60)
    slopes = np.array([3.0, 2.0, 4.0])
    model = fit(weights, (weights @ slopes)[:, None], regressor="linear")
    mixture = np.array([0.5, 0.3, 0.2])
    found = influence(model, mixture)
    expected = RAISED_BY * (slopes - mixture @ slopes) / (1 - mixture)
    np.testing.assert_allclose(found.mean[0], expected, atol=2e-3)


def test_influence_has_the_sign_of_the_law_and_an_interval_around_it(fitted: Surrogate) -> None:
    found = influence(fitted, np.full(4, 0.25))
    assert found.mean[0].argmin() == 0
    assert found.mean[1].argmin() == 1
    assert (found.low <= found.mean).all()
    assert (found.mean <= found.high).all()
    # The best domain lowers its target's loss beyond doubt, the worst raises it.
    assert found.high[0, 0] < 0 < found.low[0, 3]


def test_a_domain_that_is_all_there_is_cannot_rise(fitted: Surrogate) -> None:
    found = influence(fitted, np.array([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(found.mean[:, 0], 0, atol=1e-9)
    assert np.isfinite(found.mean).all()


def test_exchange_rates_lie_in_their_intervals(fitted: Surrogate) -> None:
    found = exchange_table(fitted)
    assert found is not None
    held = (found.low <= RATES) & (found.high >= RATES)
    assert held.sum() >= 6
    assert (found.high - found.low)[RATES < 1].max() < 0.5
    record = found.record()
    assert record["0"]["0"] == [1.0, 1.0, 1.0]


def test_a_surrogate_without_a_power_law_has_no_exchange_rates() -> None:
    assert exchange_table(fit(*power_law_runs(40, 0.01), regressor="gp")) is None
