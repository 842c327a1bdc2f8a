"""Runs: tables joined on the index, nothing filled in, nothing lost in silence."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from regmix.decision.runs import Runs, read_runs, replicate_groups, resolve
from regmix.decision.surrogate import fit
from regmix.errors import LossTableError, MixtureError, RegmixError

MIXTURES = "index,train_p_a,train_p_b,train_p_c\n" + "".join(
    f"{i},{0.1 * i:.1f},{0.9 - 0.1 * i:.1f},0.1\n" for i in range(1, 7)
)
HEADER = "index,metric/p_a_val_loss,metric/p_b_val_loss\n"


def read(folder: Path, losses: str, **options: bool) -> Runs:
    (folder / "m.csv").write_text(MIXTURES)
    (folder / "l.csv").write_text(HEADER + losses)
    return read_runs(folder / "m.csv", folder / "l.csv", **options)


def read_mixtures(folder: Path, mixtures: str) -> Runs:
    (folder / "m.csv").write_text("index,train_p_a,train_p_b,train_p_c\n" + mixtures)
    (folder / "l.csv").write_text(HEADER + rows())
    return read_runs(folder / "m.csv", folder / "l.csv")


def rows(*skipped: int) -> str:
    return "".join(f"{i},{i}.5,2.0{i}\n" for i in (6, 5, 4, 3, 2, 1) if i not in skipped)


def test_tables_are_joined_on_the_index_whatever_their_order(tmp_path: Path) -> None:
    runs = read(tmp_path, rows())
    assert runs.indices == (1, 2, 3, 4, 5, 6)
    assert runs.losses[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert runs.weights[2].tolist() == pytest.approx([0.3, 0.6, 0.1])
    assert (runs.domains, runs.targets) == (("p_a", "p_b", "p_c"), ("p_a", "p_b"))


@pytest.mark.parametrize("bad", ["nan", "inf", ""])
def test_run_without_finite_losses_is_left_out_and_named(tmp_path: Path, bad: str) -> None:
    runs = read(tmp_path, rows(3) + f"3,{bad},2.0\n")
    assert runs.indices == (1, 2, 4, 5, 6)
    assert [(run.index, run.reason) for run in runs.dropped] == [(3, "loss of 'p_a' is not finite")]


def test_run_with_an_absurd_loss_is_left_out_and_named(tmp_path: Path) -> None:
    runs = read(tmp_path, rows(3) + "3,2.0,1e308\n")
    assert runs.indices == (1, 2, 4, 5, 6)
    reason = "loss of 'p_b' is above 1,000,000 nats"
    assert [(run.index, run.reason) for run in runs.dropped] == [(3, reason)]


def test_constant_domain_is_reported(tmp_path: Path) -> None:
    assert read(tmp_path, rows()).constant_domains == ("p_c",)


def test_missing_losses_are_an_error_unless_partial(tmp_path: Path) -> None:
    with pytest.raises(LossTableError, match="run 4 of"):
        read(tmp_path, rows(4))
    assert read(tmp_path, rows(4), partial=True).dropped[0].reason == "no losses"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (rows() + "9,1.0,1.0\n", "run 9 not in"),
        (rows() + "1,1.0,1.0\n", "index 1 appears twice"),
        (rows(1) + "1,x,1.0\n", "row 6 .index 1., 'p_a': 'x' is not a number"),
        (rows(1) + "1,-2,1.0\n", "a loss of -2 nats"),
        (rows(1) + "1,2\n", "2 cells under 3 columns"),
        ("".join(f"{i},nan,1\n" for i in range(1, 7)), "0 usable runs .6 left out."),
    ],
)
def test_losses_that_cannot_be_used_are_named(tmp_path: Path, losses: str, message: str) -> None:
    with pytest.raises(LossTableError, match=message):
        read(tmp_path, losses)


@pytest.mark.parametrize("losses", [rows() + "9,1.0,1.0\n", rows(4), rows(1) + "1,x,1.0\n"])
def test_a_refused_table_is_named_with_a_cure(tmp_path: Path, losses: str) -> None:
    with pytest.raises(LossTableError) as caught:
        read(tmp_path, losses)
    assert str(tmp_path / "l.csv") in caught.value.what
    assert len(caught.value.cure) > 5


@pytest.mark.parametrize("last", ["0.996", "1.003"])
def test_rounded_weights_are_accepted_and_sum_to_1(tmp_path: Path, last: str) -> None:
    kept = "".join(f"{i},0.{i},0.{9 - i},0.1\n" for i in range(1, 6))
    runs = read_mixtures(tmp_path, kept + f"6,0,{last},0\n")
    assert runs.weights[5].tolist() == [0.0, 1.0, 0.0]
    assert np.asarray(runs.weights).sum(1) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("last", ["0.98", "1.02"])
def test_weights_beyond_rounding_are_refused_with_the_tolerance(tmp_path: Path, last: str) -> None:
    kept = "".join(f"{i},0.{i},0.{9 - i},0.1\n" for i in range(1, 6))
    with pytest.raises(
        MixtureError, match=rf"row 6 \(index 6\): the weights sum to {last}"
    ) as caught:
        read_mixtures(tmp_path, kept + f"6,0,{last},0\n")
    assert "0.01 is accepted as rounding" in caught.value.cure


@pytest.mark.parametrize(
    ("mixtures", "message"),
    [
        ("1,0.5,0.5,0\n1,0.5,0.4,0.1\n", "m.csv, row 2: index 1 appears twice"),
        ("1,0.5,0.5,0\n,0.5,0.4,0.1\n", "m.csv, row 2: index '' is not a whole number"),
    ],
)
def test_missing_or_double_index_is_named(tmp_path: Path, mixtures: str, message: str) -> None:
    with pytest.raises(MixtureError, match=message):
        read_mixtures(tmp_path, mixtures)


def test_one_mixture_under_several_indices_gives_replicates(tmp_path: Path) -> None:
    same, other = "0.2,0.3,0.5", "0.7,0.2,0.1"
    runs = read_mixtures(
        tmp_path, f"1,{same}\n2,{other}\n3,{same}\n4,0.4,0.4,0.2\n5,{other}\n6,{same}\n"
    )
    assert len(runs) == 6
    assert runs.replicate_groups == ((0, 2, 5), (1, 4))
    assert fit(runs.weights, runs.losses).losses.tolist() == runs.losses.tolist()


def test_distinct_mixtures_are_no_replicates(tmp_path: Path) -> None:
    assert read(tmp_path, rows()).replicate_groups == ()
    assert replicate_groups(np.array([[1.0, 0.0], [1.0, -0.0], [0.5, 0.5]])) == ((0, 1),)


def test_replicates_are_counted_among_the_runs_that_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(MIXTURES + "7,0.2,0.7,0.1\n8,0.2,0.7,0.1\n")
    (tmp_path / "l.csv").write_text(HEADER + rows(1) + "1,nan,1\n7,2.5,2.0\n8,2.4,2.0\n")
    runs = read_runs(tmp_path / "m.csv", tmp_path / "l.csv")
    assert runs.indices == (2, 3, 4, 5, 6, 7, 8)
    assert runs.replicate_groups == ((0, 5, 6),)


def test_runs_with_a_constant_domain_can_be_fitted(tmp_path: Path) -> None:
    runs = read(tmp_path, rows())
    assert np.isfinite(fit(runs.weights, runs.losses).predict(runs.weights)[0]).all()


def test_column_that_is_no_loss_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(MIXTURES)
    (tmp_path / "l.csv").write_text("index,p_a\n1,2\n")
    with pytest.raises(LossTableError, match="column 'p_a'"):
        read_runs(tmp_path / "m.csv", tmp_path / "l.csv")


def test_unique_ending_finds_a_name() -> None:
    names = ["the_pile_pile_cc", "the_pile_github"]
    assert resolve("pile_cc", names, "target") == "the_pile_pile_cc"
    assert resolve("the_pile_github", names, "target") == "the_pile_github"


@pytest.mark.parametrize(
    ("name", "kind", "error", "message"),
    [
        ("c", "target", LossTableError, "could be x_c, y_c"),
        ("gitub", "target", LossTableError, "did you mean 'github'"),
        ("hub", "domain", MixtureError, "did you mean 'github'"),
    ],
)
def test_unknown_or_ambiguous_name_is_an_error(
    name: str, kind: str, error: type[RegmixError], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve(name, ["x_c", "y_c", "github"], kind)


def test_arrays_keep_their_names_while_only_rows_are_chosen(tmp_path: Path) -> None:
    weights = read(tmp_path, rows()).weights
    assert weights[:3].columns == weights[[0, 2]].columns == ("p_a", "p_b", "p_c")
    assert pickle.loads(pickle.dumps(weights)).columns == weights.columns
    assert getattr(weights[:, ::-1], "columns", None) is None
    assert (weights * 2).columns is None
    assert np.asarray(weights).shape == (6, 3)


def test_targets_can_be_chosen(tmp_path: Path) -> None:
    chosen = read(tmp_path, rows(5), partial=True).select(["b"])
    assert chosen.targets == chosen.losses.columns == ("p_b",)
    assert chosen.losses.shape == (5, 1)
    assert [run.index for run in chosen.dropped] == [5]


def test_unknown_target_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        LossTableError, match=r"unknown target 'p_d' .did you mean 'p_[ab]'"
    ) as caught:
        read(tmp_path, rows()).select(["p_d"])
    assert caught.value.cure == "Correct it"
