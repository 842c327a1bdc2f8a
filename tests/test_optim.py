"""AdamW of a stack is AdamW of each proxy, and a failed proxy stands still."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from regmix_kernels import reference
from torch import Tensor

from regmix.errors import ConfigError, ModelError
from regmix.model.optim import OptimConfig, StackedAdamW


def stack(num_proxies: int, seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"embedding": (123, 5), "norm": (5,), "head": (7, 5)}
    return {
        name: torch.randn(num_proxies, *size, generator=generator) * scale
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_each_proxy_equals_torch_adamw_with_clip(scale: float) -> None:
    params = stack(3)
    singles = [[torch.nn.Parameter(v[row].clone()) for v in params.values()] for row in range(3)]
    optimizers = [
        torch.optim.AdamW(s, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1) for s in singles
    ]
    ours = StackedAdamW(params, OptimConfig(lr=0.01, warmup_steps=0))
    for step in range(5):
        grads = stack(3, seed=step + 1, scale=scale)
        for row, (single, optimizer) in enumerate(zip(singles, optimizers, strict=True)):
            for param, grad in zip(single, grads.values(), strict=True):
                param.grad = grad[row].clone()
            expected = torch.nn.utils.clip_grad_norm_(single, 1.0)
            optimizer.step()
            if row == 0:
                first = expected
        norms = ours.step(grads, step)
        torch.testing.assert_close(norms[0], first)
    for row, single in enumerate(singles):
        for param, value in zip(single, params.values(), strict=True):
            torch.testing.assert_close(value[row], param.detach(), rtol=1e-5, atol=1e-6)


def test_update_equals_the_float64_reference() -> None:
    params = {name: value.double() for name, value in stack(1).items()}
    grads = {name: value.double() for name, value in stack(1, seed=1).items()}
    config = OptimConfig(lr=0.1, warmup_steps=0, clip_norm=0.5)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    scale = reference.clip_scale(norm, 0.5)
    zeros = {name: torch.zeros_like(value) for name, value in params.items()}
    expected = {
        name: reference.adamw(
            params[name], grads[name] * scale, zeros[name], zeros[name], 1,
            lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        )[0]
        for name in params
    }  # fmt: skip
    StackedAdamW(params, config).step(grads, 0)
    for name, value in params.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)


def test_stack_equals_single_proxies_bit_for_bit() -> None:
    params = stack(3)
    single = {name: value[1:2].clone() for name, value in params.items()}
    stacked, alone = (StackedAdamW(p, OptimConfig(warmup_steps=2)) for p in (params, single))
    for step in range(5):
        grads = stack(3, seed=step + 1)
        own = {name: value[1:2].clone() for name, value in grads.items()}
        assert torch.equal(stacked.step(grads, step)[1:2], alone.step(own, step))
    assert all(torch.equal(params[name][1:2], single[name]) for name in params)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_failed_proxy_is_frozen_for_good_and_neighbours_go_on(value: float) -> None:
    params, healthy = stack(3), stack(3)
    ours, other = (StackedAdamW(p, OptimConfig()) for p in (params, healthy))
    ours.step(stack(3, seed=1), 0)
    other.step(stack(3, seed=1), 0)
    frozen = {name: tensor[1].clone() for name, tensor in params.items()}
    state = {name: tensor[1].clone() for name, tensor in ours.state_tensors().items()}
    for step in (1, 2):
        grads = stack(3, seed=step + 1)
        other.step({name: grad.clone() for name, grad in grads.items()}, step)
        if step == 1:
            grads["head"][1, 3, 3] = value
        norms = ours.step(grads, step)
        assert math.isfinite(norms[1]) == (step == 2)
    assert ours.failed.tolist() == [False, True, False]
    assert all(torch.equal(params[name][1], frozen[name]) for name in params)
    after = {name: tensor[1] for name, tensor in ours.state_tensors().items()}
    assert all(torch.equal(after[name], state[name]) for name in state if name != "failed")
    for row in (0, 2):
        assert all(torch.equal(params[name][row], healthy[name][row]) for name in params)


def test_state_resumes_bit_for_bit() -> None:
    params = stack(2)
    ours = StackedAdamW(params, OptimConfig())
    for step in range(3):
        ours.step(stack(2, seed=step + 1), step)
    copied = {name: value.clone() for name, value in params.items()}
    resumed = StackedAdamW(copied, OptimConfig())
    resumed.load({name: value.clone() for name, value in ours.state_tensors().items()})
    for step in range(3, 6):
        ours.step(stack(2, seed=step + 1), step)
        resumed.step(stack(2, seed=step + 1), step)
    assert all(torch.equal(params[name], copied[name]) for name in params)


def test_state_of_another_stack_is_refused() -> None:
    ours = StackedAdamW(stack(2), OptimConfig())
    with pytest.raises(ModelError, match="number of proxies"):
        ours.load(StackedAdamW(stack(3), OptimConfig()).state_tensors())


def test_state_with_a_missing_tensor_is_refused() -> None:
    ours = StackedAdamW(stack(2), OptimConfig())
    state = ours.state_tensors()
    del state["mean.head"]
    with pytest.raises(ModelError, match=r"mean\.head"):
        ours.load(state)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ModelError, match="No parameters"):
        StackedAdamW({}, OptimConfig())


def test_schedules_warm_up_hold_and_decay() -> None:
    constant = OptimConfig(lr=1.0, warmup_steps=4)
    assert [constant.lr_at(step) for step in (0, 1, 3, 4, 999)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = OptimConfig(lr=1.0, warmup_steps=0, schedule="cosine", total_steps=100)
    assert cosine.lr_at(0) == 1.0
    assert cosine.lr_at(50) == pytest.approx(0.55)
    assert cosine.lr_at(100) == pytest.approx(0.1)
    wsd = OptimConfig(lr=1.0, warmup_steps=0, schedule="wsd", total_steps=100, min_lr_ratio=0.0)
    assert wsd.lr_at(79) == 1.0
    assert wsd.lr_at(90) == pytest.approx(0.5)
    assert wsd.lr_at(100) == 0.0


BAD: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": float("nan")},
    {"eps": -1.0},
    {"warmup_steps": -1},
    {"betas": (0.9,)},
    {"betas": (0.9, 1.0)},
    {"weight_decay": -0.1},
    {"clip_norm": 0.0},
    {"schedule": "linear"},
    {"total_steps": 0},
    {"min_lr_ratio": 1.5},
    {"decay_fraction": 0.0},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: str(bad))
def test_bad_setting_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OptimConfig(**bad)


def test_decaying_schedule_needs_its_length() -> None:
    with pytest.raises(ConfigError, match="total_steps"):
        OptimConfig(schedule="cosine")
