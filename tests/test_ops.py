"""Every fast operation against its float64 reference, forward and backward, at odd sizes too."""

from __future__ import annotations

import pytest
import torch
from regmix_kernels import reference
from torch import Tensor

from regmix.model import ops

# Relative Frobenius error allowed, by the dtype of the fast version. float32 rounds at 6e-8; the
# longest sums here (a few hundred terms) lose one decimal digit. float64 shows that the formula
# is the same.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator) * scale


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual.double() - expected).norm() / expected.norm())
    assert error <= TOLERANCE[actual.dtype], f"{what}: relative error {error:.2e}"


def poisoned(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.full(size, float("nan"), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("size", [(1, 16, 32), (3, 5, 123)])
def test_normalize_meets_rmsnorm(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy, dx_before = (normal(*size, seed=seed) for seed in range(3))
    leaf = x.mT.clone().requires_grad_()
    expected = reference.rmsnorm(leaf, torch.ones(size[1], dtype=torch.float64), 1e-5)
    expected.backward(dy.mT)
    out, scratch = poisoned(*size, dtype=dtype), poisoned(*size, dtype=dtype)
    rstd = poisoned(size[0], 1, size[2], dtype=dtype)
    ops.normalize(x.to(dtype), out, rstd, 1e-5)
    dx = dx_before.to(dtype, copy=True)
    ops.normalize_backward(dy.to(dtype), out, rstd, dx, scratch)
    assert leaf.grad is not None
    assert_near(out, expected.detach().mT, "forward")
    assert_near(dx, dx_before + leaf.grad.mT, "backward, added to what was there")


@DTYPES
@pytest.mark.parametrize("size", [(2, 16, 32), (3, 10, 19)])
def test_rotate_meets_rope(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x, dy = normal(*size), normal(*size, seed=1)
    leaf = x.mT.clone().requires_grad_()
    expected = reference.rope(leaf, 10000.0)
    expected.backward(dy.mT)
    cos, sin = ops.rope_tables(size[2], size[1], 10000.0, x.to(dtype))
    out, dx = poisoned(*size, dtype=dtype), poisoned(*size, dtype=dtype)
    ops.rotate(x.to(dtype), cos, sin, out)
    ops.rotate(dy.to(dtype), cos, sin, dx, backward=True)
    assert leaf.grad is not None
    assert_near(out, expected.detach().mT, "forward")
    assert_near(dx, leaf.grad.mT, "backward")


def attention(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return out, dq, dk, dv of the fast version; everything [B, G, H, R, T]."""
    batch, group, heads, _, seq_len = q.shape
    weights = poisoned(batch, group, heads, seq_len, seq_len, dtype=dtype)
    inverse = poisoned(batch, group, heads, 1, seq_len, dtype=dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    state = ops.AttentionState(q, k, v, weights, inverse, torch.full_like(q, float("nan")))
    results = [torch.full_like(q, float("nan")) for _ in range(4)]
    ops.attend(state, ops.causal_mask(seq_len, q), results[0])
    ops.attend_backward(state, dout.to(dtype), *results[1:], ops.Workspace())
    return results


def attention_reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.mT.clone().requires_grad_() for x in (q, k, v)]
    out = reference.causal_attention(*leaves)
    out.backward(dout.mT)
    return [x.mT for x in (out.detach(), *(leaf.grad for leaf in leaves)) if x is not None]


@DTYPES
@pytest.mark.parametrize("size", [(2, 2, 2, 16, 32), (3, 1, 3, 5, 19), (1, 1, 1, 2, 1)])
def test_attend_meets_causal_attention(size: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [normal(*size, seed=seed) for seed in range(4)]
    results = attention(*inputs, dtype)
    for actual, expected, what in zip(
        results, attention_reference(*inputs), ("out", "dq", "dk", "dv"), strict=True
    ):
        if float(expected.norm()) > 0:
            assert_near(actual, expected, what)


@pytest.mark.parametrize("sign", [1, -1], ids=["overflow", "underflow"])
def test_attend_is_exact_where_plain_exponentials_are_not(sign: int) -> None:
    q, k, v, dout = (normal(1, 3, 2, 4, 8, seed=seed) for seed in range(4))
    calm = attention(q, k, v, dout, torch.float64)
    # One direction shared by all keys shifts every score of proxy 1 by the same 400.
    q[:, 1, :, 0], k[:, 1, :, 0] = 20.0, 40.0 * sign
    results = attention(q, k, v, dout, torch.float64)
    for actual, expected in zip(results, attention_reference(q, k, v, dout), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for actual, before in zip(results, calm, strict=True):
        assert torch.equal(actual[:, [0, 2]], before[:, [0, 2]])


def test_attend_parts_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [normal(5, 1, 2, 4, 8, seed=seed) for seed in range(4)]
    whole = attention(*inputs, torch.float64)
    monkeypatch.setattr(ops, "_SCORE_FLOATS", 2 * 2 * 8 * 8)
    for actual, expected in zip(attention(*inputs, torch.float64), whole, strict=True):
        torch.testing.assert_close(actual, expected)


@DTYPES
@pytest.mark.parametrize("size", [(2, 16, 32), (3, 5, 19)])
def test_swiglu_meets_swiglu(size: tuple[int, ...], dtype: torch.dtype) -> None:
    group, hidden, tokens = size
    gate_up, dout = normal(group, 2 * hidden, tokens), normal(*size, seed=1)
    leaf = gate_up.clone().requires_grad_()
    expected = reference.swiglu(*leaf.chunk(2, dim=1))
    expected.backward(dout)
    silu, out = poisoned(*size, dtype=dtype), poisoned(*size, dtype=dtype)
    dgate_up = poisoned(group, 2 * hidden, tokens, dtype=dtype)
    ops.swiglu(gate_up.to(dtype), silu, out)
    ops.swiglu_backward(dout.to(dtype), gate_up.to(dtype), silu, dgate_up)
    assert leaf.grad is not None
    assert_near(out, expected.detach(), "forward")
    assert_near(dgate_up, leaf.grad, "backward")


def head(e: Tensor, table: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    de, dtable = torch.full_like(e, float("nan"), dtype=dtype), poisoned(*table.shape, dtype=dtype)
    spare = ops.Workspace()
    nats = ops.head_loss(e.to(dtype), table.to(dtype), labels, spare, de, dtable)
    loss_only = ops.head_loss(e.to(dtype), table.to(dtype), labels, spare)
    assert torch.equal(nats, loss_only)
    return [nats, de, dtable]


def head_reference(e: Tensor, table: Tensor, labels: Tensor) -> list[Tensor]:
    leaf_e, leaf_table = e.mT.clone().requires_grad_(), table.clone().requires_grad_()
    nats = reference.linear_cross_entropy(leaf_e, leaf_table, labels)
    nats.mean().backward()
    assert leaf_e.grad is not None
    assert leaf_table.grad is not None
    return [nats.detach(), leaf_e.grad.mT, leaf_table.grad]


@DTYPES
@pytest.mark.parametrize("size", [(16, 64, 512), (5, 123, 77), (3, 300, 7)])
def test_head_loss_meets_linear_cross_entropy(
    size: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_LOGIT_FLOATS", 1 << 12)
    width, tokens, vocab_size = size
    e, table = normal(width, tokens), normal(vocab_size, width, seed=1)
    labels = torch.arange(tokens).square() % vocab_size
    labels[1] = labels[0]
    results = head(e, table, labels, dtype)
    for actual, expected, what in zip(
        results, head_reference(e, table, labels), ("nats", "de", "dhead"), strict=True
    ):
        assert_near(actual, expected, what)


@pytest.mark.parametrize("shift", [400.0, -400.0], ids=["overflow", "underflow"])
def test_head_loss_is_exact_where_plain_exponentials_are_not(shift: float) -> None:
    e, table = normal(4, 50), normal(40, 4, seed=1)
    e[0], table[:, 0] = 1.0, shift
    labels = torch.arange(50) % 40
    results = head(e, table, labels, torch.float64)
    for actual, expected in zip(results, head_reference(e, table, labels), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_workspace_keeps_a_buffer_until_its_shape_changes() -> None:
    space, like = ops.Workspace(), torch.zeros(1)
    first = space.get("x", (2, 3), like)
    assert space.get("x", (2, 3), like) is first
    assert space.get("x", (2, 4), like) is not first
    assert space.num_bytes == 32


def test_path_names_the_implementation() -> None:
    assert ops.path("cpu") == "torch-cpu"
