"""Rows summed by id without atomics: the gradient of an embedding, and of labels' rows.

Enters: rows [P, N, D] of any float dtype and a plan made once from ids [P, N]. Leaves: a float32
table [P, V, D] to which each segment's sum was added; rows of the table without an id are neither
read nor written. The order of every sum follows from the proxy's ids alone, so it is the same on
every run and in any stack. Does not sort rows, only their numbers; does not wait for the device.

Sorted positions are cut into blocks of 16. A block sums its rows by id; a segment that lies in one
block goes to the table at once, the parts of a longer one go to scratch and are added by a second
kernel, in order. So a token that makes 5% of a batch does not keep one program busy for long. The
product with zeros and ones means that a row that is not finite spoils its block, which is its own
proxy's; the optimizer freezes that proxy.

Bytes to move per row: D of the rows' dtype, and 8 D per distinct id for the float32 sum's read and
write: at D 256, bf16 and one distinct id in three rows 512 + 683, about 1.2 kB a token.

P proxies, N rows, D width, V segments, B blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case


@dataclass(frozen=True, kw_only=True)
class SegmentPlan:
    """Which rows belong to which segment.

    ids_PN: int32 ids in order; those outside [0, num_segments) count as num_segments, at the end.
    order_PN: int32 number of the row at each place of that order; equal ids keep theirs.
    num_segments: V.
    """

    ids_PN: Tensor
    order_PN: Tensor
    num_segments: int


def plan(ids_PN: Tensor, num_segments: int) -> SegmentPlan:
    """Sort `ids_PN` (any integer type); an id outside [0, num_segments) takes part in no sum.

    Such an id is the label that a loss ignores. The plan serves any rows that have these ids.
    """
    keys_PN = ids_PN.to(torch.int32)
    keys_PN = torch.where((keys_PN >= 0) & (keys_PN < num_segments), keys_PN, num_segments)
    sorted_PN, order_PN = torch.sort(keys_PN, dim=-1, stable=True)
    return SegmentPlan(
        ids_PN=sorted_PN.contiguous(),
        order_PN=order_PN.to(torch.int32).contiguous(),
        num_segments=num_segments,
    )


def add_rows(rows_PND: Tensor, plan: SegmentPlan, out_PVD: Tensor, scale: float = 1.0) -> None:
    """Add `scale` times the sum of the rows with id v to out[p, v], for every v.

    `out_PVD` is float32; it may be strided over P, and each [V, D] of it is contiguous.
    """
    num_proxies, num_rows, width = rows_PND.shape
    assert plan.ids_PN.shape == (num_proxies, num_rows), "the plan is of other rows"
    assert out_PVD.shape == (num_proxies, plan.num_segments, width), out_PVD.shape
    assert rows_PND.is_contiguous()
    assert out_PVD.dtype == torch.float32
    assert out_PVD[0].is_contiguous(), "each [V, D] must be contiguous"
    launch = launches.segment_sum(width, rows_PND.element_size())
    num_blocks = triton.cdiv(num_rows, launch.rows)
    parts_PB2D = out_PVD.new_empty(num_proxies, num_blocks, 2, width)
    grid = (num_blocks, triton.cdiv(width, launch.width), num_proxies)
    _sum_blocks[grid](
        rows_PND,
        plan.order_PN,
        plan.ids_PN,
        out_PVD,
        parts_PB2D,
        scale,
        num_rows,
        plan.num_segments,
        width,
        out_PVD.stride(0),
        BLOCK_N=launch.rows,
        BLOCK_D=launch.width,
        num_warps=launch.num_warps,
    )
    _add_parts[grid](
        parts_PB2D,
        plan.ids_PN,
        out_PVD,
        scale,
        num_rows,
        plan.num_segments,
        width,
        out_PVD.stride(0),
        BLOCK_N=launch.rows,
        BLOCK_D=launch.width,
        BLOCK_B=launch.parts,
        num_warps=launch.num_warps,
    )


@triton.jit
def _sum_blocks(
    rows,  # [P, N, D]
    order,  # [P, N]
    ids,  # [P, N], sorted
    out,  # [P, V, D], float32
    parts,  # [P, B, 2, D]: of the segment that enters the block, and of the one that leaves it
    scale,
    num_rows,
    num_segments,
    width,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    proxy = tl.program_id(2).to(tl.int64)
    ids += proxy * num_rows
    start = block * BLOCK_N
    if tl.load(ids + start) < num_segments:
        place = start + tl.arange(0, BLOCK_N)
        exists = place < num_rows
        id = tl.load(ids + place, mask=exists, other=num_segments)
        before = tl.load(ids + place - 1, mask=exists & (place > start), other=-1)
        entering = tl.load(ids + start - 1, mask=start > 0, other=-1)
        end = start + BLOCK_N
        leaving = tl.load(ids + end, mask=end < num_rows, other=-1)
        valid = id < num_segments
        row = tl.load(order + proxy * num_rows + place, mask=valid, other=0).to(tl.int64)

        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < width
        rows += proxy * num_rows * width
        x = tl.load(
            rows + row[:, None] * width + column[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        # Line i is the sum over the segment of line i, as far as it lies in this block.
        same = (id[:, None] == id[None, :]).to(x.dtype)
        total = tl.dot(same, x, input_precision="ieee")

        opens = valid & (before != id)
        crosses = (id == entering) | (id == leaving)
        target = out + proxy * out_stride + id.to(tl.int64)[:, None] * width + column[None, :]
        mask = (opens & (crosses == 0))[:, None] & inside[None, :]
        tl.store(target, tl.load(target, mask=mask, other=0.0) + scale * total, mask=mask)
        slot = (proxy * tl.num_programs(0) + block) * 2 + (id != entering).to(tl.int64)
        tl.store(
            parts + slot[:, None] * width + column[None, :],
            total,
            mask=(opens & crosses)[:, None] & inside[None, :],
        )


@triton.jit
def _add_parts(
    parts,  # [P, B, 2, D]
    ids,  # [P, N], sorted
    out,  # [P, V, D], float32
    scale,
    num_rows,
    num_segments,
    width,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    proxy = tl.program_id(2).to(tl.int64)
    ids += proxy * num_rows
    end = (block + 1) * BLOCK_N
    id = tl.load(ids + end - 1, mask=end < num_rows, other=num_segments)
    entering = tl.load(ids + block * BLOCK_N - 1, mask=block > 0, other=-1)
    follows = tl.load(ids + end, mask=end < num_rows, other=-1)
    # The block in which a crossing segment begins adds all of it.
    if (id < num_segments) & (id != entering) & (id == follows):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < width
        parts += proxy * num_blocks * 2 * width
        total = tl.load(parts + (block.to(tl.int64) * 2 + 1) * width + column, mask=inside)
        here = block + 1
        while follows == id:
            later = here + tl.arange(0, BLOCK_B)
            first = tl.load(ids + later * BLOCK_N, mask=later < num_blocks, other=-1)
            part = tl.load(
                parts + later.to(tl.int64)[:, None] * 2 * width + column[None, :],
                mask=(first == id)[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(part, axis=0)
            here += BLOCK_B
            follows = tl.load(ids + here * BLOCK_N, mask=here < num_blocks, other=-1)
        target = out + proxy * out_stride + id.to(tl.int64) * width + column
        tl.store(target, tl.load(target, mask=inside) + scale * total, mask=inside)


def cases(capability: int) -> list[Case]:
    """Return both kernels at the widths of the presets, in bf16 and float32."""
    found = []
    for width, (dtype, size) in itertools.product(launches.WIDTHS, (("bf16", 2), ("fp32", 4))):
        launch = launches.segment_sum(width, size)
        shape = {
            "scale": "fp32",
            "num_rows": "i32:16",
            "num_segments": "i32:16",
            "width": "i32:16",
            "out_stride": "i32:16",
        }
        tiles = {"BLOCK_N": launch.rows, "BLOCK_D": launch.width}
        pointers = {"order": "*i32", "ids": "*i32", "out": "*fp32", "parts": "*fp32"}
        found.append(
            Case(
                name=f"segment_sum.blocks d{width} {dtype}",
                kernel=_sum_blocks,
                signature={"rows": f"*{dtype}", **pointers, **shape},
                constants=tiles,
                num_warps=launch.num_warps,
            )
        )
        found.append(
            Case(
                name=f"segment_sum.parts d{width} {dtype}",
                kernel=_add_parts,
                signature={"parts": "*fp32", "ids": "*i32", "out": "*fp32", **shape},
                constants={**tiles, "BLOCK_B": launch.parts},
                num_warps=launch.num_warps,
            )
        )
    return found
