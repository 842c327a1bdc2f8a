"""Stacked products have the bits of single ones, and add in float32."""

from __future__ import annotations

import pytest
import torch
from regmix_kernels.products import matmul


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 32, 64), (5, 123, 7)])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_a_proxy_gets_the_same_bits_in_any_stack(
    dtype: torch.dtype, size: tuple[int, int, int], out_dtype: torch.dtype | None
) -> None:
    m, k, n = size
    a, b = normal(3, m, k, seed=0, dtype=dtype), normal(3, n, k, seed=1, dtype=dtype)
    b = b.transpose(1, 2)
    out = None if out_dtype is None else torch.full((3, m, n), float("nan"), dtype=out_dtype)
    together = matmul(a, b, out=out)
    for row in range(3):
        single = None if out_dtype is None else torch.empty(1, m, n, dtype=out_dtype)
        alone = matmul(a[row : row + 1], b[row : row + 1], out=single)
        assert torch.equal(together[row], alone[0])
    expected = a.double() @ b.double()
    torch.testing.assert_close(together.double(), expected, rtol=2e-2, atol=1e-1)


def test_a_float32_result_is_not_rounded_on_the_way() -> None:
    a, b = (normal(2, 40, 40, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    out = torch.ones(2, 40, 40)
    matmul(a, b, out=out, accumulate=True)
    torch.testing.assert_close(out.double(), 1 + a.double() @ b.double(), rtol=0, atol=1e-4)


def test_results_may_be_views_into_a_flat_buffer() -> None:
    flat = torch.zeros(2, 100)
    view = flat[:, 10:74].view(2, 8, 8)
    a, b = normal(2, 8, 16, seed=0), normal(2, 16, 8, seed=1)
    matmul(a, b, out=view, accumulate=True)
    torch.testing.assert_close(view, a @ b)
    assert not flat[:, :10].any()
    assert not flat[:, 74:].any()


def test_adding_without_a_result_is_refused() -> None:
    with pytest.raises(ValueError, match="out"):
        matmul(torch.ones(1, 2, 2), torch.ones(1, 2, 2), accumulate=True)
