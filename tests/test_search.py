"""The search: right where the optimum is known, never worse than the paper's, within its limits."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from search_cases import bowls, made_up

from regmix.decision import uncertainty
from regmix.decision.baselines import Baseline
from regmix.decision.objective import make_objective
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.regressors.trees import Trees
from regmix.decision.searching import simulation
from regmix.decision.searching.constraints import make_constraints
from regmix.decision.searching.exchange import exchange
from regmix.decision.searching.guard import make_guard
from regmix.decision.searching.penalty import divergence
from regmix.decision.searching.predictor import Predictor
from regmix.decision.searching.search import _settled
from regmix.decision.surrogate import Member, Surrogate, fit
from regmix.errors import ConstraintError

DOMAINS, TARGETS = "abcde", "xyz"
AVAILABLE = dict(zip(DOMAINS, (2e9, 5e9, 20e9, 40e9, 9e9), strict=True))


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw 8,000 mixtures and judge 1,500 of them in full, at a tenth of the time.

    Intervals around the optimum are not what is tested here: few draws of them will do.
    """
    monkeypatch.setattr(simulation, "NUM_DRAWS", 8_000)
    monkeypatch.setattr(simulation, "_SAMPLED", 500)
    monkeypatch.setattr(simulation, "_PICKED", 500)
    monkeypatch.setattr(uncertainty, "NUM_DRAWS", 40)
    monkeypatch.setattr(uncertainty, "NUM_RIVALS", 20)


@pytest.fixture(scope="module")
def process() -> Surrogate:
    rng = np.random.default_rng(3)
    weights = rng.dirichlet(np.full(5, 0.7), 60)
    rates = rng.gamma(0.7, 1.5, (3, 5))
    losses = 1.5 + 1.2 * (0.05 + np.sqrt(weights) @ rates.T) ** -0.4
    losses += rng.normal(0, 0.005, losses.shape)
    return fit(weights, losses, regressor="gp", domains=tuple(DOMAINS), targets=tuple(TARGETS))


@pytest.fixture(scope="module")
def trees(process: Surrogate) -> Surrogate:
    """Return a tenth of the paper's trees on the same runs: as jagged, and fitted in a moment."""
    forest = Trees(num_rounds=100, learning_rate=0.1).fit(process.weights, process.losses)
    return replace(process, members=(Member("lightgbm", 1.0, forest, np.ones(3)),))


def random_limits(seed: int) -> dict[str, Any]:
    """Return an objective, a prior, and a random choice of bounds, epochs, KL and guard."""
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(5, 2.0))
    wanted: dict[str, Any] = {
        "objective": ("x", "mean", "worst", {"y": 0.7, "z": 0.3})[seed % 4],
        "prior": dict(zip(DOMAINS, prior.tolist(), strict=True)),
        "seed": seed,
    }
    if rng.random() < 0.6:
        lower = rng.dirichlet(np.ones(5)) * rng.uniform(0, 0.5)
        upper = np.minimum(1, lower + rng.dirichlet(np.ones(5)) + 0.15)
        wanted |= {"lower": lower, "upper": upper}
    if rng.random() < 0.5:
        wanted |= {"available_tokens": AVAILABLE, "budget_tokens": rng.uniform(5e9, 40e9)}
    if rng.random() < 0.5:
        wanted["kl"] = 10 ** rng.uniform(-3, -0.5)
    if rng.random() < 0.6:
        names = ("natural", "uniform", "best observed")
        wanted |= {"guard": names[rng.integers(3)], "guard_tolerance": rng.uniform(0, 0.05)}
    return wanted


def check_respected(best: Optimum, model: Surrogate, wanted: dict[str, Any]) -> None:
    weights = best.weights
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.min() >= 0
    if "lower" in wanted:
        assert (weights >= wanted["lower"] - 1e-9).all()
        assert (weights <= wanted["upper"] + 1e-9).all()
    if "budget_tokens" in wanted:
        tokens = np.array(list(AVAILABLE.values()))
        assert (weights * wanted["budget_tokens"] <= 4 * tokens * (1 + 1e-8)).all()
    if "guard" in wanted:
        assert best.guard is not None
        loss, most = model.mean(weights)[0], model.mean(best.guard.weights)[0]
        assert (loss <= most + wanted["guard_tolerance"] + 1e-8).all()


