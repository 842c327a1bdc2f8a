"""AdamW for a stack in flat buffers: each proxy's own clip, and its own failure (arXiv 1711.05101).

Enters: float32 parameters, gradients and moments [P, S], learning rate and update counts on the
device. Leaves: all of them updated in place, a working copy of the parameters in its own dtype, and
gradients set to zero for the next step. A proxy whose gradient norm is not finite fails: from then
on its parameters, moments, copy and count stay bit for bit as they were, its gradients are still
set to zero, and its neighbours do not notice. Waits for nothing on the host; computes no gradient.

The norm is a sum of float32 squares in two stages, in an order that follows from S alone. Where a
sum of squares overflows (a norm above 1.8e19) the norm is infinite, so the proxy fails; it is never
finite and wrong. Squares below 1e-38 count as 0.

Bytes to move per parameter and step: 4 for the norm, then 16 read and 16 written (parameter,
gradient, two moments), and 2 for a bf16 copy: 38, whatever the number of tokens.

P proxies, S numbers of a proxy, B blocks of them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case

# What one proxy's update needs besides its numbers: whether it takes part, what its gradients are
# multiplied with, lr / (1 - beta1^t), and 1 / sqrt(1 - beta2^t).
_NUM_FACTORS = 4


def gradient_norms(grads_PS: Tensor) -> Tensor:
    """Return the float32 norm of each proxy's gradients, [P]; not finite where any of them is."""
    num_proxies, size = grads_PS.shape
    assert grads_PS.is_contiguous()
    assert grads_PS.dtype == torch.float32
    launch = launches.NORM
    num_blocks = triton.cdiv(size, launch.block * launch.num_blocks)
    squares_PB = grads_PS.new_empty(num_proxies, num_blocks)
    norms_P = grads_PS.new_empty(num_proxies)
    _sum_squares[(num_blocks, num_proxies)](
        grads_PS,
        squares_PB,
        size,
        BLOCK=launch.block,
        NUM_BLOCKS=launch.num_blocks,
        num_warps=launch.num_warps,
    )
    _add_squares[(num_proxies,)](
        squares_PB, norms_P, num_blocks, BLOCK=launch.block, num_warps=launch.num_warps
    )
    return norms_P


def update(
    params_PS: Tensor,
    grads_PS: Tensor,
    mean_PS: Tensor,
    square_PS: Tensor,
    copy_PS: Tensor | None,
    norms_P: Tensor,
    lr: Tensor,
    counts_P: Tensor,
    failed_P: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip_norm: float | None,
) -> None:
    """Make one update of every proxy that has not failed; set all gradients to zero.

    lr: one float32 on the device. counts_P: int32, updates made so far; grows by one where one is
    made. failed_P: bool or uint8; set where the norm is not finite, never reset. Gradients are
    multiplied with clip_norm / norm where the norm is larger; `clip_norm` None means no limit.
    Weight decay is decoupled and on every parameter.
    """
    num_proxies, size = params_PS.shape
    for value in (params_PS, grads_PS, mean_PS, square_PS):
        assert value.shape == params_PS.shape
        assert value.is_contiguous()
        assert value.dtype == torch.float32
    assert copy_PS is None or (copy_PS.shape == params_PS.shape and copy_PS.is_contiguous())
    assert counts_P.dtype == torch.int32
    assert lr.dtype == torch.float32
    factors_P4 = params_PS.new_empty(num_proxies, _NUM_FACTORS)
    _judge[(num_proxies,)](
        norms_P,
        lr,
        counts_P,
        failed_P.view(torch.uint8),
        factors_P4,
        _log2(betas[0]),
        _log2(betas[1]),
        math.inf if clip_norm is None else clip_norm,
        num_warps=1,
    )
    launch = launches.ADAMW
    _update[(triton.cdiv(size, launch.block), num_proxies)](
        params_PS,
        grads_PS,
        mean_PS,
        square_PS,
        params_PS if copy_PS is None else copy_PS,
        factors_P4,
        lr,
        betas[0],
        1.0 - betas[0],
        betas[1],
        1.0 - betas[1],
        eps,
        weight_decay,
        size,
        HAS_COPY=copy_PS is not None,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )


def _log2(beta: float) -> float:
    # 1 - beta^t from the logarithm: as float32, 0.999 itself would be off by 3e-5 of 1 - 0.999.
    return math.log2(beta) if beta > 0 else -math.inf


