"""Mixtures: validated, exact, the same bits after a file; swarms within bounds that see all."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from regmix.cli import mixtures as mixtures_cli
from regmix.data.draws import BoundedOptions, RegmixOptions, distinct, scale_into_bounds
from regmix.data.mixtures import (
    Mixture,
    MixtureTable,
    coverage,
    draw_swarm,
    read_mixture_yaml,
    write_mixture_yaml,
)
from regmix.errors import ConfigError, ConstraintError, MixtureError, RegmixError
from regmix.swarm.drawing import SwarmRequest

PRIOR = {"web": 0.9, "code": 0.09, "books": 0.009, "rare": 0.001}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_mixture_sorts_normalises_exactly_and_keeps_zeros_and_the_requested_sum() -> None:
    mixture = Mixture({"b": 0.333, "a": 0.667, "c": 0.0, "d": 0.003})
    assert list(mixture) == ["a", "b", "c", "d"]
    assert math.fsum(mixture.values()) == 1.0
    assert mixture["c"] == 0.0
    assert mixture.requested_sum == pytest.approx(1.003)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60))
@settings(max_examples=80, deadline=None)
def test_normalisation_is_exact_and_changes_nothing_twice(values: list[float]) -> None:
    weights = {f"d{i:02d}": value for i, value in enumerate(values)}
    once = Mixture(weights, normalise=True)
    assert math.fsum(once.values()) == 1.0
    assert Mixture(once) == once


def test_mixture_is_immutable_hashable_and_survives_pickle() -> None:
    mixture = Mixture({"a": 0.25, "b": 0.75})
    with pytest.raises(AttributeError, match="immutable"):
        mixture.requested_sum = 2.0
    assert pickle.loads(pickle.dumps(mixture)) == copy.deepcopy(mixture) == mixture
    assert hash(mixture) == hash(Mixture({"b": 0.75, "a": 0.25}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, True, "many", None])
def test_mixture_refuses_a_weight_that_is_none(bad: object) -> None:
    with pytest.raises(MixtureError, match="'b'"):
        Mixture({"a": 1.0, "b": bad})  # type: ignore[dict-item]


@pytest.mark.parametrize("total", [0.98, 1.02, 0.0])
def test_mixture_refuses_weights_that_do_not_sum_to_1(total: float) -> None:
    with pytest.raises(MixtureError, match="sum to"):
        Mixture({"a": total / 2, "b": total / 2})


def test_mixture_refuses_no_domain() -> None:
    with pytest.raises(MixtureError, match="no domain"):
        Mixture({})


def test_array_never_loses_a_positive_weight() -> None:
    mixture = Mixture({"web": 0.5, "code": 0.5, "none": 0.0})
    assert mixture.array(["code", "other", "web"]).tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(MixtureError, match="did you mean 'webs'"):
        mixture.array(["webs", "code"])


def test_table_reads_back_the_same_bits(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).dirichlet(np.full(7, 0.2), 40)
    table = MixtureTable(tuple("gfedcba"), tuple(range(5, 45)), weights)
    table.write_csv(tmp_path / "m.csv")
    again = MixtureTable.read_csv(tmp_path / "m.csv")
    assert (again.domains, again.indices) == (table.domains, table.indices)
    assert again.weights.tobytes() == table.weights.tobytes()
    assert again.mixture(3) == table.mixture(3)


def test_table_normalises_rounded_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "index,train_a,train_b\n1,0.5,0.497\n2,0.502,0.501\n")
    assert [math.fsum(row) for row in MixtureTable.read_csv(path).weights] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,0.5,0.5\n2,nan,1\n", r"row 2 \(index 2\), 'a'"),
        ("1,-0.5,1.5\n", r"row 1 \(index 1\), 'a'"),
        ("1,0.5,0.5\n1,0.5,0.5\n", "row 2: index 1 appears twice"),
        ("1,0.5,0.5\n,0.5,0.5\n", "row 2: index '' is not a whole number"),
        ("1,0.5\n", "row 1: 2 cells under 3 columns"),
        ("1,0.5,0.6\n", r"row 1 \(index 1\): the weights sum to 1.1"),
        ("1,0.5,x\n", "'b': weight 'x'"),
        ("1,1e308,1e308\n", r"row 1 \(index 1\), 'a': weight '1e308'"),
        ("", "no rows"),
    ],
)
def test_table_names_the_row_of_a_mistake(tmp_path: Path, rows: str, message: str) -> None:
    path = write(tmp_path / "m.csv", "index,train_a,train_b\n" + rows)
    with pytest.raises(MixtureError, match=message):
        MixtureTable.read_csv(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("train_a,train_b,c", "no column 'index'"),
        ("index,train_a,b", "column 'b'"),
        ("index,train_a,train_a", "'train_a' appears twice"),
        ("index,train_a,train_bb", "unknown domain 'bb'"),
    ],
)
def test_table_refuses_a_wrong_header(tmp_path: Path, header: str, message: str) -> None:
    path = write(tmp_path / "m.csv", header + "\n1,0.5,0.5\n")
    with pytest.raises(MixtureError, match=message):
        MixtureTable.read_csv(path, domains=["a", "b"])


def test_table_refuses_a_missing_domain(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", "index,train_a,train_b\n1,0.5,0.5\n")
    with pytest.raises(MixtureError, match="no column for domain 'c'"):
        MixtureTable.read_csv(path, domains=["a", "b", "c"])


def test_yaml_reads_back_the_same_mixture(tmp_path: Path) -> None:
    mixture = Mixture({"a": 1e-5, "b": 1 / 3, "c": 2 / 3 - 1e-5})
    path = tmp_path / "m.yaml"
    write_mixture_yaml(path, mixture, valid={"c": 1.0}, model_name="x", sections={"more": {"k": 1}})
    assert read_mixture_yaml(path) == mixture
    assert "train_a: 1.0e-05" in path.read_text()


def test_yaml_accepts_a_float_without_a_dot(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml", "train:\n  train_a: 1e-3\n  train_b: 0.999\n")
    assert read_mixture_yaml(path)["a"] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2]", "no section 'train'"),
        ("a: 1", "no section 'train'"),
        ("train: {train_a: 0.5, train_b: [", "not valid YAML"),
        ("train: {train_a: 0.5, train_a: 0.5}", "'train_a' appears twice"),
        ("train: {train_a: 0.5, a: 0.5}", "domain 'a' appears twice"),
        ("train: {train_a: 0.5, train_b: 0.2}", "sum to 0.7"),
        ("train: {train_a: !!python/object/apply:os.getcwd []}", "not valid YAML"),
        ("#" + "x" * 1_100_000, "too long"),
        ("train: {train_a: 1.0e+308, train_b: 1.0e+308}", "'a': weight 1e.308"),
        ("train: {train_a: " + "1" * 401 + "}", "'a': weight of type int"),
        ("train:\n  ? 0x" + "f" * 5000 + "\n  : 1.0", "many digits"),
        ("train: !!map [1, 2]", "not valid YAML"),
        ('train: {train_a: !!timestamp "zz"}', "not valid YAML"),
        ('train: {train_a: !!bool "zz"}', "not valid YAML"),
        ('train: {train_a: !!int ""}', "not valid YAML"),
        ("train: {train_a: " + ":".join(["1"] * 400) + ".5}", "not valid YAML"),
        ("a: &a {train_a: 1.0}\ntrain: {<<: *a}", "merge keys"),
    ],
)
def test_yaml_refuses_what_is_no_mixture(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        read_mixture_yaml(write(tmp_path / "m.yaml", text))


def test_published_yaml_files_are_read_and_their_sums_kept(shared: Path) -> None:
    sums = {
        name: read_mixture_yaml(shared / "published_runs" / f"{name}.yaml", normalise=True)
        for name in ("human", "doremi", "regmix", "pile_cc_only")
    }
    assert sums["human"].requested_sum == pytest.approx(0.7868)
    assert sums["regmix"].requested_sum == pytest.approx(1.0)
    with pytest.raises(MixtureError, match=r"doremi.*sum to 0\.8148"):
        read_mixture_yaml(shared / "published_runs" / "doremi.yaml")


@pytest.mark.parametrize("sampler", ["bounded", "regmix"])
def test_swarm_is_the_same_for_a_seed_distinct_and_exact(sampler: str) -> None:
    first, again, other = (draw_swarm(PRIOR, 64, sampler=sampler, seed=s) for s in (3, 3, 4))
    assert first.weights.tobytes() == again.weights.tobytes() != other.weights.tobytes()
    assert len({row.tobytes() for row in first.weights}) == 64
    assert all(math.fsum(row) == 1.0 for row in first.weights)
    assert first.indices == tuple(range(1, 65))


def test_bounded_swarm_begins_with_a_smaller_one_of_the_same_seed() -> None:
    small, large = (draw_swarm(PRIOR, num, seed=0) for num in (20, 64))
    assert large.weights[:20].tobytes() == small.weights.tobytes()


@pytest.mark.parametrize("seed", [0, 1])
def test_more_mixtures_repeat_none_and_go_on_counting(seed: int) -> None:
    first = draw_swarm(PRIOR, 48, seed=0)
    more = draw_swarm(PRIOR, 32, seed=seed, existing=first)
    both = first.extended(more)
    assert both.indices == tuple(range(1, 81))
    gaps = np.abs(both.weights[:, None] - both.weights[None]).max(2) + np.eye(80)
    assert gaps.min() > 1e-6


@pytest.mark.parametrize("num_domains", [2, 17])
def test_distinct_keeps_what_a_comparison_with_every_row_keeps(num_domains: int) -> None:
    rng = np.random.default_rng(num_domains)
    base = rng.dirichlet(np.full(num_domains, 0.3), 60)
    shift = rng.choice([0.0, 0.4e-6, 0.999e-6, 1.02e-6, 3e-6], (300, 1))
    rows = np.tile(base, (5, 1)) + shift * rng.choice([-1.0, 0.0, 1.0], (300, num_domains))
    known, drawn = rows[:90], rows[90:]
    kept = list(known)
    for row in drawn:
        if np.abs(np.array(kept) - row).max(1).min() > 1e-6:
            kept.append(row)
    assert 90 < len(kept) < 280
    assert np.array_equal(distinct(drawn, known), np.array(kept[90:]))


@given(seed=st.integers(0, 10_000), num_domains=st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_bounded_swarm_respects_any_feasible_bounds(seed: int, num_domains: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"d{i:02d}" for i in range(num_domains)]
    inside = rng.dirichlet(np.ones(num_domains))
    low = np.maximum(0, inside - rng.exponential(0.1, num_domains))
    high = np.minimum(1, inside + 0.01 + rng.exponential(0.1, num_domains))
    prior = rng.dirichlet(np.full(num_domains, 0.5)) + 1e-4
    table = draw_swarm(
        dict(zip(names, prior / prior.sum(), strict=True)),
        16,
        seed=seed,
        lower=dict(zip(names, low, strict=True)),
        upper=dict(zip(names, high, strict=True)),
    )
    assert (table.weights >= low - 1e-9).all()
    assert (table.weights <= high + 1e-9).all()


def test_rare_domain_is_visible_in_a_good_part_of_the_mixtures() -> None:
    free = {c.domain: c for c in coverage(draw_swarm(PRIOR, 64, seed=0), PRIOR)}
    assert free["rare"].visible > 0.4
    capped = draw_swarm(PRIOR, 64, seed=0, upper={"rare": 0.015})
    assert {c.domain: c for c in coverage(capped, PRIOR)}["rare"].visible > 0.2


def test_coverage_counts_presence_and_ratio_to_the_prior() -> None:
    table = MixtureTable(("a", "b"), (1, 2), np.array([[1.0, 0.0], [0.5, 0.5]]))
    report = coverage(table, {"a": 0.75, "b": 0.25})
    assert (report[1].present, report[1].minimum, report[1].maximum) == (0.5, 0.0, 0.5)
    assert report[1].max_to_prior == 2.0


def test_regmix_swarm_respects_the_maximum_usage_and_the_step() -> None:
    options = RegmixOptions(max_usage=5.0, min_weight=1e-3)
    table = draw_swarm(PRIOR, 32, sampler="regmix", seed=0, options=options)
    ceiling = np.array([5 * PRIOR[name] for name in table.domains])
    assert (table.weights <= ceiling + 2e-3).all()
    positive = table.weights[table.weights > 0]
    assert positive.min() > 0.9e-3


def test_scaling_into_bounds_keeps_ratios_of_free_domains() -> None:
    moved = scale_into_bounds(np.array([[0.8, 0.15, 0.05]]), np.zeros(3), np.array([0.4, 1, 1]))
    assert moved.sum() == pytest.approx(1.0)
    assert moved[0, 0] == pytest.approx(0.4)
    assert moved[0, 1] / moved[0, 2] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"lower": {"web": 0.7, "code": 0.4}}, "lower bounds sum to 1.1"),
        ({"upper": dict.fromkeys(PRIOR, 0.2)}, "upper bounds sum to 0.8"),
        ({"lower": {"web": 0.5}, "upper": {"web": 0.4}}, "'web' must be at least 0.5"),
        ({"upper": {"web": -1}}, "'web'"),
    ],
)
def test_swarm_names_bounds_that_clash(bounds: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ConstraintError, match=message):
        draw_swarm(PRIOR, 4, seed=0, **bounds)  # type: ignore[arg-type]


def test_swarm_refuses_bounds_of_an_unknown_domain() -> None:
    with pytest.raises(MixtureError, match=r"'wub'.*did you mean 'web'"):
        draw_swarm(PRIOR, 4, seed=0, upper={"wub": 0.5})


def test_swarm_refuses_more_mixtures_than_exist() -> None:
    with pytest.raises(MixtureError, match="only 1 distinct"):
        draw_swarm({"a": 1.0}, 4, seed=0)


def test_swarm_refuses_an_empty_domain() -> None:
    with pytest.raises(MixtureError, match="'b' has share 0"):
        draw_swarm({"a": 1.0, "b": 0.0}, 4, seed=0)


def test_swarm_refuses_an_unknown_sampler_and_bad_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'regmix'"):
        draw_swarm(PRIOR, 4, sampler="regmux", seed=0)
    with pytest.raises(ConfigError, match="out of range"):
        BoundedOptions(min_weight=-1.0)


def test_yaml_aliases_do_not_fill_the_screen(tmp_path: Path) -> None:
    lines = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 5)]
    path = write(tmp_path / "m.yaml", "\n".join([*lines, "train: {train_a: *l4}"]))
    with pytest.raises(MixtureError, match="'a': weight of type list") as caught:
        read_mixture_yaml(path)
    assert len(str(caught.value)) < 1000


def test_yaml_of_many_keys_is_checked_for_duplicates_in_linear_time(tmp_path: Path) -> None:
    num = 2000
    body = ", ".join(f"k{i}: 0" for i in range(num))
    path = write(tmp_path / "m.yaml", f"train: {{train_a: 1.0, {body}}}")
    hashed = 0

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            nonlocal hashed
            hashed += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    import yaml

    from regmix.data.strict_yaml import strict_loader

    loader = strict_loader()(path.read_text())
    node = loader.get_single_node()
    pairs = node.value[0][1].value
    for key, _ in pairs:
        key.value = Counted(key.value)
    assert isinstance(node, yaml.MappingNode)
    loader.construct_mapping(node.value[0][1])
    assert hashed < 20 * num


def test_token_counts_are_scaled_to_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "m.yaml", "train: {train_a: 3000000000, train_b: 1000000000}")
    assert read_mixture_yaml(path, normalise=True)["a"] == 0.75


def test_swarm_too_large_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3,000,000,000 mixtures.*at most"):
        draw_swarm(PRIOR, 3_000_000_000, seed=0)


def test_paper_sampler_refuses_more_draws_than_memory_holds() -> None:
    with pytest.raises(ConfigError, match="oversampling 1000000000"):
        RegmixOptions(oversampling=10**9)


@pytest.mark.parametrize("sampler", ["bounded", "regmix"])
@pytest.mark.parametrize("temperature", [math.inf, math.nan, 1e9])
def test_sampler_option_out_of_range_is_refused(sampler: str, temperature: float) -> None:
    request = SwarmRequest(num=4, sampler=sampler, options={"temperature": temperature})
    with pytest.raises(ConfigError, match="temperature"):
        request.draw(PRIOR)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "{csv}", "--num", "64"], "--num has no use with --from"),
        (["--from", "{csv}", "--sampler", "bounded"], "--sampler has no use with --from"),
        (["--from", "{csv}", "--sampler-option", "temperature=1"], "--sampler-option has no use"),
        (["--from", "{csv}", "--lower", "a=0.1"], "--lower has no use with --from"),
        (["--from", "{csv}", "--upper", "a=0.1"], "--upper has no use with --from"),
        (["--add", "--shards", "s"], "--shards has no use with --add"),
        (["--add", "--target", "mean"], "--target has no use with --add"),
        (["--add", "--tokens", "2M"], "--tokens has no use with --add"),
        (["--add", "--model", "cpu-64"], "--model has no use with --add"),
        (["--add", "--eval-every", "3"], "--eval-every has no use with --add"),
        (["--add", "--from", "{csv}"], "--from has no use with --add"),
        (["--num", "4", "--seed", "1"], "a new study needs a corpus"),
        (["--add", "--num", "4", "--seed", "1", "--json"], "no study"),
    ],
)
def test_options_without_use_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    csv = write(tmp_path / "m.csv", "index,train_a\n1,1.0\n")
    filled = [str(tmp_path / "study"), *(word.format(csv=csv) for word in words)]
    with pytest.raises(RegmixError, match=message):
        CliRunner().invoke(mixtures_cli.command, filled, catch_exceptions=False)


@pytest.mark.parametrize("option", ["--seed", "--data-seed", "--init-seed"])
def test_negative_seed_of_a_swarm_is_refused(option: str) -> None:
    result = CliRunner().invoke(mixtures_cli.command, ["study", option, "-1"])
    assert result.exit_code == 2
    assert "x>=0" in result.output
