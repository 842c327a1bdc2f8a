"""Runs: tables joined on the index, nothing filled in, nothing lost in silence."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from regmix.decision.runs import Runs, read_runs, resolve
from regmix.errors import LossTableError, MixtureError, RegmixError

MIXTURES = "index,train_p_a,train_p_b,train_p_c\n" + "".join(
    f"{i},{0.1 * i:.1f},{0.9 - 0.1 * i:.1f},0.1\n" for i in range(1, 7)
)
HEADER = "index,metric/p_a_val_loss,metric/p_b_val_loss\n"


def read(folder: Path, losses: str, **options: bool) -> Runs:
    (folder / "m.csv").write_text(MIXTURES)
    (folder / "l.csv").write_text(HEADER + losses)
    return read_runs(folder / "m.csv", folder / "l.csv", **options)


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
    chosen = read(tmp_path, rows()).select(["b"])
    assert chosen.targets == chosen.losses.columns == ("p_b",)
    assert chosen.losses.shape == (6, 1)
