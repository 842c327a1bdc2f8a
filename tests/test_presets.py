"""Shapes count what they should and refuse what cannot be built."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from regmix.errors import ModelError
from regmix.model.presets import PRESETS, ModelShape, make_shape

FINE: dict[str, Any] = {
    "num_layers": 2,
    "width": 64,
    "num_heads": 4,
    "hidden": 128,
    "vocab_size": 100,
    "seq_len": 16,
}


def test_published_proxy_has_its_published_size() -> None:
    shape = make_shape("1m")
    assert round(shape.num_body_parameters / 1e6, 2) == 1.31
    assert round(shape.num_parameters / 1e6, 1) == 27.1
    assert shape.head_dim == 32
    assert round(shape.flops_per_token() / 1e6, 1) == 91.6


def test_every_preset_is_in_multiples_of_16() -> None:
    for shape in PRESETS.values():
        assert all(size % 16 == 0 for size in (shape.width, shape.hidden, shape.head_dim))


def test_parameters_counted_are_parameters_made() -> None:
    from regmix.model.llama import parameter_shapes

    for changes in ({}, {"tied": True}, {"num_kv_heads": 2}):
        shape = ModelShape(**(FINE | changes))
        made = sum(_numel(size) for size in parameter_shapes(shape).values())
        assert made == shape.num_parameters


def _numel(size: tuple[int, ...]) -> int:
    total = 1
    for length in size:
        total *= length
    return total


def test_tied_saves_one_table() -> None:
    shape = ModelShape(**FINE)
    tied = dataclasses.replace(shape, tied=True)
    assert shape.num_parameters - tied.num_parameters == 100 * 64
    assert shape.flops_per_token(16) == tied.flops_per_token(16)


def test_longer_sequences_cost_more_per_token() -> None:
    shape = ModelShape(**FINE)
    assert shape.flops_per_token(32) - shape.flops_per_token(16) == 6 * 2 * 64 * 16


def test_make_shape_changes_only_what_is_given() -> None:
    shape = make_shape("cpu-64", vocab_size=512)
    assert shape.vocab_size == 512
    assert shape.seq_len == PRESETS["cpu-64"].seq_len
    assert make_shape("cpu-64", seq_len=64).seq_len == 64


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"'cpu64'.*did you mean 'cpu-64'"):
        make_shape("cpu64")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 0),
        ("width", 60),
        ("num_heads", 5),
        ("hidden", 0),
        ("vocab_size", 0),
        ("seq_len", 0),
        ("rope_base", 1.0),
        ("norm_eps", 0.0),
        ("num_kv_heads", 3),
    ],
)
def test_bad_shape_names_the_field(name: str, value: float) -> None:
    with pytest.raises(ModelError, match=name if name != "num_heads" else "width"):
        ModelShape(**(FINE | {name: value}))


def test_7b_is_llama_2_but_for_its_vocabulary() -> None:
    assert make_shape("7b", vocab_size=32000).num_parameters == 6_738_415_616