@triton.jit
def _sum_squares(grads, squares, size, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    part = tl.program_id(0)
    proxy = tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * (NUM_BLOCKS * BLOCK)
    grads += proxy * size + first
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(NUM_BLOCKS):
        offset = block * BLOCK + place
        value = tl.load(grads + offset, mask=offset < size - first, other=0.0)
        total += value * value
    tl.store(squares + proxy * tl.num_programs(0) + part, tl.sum(total, axis=0))


@triton.jit
def _add_squares(squares, norms, num_parts, BLOCK: tl.constexpr):
    proxy = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = start + place
        total += tl.load(squares + proxy * num_parts + part, mask=part < num_parts, other=0.0)
    tl.store(norms + proxy, tl.sqrt_rn(tl.sum(total, axis=0)))


@triton.jit
def _judge(
    norms,  # [P]
    lr,  # [1]
    counts,  # [P]
    failed,  # [P]
    factors,  # [P, 4]
    log2_beta_mean,
    log2_beta_square,
    clip_norm,
):
    proxy = tl.program_id(0)
    norm = tl.load(norms + proxy)
    # NaN fails the comparison, so it counts as not finite.
    fails = (tl.load(failed + proxy) != 0) | ((norm < float("inf")) == 0)
    count = tl.load(counts + proxy) + (fails == 0).to(tl.int32)
    tl.store(failed + proxy, fails.to(tl.uint8))
    tl.store(counts + proxy, count)
    # In float64: 1 - beta^t is small at first.
    updates = count.to(tl.float64)
    left_mean = 1.0 - tl.exp2(updates * log2_beta_mean)
    left_square = 1.0 - tl.exp2(updates * log2_beta_square)
    step = tl.load(lr) / left_mean
    inverse_root = 1.0 / tl.sqrt(left_square)
    scale = tl.where(norm > clip_norm, clip_norm / norm, 1.0)
    factors += proxy * 4
    tl.store(factors, (fails == 0).to(tl.float32))
    tl.store(factors + 1, scale)
    tl.store(factors + 2, step.to(tl.float32))
    tl.store(factors + 3, inverse_root.to(tl.float32))


@triton.jit
def _update(
    values,  # [P, S]; the name `params` is taken in what Triton generates for a launch
    grads,  # [P, S]
    mean,  # [P, S]
    square,  # [P, S]
    copy,  # [P, S] in the dtype of the forward pass
    factors,  # [P, 4]
    lr,  # [1]
    beta_mean,
    rest_mean,
    beta_square,
    rest_square,
    eps,
    weight_decay,
    size,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    proxy = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    mask = place < size - first
    first += proxy * size
    factors += proxy * 4
    if tl.load(factors) != 0:
        grad = tl.load(grads + first + place, mask=mask, other=0.0) * tl.load(factors + 1)
        m = beta_mean * tl.load(mean + first + place, mask=mask, other=0.0) + rest_mean * grad
        v = tl.load(square + first + place, mask=mask, other=0.0)
        v = beta_square * v + rest_square * grad * grad
        param = tl.load(values + first + place, mask=mask, other=0.0)
        param *= 1.0 - tl.load(lr) * weight_decay
        param -= tl.load(factors + 2) * m / (tl.sqrt(v) * tl.load(factors + 3) + eps)
        tl.store(mean + first + place, m, mask=mask)
        tl.store(square + first + place, v, mask=mask)
        tl.store(values + first + place, param, mask=mask)
        if HAS_COPY:
            tl.store(copy + first + place, param.to(copy.dtype.element_ty), mask=mask)
    tl.store(grads + first + place, tl.zeros((BLOCK,), tl.float32), mask=mask)


def cases(capability: int) -> list[Case]:
    """Return the four kernels; sizes are arguments, so one configuration serves every model."""
    norm, adamw = launches.NORM, launches.ADAMW
    found = [
        Case(
            name="adamw.squares",
            kernel=_sum_squares,
            signature={"grads": "*fp32", "squares": "*fp32", "size": "i32:16"},
            constants={"BLOCK": norm.block, "NUM_BLOCKS": norm.num_blocks},
            num_warps=norm.num_warps,
        ),
        Case(
            name="adamw.norms",
            kernel=_add_squares,
            signature={"squares": "*fp32", "norms": "*fp32", "num_parts": "i32"},
            constants={"BLOCK": norm.block},
            num_warps=norm.num_warps,
        ),
        Case(
            name="adamw.judge",
            kernel=_judge,
            signature={
                "norms": "*fp32",
                "lr": "*fp32",
                "counts": "*i32",
                "failed": "*u8",
                "factors": "*fp32",
                **dict.fromkeys(("log2_beta_mean", "log2_beta_square", "clip_norm"), "fp32"),
            },
            num_warps=1,
        ),
    ]
    for has_copy in (True, False):
        settings = ("beta_mean", "rest_mean", "beta_square", "rest_square", "eps", "weight_decay")
        found.append(
            Case(
                name=f"adamw.update{' and copy' if has_copy else ''}",
                kernel=_update,
                signature={
                    **dict.fromkeys(("values", "grads", "mean", "square"), "*fp32"),
                    "copy": "*bf16" if has_copy else "*fp32",
                    "factors": "*fp32",
                    "lr": "*fp32",
                    **dict.fromkeys(settings, "fp32"),
                    "size": "i32:16",
                },
                constants={"HAS_COPY": has_copy, "BLOCK": adamw.block},
                num_warps=adamw.num_warps,
            )
        )
    return found
