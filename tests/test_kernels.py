"""The references are right: against torch's own operations, and by gradcheck in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from regmix_kernels import reference
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional


def double(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()


LABELS = torch.tensor([0, 6, 6, 2, 1])

GRADIENTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "rmsnorm": (lambda x, w: reference.rmsnorm(x, w, 1e-5), (double(5, 3), double(3, seed=1))),
    "rope": (lambda x: reference.rope(x, 10000.0), (double(2, 5, 6),)),
    "causal_attention": (
        reference.causal_attention,
        (double(2, 5, 3), double(2, 5, 3, seed=1), double(2, 5, 3, seed=2)),
    ),
    "swiglu": (reference.swiglu, (double(5, 3), double(5, 3, seed=1))),
    "linear_cross_entropy": (
        lambda e, c: reference.linear_cross_entropy(e, c, LABELS),
        (double(5, 3), double(7, 3, seed=1)),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_reference_gradient_is_the_derivative(name: str) -> None:
    function, arguments = GRADIENTS[name]
    assert gradcheck(function, arguments)


def test_rmsnorm_equals_torch() -> None:
    x, weight = double(5, 123), double(123, seed=1)
    expected = functional.rms_norm(x, (123,), weight, 1e-5)
    torch.testing.assert_close(reference.rmsnorm(x, weight, 1e-5), expected)


def test_causal_attention_equals_torch() -> None:
    q, k, v = (double(2, 3, 19, 10, seed=seed) for seed in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference.causal_attention(q, k, v), expected)


def test_causal_attention_sees_no_future() -> None:
    q, k, v = (double(1, 9, 4, seed=seed).detach() for seed in range(3))
    before = reference.causal_attention(q, k, v)
    k[:, 5:] += 1.0
    v[:, 5:] -= 1.0
    after = reference.causal_attention(q, k, v)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_rope_scores_depend_on_distance_only() -> None:
    q, k = double(1, 6).detach(), double(1, 6, seed=1).detach()
    rotated_q, rotated_k = (reference.rope(x.expand(12, 6), 100.0) for x in (q, k))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3])
    torch.testing.assert_close(rotated_q[0], q[0])


def test_swiglu_equals_torch() -> None:
    gate, up = double(5, 123), double(5, 123, seed=1)
    torch.testing.assert_close(reference.swiglu(gate, up), functional.silu(gate) * up)


def test_linear_cross_entropy_equals_torch() -> None:
    e, head = double(5, 11), double(7, 11, seed=1)
    expected = functional.cross_entropy(e @ head.T, LABELS, reduction="none")
    torch.testing.assert_close(reference.linear_cross_entropy(e, head, LABELS), expected)


def test_embedding_grad_equals_autograd() -> None:
    table, dx = double(7, 3), double(5, 3, seed=1).detach()
    functional.embedding(LABELS, table).backward(dx)
    torch.testing.assert_close(reference.embedding_grad(dx, LABELS, 7), table.grad)


def test_adamw_equals_torch() -> None:
    param = torch.nn.Parameter(double(5, 3).detach())
    ours = param.detach().clone()
    mean = square = torch.zeros_like(ours)
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([param], **settings)
    for count in range(1, 6):
        param.grad = double(5, 3, seed=count).detach()
        optimizer.step()
        ours, mean, square = reference.adamw(ours, param.grad, mean, square, count, **settings)
        torch.testing.assert_close(ours, param.detach())


def test_clip_scale_limits_the_norm() -> None:
    assert reference.clip_scale(4.0, 1.0) == 0.25
    assert reference.clip_scale(0.5, 1.0) == 1.0
    assert reference.clip_scale(0.0, 1.0) == 1.0