def both_methods(model: Surrogate, seed: int) -> int:
    """Check one random set; return 1 where it can be kept, 0 where both methods refuse it."""
    wanted = random_limits(seed)
    try:
        simulated = optimize(model, method="simulate", **wanted)
    except ConstraintError:
        with pytest.raises(ConstraintError):
            optimize(model, method="exact", **wanted)
        return 0
    exact = optimize(model, method="exact", **wanted)
    assert exact.minimised <= simulated.minimised + 1e-12, wanted
    for best in (simulated, exact):
        check_respected(best, model, wanted)
        prior = np.array(list(wanted["prior"].values()))
        told = divergence(best.weights[None], prior)[0]
        assert best.divergence_nats == pytest.approx(told, abs=1e-9)
    return 1


def test_exact_is_never_worse_than_simulate_under_20_random_constraints(
    process: Surrogate,
) -> None:
    assert sum(both_methods(process, seed) for seed in range(20)) >= 14


def test_exact_on_trees_is_never_worse_than_simulate_under_random_constraints(
    trees: Surrogate,
) -> None:
    assert sum(both_methods(trees, seed) for seed in range(20, 26)) >= 4


def test_power_law_of_separate_domains_is_solved_as_by_hand() -> None:
    # Minimise sum_d s_d (0.05 + p_d) ** -0.5: the slopes s_d (0.05 + p_d) ** -1.5 / 2 are equal.
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    model = made_up(
        lambda weights: (0.05 + weights) ** -0.5,
        lambda weights: -0.5 * (0.05 + weights)[:, :, None] ** -1.5 * np.eye(4),
        "abcd",
        "wxyz",
    )
    relative = shares ** (1 / 1.5)
    known = relative * (1 + 4 * 0.05) / relative.sum() - 0.05
    best = optimize(model, objective=dict(zip("wxyz", shares, strict=True)))
    assert best.weights == pytest.approx(known, abs=2e-5)


def test_quadratic_is_projected_onto_the_bounded_simplex() -> None:
    centre = np.array([[0.9, 0.4, -0.1, 0.1]])
    model = bowls(centre, "abcd", "x", rooted=False)
    assert optimize(model).weights == pytest.approx([0.75, 0.25, 0, 0], abs=2e-5)
    # With a at 0.6 the rest is (0.4 - t) + (0.1 - t) = 0.4.
    bounded = optimize(model, upper={"a": 0.6})
    assert bounded.weights == pytest.approx([0.6, 0.35, 0, 0.05], abs=2e-5)


def test_infinite_slope_at_zero_leaves_no_specks_and_misses_no_domain() -> None:
    centre = np.array([0.6, 0.36, 0.0, 0.04, 0.0])
    best = optimize(bowls(centre[None], DOMAINS, "x"))
    assert best.weights == pytest.approx(centre, abs=1e-4)
    assert best.weights[[2, 4]].tolist() == [0.0, 0.0]
    assert best.loss == pytest.approx(2.0, abs=1e-7)


def test_speck_that_pays_is_kept() -> None:
    centre = np.array([0.6, 0.4 - 4e-6, 4e-6])
    best = optimize(bowls(centre[None], "abc", "x"))
    assert best.weights[2] == pytest.approx(4e-6, rel=0.5)


def test_better_of_two_basins_is_found() -> None:
    # A narrow deep basin at (0, 0.1, 0.9) and a wide shallow one at (0.9, 0.1, 0).
    deep, wide = np.array([0.0, 0.1, 0.9]), np.array([0.9, 0.1, 0.0])

    def parts(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            1.5 * np.exp(-20 * ((weights - deep) ** 2).sum(1)),
            np.exp(-2 * ((weights - wide) ** 2).sum(1)),
        )

    def slopes(weights: np.ndarray) -> np.ndarray:
        first, second = parts(weights)
        pull = 40 * first[:, None] * (weights - deep) + 4 * second[:, None] * (weights - wide)
        return pull[:, None]

    model = made_up(lambda weights: 4 - sum(parts(weights))[:, None], slopes, "abc", "x")
    # Draws near a never reach c, and the hint starts higher than they end.
    hint = {"b": 0.3, "c": 0.7}
    prior = {"a": 0.98, "b": 0.01, "c": 0.01}
    assert model.mean(np.array([[0, 0.3, 0.7]])) > model.mean(wide[None])
    best = optimize(model, prior=prior, baselines={"hint": hint})
    assert best.mixture["c"] > 0.8


