"""The gradient of packed QKV under causal attention, in two passes that repeat bit for bit.

Enters: what `attention.forward` took and gave, and the gradient of its outputs. Leaves: the
gradient of the packed QKV before its rotation. One pass goes by queries and makes dq, the other by
keys and makes dk and dv: seven products in place of five, but every sum is made by one program in
one order, without atomics. Each undoes the rotation in registers before it stores.

P proxies, N tokens of a micro-batch, T tokens of a sequence, H heads, K key-value heads, R head
size, C = (H + 2K) R: query heads, key heads, value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.attention_tiles import LOG2_E, load_rows, row_offset, store_rows, unrotate
from regmix_kernels.compilation import Case


@triton.jit
def _query_gradient(
    q,
    dout,
    dq,
    lse,
    delta,
    k_base,
    v_base,
    queries,
    start,
    seq_len,
    C: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    keys = start + tl.arange(0, KEYS)
    k = load_rows(k_base, keys, seq_len, C, HEAD_DIM, PADDED, DIAGONAL)
    v = load_rows(v_base, keys, seq_len, C, HEAD_DIM, PADDED, DIAGONAL)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2(scores * scale - lse[:, None])
    if DIAGONAL:
        weights = tl.where((queries - start)[:, None] >= tl.arange(0, KEYS)[None, :], weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    dout,
    qkv,
    out,
    lse,
    cosines,
    sines,
    delta,
    dqkv,
    seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Make dq of one tile of queries of one head, and its rows' dout . out for `dkv_kernel`."""
    C: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    OUT: tl.constexpr = NUM_HEADS * HEAD_DIM
    head = tl.program_id(0) % NUM_HEADS
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    first_query = (tl.num_programs(0) // NUM_HEADS - 1 - tl.program_id(0) // NUM_HEADS) * QUERIES
    proxy, num_sequences = tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first_token = (proxy * num_sequences + tl.program_id(1)) * seq_len
    q_base = qkv + first_token * C + head * HEAD_DIM
    k_base = qkv + first_token * C + (NUM_HEADS + kv_head) * HEAD_DIM
    v_base = k_base + NUM_KV_HEADS * HEAD_DIM
    out_offset = first_token * OUT + head * HEAD_DIM
    row_start = row_offset(proxy, num_sequences, head, seq_len, NUM_HEADS)

    queries = first_query + tl.arange(0, QUERIES)
    valid = queries < seq_len
    q = load_rows(q_base, queries, seq_len, C, HEAD_DIM, PADDED, True)
    do = load_rows(dout + out_offset, queries, seq_len, OUT, HEAD_DIM, PADDED, True)
    o = load_rows(out + out_offset, queries, seq_len, OUT, HEAD_DIM, PADDED, True)
    rows_lse = tl.load(lse + row_start + queries, mask=valid, other=0.0)
    rows_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + row_start + queries, rows_delta, mask=valid)

    dq = tl.zeros((QUERIES, PADDED), tl.float32)
    diagonal = first_query // KEYS * KEYS
    for start in range(0, diagonal, KEYS):
        dq = _query_gradient(
            q, do, dq, rows_lse, rows_delta, k_base, v_base, queries, start, seq_len,
            C, HEAD_DIM, PADDED, KEYS, False,
        )  # fmt: skip
    for start in range(diagonal, tl.minimum(first_query + QUERIES, seq_len), KEYS):
        dq = _query_gradient(
            q, do, dq, rows_lse, rows_delta, k_base, v_base, queries, start, seq_len,
            C, HEAD_DIM, PADDED, KEYS, True,
        )  # fmt: skip

    dq = unrotate(dq * HEAD_DIM**-0.5, cosines, sines, queries, seq_len, HEAD_DIM, PADDED)
    dq_base = dqkv + first_token * C + head * HEAD_DIM
    store_rows(dq_base, dq, queries, seq_len, C, HEAD_DIM, PADDED)


