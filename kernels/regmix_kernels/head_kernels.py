"""Triton kernels of the head and its loss: the vocabulary streamed past a tile of tokens.

Enters: embeddings, head and labels of a stack, or one chunk of logits. Leaves: what
`linear_cross_entropy` makes losses and gradients of. Allocates nothing and chooses no tile.

`stream` is shaped like attention with the head as both keys and values. For 128 tokens it holds the
embeddings and walks over the vocabulary: s = e c^T, p = exp(s), sum of p, mean += p c, p stored.
There is no running maximum: bfloat16 has the range of float32, exp overflows only beyond 88, and
the logits of a proxy stay far below. `stream` with RESCUE runs after it and leaves at once unless a
row's sum lies outside `SAFE_LOW` to `SAFE_HIGH`; it then takes such rows' maxima and walks again
with shifted logits. So nothing waits for the host, and a proxy's numbers follow from its own alone.
Where a sum is NaN a logit was: no shift mends that, and NaN is the answer.

Checked in the machine code for sm_90: the products of a tile run as two asynchronous groups (ptxas
waits for each product where registers run short), p goes to memory within warps, and the loop has
two barriers: one where a tile has arrived, one before its place is filled again.

P proxies, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A row's sum of exponentials, 57 nats to either side: far inside what float32 and bfloat16 hold,
# also once multiplied with the head or divided by the tokens of a step.
SAFE_LOW = tl.constexpr(1e-25)
SAFE_HIGH = tl.constexpr(1e25)


@triton.jit
def _dot(a, b, acc, WIDEN: tl.constexpr):
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _columns(rows, offset, keep, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Load [rows, BLOCK_D] from column `offset` on; `rows` are pointers to each row's start."""
    column = offset + tl.arange(0, BLOCK_D)
    if MASKED:
        inside = keep[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(rows[:, None] + column[None, :], mask=inside, other=0.0)
    else:
        tile = tl.load(rows[:, None] + column[None, :])
    return tile


@triton.jit
def _scores(
    e_low,
    e_high,
    head,
    v,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return the logits of one tile, -inf beyond the vocabulary, and the head's rows in parts."""
    token = tl.arange(0, BLOCK_V)
    known = v + token < VOCAB
    masked: tl.constexpr = VOCAB % BLOCK_V != 0 or WIDTH != BLOCK_D * HALVES
    # Offsets inside the tile do not depend on v, so that they become part of the instructions.
    rows = (head + v * WIDTH) + token * WIDTH
    c_low = _columns(rows, 0, known, WIDTH, BLOCK_D, masked)
    s = tl.zeros((e_low.shape[0], BLOCK_V), tl.float32)
    s = _dot(e_low, tl.trans(c_low), s, WIDEN)
    c_high = c_low
    if HALVES == 2:
        c_high = _columns(rows, BLOCK_D, known, WIDTH, BLOCK_D, masked)
        s = _dot(e_high, tl.trans(c_high), s, WIDEN)
    if VOCAB % BLOCK_V != 0:
        s = tl.where(known[None, :], s, float("-inf"))
    return s, c_low, c_high


@triton.jit
def _largest(
    e_low,
    e_high,
    head,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Return the largest logit of each row."""
    largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for v in tl.range(0, VOCAB, BLOCK_V):
        s, _, _ = _scores(e_low, e_high, head, v, VOCAB, WIDTH, BLOCK_V, BLOCK_D, HALVES, WIDEN)
        largest = tl.maximum(largest, tl.max(s, 1))
    return largest


@triton.jit
def _dealt(p, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Put rows in the order of `_dealt_rows`."""
    near: tl.constexpr = 256 // BLOCK_V
    p = tl.reshape(p, (BLOCK_N // 16, 16 // near, near, BLOCK_V))
    return tl.reshape(tl.permute(p, (1, 0, 2, 3)), (BLOCK_N, BLOCK_V))


@triton.jit
def _dealt_rows(BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return rows in an order in which a warp that stores 16-byte pieces has what it computed.

    A product leaves 16 rows with each warp; a store of whole lines gives a warp `near` rows out of
    every `near` times the number of warps. In this order they are the same rows, so that p moves
    within warps, through half the shared memory, and no warp waits for another to store it.
    """
    near: tl.constexpr = 256 // BLOCK_V
    num_warps: tl.constexpr = BLOCK_N // 16
    row = tl.arange(0, BLOCK_N)
    return 16 * ((row // near) % num_warps) + near * (row // (near * num_warps)) + row % near


@triton.jit
def stream(
    e,  # [P, N, D]
    head,  # [P, V, D], strided over P
    sums,  # [P, N] float32: of exp2(logit * LOG2E - shift)
    shifts,  # [P, N] float32
    means,  # [P, N, D] float32: the head's rows weighted with the softmax
    probs,  # [P, N to whole tiles, PITCH]: the terms of the sums
    num_tokens,
    head_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    STORE: tl.constexpr,
    RESCUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr,
    DEAL: tl.constexpr,
    WIDEN: tl.constexpr,
):
    proxy = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    first = proxy * num_tokens + start
    local = tl.arange(0, BLOCK_N)
    head += proxy * head_stride
    probs += (proxy * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N * PITCH
    unsafe = local < 0
    work = 1
    if RESCUE:
        total = tl.load(sums + first + local, mask=start + local < num_tokens, other=1.0)
        # Neither holds for NaN.
        unsafe = (total < SAFE_LOW) | (total > SAFE_HIGH)
        work = tl.max(unsafe.to(tl.int32), 0)
    if work > 0:
        # Rows beyond the last repeat it. A mask here would share registers with the masks below
        # and keep them busy all the way.
        rows = e + first * WIDTH + tl.minimum(local, num_tokens - start - 1) * WIDTH
        padded: tl.constexpr = WIDTH != BLOCK_D * HALVES
        e_low = _columns(rows, 0, local >= 0, WIDTH, BLOCK_D, padded)
        e_high = e_low
        if HALVES == 2:
            e_high = _columns(rows, BLOCK_D, local >= 0, WIDTH, BLOCK_D, padded)
        shift = tl.zeros((BLOCK_N,), tl.float32)
        if RESCUE:
            largest = _largest(
                e_low, e_high, head, VOCAB, WIDTH, BLOCK_N, BLOCK_V, BLOCK_D, HALVES, WIDEN
            )
            shift = tl.where(unsafe, largest * LOG2E, 0.0)

        total = tl.zeros((BLOCK_N,), tl.float32)
        mean_low = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        mean_high = mean_low
        if DEAL:
            target = _dealt_rows(BLOCK_N, BLOCK_V)
        else:
            target = local
        cells = target[:, None] * PITCH + tl.arange(0, BLOCK_V)[None, :]
        for v in tl.range(0, VOCAB, BLOCK_V):
            s, c_low, c_high = _scores(
                e_low, e_high, head, v, VOCAB, WIDTH, BLOCK_V, BLOCK_D, HALVES, WIDEN
            )
            if RESCUE:
                p = tl.exp2(s * LOG2E - shift[:, None])
            else:
                p = tl.exp2(s * LOG2E)
            total += tl.sum(p, 1)
            p = p.to(c_low.dtype)
            mean_low = _dot(p, c_low, mean_low, WIDEN)
            if HALVES == 2:
                mean_high = _dot(p, c_high, mean_high, WIDEN)
            if STORE:
                if DEAL:
                    p = _dealt(p, BLOCK_N, BLOCK_V)
                tl.store(probs + v + cells, p)

        inside = start + local < num_tokens
        tl.store(sums + first + local, total, mask=inside)
        tl.store(shifts + first + local, shift, mask=inside)
        column = tl.arange(0, BLOCK_D)
        cells = local[:, None] * WIDTH + column[None, :]
        means += first * WIDTH
        kept = inside[:, None] & (column < WIDTH)[None, :]
        tl.store(means + cells, mean_low / total[:, None], mask=kept)
        if HALVES == 2:
            kept = inside[:, None] & (BLOCK_D + column < WIDTH)[None, :]
            tl.store(means + BLOCK_D + cells, mean_high / total[:, None], mask=kept)


@triton.jit
def log_sum_exp(
    e,  # [P, N, D]
    head,  # [P, V, D], strided over P
    sums,  # [P, N] float32
    shifts,  # [P, N] float32
    num_tokens,
    head_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Only the sums, with the running maximum as shift; any width, BLOCK_D of it at a time."""
    proxy = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_N
    first = proxy * num_tokens + start
    local = tl.arange(0, BLOCK_N)
    head += proxy * head_stride
    rows = e + first * WIDTH + tl.minimum(local, num_tokens - start - 1) * WIDTH
    padded: tl.constexpr = WIDTH % BLOCK_D != 0
    if WIDTH <= BLOCK_D:
        whole = _columns(rows, 0, local >= 0, WIDTH, BLOCK_D, padded)
    token = tl.arange(0, BLOCK_V)
    shift = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for v in tl.range(0, VOCAB, BLOCK_V, flatten=WIDTH > BLOCK_D):
        if WIDTH <= BLOCK_D:
            s, _, _ = _scores(whole, whole, head, v, VOCAB, WIDTH, BLOCK_V, BLOCK_D, 1, WIDEN)
        else:
            known = v + token < VOCAB
            head_rows = (head + v * WIDTH) + token * WIDTH
            masked: tl.constexpr = padded or VOCAB % BLOCK_V != 0
            s = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for d in tl.range(0, WIDTH, BLOCK_D):
                part = _columns(rows, d, local >= 0, WIDTH, BLOCK_D, padded)
                c = _columns(head_rows, d, known, WIDTH, BLOCK_D, masked)
                s = _dot(part, tl.trans(c), s, WIDEN)
            if VOCAB % BLOCK_V != 0:
                s = tl.where(known[None, :], s, float("-inf"))
        larger = tl.maximum(shift, tl.max(s, 1) * LOG2E)
        total = total * tl.exp2(shift - larger) + tl.sum(tl.exp2(s * LOG2E - larger[:, None]), 1)
        shift = larger
    inside = start + local < num_tokens
    tl.store(sums + first + local, total, mask=inside)
    tl.store(shifts + first + local, shift, mask=inside)


@triton.jit
def finish(
    e,  # [P, N, D]
    head,  # [P, V, D], strided over P
    labels,  # [P, N]
    sums,  # [P, N] float32
    shifts,  # [P, N] float32
    nats,  # [P, N] float32
    means,  # [P, N, D] float32: rounded to bf16, what rows have in common would drown de
    de,  # [P, N, D]
    weighted,  # [P, N, D]: scale * e / sum, so that p times it is softmax times scale * e
    scale,
    num_tokens,
    head_stride,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Bring in the labels: the label's logit exactly, and what it adds to the gradients."""
    proxy = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = local < num_tokens
    place = proxy * num_tokens + local
    column = tl.arange(0, BLOCK_D)
    kept = inside[:, None] & (column < WIDTH)[None, :]
    label = tl.load(labels + place, mask=inside, other=-1).to(tl.int64)
    counted = (label >= 0) & (label < VOCAB)
    cells = place[:, None] * WIDTH + column[None, :]
    x = tl.load(e + cells, mask=kept, other=0.0).to(tl.float32)
    c = tl.load(
        head + proxy * head_stride + label[:, None] * WIDTH + column[None, :],
        mask=kept & counted[:, None],
        other=0.0,
    ).to(tl.float32)
    total = tl.load(sums + place, mask=inside, other=1.0)
    shift = tl.load(shifts + place, mask=inside, other=0.0)
    loss = (tl.log2(total) + shift) * LN2 - tl.sum(x * c, 1)
    tl.store(nats + place, tl.where(counted, loss, 0.0), mask=inside)
    if GRADIENT:
        mean = tl.load(means + cells, mask=kept, other=0.0)
        gradient = tl.where(counted[:, None], scale * (mean - c), 0.0)
        tl.store(de + cells, gradient.to(de.dtype.element_ty), mask=kept)
        if STORE:
            row = tl.where(counted[:, None], x * (scale / total)[:, None], 0.0)
            tl.store(weighted + cells, row.to(weighted.dtype.element_ty), mask=kept)


@triton.jit
def cross_entropy(
    logits,  # [N, PITCH]: the gradient of scale * nats leaves in their place
    labels,  # [N]
    nats,  # [N] float32
    scale,
    VOCAB: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row a program; the second reading finds the row in the cache."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * PITCH
    label = tl.load(labels + row)
    counted = (label >= 0) & (label < VOCAB)
    # Read before the first reduction: a barrier lies between this and any overwriting.
    known = tl.load(logits + tl.where(counted, label, 0)).to(tl.float32)
    column = tl.arange(0, BLOCK_V)
    largest = float("-inf")
    total = 0.0
    for v in tl.range(0, VOCAB, BLOCK_V):
        x = tl.load(logits + v + column, mask=v + column < VOCAB, other=float("-inf"))
        x = x.to(tl.float32) * LOG2E
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(x - larger), 0)
        largest = larger
    loss = (tl.log2(total) + largest) * LN2 - known
    tl.store(nats + row, tl.where(counted, loss, 0.0))
    factor = scale / total
    for v in tl.range(0, VOCAB, BLOCK_V):
        inside = v + column < VOCAB
        x = tl.load(logits + v + column, mask=inside, other=0.0).to(tl.float32) * LOG2E
        gradient = tl.exp2(x - largest) * factor - tl.where(v + column == label, scale, 0.0)
        gradient = tl.where(counted, gradient, 0.0)
        tl.store(logits + v + column, gradient.to(logits.dtype.element_ty), mask=inside)
