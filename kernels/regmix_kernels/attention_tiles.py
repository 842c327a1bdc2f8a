"""Tiles of attention's tensors inside a kernel: read, written, un-rotated, and where rows lie.

Enters: pointers and row numbers, in a Triton program. Leaves: tiles of whole heads, [rows, padded
head size]. Launches nothing; the kernels are in `attention` and `attention_backward`.

P proxies, N tokens of a micro-batch, T tokens of a sequence, H heads, K key-value heads, R head
size, C = (H + 2K) R: query heads, key heads, value heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# tl.exp2 is one instruction; exp is a product more for each score.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_columns(HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    # Each half of a head is padded by itself, so that a rotated pair is (d, d + PADDED / 2) for
    # every head size; products do not mind the order of the columns.
    d = tl.arange(0, PADDED)
    within = d % (PADDED // 2)
    return d // (PADDED // 2) * (HEAD_DIM // 2) + within, within < HEAD_DIM // 2


@triton.jit
def load_rows(
    base,
    rows,
    seq_len,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GUARDED: tl.constexpr,
):
    # Rows from `seq_len` on are zero where GUARDED; elsewhere there are none.
    if HEAD_DIM == PADDED:
        pointers = base + rows[:, None] * STRIDE + tl.arange(0, PADDED)[None, :]
        if GUARDED:
            tile = tl.load(pointers, mask=(rows < seq_len)[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
    else:
        columns, valid = head_columns(HEAD_DIM, PADDED)
        pointers = base + rows[:, None] * STRIDE + columns[None, :]
        inside = valid[None, :] & (rows < seq_len)[:, None] if GUARDED else valid[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(
    base,
    tile,
    rows,
    seq_len,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    columns, valid = head_columns(HEAD_DIM, PADDED)
    inside = valid[None, :] & (rows < seq_len)[:, None]
    tl.store(base + rows[:, None] * STRIDE + columns[None, :], tile, mask=inside)


@triton.jit
def unrotate(
    tile,
    cosines,
    sines,
    rows,
    seq_len,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    # The transpose of the rotation is its inverse: the gradient before it, from the one after it.
    half: tl.constexpr = PADDED // 2
    columns = tl.arange(0, half)
    inside = (columns < HEAD_DIM // 2)[None, :] & (rows < seq_len)[:, None]
    angles = rows[:, None] * (HEAD_DIM // 2) + columns[None, :]
    cosine = tl.load(cosines + angles, mask=inside, other=0.0)
    sine = tl.load(sines + angles, mask=inside, other=0.0)
    low, high = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, half)), (0, 2, 1)))
    pair = tl.join(low * cosine + high * sine, high * cosine - low * sine)
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (tile.shape[0], PADDED))


@triton.jit
def row_offset(proxy, num_sequences, head, seq_len, NUM_HEADS: tl.constexpr):
    # Of the first query in [P, H, N], for the program's sequence.
    return ((proxy * NUM_HEADS + head) * num_sequences + tl.program_id(1)) * seq_len
