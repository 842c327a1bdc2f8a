"""Fit and optimum with frozen ratios, on losses from a known law."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from regmix.data.groups import KEPT, Groups
from regmix.data.mixtures import MixtureTable, draw_swarm, read_mixture_yaml, write_mixture_yaml
from regmix.data.shards import ShardSet
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.records import write_optimum
from regmix.decision.reuse import (
    NATURAL_TOTALS,
    groups_of,
    optimize_frozen,
    reduce_runs,
    reused_baseline,
)
from regmix.decision.runs import NamedArray, Runs, read_runs
from regmix.decision.surrogate import Surrogate, fit
from regmix.errors import ConfigError, ConstraintError, MixtureError
from regmix.study import Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.reuse import Reuse

OLD = ("a", "b", "c", "d", "e", "f")
DOMAINS = (*OLD, "g", "h")
TARGETS = ("x", "y", "z", "new")
PRIOR = dict(zip(DOMAINS, (0.3, 0.2, 0.15, 0.1, 0.05, 0.05, 0.1, 0.05), strict=True))
# What a token of each domain is worth to each target; the last one is what g brings.
WORTH = np.array(
    [
        [1.0, 0.05, 0.1, 0.05, 0.3, 0.1, 0.1, 0.05],
        [0.05, 1.0, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1],
        [0.05, 0.1, 0.1, 0.9, 0.1, 0.4, 0.1, 0.05],
        [0.05, 0.05, 0.02, 0.05, 0.02, 0.02, 1.0, 0.3],
    ]
)
# The optimum of the law over the old domains alone, to two digits.
RATIOS = dict(zip(OLD, (0.33, 0.34, 0.0, 0.33, 0.0, 0.0), strict=True))
GROUPS = Groups(DOMAINS, RATIOS)
REUSED = {"reused": RATIOS}


def law(weights: np.ndarray) -> np.ndarray:
    """Losses [N, 4]: a power of effective data."""
    return 1.5 + 0.5 * (0.02 + np.asarray(weights) @ WORTH.T) ** -0.35


def runs_of(weights: np.ndarray, domains: tuple[str, ...] = DOMAINS, noise: float = 0.0) -> Runs:
    rng = np.random.default_rng(len(weights))
    losses = law(weights)
    losses += noise * rng.standard_normal(losses.shape)
    return Runs(
        weights=NamedArray.of(weights, domains),
        losses=NamedArray.of(losses, TARGETS),
        domains=domains,
        targets=TARGETS,
        indices=tuple(range(1, len(weights) + 1)),
    )


def drawn(num: int, seed: int = 0) -> np.ndarray:
    """Mixtures with the frozen ratios, as `mixtures --reuse` draws them."""
    return SwarmRequest(num=num, seed=seed).draw(PRIOR, groups=GROUPS).weights


def fitted(runs: Runs) -> Surrogate:
    return fit(
        np.asarray(runs.weights),
        np.asarray(runs.losses),
        regressor="powerlaw",
        domains=runs.domains,
        targets=runs.targets,
    )


@pytest.fixture(scope="module")
def model() -> Surrogate:
    return fitted(reduce_runs(runs_of(drawn(24)), GROUPS))


@pytest.fixture(scope="module")
def found(model: Surrogate) -> tuple[Optimum, list[str]]:
    return optimize_frozen(model, GROUPS, prior=PRIOR, baselines=REUSED)


def grid(step: float = 0.01) -> np.ndarray:
    """All mixtures of [kept, g, h] on a grid."""
    ticks = np.arange(0, 1 + step / 2, step)
    g, h = (side.ravel() for side in np.meshgrid(ticks, ticks))
    inside = g + h <= 1 + 1e-9
    return np.stack([1 - g - h, g, h], 1)[inside].clip(0)


def test_the_reduced_search_finds_the_best_of_the_frozen_family(
    model: Surrogate, found: tuple[Optimum, list[str]]
) -> None:
    best = found[0]
    predicted = model.mean(grid()).mean(1)
    assert best.loss <= predicted.min() + 1e-6
    by_force = GROUPS.expand(grid()[[int(predicted.argmin())]])[0]
    np.testing.assert_allclose(best.weights, by_force, atol=0.02)
    # And by the law itself: within a tenth of what the new domains bring.
    true = law(GROUPS.expand(grid())).mean(1)
    regret = float(law(best.weights[None]).mean()) - true.min()
    assert regret < 0.1 * (float(law(GROUPS.expand(np.eye(3)[:1])).mean()) - true.min())


def test_the_optimum_has_the_frozen_ratios_over_all_domains(
    found: tuple[Optimum, list[str]],
) -> None:
    best = found[0]
    assert best.domains == DOMAINS
    assert best.weights.sum() == pytest.approx(1, abs=1e-12)
    assert GROUPS.representable(best.weights[None]).all()
    assert dict(best.mixture) == dict(zip(DOMAINS, best.weights.tolist(), strict=True))
    assert KEPT not in json.dumps([entry.weights for entry in best.baselines])


def test_what_lies_outside_the_frozen_ratios_is_named_and_not_predicted(
    model: Surrogate, found: tuple[Optimum, list[str]]
) -> None:
    best, notes = found
    assert notes == ["Not comparable, outside the frozen ratios: natural, uniform"]
    names = [entry.name for entry in best.baselines]
    assert names == [NATURAL_TOTALS, "best observed", "reused"]
    for entry in best.baselines:
        weights = np.array([[entry.weights[name] for name in DOMAINS]])
        assert GROUPS.representable(weights).all(), entry.name
        predicted = model.mean(GROUPS.reduce(weights)).mean()
        assert entry.loss == pytest.approx(float(predicted), abs=1e-12)
    _, notes = optimize_frozen(model, GROUPS, baselines={"mine": PRIOR}, method="simulate")
    assert notes == ["Not comparable, outside the frozen ratios: mine, uniform"]


def test_the_verdict_is_about_the_reused_mixture(found: tuple[Optimum, list[str]]) -> None:
    best = found[0]
    assert best.baseline == "reused"
    assert best.verdict.startswith("use the optimum")
    assert "'reused'" in best.verdict


def test_without_a_reused_mixture_the_verdict_is_about_the_natural_totals(
    model: Surrogate,
) -> None:
    best, _ = optimize_frozen(model, GROUPS, prior=PRIOR, method="simulate")
    assert best.baseline == NATURAL_TOTALS
    assert f"'{NATURAL_TOTALS}'" in best.verdict
    assert "'natural'" not in best.verdict


def test_every_field_of_an_optimum_is_told_over_all_domains() -> None:
    """A new field of `Optimum` has to be expanded in `reuse._expanded`, or named here."""
    expanded = {"domains", "weights", "mixture", "baseline", "baselines", "epochs", "constraints",
                "verdict", "at_edge", "guard", "interval"}  # fmt: skip
    of_losses = {"objective", "method", "loss", "loss_interval", "gain", "gain_interval",
                 "per_target", "shortfall_nats", "noise_nats", "action", "more_proxies", "seed",
                 "kl", "divergence_nats", "guard_changes", "remarks"}  # fmt: skip
    assert {field.name for field in dataclasses.fields(Optimum)} == expanded | of_losses


def test_a_guard_is_kept_and_told_over_all_domains(model: Surrogate) -> None:
    options = {"prior": PRIOR, "baselines": REUSED, "guard_tolerance": 0.02}
    best, _ = optimize_frozen(model, GROUPS, guard="reused", **options)  # type: ignore[arg-type]
    assert best.guard is not None
    assert best.guard.name == "reused"
    np.testing.assert_allclose(best.guard.weights, [RATIOS.get(name, 0.0) for name in DOMAINS])
    assert max((best.guard_changes or {}).values()) <= 0.02 + 1e-6
    same, _ = optimize_frozen(model, GROUPS, guard=REUSED["reused"], **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(same.weights, best.weights, atol=1e-6)
    with pytest.raises(ConfigError, match="guard 'natural' is unknown, or lies outside"):
        optimize_frozen(model, GROUPS, guard="natural", **options)  # type: ignore[arg-type]


def test_a_group_at_the_edge_of_the_runs_is_told_by_its_domains() -> None:
    rows = drawn(40)
    rows = rows[GROUPS.reduce(rows)[:, 0] < 0.5]
    model = fitted(reduce_runs(runs_of(rows), GROUPS))
    best, _ = optimize_frozen(model, GROUPS)
    assert best.at_edge == ("a", "b", "d")


def test_a_penalty_pulls_towards_the_totals_of_the_prior(model: Surrogate) -> None:
    best, notes = optimize_frozen(model, GROUPS, prior=PRIOR, kl=100.0)
    totals = GROUPS.totals(np.array([list(PRIOR.values())]))
    np.testing.assert_allclose(GROUPS.totals(best.weights[None]), totals, atol=0.01)
    assert notes[-1] == "The KL penalty compares the kept domains together, and each free one"


@pytest.mark.parametrize("name", ["natural", "uniform", "other"])
def test_a_verdict_about_what_is_not_comparable_is_refused(model: Surrogate, name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is unknown, or lies outside"):
        optimize_frozen(model, GROUPS, prior=PRIOR, baseline=name)
    with pytest.raises(MixtureError, match="by its frozen ratio"):
        optimize_frozen(model, GROUPS, baseline=PRIOR)


def test_a_frozen_domains_epochs_limit_the_whole_group(model: Surrogate) -> None:
    tokens = dict.fromkeys(DOMAINS, 1e9) | {"d": 1e5}
    options = {"available_tokens": tokens, "budget_tokens": 1e6, "max_epochs": 1.0}
    best, _ = optimize_frozen(model, GROUPS, prior=PRIOR, **options)  # type: ignore[arg-type]
    assert best.epochs is not None
    assert max(best.epochs.values()) <= 1 + 1e-9
    # d may have 0.1 of the run, so the kept domains 0.1 / 0.33.
    assert best.weights[:6].sum() == pytest.approx(0.1 / RATIOS["d"], abs=1e-6)


def test_bounds_hold_for_frozen_and_free_domains(model: Surrogate) -> None:
    lower, upper = {"a": 0.1}, {"b": 0.15, "g": 0.3}
    best, _ = optimize_frozen(model, GROUPS, lower=lower, upper=upper, extrapolate=True)
    weights = dict(best.mixture)
    assert weights["a"] >= 0.1 - 1e-9
    assert weights["b"] <= 0.15 + 1e-9
    assert weights["g"] <= 0.3 + 1e-9
    best, _ = optimize_frozen(model, GROUPS, upper=0.25)
    assert best.weights.max() <= 0.25 + 1e-9


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ({"a": 0.4}, None, "'a' must be at least 0.4"),
        ({"c": 0.1}, None, "at most 0 of any mixture"),
        ({"a": 0.165}, {"b": 0.034}, "need at least 0.5 .* allow 0.1"),
        (None, {"a": 0.01, "g": 0.1, "h": 0.1}, "upper bounds sum to"),
    ],
)
def test_constraints_that_clash_with_the_ratios_are_refused(
    model: Surrogate, lower: dict[str, float], upper: dict[str, float], message: str
) -> None:
    with pytest.raises(ConstraintError, match=message):
        optimize_frozen(model, GROUPS, lower=lower, upper=upper)


def test_a_run_of_other_ratios_is_refused_by_index_and_domain() -> None:
    weights = drawn(8).copy()
    weights[4] = list(PRIOR.values())
    with pytest.raises(MixtureError, match="mixture 5: "):
        reduce_runs(runs_of(weights), GROUPS)


def test_nothing_frozen_changes_nothing() -> None:
    rows = draw_swarm(PRIOR, 24, seed=0).weights
    runs = runs_of(rows)
    assert groups_of(None, runs) is None
    assert reduce_runs(runs, None) is runs
    whole = fitted(runs)
    best, notes = optimize_frozen(whole, None, prior=PRIOR, method="simulate")
    plain = optimize(whole, prior=PRIOR, method="simulate")
    assert notes == []
    np.testing.assert_array_equal(best.weights, plain.weights)
    assert best.verdict == plain.verdict


def test_columns_in_another_order_are_found_by_name() -> None:
    rows = drawn(8)
    shuffled = tuple(reversed(DOMAINS))
    table = Runs(
        weights=NamedArray.of(rows[:, ::-1], shuffled),
        losses=runs_of(rows).losses,
        domains=shuffled,
        targets=TARGETS,
        indices=tuple(range(8)),
    )
    reduced = reduce_runs(table, GROUPS)
    assert reduced.domains == (KEPT, "g", "h")
    np.testing.assert_allclose(np.asarray(reduced.weights), GROUPS.reduce(rows), atol=1e-12)


def test_bare_tables_show_their_frozen_group() -> None:
    found = groups_of(None, runs_of(drawn(16)))
    assert found is not None
    assert found.ratios == pytest.approx({n: r for n, r in RATIOS.items() if r > 0})


def test_one_frozen_domain_is_a_domain_like_any_other() -> None:
    rows = draw_swarm({"a": 0.5, "b": 0.3, "c": 0.2}, 24, seed=0).weights
    groups = Groups(("a", "b", "c"), {"a": 1.0})
    losses = law(np.hstack([rows, np.zeros((24, 5))]))
    model = fit(rows, losses, regressor="powerlaw", domains=groups.domains, targets=TARGETS)
    short = fit(rows, losses, regressor="powerlaw", domains=groups.names, targets=TARGETS)
    prior = {"a": 0.5, "b": 0.3, "c": 0.2}
    best, notes = optimize_frozen(short, groups, prior=prior)
    whole = optimize(model, prior=prior)
    assert notes == []
    np.testing.assert_allclose(best.weights, whole.weights, atol=1e-9)
    assert [entry.name for entry in best.baselines] == [entry.name for entry in whole.baselines]


def test_frozen_ratios_need_fewer_runs_than_a_full_study() -> None:
    """16 runs of the frozen family choose better than 32 over all domains, mean of 3 draws."""

    def regret(runs: Runs, groups: Groups | None) -> float:
        model = fitted(reduce_runs(runs, groups))
        best, _ = optimize_frozen(model, groups, prior=PRIOR)
        return float(law(best.weights[None]).mean()) - lowest

    lowest = law(GROUPS.expand(grid())).mean(1).min()
    frozen, full = [], []
    for seed in range(3):
        frozen.append(regret(runs_of(drawn(16, seed), noise=0.05), GROUPS))
        rows = draw_swarm(PRIOR, 32, seed=seed).weights
        full.append(regret(runs_of(rows, noise=0.05), None))
    assert np.mean(frozen) < 0.5 * np.mean(full)


def test_a_reused_study_goes_from_losses_to_a_mixture_of_all_domains(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    groups = Groups(("animals", "colours", "numbers"), {"animals": 0.4, "numbers": 0.6})
    old = {"animals": 0.4, "colours": 0.0, "numbers": 0.6}
    path = tmp_path / "old.yaml"
    write_mixture_yaml(path, old)
    reuse = Reuse(source="old", groups=groups, gone={}, carried=read_mixture_yaml(path), remarks=())
    study = make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=10),
        training=tiny_training,
        objective={"animals": 1.0},
        reuse=reuse,
    )
    table = MixtureTable.read_csv(study.mixtures_path)
    lines = ["index,metric/animals_val_loss"]
    for index, row in zip(table.indices, table.weights, strict=True):
        lines.append(f"{index},{float(2 + (row[1] - 0.3) ** 2)!r}")
    study.losses_path.write_text("\n".join(lines) + "\n")
    runs = read_runs(study.mixtures_path, study.losses_path)
    frozen = groups_of(study, runs)
    short = reduce_runs(runs, frozen)
    assert short.domains == (KEPT, "colours")
    model = fit(short.weights, short.losses, regressor="powerlaw")
    best, notes = optimize_frozen(
        model, frozen, prior=study.config.prior, baselines=reused_baseline(study)
    )
    assert notes == ["Not comparable, outside the frozen ratios: natural, uniform"]
    write_optimum(study.optimum_path, best, model)
    mixture = read_mixture_yaml(study.optimum_path)
    assert set(mixture) == set(groups.domains)
    assert mixture["animals"] / mixture["numbers"] == pytest.approx(2 / 3)
    assert best.baselines[-1].weights == pytest.approx(old)