def test_worst_target_is_the_minimum_of_a_brute_force_grid() -> None:
    centres = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]])
    model = bowls(centres, "abc", TARGETS)
    centre, reach = np.array([0.5, 0.5]), 0.5
    for _ in range(4):  # each grid of 201 x 201 covers a few cells of the one before
        steps = np.linspace(-reach, reach, 201)
        pairs = centre + np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
        grid = np.column_stack([pairs, 1 - pairs.sum(1)])
        grid = grid[(grid >= 0).all(1)]
        values = model.mean(grid).max(1)
        centre, reach = grid[values.argmin(), :2], reach / 20
    best = optimize(model, objective="worst")
    assert best.loss == pytest.approx(values.min(), abs=1e-5)
    assert best.loss <= values.min() + 1e-9


def test_penalised_linear_loss_is_solved_as_by_hand() -> None:
    # Minimise c . p + k KL(p || q): p is q exp(-c / k), scaled to 1.
    cost, prior, kl = np.array([0.3, 0.1, 0.2, 0.9]), np.array([0.4, 0.1, 0.2, 0.3]), 0.2
    model = made_up(
        lambda weights: 1 + weights @ cost[:, None],
        lambda weights: np.broadcast_to(cost, (len(weights), 1, 4)),
        "abcd",
        "x",
    )
    known = prior * np.exp(-cost / kl)
    best = optimize(model, prior=prior, kl=kl)
    assert best.weights == pytest.approx(known / known.sum(), abs=1e-5)


def test_penalty_pulls_towards_the_prior_monotonically(process: Surrogate) -> None:
    prior = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.3, "e": 0.1}
    found = [optimize(process, objective="x", prior=prior, kl=k) for k in (0, 0.01, 0.1, 1, 100)]
    divergences = [best.divergence_nats or 0.0 for best in found]
    losses = [best.loss for best in found]
    assert all(a > b for a, b in itertools.pairwise(divergences))
    assert all(a < b for a, b in itertools.pairwise(losses))
    assert found[-1].weights == pytest.approx(np.array(list(prior.values())), abs=2e-3)


def test_guard_holds_binds_and_costs() -> None:
    centres = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    model = bowls(centres, "abc", TARGETS)
    free = optimize(model, objective="x", prior="uniform")
    before = free.loss
    for tolerance in (0.2, 0.1, 0.05, 0.01):
        best = optimize(
            model, objective="x", prior="uniform", guard="uniform", guard_tolerance=tolerance
        )
        changes = best.guard_changes
        assert changes is not None
        assert set(changes) == set(TARGETS)
        assert max(changes.values()) == pytest.approx(tolerance, abs=1e-5)
        assert max(changes.values()) <= tolerance + 1e-9
        assert best.loss > before
        before = best.loss
    assert model.mean(free.weights)[0, 1] > model.mean(np.full((1, 3), 1 / 3))[0, 1] + 0.2


def test_guard_against_a_pareto_optimal_mixture_returns_it() -> None:
    model = bowls(np.array([[0.9, 0.1, 0], [0.1, 0.9, 0]]), "abc", "xy")
    # On the arc of square roots between the two centres nothing is better on both.
    roots = np.sqrt([0.9, 0.1, 0]) + np.sqrt([0.1, 0.9, 0])
    arc = roots**2 / (roots**2).sum()
    reference = dict(zip("abc", arc.tolist(), strict=True))
    best = optimize(model, objective="x", guard=reference, guard_tolerance=0)
    assert best.weights == pytest.approx(arc, abs=1e-4)


