"""What the tests of kernels share: numbers to put in, the tolerance table, and stacks.

Enters: results of a kernel and of the float64 reference. Leaves: an assertion that names the worst
elements. Imports torch only; nothing here starts an interpreter.
"""

from __future__ import annotations

import torch
import torch.utils.deterministic
from torch import Tensor

POISON = float("nan")

# Largest error of an element over the largest element of the reference. The sums are all in
# float32, so what counts is the rounding of inputs and outputs, not of the sums.
TOLERANCE = {
    # A few units of 2^-24: sums of up to 300 terms, and exponentials to 2 units.
    torch.float32: 2e-6,
    # Half a unit of 2^-10 when the result is stored, and as much when a sum of two is stored first.
    torch.float16: 1e-3,
}


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator).to(dtype)


def poisoned(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory that must be written before it is read."""
    return torch.full(size, POISON, dtype=dtype)


def poison_new_memory() -> None:
    """Fill what torch.empty and its like return with NaN from now on, in this process."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def strided(x: Tensor, room: int = 7) -> Tensor:
    """Return a copy of [P, ...] in which proxies lie `room` numbers further apart than needed."""
    flat = torch.full((x.shape[0], x[0].numel() + room), POISON, dtype=x.dtype)
    view = flat[:, : x[0].numel()].view(x.shape)
    return view.copy_(x)


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, what: str) -> None:
    """Fail, with the five worst elements, where `got` is too far from `wanted`."""
    assert got.shape == wanted.shape, (what, got.shape, wanted.shape)
    error = (got.double() - wanted.double()).abs()
    scale = wanted.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = torch.where(error.isfinite(), error / scale, torch.inf).flatten()
    worst = error.topk(min(5, error.numel())).indices.tolist()
    lines = [f"{got.flatten()[i]:.8g} for {wanted.flatten()[i]:.8g} at {i}" for i in worst]
    assert error.max() <= TOLERANCE[dtype], f"{what}, {dtype}: {error.max():.3g}; {lines}"


def assert_same_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    """Fail where two tensors differ in any bit; NaN equals NaN."""
    same = torch.equal(got.nan_to_num(12345.0), wanted.nan_to_num(12345.0))
    assert torch.equal(got.isnan(), wanted.isnan()), what
    assert same, what