@triton.jit
def _key_gradients(
    k,
    v,
    dk,
    dv,
    q_base,
    dout_base,
    lse_base,
    delta_base,
    keys,
    start,
    seq_len,
    C: tl.constexpr,
    OUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    scale: tl.constexpr = HEAD_DIM**-0.5 * LOG2_E
    queries = start + tl.arange(0, QUERIES)
    valid = queries < seq_len
    # Rows past the end have q = dout = delta = 0: weight 1, and nothing to give.
    q = load_rows(q_base, queries, seq_len, C, HEAD_DIM, PADDED, True)
    dout = load_rows(dout_base, queries, seq_len, OUT, HEAD_DIM, PADDED, True)
    lse = tl.load(lse_base + queries, mask=valid, other=0.0)
    delta = tl.load(delta_base + queries, mask=valid, other=0.0)
    # Keys are rows, so that weights and dscores are left operands as they stand, in registers.
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    weights = tl.exp2(scores * scale - lse[None, :])
    if DIAGONAL:
        weights = tl.where((keys - start)[:, None] <= tl.arange(0, QUERIES)[None, :], weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
    dscores = weights * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkv_kernel(
    dout,
    qkv,
    lse,
    cosines,
    sines,
    delta,
    dqkv,
    seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Make dk and dv of one tile of keys of one key-value head, its query heads in order."""
    C: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    OUT: tl.constexpr = NUM_HEADS * HEAD_DIM
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    first_key = tl.program_id(0) // NUM_KV_HEADS * KEYS
    proxy, num_sequences = tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first_token = (proxy * num_sequences + tl.program_id(1)) * seq_len
    k_offset = first_token * C + (NUM_HEADS + kv_head) * HEAD_DIM
    v_offset = k_offset + NUM_KV_HEADS * HEAD_DIM

    keys = first_key + tl.arange(0, KEYS)
    k = load_rows(qkv + k_offset, keys, seq_len, C, HEAD_DIM, PADDED, True)
    v = load_rows(qkv + v_offset, keys, seq_len, C, HEAD_DIM, PADDED, True)
    dk = tl.zeros((KEYS, PADDED), tl.float32)
    dv = tl.zeros((KEYS, PADDED), tl.float32)
    diagonal = first_key // QUERIES * QUERIES
    below = tl.cdiv(first_key + KEYS, QUERIES) * QUERIES
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = qkv + first_token * C + head * HEAD_DIM
        dout_base = dout + first_token * OUT + head * HEAD_DIM
        row_start = row_offset(proxy, num_sequences, head, seq_len, NUM_HEADS)
        for start in range(diagonal, tl.minimum(below, seq_len), QUERIES):
            dk, dv = _key_gradients(
                k, v, dk, dv, q_base, dout_base, lse + row_start, delta + row_start,
                keys, start, seq_len, C, OUT, HEAD_DIM, PADDED, QUERIES, True,
            )  # fmt: skip
        for start in range(below, seq_len, QUERIES):
            dk, dv = _key_gradients(
                k, v, dk, dv, q_base, dout_base, lse + row_start, delta + row_start,
                keys, start, seq_len, C, OUT, HEAD_DIM, PADDED, QUERIES, False,
            )  # fmt: skip

    dk = unrotate(dk * HEAD_DIM**-0.5, cosines, sines, keys, seq_len, HEAD_DIM, PADDED)
    store_rows(dqkv + k_offset, dk, keys, seq_len, C, HEAD_DIM, PADDED)
    store_rows(dqkv + v_offset, dv, keys, seq_len, C, HEAD_DIM, PADDED)


def backward(
    dout_PNO: Tensor,
    qkv_PNC: Tensor,
    out_PNO: Tensor,
    lse_PHN: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
) -> Tensor:
    """Return the gradient of the packed QKV before its rotation, [P, N, C].

    qkv, out and lse are those of `attention.forward`; the tables are those of `rope.rotate_`, in
    float32. All are contiguous.
    """
    num_proxies, num_tokens, channels = qkv_PNC.shape
    head_dim = channels // (num_heads + 2 * num_kv_heads)
    assert dout_PNO.shape == out_PNO.shape == (num_proxies, num_tokens, num_heads * head_dim)
    assert lse_PHN.shape == (num_proxies, num_heads, num_tokens)
    assert cos_TR2.shape == sin_TR2.shape == (seq_len, head_dim // 2)
    tensors = (dout_PNO, qkv_PNC, out_PNO, lse_PHN, cos_TR2, sin_TR2)
    assert all(x.is_contiguous() for x in tensors)
    tiles = launches.attention(
        head_dim, launches.capability(qkv_PNC.device), qkv_PNC.element_size()
    )
    dqkv, delta = torch.empty_like(qkv_PNC), torch.empty_like(lse_PHN)
    num_sequences = num_tokens // seq_len
    # By queries first: that pass stores each row's dout . out, which the other reads.
    tile = tiles.by_queries
    grid = (triton.cdiv(seq_len, tile.queries) * num_heads, num_sequences, num_proxies)
    dq_kernel[grid](
        dout_PNO, qkv_PNC, out_PNO, lse_PHN, cos_TR2, sin_TR2, delta, dqkv, seq_len,
        **tile.constants(num_heads, num_kv_heads, head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    tile = tiles.by_keys
    grid = (triton.cdiv(seq_len, tile.keys) * num_kv_heads, num_sequences, num_proxies)
    dkv_kernel[grid](
        dout_PNO, qkv_PNC, lse_PHN, cos_TR2, sin_TR2, delta, dqkv, seq_len,
        **tile.constants(num_heads, num_kv_heads, head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return dqkv


def cases(capability: int) -> list[Case]:
    """Return both passes at every preset's heads, and at one group of query heads."""
    kinds = {"seq_len": "i32:16"}
    kinds |= dict.fromkeys(("dout", "qkv", "out", "dqkv"), "*bf16")
    kinds |= dict.fromkeys(("lse", "cosines", "sines", "delta"), "*fp32")
    found = []
    for num_heads, num_kv_heads, head_dim in launches.ATTENTION_SHAPES:
        tiles = launches.attention(head_dim, capability, 2)
        for name, kernel, tile in (
            ("dq", dq_kernel, tiles.by_queries),
            ("dkv", dkv_kernel, tiles.by_keys),
        ):
            found.append(
                Case(
                    name=f"attention {name} H{num_heads} K{num_kv_heads} R{head_dim}",
                    kernel=kernel,
                    signature={n: kinds[n] for n in kernel.arg_names if n in kinds},
                    constants=tile.constants(num_heads, num_kv_heads, head_dim),
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    is_matrix=True,
                    capabilities=(capability,),
                )
            )
    return found
