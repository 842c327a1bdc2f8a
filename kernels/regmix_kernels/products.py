"""Stacked matrix products by the library, with the bits of single ones.

Enters: [P, M, K] and [P, K, N], strided views included. Leaves: [P, M, N]; sums are in float32 and
can be added to a float32 result inside the product. A stack's products go to the library in one
call only where that call has been seen to give, bit for bit, what P calls give; otherwise, and
while a graph is captured before that was looked at, one proxy after the other.

P proxies, M rows, K summed, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What one call for the whole stack gave, by device, types, sizes and strides: the same bits or not.
_proven: dict[tuple[object, ...], bool] = {}


def matmul(
    a_PMK: Tensor, b_PKN: Tensor, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Return a @ b per proxy, [P, M, N], in `out` where it is given; add to it with `accumulate`.

    `out` has the dtype of `a`, or float32: then no product is rounded before it is stored or added.
    """
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs out")
        out = a_PMK.new_empty(a_PMK.shape[0], a_PMK.shape[1], b_PKN.shape[2])
    num_proxies = a_PMK.shape[0]
    if num_proxies > 1 and _is_proven(a_PMK, b_PKN, out, accumulate):
        _stacked(a_PMK, b_PKN, out, accumulate)
        return out
    for row in range(num_proxies):
        _single(a_PMK[row], b_PKN[row], out[row], accumulate)
    return out


def _single(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, accumulate: bool) -> None:
    if out_MN.dtype == a_MK.dtype:
        if accumulate:
            torch.addmm(out_MN, a_MK, b_KN, out=out_MN)
        else:
            torch.mm(a_MK, b_KN, out=out_MN)
    elif a_MK.device.type == "cuda":
        # beta = 0 does not read what lies in out, so it may be NaN.
        torch.ops.aten.addmm.dtype_out(
            out_MN, a_MK, b_KN, out_MN.dtype, beta=int(accumulate), alpha=1, out=out_MN
        )
    else:
        _single(a_MK.to(out_MN.dtype), b_KN.to(out_MN.dtype), out_MN, accumulate)


def _stacked(a_PMK: Tensor, b_PKN: Tensor, out_PMN: Tensor, accumulate: bool) -> None:
    if out_PMN.dtype == a_PMK.dtype:
        if accumulate:
            torch.baddbmm(out_PMN, a_PMK, b_PKN, out=out_PMN)
        else:
            torch.bmm(a_PMK, b_PKN, out=out_PMN)
    elif a_PMK.device.type == "cuda":
        torch.ops.aten.baddbmm.dtype_out(
            out_PMN, a_PMK, b_PKN, out_PMN.dtype, beta=int(accumulate), alpha=1, out=out_PMN
        )
    else:
        _stacked(a_PMK.to(out_PMN.dtype), b_PKN.to(out_PMN.dtype), out_PMN, accumulate)


def _is_proven(a_PMK: Tensor, b_PKN: Tensor, out_PMN: Tensor, accumulate: bool) -> bool:
    # bmm into a result that is strided over proxies goes through a copy of its own.
    if not out_PMN.is_contiguous():
        return False
    tensors = (a_PMK, b_PKN, out_PMN)
    places = [(x.device, x.dtype, tuple(x.shape), tuple(x.stride())) for x in tensors]
    key = (accumulate, torch.get_num_threads(), *places)
    known = _proven.get(key)
    if known is not None:
        return known
    if a_PMK.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    # Numbers of one scale, whatever lies in the operands now: zeros would prove nothing.
    generator = torch.Generator(device=a_PMK.device).manual_seed(0)
    a, b, start = (_like(x, generator) for x in tensors)
    together, apart = start.clone(), start.clone()
    _stacked(a, b, together, accumulate)
    for row in range(a.shape[0]):
        _single(a[row], b[row], apart[row], accumulate)
    _proven[key] = bool(torch.equal(together, apart))
    return _proven[key]


def _like(x: Tensor, generator: torch.Generator) -> Tensor:
    random = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    values = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return random.copy_(values)