def test_mean_of_draws_that_breaks_the_guard_gives_way_to_the_best_draw() -> None:
    # y is low at the corners: the mean of draws near two corners lies between, where it is high.
    model = made_up(
        lambda weights: np.stack([2 + 0.01 * weights[:, 2], 3 - (weights**2).sum(1)], axis=1),
        lambda weights: np.stack([np.full_like(weights, [0, 0, 0.01]), -2 * weights], axis=1),
        "abc",
        "xy",
    )
    wanted: dict[str, Any] = {
        "objective": "x",
        "prior": {"a": 0.45, "b": 0.45, "c": 0.1},
        "guard": {"a": 0.9, "b": 0.05, "c": 0.05},
        "guard_tolerance": 0.1,
    }
    best = optimize(model, method="simulate", **wanted)
    assert best.remarks == (
        "The mean of the best draws breaks the guard: the best draw that keeps it",
    )
    assert best.weights[:2].max() > 0.8
    assert best.guard_changes is not None
    assert best.guard_changes["y"] <= 0.1
    assert optimize(model, **wanted).loss <= best.loss


def test_guard_that_no_draw_keeps_is_said_and_kept() -> None:
    model = bowls(np.array([[0.9, 0.1, 0], [0.1, 0.9, 0]]), "abc", "xy")
    wanted: dict[str, Any] = {"objective": "x", "guard": {"a": 0.1, "b": 0.9}, "guard_tolerance": 0}
    best = optimize(model, method="simulate", **wanted)
    assert "No draw of" in best.remarks[0]
    assert model.mean(best.weights)[0, 1] <= 2 + 1e-9


def test_exchange_never_leaves_the_guard(trees: Surrogate) -> None:
    uniform = Baseline("uniform", np.full(5, 0.2))
    guard = make_guard(trees, uniform, 0.01)
    predictor = Predictor(trees, make_objective("x", TARGETS), guard=guard)
    free = Predictor(trees, make_objective("x", TARGETS))
    limits = make_constraints(tuple(DOMAINS), upper={"b": 0.5})
    found = exchange(predictor, limits, uniform.weights)
    beyond = exchange(free, limits, uniform.weights)
    assert guard.excess(trees.mean(beyond[None]))[0] > 0.01
    assert guard.excess(trees.mean(found[None]))[0] <= 0
    assert predictor.value(found[None])[0] < predictor.value(uniform.weights[None])[0]
    assert predictor.judge(exchange(predictor, limits, beyond, "excess")[None])[1][0] == 0


def test_mixture_that_breaks_the_guard_is_drawn_back_to_a_safe_one() -> None:
    model = bowls(np.array([[0.9, 0.1, 0], [0.1, 0.9, 0]]), "abc", "xy")
    safe, beyond = np.array([0.2, 0.8, 0.0]), np.array([0.9, 0.1, 0.0])
    guard = make_guard(model, Baseline("safe", safe), 0.1)
    predictor = Predictor(model, make_objective("x", "xy"), guard=guard)
    found = _settled(predictor, make_constraints(tuple("abc")), safe, beyond[None])
    assert guard.excess(model.mean(found[None]))[0] <= 0
    assert 0.3 < found[0] < 0.9


def test_screening_keeps_the_best_128_draws(process: Surrogate) -> None:
    limits = make_constraints(tuple(DOMAINS), upper={"a": 0.5})
    for objective in ("x", "mean", "worst"):
        predictor = Predictor(process, make_objective(objective, TARGETS))
        draws = simulation.all_draws(limits, np.full(5, 0.5), seed=1)
        best = draws[np.argsort(predictor.value(draws), kind="stable")[:128]]
        found = simulation.draw(predictor, limits, np.full(5, 0.5), seed=1)
        assert len(found.draws) == 1500 < len(draws)
        kept = {row.tobytes() for row in found.draws[:128]} & {row.tobytes() for row in best}
        assert len(kept) >= 126


def test_many_domains_are_searched_too() -> None:
    num = 40
    centre = np.random.default_rng(2).dirichlet(np.full(num, 0.5))
    names = "".join(chr(ord("A") + place) for place in range(num))
    best = optimize(bowls(centre[None], names, "x"))
    assert best.loss == pytest.approx(2.0, abs=1e-5)
    assert best.weights == pytest.approx(centre, abs=2e-3)


@pytest.mark.parametrize("kind", ["process", "trees"])
def test_guarded_optimum_repeats_its_bits(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    wanted: dict[str, Any] = {"objective": "worst", "prior": "uniform", "kl": 0.01, "seed": 4}
    wanted |= {"guard": "uniform", "guard_tolerance": 0.02}
    first, again = (optimize(model, **wanted) for _ in range(2))
    assert first.weights.tobytes() == again.weights.tobytes()
