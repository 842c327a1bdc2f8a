"""Attention's kernels against the float64 references, and each proxy of a stack by itself.

The checks run in Triton's interpreter, in processes of their own (`interpreted`); float16 stands
for bfloat16, whose products the interpreter gets wrong. float16 takes the tiles that a Hopper GPU
takes, float32 the small ones, so more of them.
"""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import run_interpreted
from regmix_kernels import launches, reference
from torch import Tensor

BASE = 10000.0
NAMES = ("float32", "float16")

# Relative Frobenius error of a part, and the largest error of the log-sum-exp in bits; each is two
# to four times what was seen. float32 sums a few hundred products (6e-8 each). float16 rounds
# weights and outputs (up to 5e-4 each), and in the backward also the scores' gradients.
LIMITS = {
    "float32": {"out": 1e-6, "lse": 1e-5, "gradient": 3e-6},
    "float16": {"out": 5e-4, "lse": 1e-5, "gradient": 1e-3},
}
# Scores near 100 have errors near 1e-5, and so have their weights; where one weight is nearly 1,
# its score's gradient is a difference of nearly equal numbers.
LARGE_LIMITS = {"out": 5e-6, "lse": 3e-5, "gradient": 1e-5}


def normal(*size: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(dtype)


def by_head(x_PNC: Tensor, num_heads: int, seq_len: int) -> Tensor:
    """Return [P, N, H R] as [P, sequences, H, T, R]."""
    num_proxies, num_tokens, channels = x_PNC.shape
    x = x_PNC.view(num_proxies, num_tokens // seq_len, seq_len, num_heads, channels // num_heads)
    return x.transpose(2, 3)


def by_token(x: Tensor) -> Tensor:
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def rotated(qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int) -> Tensor:
    heads = by_head(qkv_PNC, num_heads + 2 * num_kv_heads, seq_len)
    qk, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
    return by_token(torch.cat((reference.rope(qk, BASE), v), dim=2))


def attended(
    qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Return the reference's outputs and log-sum-exp in bits, from rotated QKV."""
    heads = by_head(qkv_PNC, num_heads + 2 * num_kv_heads, seq_len)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    lse = scores.masked_fill(future, float("-inf")).logsumexp(-1) / math.log(2)
    return by_token(reference.causal_attention(q, k, v)), lse.transpose(1, 2).flatten(2)


def require_close(name: str, got: Tensor, expected: Tensor, limit: float) -> None:
    # A single token has no gradient of q and k: numbers under 0.1 count as absolute errors.
    error = (got.double() - expected).norm() / max(expected.norm(), 0.1 * expected.numel() ** 0.5)
    assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.0e}"


def compare(
    name: str,
    num_proxies: int,
    num_sequences: int,
    seq_len: int,
    heads: tuple[int, int],
    head_dim: int,
    gain: float = 1.0,
    limits: dict[str, float] | None = None,
) -> None:
    """Compare forward and backward on random QKV, queries and keys multiplied by `gain`."""
    from regmix_kernels import attention

    limits = LIMITS[name] if limits is None else limits
    dtype = getattr(torch, name)
    num_heads, num_kv_heads = heads
    size = (num_proxies, num_sequences * seq_len)
    qkv = normal(*size, (num_heads + 2 * num_kv_heads) * head_dim, seed=0, dtype=dtype)
    qkv[..., : (num_heads + num_kv_heads) * head_dim] *= gain
    dout = normal(*size, num_heads * head_dim, seed=1, dtype=dtype)
    tables = attention.rope_tables(seq_len, head_dim, BASE, "cpu")
    out, lse = attention.forward(qkv, *heads, seq_len)
    dqkv = attention.backward(dout, qkv, out, lse, *tables, *heads, seq_len)
    assert out.dtype == dqkv.dtype == dtype
    assert lse.dtype == torch.float32

    exact = qkv.double().requires_grad_()
    exact_out, exact_lse = attended(exact, *heads, seq_len)
    (drotated,) = torch.autograd.grad(exact_out, exact, dout.double())
    before = torch.zeros_like(exact).requires_grad_()
    (expected,) = torch.autograd.grad(rotated(before, *heads, seq_len), before, drotated)
    label = f"{name} P{num_proxies} {num_sequences}x{seq_len} {heads} R{head_dim}"
    require_close(f"out {label}", out, exact_out.detach(), limits["out"])
    error = (lse.double() - exact_lse.detach()).abs().max()
    assert error <= limits["lse"], f"lse {label}: {error:.2e} bits"
    widths = [n * head_dim for n in (num_heads, num_kv_heads, num_kv_heads)]
    for part, got, wanted in zip(
        ("dq", "dk", "dv"), dqkv.split(widths, -1), expected.split(widths, -1), strict=True
    ):
        require_close(f"{part} {label}", got, wanted, limits["gradient"])


def poison() -> None:
    """Make torch fill new memory with NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()


def both(check: str) -> None:
    """Run one check with each type: importing torch takes longer than most checks."""
    poison()
    for name in NAMES:
        globals()[check](name)


def check_rotation(name: str) -> None:
    from regmix_kernels import attention

    dtype = getattr(torch, name)
    for heads, head_dim, seq_len in (((3, 1), 16, 37), ((2, 2), 96, 5)):
        qkv = normal(2, 2 * seq_len, (heads[0] + 2 * heads[1]) * head_dim, seed=0, dtype=dtype)
        expected = rotated(qkv.double(), *heads, seq_len)
        v_width = heads[1] * head_dim
        values = qkv[..., -v_width:].clone()
        attention.rotate_(qkv, *attention.rope_tables(seq_len, head_dim, BASE, "cpu"), *heads)
        require_close("rotated", qkv, expected, {"float32": 1e-7, "float16": 5e-4}[name])
        assert torch.equal(qkv[..., -v_width:], values)


def test_rotation_equals_the_reference_and_leaves_values() -> None:
    run_interpreted(both, "check_rotation")


def check_head_sizes(name: str) -> None:
    for head_dim in (16, 32, 64, 96, 128):
        compare(name, 1, 1, 70 if name == "float16" else 40, (1, 1), head_dim)


def test_every_head_size_equals_the_reference() -> None:
    run_interpreted(both, "check_head_sizes")


def check_awkward_shapes(name: str) -> None:
    for num_sequences, seq_len, heads in (
        (2, 37, (4, 2)),
        (3, 1, (2, 1)),
        (1, 7, (3, 3)),
        (2, 64, (2, 1)),
        (1, 300 if name == "float16" else 100, (1, 1)),
    ):
        compare(name, 2, num_sequences, seq_len, heads, 16)
    compare(name, 1, 1, 9, (1, 1), 10)


def test_tails_groups_and_several_sequences_equal_the_reference() -> None:
    run_interpreted(both, "check_awkward_shapes")


def check_ampere() -> None:
    poison()
    launches.capability = lambda device: launches.AMPERE  # type: ignore[assignment]
    for head_dim in (32, 64, 96):
        compare("float16", 1, 1, 150, (1, 1), head_dim)


def test_the_tiles_of_an_a100_equal_the_reference() -> None:
    run_interpreted(check_ampere)


def check_large_scores() -> None:
    # A gain of 5 multiplies scores of standard deviation 1 by 25.
    qkv = 5.0 * normal(1, 140, 4 * 32, seed=0, dtype=torch.float32)
    _, lse = attended(qkv, 2, 1, 70)
    assert lse.max() * math.log(2) > 90
    compare("float32", 1, 2, 70, (2, 1), 32, gain=5.0, limits=LARGE_LIMITS)


def check_whole() -> None:
    from regmix_kernels import attention

    poison()
    heads, head_dim, seq_len = (2, 1), 32, 45
    qkv = normal(2, 2 * seq_len, 4 * head_dim, seed=0, dtype=torch.float32)
    dout = normal(2, 2 * seq_len, 2 * head_dim, seed=1, dtype=torch.float32)
    exact = qkv.double().requires_grad_()
    expected, _ = attended(rotated(exact, *heads, seq_len), *heads, seq_len)
    (gradient,) = torch.autograd.grad(expected, exact, dout.double())
    tables = attention.rope_tables(seq_len, head_dim, BASE, "cpu")
    attention.rotate_(qkv, *tables, *heads)
    out, lse = attention.forward(qkv, *heads, seq_len)
    dqkv = attention.backward(dout, qkv, out, lse, *tables, *heads, seq_len)
    require_close("out", out, expected.detach(), LIMITS["float32"]["out"])
    require_close("dqkv", dqkv, gradient, LIMITS["float32"]["gradient"])


def check_float32() -> None:
    check_whole()
    check_large_scores()


def test_gradients_pass_the_rotation_and_scores_near_100_stay_exact() -> None:
    run_interpreted(check_float32)


def run(qkv: Tensor, dout: Tensor, seq_len: int, head_dim: int) -> tuple[Tensor, ...]:
    from regmix_kernels import attention

    tables = attention.rope_tables(seq_len, head_dim, BASE, "cpu")
    out, lse = attention.forward(qkv, 2, 1, seq_len)
    return out, lse, attention.backward(dout, qkv, out, lse, *tables, 2, 1, seq_len)


def check_stack(name: str) -> None:
    dtype, seq_len, head_dim = getattr(torch, name), 37, 16
    qkv = normal(3, 2 * seq_len, 4 * head_dim, seed=0, dtype=dtype)
    dout = normal(3, 2 * seq_len, 2 * head_dim, seed=1, dtype=dtype)
    together = run(qkv, dout, seq_len, head_dim)
    for row in range(3):
        alone = run(qkv[row : row + 1].clone(), dout[row : row + 1].clone(), seq_len, head_dim)
        for stacked, single in zip(together, alone, strict=True):
            assert torch.equal(stacked[row], single[0])
    qkv[1, 40:] = float("nan")
    dout[1, 3] = float("inf")
    for planted, clean in zip(run(qkv, dout, seq_len, head_dim), together, strict=True):
        assert planted[1].isnan().any()
        assert torch.equal(planted[0::2], clean[0::2])


def test_a_proxy_has_the_same_bits_in_any_stack_and_beside_nan() -> None:
    run_interpreted(both, "check_stack")


def check_future(name: str) -> None:
    dtype, seq_len, head_dim, changed = getattr(torch, name), 70, 16, 41
    qkv = normal(1, 2 * seq_len, 4 * head_dim, seed=0, dtype=dtype)
    dout = normal(1, 2 * seq_len, 2 * head_dim, seed=1, dtype=dtype)
    dout[:, changed:seq_len] = 0.0
    out, lse, dqkv = run(qkv, dout, seq_len, head_dim)
    # No later token is blamed for an earlier output; then none changes one.
    assert not dqkv[:, changed:seq_len].any()
    assert dqkv[:, :changed].any(dim=-1).all()
    qkv[:, changed:seq_len] *= -3.0
    later = run(qkv, dout, seq_len, head_dim)
    for rows in (slice(0, changed), slice(seq_len, None)):
        assert torch.equal(later[0][:, rows], out[:, rows])
        assert torch.equal(later[1][..., rows], lse[..., rows])
        assert torch.equal(later[2][:, rows], dqkv[:, rows])
    assert not torch.equal(later[0], out)


def test_later_tokens_and_other_sequences_change_nothing() -> None:
    run_interpreted(both, "check_future")


def test_a_head_size_without_tiles_is_refused() -> None:
    for head_dim in (130, 15):
        with pytest.raises(ValueError, match=f"not {head_dim}"):
            launches.attention(head_dim, launches.HOPPER, 2)
