"""What is minimised: its value and its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from regmix.decision.objective import make_objective, parse_objective
from regmix.errors import ConfigError, LossTableError, RegmixError

TARGETS = ("x", "y", "z")


def test_objectives_agree_with_their_definition() -> None:
    losses = np.array([[1.0, 2.0, 6.0]])
    values = {
        "mean": 3.0,
        "worst": 6.0,
        "x=1,z=3": 4.75,
        "x,y": 1.5,
        "z": 6.0,
    }
    for text, value in values.items():
        assert make_objective(parse_objective(text), TARGETS).of_all(losses)[0] == value
    assert make_objective(1, TARGETS).of_all(losses)[0] == 2.0


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        ("xx", LossTableError, "unknown target 'xx'"),
        ({"x": -1.0}, ConfigError, "weight -1"),
        ({"x": 0.0}, ConfigError, "no target"),
        ([], ConfigError, "no target"),
        (["x", "x"], ConfigError, "once"),
        (7, ConfigError, "no target number 7"),
        ({"x": 1e308, "y": 1e308}, ConfigError, r"weight 1e\+308 of target 'x'"),
    ],
)
def test_objective_that_is_none_is_refused(
    objective: Any, error: type[RegmixError], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_objective(objective, TARGETS)


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ("mean", "mean"),
        (["x", "y", "z"], "mean"),
        ({"x": 1 / 3, "y": 1 / 3, "z": 1 / 3}, "mean"),
        ({"x": 2, "y": 2, "z": 2}, "mean"),
        ({"x": 0.5, "z": 0.5}, "mean of x, z"),
        ({"x": 0.5, "y": 0.25, "z": 0.25}, "x=0.5,y=0.25,z=0.25"),
        ({"x": 1.0, "y": 0.0}, "x"),
        ("worst", "worst"),
        (2, "z"),
    ],
)
def test_objective_is_named_by_what_it_is(objective: Any, name: str) -> None:
    assert make_objective(objective, TARGETS).name == name


def test_mean_of_all_is_the_same_objective_however_it_is_said() -> None:
    losses = np.random.default_rng(0).random((5, 3))
    said = make_objective({"z": 2, "x": 2, "y": 2}, TARGETS)
    assert np.allclose(said.of_all(losses), make_objective("mean", TARGETS).of_all(losses))
