"""RMSNorm over stacked proxies, with the residual addition before it (arXiv 1910.07467).

Enters: x [P, N, D], weights [P, D] and, where a branch of the block has just ended, its output.
Leaves: the normed rows, the residual stream, and 1 / root-mean-square of every row for backward.
x plus the branch is rounded to x's dtype before it is normed, so that forward and backward see the
same numbers. All arithmetic is float32. Backward adds to the weights' gradient in float32: each
program sums its rows, a second kernel sums the programs in order, and how many there are follows
from N and D alone. Does not keep the normed rows: backward makes them again.

Bytes to move per token, bf16: forward 8 D with a branch (x, branch, x, y) and 4 D without,
backward 8 D with a residual gradient and 6 D without; at D 256 about 2 kB each.

P proxies, N tokens, D width, B programs of a proxy.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case


def forward(
    x_PND: Tensor, weight_PD: Tensor, eps: float, branch_PND: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [P, N, D], the residual stream x + branch [P, N, D], and float32 rstd [P, N].

    Without a branch the residual stream is `x_PND` itself. `weight_PD` has any float dtype and may
    be strided over P.
    """
    num_proxies, num_rows, width = x_PND.shape
    assert weight_PD.shape == (num_proxies, width), weight_PD.shape
    assert weight_PD.stride(1) == 1
    assert x_PND.is_contiguous()
    assert branch_PND is None or branch_PND.is_contiguous()
    y_PND = torch.empty_like(x_PND)
    stream_PND = x_PND if branch_PND is None else torch.empty_like(x_PND)
    rstd_PN = torch.empty((num_proxies, num_rows), dtype=torch.float32, device=x_PND.device)
    launch = launches.rows(width)
    _forward[(triton.cdiv(num_rows, launch.rows), num_proxies)](
        x_PND,
        x_PND if branch_PND is None else branch_PND,
        weight_PD,
        y_PND,
        stream_PND,
        rstd_PN,
        eps,
        num_rows,
        weight_PD.stride(0),
        width,
        HAS_BRANCH=branch_PND is not None,
        BLOCK_N=launch.rows,
        BLOCK_D=launch.width,
        num_warps=launch.num_warps,
    )
    return y_PND, stream_PND, rstd_PN


def backward(
    dy_PND: Tensor,
    x_PND: Tensor,
    weight_PD: Tensor,
    rstd_PN: Tensor,
    dweight_PD: Tensor,
    dresidual_PND: Tensor | None = None,
) -> Tensor:
    """Return the gradient of x [P, N, D] in the dtype of `dy_PND`; add to `dweight_PD`.

    `x_PND` is the residual stream that forward returned, `dresidual_PND` the gradient that reaches
    it past the norm; the result is that of both, and so also the branch's. `dweight_PD` is float32
    and may be strided over P.
    """
    num_proxies, num_rows, width = x_PND.shape
    assert dy_PND.shape == x_PND.shape
    assert dweight_PD.dtype == torch.float32
    assert weight_PD.stride(1) == dweight_PD.stride(1) == 1
    for value in (dy_PND, x_PND, rstd_PN, dresidual_PND):
        assert value is None or value.is_contiguous()
    dx_PND = torch.empty_like(dy_PND)
    launch = launches.rows_backward(width)
    num_programs = triton.cdiv(num_rows, launches.BACKWARD_ROWS)
    parts_PBD = dweight_PD.new_empty(num_proxies, num_programs, width)
    _backward[(num_programs, num_proxies)](
        dy_PND,
        x_PND,
        weight_PD,
        rstd_PN,
        dy_PND if dresidual_PND is None else dresidual_PND,
        dx_PND,
        parts_PBD,
        num_rows,
        weight_PD.stride(0),
        width,
        HAS_RESIDUAL=dresidual_PND is not None,
        BLOCK_N=launch.rows,
        BLOCK_D=launch.width,
        NUM_TILES=launches.BACKWARD_ROWS // launch.rows,
        num_warps=launch.num_warps,
    )
    columns = launches.COLUMN_SUM
    _add_weights[(triton.cdiv(width, columns.width), num_proxies)](
        parts_PBD,
        dweight_PD,
        num_programs,
        dweight_PD.stride(0),
        width,
        BLOCK_B=columns.rows,
        BLOCK_D=columns.width,
        num_warps=columns.num_warps,
    )
    return dx_PND


