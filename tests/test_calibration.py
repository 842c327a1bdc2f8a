"""Calibration: intervals as wide as held-out errors ask, and a coverage that did not set them."""

from __future__ import annotations

import numpy as np
import pytest

from regmix.decision.calibration import HALF_WIDTH, coverage, inside, widening
from regmix.decision.surrogate import fit
from regmix.decision.validation import fold_of_mixtures


def errors(num: int, num_targets: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, num_targets))


def test_deviations_that_are_right_stay_as_they_are() -> None:
    true = errors(20_000, 2)
    assert widening(true, np.zeros_like(true), np.ones_like(true)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("factor", [0.1, 1.0, 7.0])
def test_deviations_that_are_off_by_a_factor_are_widened_by_it(factor: float) -> None:
    true, sd = errors(200, 3), np.full((200, 3), 0.5)
    found = widening(factor * true, np.zeros_like(true), sd)
    assert found == pytest.approx(factor * widening(true, np.zeros_like(true), sd))
    assert inside(factor * true, np.zeros_like(true), sd * found) == pytest.approx(0.9, abs=0.02)


def test_a_target_is_drawn_towards_all_where_runs_are_few() -> None:
    def ratio(num: int) -> float:
        true = errors(num, 10) * np.where(np.arange(10) == 0, 4.0, 1.0)
        found = widening(true, np.zeros_like(true), np.ones_like(true))
        return float(found[0] / found[1:].mean())

    assert 1.2 < ratio(16) < 2.5
    assert ratio(5000) == pytest.approx(4.0, rel=0.1)


def test_share_inside_counts_by_target() -> None:
    true = np.array([[0.0, 5.0], [HALF_WIDTH, 5.0], [-1.7, 0.0], [9.0, -5.0]])
    assert inside(true, np.zeros((4, 2)), np.ones((4, 2))).tolist() == [0.5, 0.25]


def test_coverage_counts_runs_by_intervals_that_others_set() -> None:
    folds = np.repeat([0, 1], 20)
    true = np.where(folds == 0, 1.0, 10.0)[:, None]
    nothing, sd = np.zeros_like(true), np.ones_like(true)
    own = widening(true, nothing, sd)
    assert inside(true, nothing, sd * own).tolist() == [1.0]
    assert coverage(true, nothing, sd, folds).tolist() == [0.5]


def test_a_run_that_is_far_off_does_not_widen_its_own_interval() -> None:
    folds = np.arange(40) % 4
    true = errors(40)
    nothing, sd = np.zeros_like(true), np.ones_like(true)
    assert coverage(true, nothing, sd, folds)[0] > 0.8
    true[folds == 2, 0] = np.linspace(0.8e6, 1e6, 10)
    assert coverage(true, nothing, sd, folds)[0] == 0.75
    assert inside(true, nothing, sd * widening(true, nothing, sd))[0] == 0.9


def test_reported_coverage_is_that_of_runs_that_did_not_set_it() -> None:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), 20)
    losses = 5.0 + weights[:, :1] + 0.1 * rng.standard_t(2, (20, 12))
    model = fit(weights, losses, regressor="linear")
    raw = model.held_out_sd / model.widening
    folds = fold_of_mixtures(weights, 0)
    found = [
        inside(
            model.losses[out],
            model.held_out[out],
            raw[out] * widening(model.losses[~out], model.held_out[~out], raw[~out]),
        )
        for out in (folds == fold for fold in range(10))
    ]
    np.testing.assert_allclose(model.coverage, np.mean(found, axis=0))
    own = inside(model.losses, model.held_out, model.held_out_sd)
    assert not np.array_equal(model.coverage, own)


@pytest.mark.parametrize("num_runs", [64, 120])
def test_intervals_hold_what_they_promise_of_fresh_runs(num_runs: int) -> None:
    rates = np.array([[4.0, 1.0, 0.3, 0.1, 1.0], [0.2, 0.5, 3.0, 1.0, 0.1]])

    def run(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        law = 1.5 + 1.2 * (0.05 + weights @ rates.T) ** -0.4
        return np.asarray(law + rng.normal(0, 0.03, law.shape))

    rng = np.random.default_rng(3)
    weights, fresh = rng.dirichlet(np.full(5, 0.7), num_runs), rng.dirichlet(np.full(5, 0.7), 1000)
    model = fit(weights, run(weights, rng))
    covered = inside(run(fresh, rng), *model.predict(fresh))
    assert ((covered > 0.8) & (covered < 0.97)).all()
    assert ((model.coverage > 0.8) & (model.coverage < 0.97)).all()


def test_errors_of_zero_give_intervals_of_hardly_any_width() -> None:
    found = widening(np.ones((10, 2)), np.ones((10, 2)), np.ones((10, 2)))
    assert ((found > 0) & (found < 1e-5)).all()
