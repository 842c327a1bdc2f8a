"""Rotary position embedding of packed queries and keys, in place; one pass over memory.

Enters: packed QKV, token-major, not yet rotated, and tables of cosines and sines. Leaves: the same
tensor with its query and key heads rotated as `reference.rope` rotates them, pairs (i, i + R/2).
The values are not touched. Attention reads the rotated tensor and undoes the rotation of the
gradients itself, so there is no backward here. The rotation stays out of attention's loop over
scores: keys would be rotated again for each tile of queries, in a loop that exponentials bound.

P proxies, N tokens of a micro-batch (sequences one after the other), T tokens of a sequence,
H heads, K key-value heads, R head size, C = (H + 2K) R: query heads, key heads, value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case


def rope_tables(
    seq_len: int,
    head_dim: int,
    base: float,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the cosines and the sines of every position and pair, each [T, R/2].

    The angles are computed in float64: at position 2047 a float32 angle is off by 1e-4.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-steps)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@triton.jit
def rotate_kernel(
    qkv,
    cosines,
    sines,
    num_tokens,
    seq_len,
    ROTATED: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotate ROWS pairs (token, head) of one proxy; a token has ROTATED heads to rotate."""
    half: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED_HALF)
    token, head = rows // ROTATED, rows % ROTATED
    valid = (token < num_tokens)[:, None] & (columns < half)[None, :]
    first_token = tl.program_id(1).to(tl.int64) * num_tokens
    start = (first_token + token) * (ALL_HEADS * HEAD_DIM) + head * HEAD_DIM
    pointers = qkv + start[:, None] + columns[None, :]
    angles = (token % seq_len)[:, None] * half + columns[None, :]
    cosine = tl.load(cosines + angles, mask=valid, other=0.0).to(tl.float32)
    sine = tl.load(sines + angles, mask=valid, other=0.0).to(tl.float32)
    low = tl.load(pointers, mask=valid, other=0.0).to(tl.float32)
    high = tl.load(pointers + half, mask=valid, other=0.0).to(tl.float32)
    tl.store(pointers, low * cosine - high * sine, mask=valid)
    tl.store(pointers + half, high * cosine + low * sine, mask=valid)


def rotate_(
    qkv_PNC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, num_heads: int, num_kv_heads: int
) -> None:
    """Rotate the query and key heads of packed QKV in place, computed in float32.

    The tables' length is the sequence length; it divides N.
    """
    num_proxies, num_tokens, channels = qkv_PNC.shape
    seq_len, half = cos_TR2.shape
    rotated, all_heads = num_heads + num_kv_heads, num_heads + 2 * num_kv_heads
    assert channels == all_heads * 2 * half
    assert num_tokens % seq_len == 0
    assert all(x.is_contiguous() for x in (qkv_PNC, cos_TR2, sin_TR2))
    tile = launches.rotation(2 * half)
    grid = (triton.cdiv(num_tokens * rotated, tile.rows), num_proxies)
    rotate_kernel[grid](
        qkv_PNC,
        cos_TR2,
        sin_TR2,
        num_tokens,
        seq_len,
        ROTATED=rotated,
        ALL_HEADS=all_heads,
        HEAD_DIM=2 * half,
        PADDED_HALF=triton.next_power_of_2(half),
        ROWS=tile.rows,
        num_warps=tile.num_warps,
    )


def cases(capability: int) -> list[Case]:
    """Return the kernel at every preset's heads, and at one group of query heads."""
    found = []
    for num_heads, num_kv_heads, head_dim in launches.ATTENTION_SHAPES:
        tile = launches.rotation(head_dim)
        found.append(
            Case(
                name=f"rotate H{num_heads} K{num_kv_heads} R{head_dim}",
                kernel=rotate_kernel,
                signature={
                    "qkv": "*bf16",
                    "cosines": "*fp32",
                    "sines": "*fp32",
                    "num_tokens": "i32:16",
                    "seq_len": "i32:16",
                },
                constants={
                    "ROTATED": num_heads + num_kv_heads,
                    "ALL_HEADS": num_heads + 2 * num_kv_heads,
                    "HEAD_DIM": head_dim,
                    "PADDED_HALF": triton.next_power_of_2(head_dim // 2),
                    "ROWS": tile.rows,
                },
                num_warps=tile.num_warps,
                capabilities=(capability,),
            )
        )
    return found