@triton.jit
def _forward(
    x,  # [P, N, D]
    branch,  # [P, N, D]
    weight,  # [P, D]
    y,  # [P, N, D]
    stream,  # [P, N, D], written where there is a branch
    rstd,  # [P, N]
    eps,
    num_rows,
    weight_stride,
    width,
    HAS_BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    proxy = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    exists = row < num_rows - start
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    mask = exists[:, None] & inside[None, :]
    first = proxy * num_rows + start
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + first * width + place, mask=mask, other=0.0)
    if HAS_BRANCH:
        added = tl.load(branch + first * width + place, mask=mask, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(stream + first * width + place, value, mask=mask)
    scale = tl.load(weight + proxy * weight_stride + column, mask=inside, other=0.0)
    value = value.to(tl.float32)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=1) / width + eps)
    tl.store(rstd + first + row, inverse, mask=exists)
    normed = value * inverse[:, None] * scale.to(tl.float32)[None, :]
    tl.store(y + first * width + place, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy,  # [P, N, D]
    x,  # [P, N, D]
    weight,  # [P, D]
    rstd,  # [P, N]
    dresidual,  # [P, N, D]
    dx,  # [P, N, D]
    parts,  # [P, B, D]: each program's sum for the weights' gradient
    num_rows,
    weight_stride,
    width,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    program = tl.program_id(0)
    proxy = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    scale = tl.load(weight + proxy * weight_stride + column, mask=inside, other=0.0)
    scale = scale.to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    row = tl.arange(0, BLOCK_N)
    place = row[:, None] * width + column[None, :]
    for tile in range(NUM_TILES):
        start = (program * NUM_TILES + tile) * BLOCK_N
        exists = row < num_rows - start
        mask = exists[:, None] & inside[None, :]
        first = proxy * num_rows + start
        inverse = tl.load(rstd + first + row, mask=exists, other=0.0)[:, None]
        normed = tl.load(x + first * width + place, mask=mask, other=0.0).to(tl.float32) * inverse
        above = tl.load(dy + first * width + place, mask=mask, other=0.0).to(tl.float32)
        total += above * normed
        above *= scale
        shared = tl.sum(above * normed, axis=1)[:, None] / width
        below = inverse * (above - normed * shared)
        if HAS_RESIDUAL:
            past = tl.load(dresidual + first * width + place, mask=mask, other=0.0)
            below += past.to(tl.float32)
        tl.store(dx + first * width + place, below.to(dx.dtype.element_ty), mask=mask)
    parts += (proxy * tl.num_programs(0) + program) * width
    tl.store(parts + column, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _add_weights(
    parts,  # [P, B, D]
    dweight,  # [P, D], float32
    num_parts,
    dweight_stride,
    width,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    proxy = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    parts += proxy * num_parts * width
    total = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in range(0, num_parts, BLOCK_B):
        part = start + tl.arange(0, BLOCK_B)
        mask = (part < num_parts)[:, None] & inside[None, :]
        place = part.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(parts + place, mask=mask, other=0.0)
    target = dweight + proxy * dweight_stride + column
    tl.store(target, tl.load(target, mask=inside) + tl.sum(total, axis=0), mask=inside)


def cases(capability: int) -> list[Case]:
    """Return the kernels at the widths of the presets: bf16 and float32 rows, float32 weights."""
    found = [_weights_case()]
    extras = (False, True)
    for width, dtype, extra in itertools.product(launches.WIDTHS, ("bf16", "fp32"), extras):
        sizes = {"num_rows": "i32:16", "weight_stride": "i32:16", "width": "i32:16"}
        forward_tile, backward_tile = launches.rows(width), launches.rows_backward(width)
        found.append(
            Case(
                name=f"rmsnorm.forward d{width} {dtype}{' branch' if extra else ''}",
                kernel=_forward,
                signature={
                    **dict.fromkeys(("x", "branch", "y", "stream"), f"*{dtype}"),
                    "weight": "*fp32",
                    "rstd": "*fp32",
                    "eps": "fp32",
                    **sizes,
                },
                constants={
                    "HAS_BRANCH": extra,
                    "BLOCK_N": forward_tile.rows,
                    "BLOCK_D": forward_tile.width,
                },
                num_warps=forward_tile.num_warps,
            )
        )
        found.append(
            Case(
                name=f"rmsnorm.backward d{width} {dtype}{' residual' if extra else ''}",
                kernel=_backward,
                signature={
                    **dict.fromkeys(("dy", "x", "dresidual", "dx"), f"*{dtype}"),
                    "weight": "*fp32",
                    "rstd": "*fp32",
                    "parts": "*fp32",
                    **sizes,
                },
                constants={
                    "HAS_RESIDUAL": extra,
                    "BLOCK_N": backward_tile.rows,
                    "BLOCK_D": backward_tile.width,
                    "NUM_TILES": launches.BACKWARD_ROWS // backward_tile.rows,
                },
                num_warps=backward_tile.num_warps,
            )
        )
    return found


def _weights_case() -> Case:
    columns = launches.COLUMN_SUM
    return Case(
        name="rmsnorm.weights",
        kernel=_add_weights,
        signature={
            "parts": "*fp32",
            "dweight": "*fp32",
            "num_parts": "i32",
            "dweight_stride": "i32:16",
            "width": "i32:16",
        },
        constants={"BLOCK_B": columns.rows, "BLOCK_D": columns.width},
        num_warps=columns.num_warps,
    )
