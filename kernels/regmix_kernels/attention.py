"""Causal attention on packed, rotated QKV, forward and backward, for a stack of proxies.

Enters: packed QKV, token-major, rotated by `rope.rotate_`. Leaves: the heads' outputs with the
log-sum-exp of each query's scores, and the gradient of the packed QKV before its rotation.
Sequences of T tokens lie one after the other and do not see each other; documents packed into one
sequence do. Holds no dropout, no document mask and no window.

Scores are never stored (FlashAttention-2, arXiv 2307.08691): the forward keeps a running maximum,
the backward (`attention_backward`) makes the probabilities anew from the log-sum-exp. Only tiles on
the diagonal are masked, and programs with the longest rows start first. The grid is (tiles x heads,
sequences, proxies): a proxy's sums are the same in any stack.

P proxies, N tokens of a micro-batch, T tokens of a sequence, H heads, K key-value heads, R head
size, C = (H + 2K) R: query heads, key heads, value heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.attention_backward import backward
from regmix_kernels.attention_tiles import LOG2_E, load_rows, row_offset, store_rows
from regmix_kernels.compilation import Case
from regmix_kernels.rope import rope_tables, rotate_

__all__ = ["backward", "cases", "forward", "rope_tables", "rotate_"]


@triton.jit
def _attend(
    q,
    acc,
    peak,
    total,
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
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if DIAGONAL:
        scores = tl.where(queries[:, None] >= keys[None, :], scores, float("-inf"))
    # Key 0 of the first tile is never masked, so the maximum is finite from the first tile on.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    v = load_rows(v_base, keys, seq_len, C, HEAD_DIM, PADDED, DIAGONAL)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def forward_kernel(
    qkv,
    out,
    lse,
    seq_len,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attend from one tile of queries of one head to the keys up to them."""
    C: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    head = tl.program_id(0) % NUM_HEADS
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    first_query = (tl.num_programs(0) // NUM_HEADS - 1 - tl.program_id(0) // NUM_HEADS) * QUERIES
    proxy, num_sequences = tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first_token = (proxy * num_sequences + tl.program_id(1)) * seq_len
    q_base = qkv + first_token * C + head * HEAD_DIM
    k_base = qkv + first_token * C + (NUM_HEADS + kv_head) * HEAD_DIM
    v_base = k_base + NUM_KV_HEADS * HEAD_DIM

    queries = first_query + tl.arange(0, QUERIES)
    q = load_rows(q_base, queries, seq_len, C, HEAD_DIM, PADDED, True)
    acc = tl.zeros((QUERIES, PADDED), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    diagonal = first_query // KEYS * KEYS
    for start in range(0, diagonal, KEYS):
        acc, peak, total = _attend(
            q, acc, peak, total, k_base, v_base, queries, start, seq_len,
            C, HEAD_DIM, PADDED, KEYS, False,
        )  # fmt: skip
    for start in range(diagonal, tl.minimum(first_query + QUERIES, seq_len), KEYS):
        acc, peak, total = _attend(
            q, acc, peak, total, k_base, v_base, queries, start, seq_len,
            C, HEAD_DIM, PADDED, KEYS, True,
        )  # fmt: skip

    OUT: tl.constexpr = NUM_HEADS * HEAD_DIM
    out_base = out + first_token * OUT + head * HEAD_DIM
    acc = acc * (1.0 / total)[:, None]
    store_rows(out_base, acc, queries, seq_len, OUT, HEAD_DIM, PADDED)
    lse_base = lse + row_offset(proxy, num_sequences, head, seq_len, NUM_HEADS)
    tl.store(lse_base + queries, peak + tl.log2(total), mask=queries < seq_len)


def forward(
    qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs, [P, N, H R], and each query's log-sum-exp in bits, [P, H, N].

    qkv is rotated already and contiguous; seq_len divides N. The second result is float32, the
    base-2 logarithm of the sum of exp(scores): what `backward` wants.
    """
    num_proxies, num_tokens, channels = qkv_PNC.shape
    head_dim = channels // (num_heads + 2 * num_kv_heads)
    assert channels == (num_heads + 2 * num_kv_heads) * head_dim
    assert num_tokens % seq_len == 0
    assert num_heads % num_kv_heads == 0
    assert qkv_PNC.is_contiguous()
    out = qkv_PNC.new_empty((num_proxies, num_tokens, num_heads * head_dim))
    lse = qkv_PNC.new_empty((num_proxies, num_heads, num_tokens), dtype=torch.float32)
    tile = launches.attention(
        head_dim, launches.capability(qkv_PNC.device), qkv_PNC.element_size()
    ).forward
    grid = (triton.cdiv(seq_len, tile.queries) * num_heads, num_tokens // seq_len, num_proxies)
    forward_kernel[grid](
        qkv_PNC,
        out,
        lse,
        seq_len,
        **tile.constants(num_heads, num_kv_heads, head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


def cases(capability: int) -> list[Case]:
    """Return forward and backward at every preset's heads, and at one group of query heads."""
    found = []
    for num_heads, num_kv_heads, head_dim in launches.ATTENTION_SHAPES:
        tile = launches.attention(head_dim, capability, 2).forward
        found.append(
            Case(
                name=f"attention forward H{num_heads} K{num_kv_heads} R{head_dim}",
                kernel=forward_kernel,
                signature={"qkv": "*bf16", "out": "*bf16", "lse": "*fp32", "seq_len": "i32:16"},
                constants=tile.constants(num_heads, num_kv_heads, head_dim),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                is_matrix=True,
                capabilities=(capability,),
            )
        )
    return found
