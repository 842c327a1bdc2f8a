"""Each proxy's losses added up, in an order that no other proxy changes.

Enters: float32 values [P, N]. Leaves: float64 sums [P], added to. A reduction of the library splits
its work by the number of rows, so its rounding depends on it; here one program adds one row.

P proxies, N values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels.compilation import Case

_BLOCK = 1024


@triton.jit
def sum_kernel(values, sums, num_values, stride, BLOCK: tl.constexpr):
    proxy = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_values, BLOCK):
        inside = start + places < num_values
        total += tl.load(values + proxy * stride + start + places, inside, 0.0).to(tl.float64)
    tl.store(sums + proxy, tl.load(sums + proxy) + tl.sum(total))


def add_row_sums(values_PN: Tensor, sums_P: Tensor) -> None:
    """Add each row of `values_PN` (float32, contiguous rows) to `sums_P` (float64)."""
    num_proxies, num_values = values_PN.shape
    sum_kernel[(num_proxies,)](values_PN, sums_P, num_values, values_PN.stride(0), BLOCK=_BLOCK)


def cases(capability: int) -> list[Case]:
    """Return the kernel for ahead-of-time compilation."""
    signature = {"values": "*fp32", "sums": "*fp64", "num_values": "i32", "stride": "i32:16"}
    return [
        Case(
            name="row_sums",
            kernel=sum_kernel,
            signature=signature,
            constants={"BLOCK": _BLOCK},
        )
    ]
