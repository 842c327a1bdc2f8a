"""Rows of a table by token, and the table's gradient.

Enters: a table [P, V, D] and tokens [P, N] of any integer type. Leaves: rows [P, N, D] in the dtype
asked for; backward adds to a float32 table. A token outside the table gives a row of NaN: the
proxy's gradient norm is then not finite and the optimizer freezes it, where a wild read would give
a plausible loss. Does not scale rows.

Bytes to move per token: forward D of the table's dtype in, D of the result's out, 1.5 kB at D 256
from float32 to bf16 and less where rows repeat within the cache; backward as in segment_sum.

P proxies, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case
from regmix_kernels.segment_sum import SegmentPlan, add_rows


def forward(table_PVD: Tensor, tokens_PN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return table[p, tokens[p, n]] as [P, N, D] in `dtype`, by default the table's.

    `table_PVD` may be strided over P; each [V, D] of it is contiguous.
    """
    num_proxies, num_rows = tokens_PN.shape
    vocab_size, width = table_PVD.shape[1:]
    assert table_PVD[0].is_contiguous(), "each [V, D] must be contiguous"
    assert tokens_PN.is_contiguous()
    x_PND = torch.empty(
        (num_proxies, num_rows, width), dtype=dtype or table_PVD.dtype, device=table_PVD.device
    )
    launch = launches.rows(width)
    _gather[(triton.cdiv(num_rows, launch.rows), num_proxies)](
        table_PVD,
        tokens_PN,
        x_PND,
        num_rows,
        vocab_size,
        table_PVD.stride(0),
        width,
        BLOCK_N=launch.rows,
        BLOCK_D=launch.width,
        num_warps=launch.num_warps,
    )
    return x_PND


def backward(dx_PND: Tensor, plan: SegmentPlan, dtable_PVD: Tensor) -> None:
    """Add the rows of `dx_PND` to `dtable_PVD` (float32) by token; `plan` is that of the tokens."""
    add_rows(dx_PND, plan, dtable_PVD)


@triton.jit
def _gather(
    table,  # [P, V, D]
    tokens,  # [P, N]
    x,  # [P, N, D]
    num_rows,
    vocab_size,
    table_stride,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    proxy = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = row < num_rows
    token = tl.load(tokens + proxy * num_rows + row, mask=exists, other=0).to(tl.int64)
    known = (token >= 0) & (token < vocab_size)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    value = tl.load(
        table + proxy * table_stride + token[:, None] * width + column[None, :],
        mask=(exists & known)[:, None] & inside[None, :],
        other=float("nan"),
    )
    place = (proxy * num_rows + row)[:, None] * width + column[None, :]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=exists[:, None] & inside[None, :])


def cases(capability: int) -> list[Case]:
    """Return the gather at the widths of the presets: bf16 and float32 tables, int32 tokens."""
    found = []
    for width in launches.WIDTHS:
        launch = launches.rows(width)
        for dtype in ("bf16", "fp32"):
            found.append(
                Case(
                    name=f"embedding.forward d{width} {dtype}",
                    kernel=_gather,
                    signature={
                        "table": f"*{dtype}",
                        "tokens": "*i32",
                        "x": f"*{dtype}",
                        "num_rows": "i32:16",
                        "vocab_size": "i32:16",
                        "table_stride": "i32:16",
                        "width": "i32:16",
                    },
                    constants={"BLOCK_N": launch.rows, "BLOCK_D": launch.width},
                    num_warps=launch.num_warps,
                )
            )
    return found
