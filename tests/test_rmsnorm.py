"""RMSNorm with the residual addition: values and gradients against float64, edges, stacks."""

from __future__ import annotations

import torch
from interpreted import run_interpreted
from kernel_checks import assert_close, assert_same_bits, normal, poison_new_memory, strided
from regmix_kernels import reference
from torch import Tensor

DTYPES = (torch.float32, torch.float16)
SHAPES = ((5, 123, 123), (1, 1, 32), (2, 70, 768), (3, 33, 64))
EPS = 1e-5


def test_every_property_holds_in_the_interpreter() -> None:
    """One process for all, each named for its property: starting Triton takes seconds."""
    run_interpreted(everything)


def everything() -> None:
    poison_new_memory()
    normed_rows_and_stream_are_the_references()
    gradients_are_those_of_the_reference()
    a_stack_norms_like_single_proxies()


def normed_rows_and_stream_are_the_references() -> None:
    from regmix_kernels import rmsnorm

    for dtype in DTYPES:
        for shape in SHAPES:
            x, branch, weight = inputs(shape, dtype)
            for added in (None, branch):
                y, stream, rstd = rmsnorm.forward(x, weight, EPS, added)
                wanted = x if added is None else (x.float() + branch.float()).to(dtype)
                assert_same_bits(stream, wanted, f"stream {shape}")
                normed = reference.rmsnorm(wanted.double(), weight.double()[:, None], EPS)
                assert_close(y, normed, dtype, f"y {shape}")
                roots = (wanted.double().square().mean(dim=-1) + EPS).rsqrt()
                assert_close(rstd, roots, torch.float32, f"rstd {shape}")


def gradients_are_those_of_the_reference() -> None:
    from regmix_kernels import rmsnorm

    for dtype in DTYPES:
        for shape in SHAPES:
            x, past, weight = inputs(shape, dtype)
            dy = normal(*shape, seed=3, dtype=dtype)
            start = normal(shape[0], shape[2], seed=4)
            _, _, rstd = rmsnorm.forward(x, weight, EPS)
            wide_x, wide_weight = (v.double().requires_grad_() for v in (x, weight))
            y = reference.rmsnorm(wide_x, wide_weight[:, None], EPS)
            dx_wanted, dweight_wanted = torch.autograd.grad(y, (wide_x, wide_weight), dy.double())
            for residual in (None, past):
                dweight = strided(start)
                dx = rmsnorm.backward(dy, x, weight, rstd, dweight, residual)
                wanted = dx_wanted if residual is None else dx_wanted + past.double()
                assert_close(dx, wanted, dtype, f"dx {shape}")
                # Inputs are exact and sums float32, whatever the dtype of the rows.
                assert_close(dweight, start + dweight_wanted, torch.float32, f"dweight {shape}")


def a_stack_norms_like_single_proxies() -> None:
    from regmix_kernels import rmsnorm

    def both_ways(*given: Tensor) -> tuple[Tensor, ...]:
        x, branch, weight, dy = given
        y, stream, rstd = rmsnorm.forward(x, weight, EPS, branch)
        dweight = torch.ones(weight.shape)
        dx = rmsnorm.backward(dy, stream, weight, rstd, dweight, branch)
        return y, stream, rstd, dx, dweight

    for dtype in DTYPES:
        for num_rows, width in ((123, 123), (96, 64)):
            x, branch, weight = inputs((3, num_rows, width), dtype)
            x[1, 5, 7] = float("nan")
            dy = normal(3, num_rows, width, seed=3, dtype=dtype)
            together = both_ways(x, branch, weight, dy)
            assert all(value[1].isnan().any() for value in together)
            for p in (0, 2):
                given = (value[p : p + 1].clone() for value in (x, branch, weight, dy))
                for got, alone in zip(together, both_ways(*given), strict=True):
                    assert got[p].isfinite().all()
                    assert_same_bits(got[p], alone[0], f"proxy {p}")


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return x and a branch [P, N, D] of which one row is nearly 0, and weights [P, D]."""
    x, branch = (normal(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
    x[0, -1] *= 1e-3
    branch[0, -1] *= 1e-3
    return x, branch, strided((1 + 0.1 * normal(shape[0], shape[2], seed=2)).to(dtype))
