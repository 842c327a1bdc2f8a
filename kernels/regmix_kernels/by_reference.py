"""The kernels' interfaces served by the specification: plain PyTorch, any device, any float dtype.

Enters and leaves: what each kernel's module says, under the same meaning. Gradients are autograd's
of `reference`; nothing here is fast. A whole stack can so be run without a GPU, in float64 too, and
compared with the same stack over the kernels. `sdpa_*` is attention by PyTorch's own fused one.

P proxies, N tokens, T tokens of a sequence, D width, H query heads, K key and value heads, R head
size, F hidden, V vocabulary, C columns of packed QKV, S floats of one proxy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regmix_kernels import reference
from regmix_kernels.reference import IGNORED


def plan(ids_PN: Tensor, num_segments: int) -> tuple[Tensor, int]:
    """Return what `add_rows` needs of the ids."""
    return ids_PN.long(), num_segments


def add_rows(
    rows_PND: Tensor, of_ids: tuple[Tensor, int], out_PVD: Tensor, scale: float = 1.0
) -> None:
    """Add the rows of each id to its row of `out_PVD`; see `segment_sum`."""
    ids_PN, num_segments = of_ids
    for rows_ND, ids_N, out_VD in zip(rows_PND, ids_PN, out_PVD, strict=True):
        known_N = (ids_N >= 0) & (ids_N < num_segments)
        out_VD.index_add_(0, ids_N[known_N], scale * rows_ND[known_N].to(out_VD.dtype))


def embed(table_PVD: Tensor, tokens_PN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tokens' rows of the table, [P, N, D]; see `embedding`."""
    pairs = zip(table_PVD, tokens_PN, strict=True)
    rows_PND = torch.stack([table_VD[tokens_N.long()] for table_VD, tokens_N in pairs])
    return rows_PND.to(dtype or table_PVD.dtype)


def rmsnorm(
    x_PND: Tensor, weight_PD: Tensor, eps: float, branch_PND: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, x + branch and 1 / rms(x); see `rmsnorm.forward`."""
    if branch_PND is not None:
        x_PND = x_PND + branch_PND
    rstd_PN = torch.rsqrt(x_PND.square().mean(dim=-1) + eps)
    weight = weight_PD[:, None].to(x_PND.dtype)
    return reference.rmsnorm(x_PND, weight, eps), x_PND, rstd_PN


def rmsnorm_backward(
    dy_PND: Tensor,
    x_PND: Tensor,
    weight_PD: Tensor,
    rstd_PN: Tensor,
    dweight_PD: Tensor,
    dresidual_PND: Tensor | None = None,
) -> Tensor:
    """Return dx and add to `dweight_PD`; see `rmsnorm.backward`."""
    x, weight = _leaf(x_PND), _leaf(weight_PD.to(x_PND.dtype))
    with torch.enable_grad():
        # eps lies in rstd: rstd^-2 = mean(x^2) + eps.
        eps = rstd_PN.detach() ** -2 - x_PND.detach().square().mean(dim=-1)
        y = x * torch.rsqrt(x.square().mean(dim=-1) + eps)[..., None] * weight[:, None]
        dx, dweight = torch.autograd.grad(y, (x, weight), dy_PND)
    dweight_PD += dweight.to(dweight_PD.dtype)
    return dx if dresidual_PND is None else dx + dresidual_PND


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [P, N, F] of [P, N, 2F]; see `swiglu.forward`."""
    return reference.swiglu(*gate_up.chunk(2, dim=-1))


def swiglu_backward(dhidden_PNF: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of gate and up, and the hidden again; see `swiglu.backward`."""
    leaf = _leaf(gate_up)
    with torch.enable_grad():
        hidden = swiglu(leaf)
        (grad,) = torch.autograd.grad(hidden, leaf, dhidden_PNF)
    return grad, hidden.detach()


def rotate(
    qkv_PNC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, num_heads: int, num_kv_heads: int
) -> None:
    """Rotate queries and keys in place; see `rope.rotate_`."""
    qkv_PNC.copy_(_rotated(qkv_PNC, cos_TR2, sin_TR2, num_heads, num_kv_heads))


def attention(
    qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs [P, N, H R], and log-sum-exp in bits [P, H, N]; see `attention`."""
    q, k, v = _split(qkv_PNC, num_heads, num_kv_heads, seq_len)
    out = _merge(reference.causal_attention(q, k, v))
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    return out, scores.logsumexp(dim=-1).transpose(1, 2).flatten(2) / math.log(2)


def attention_backward(
    dout: Tensor,
    qkv_PNC: Tensor,
    out: Tensor,
    lse: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
) -> Tensor:
    """Return the gradient of packed QKV before the rotation; see `attention.backward`."""
    angles, sizes = (cos_TR2, sin_TR2), (num_heads, num_kv_heads, seq_len)
    return _backward(reference.causal_attention, dout, qkv_PNC, *angles, *sizes)


def sdpa(
    qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int
) -> tuple[Tensor, Tensor | None]:
    """As `attention`, by `scaled_dot_product_attention`; it keeps no log-sum-exp."""
    return _merge(_sdpa(*_split(qkv_PNC, num_heads, num_kv_heads, seq_len))), None


def sdpa_backward(
    dout: Tensor,
    qkv_PNC: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
) -> Tensor:
    """As `attention_backward`; the forward is run again, and the order of sums may vary."""
    return _backward(_sdpa, dout, qkv_PNC, cos_TR2, sin_TR2, num_heads, num_kv_heads, seq_len)


def head(
    e_PND: Tensor,
    head_PVD: Tensor,
    labels_PN: Tensor,
    *,
    scale: float,
    dhead_PVD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return nats and the gradient of `e`, add to `dhead_PVD`; see `linear_cross_entropy`."""
    e, table = _leaf(e_PND), _leaf(head_PVD)
    with torch.enable_grad():
        nats_PN = torch.stack(
            [_nats(e_ND, c_VD, n) for e_ND, c_VD, n in zip(e, table, labels_PN, strict=True)]
        )
        de, dtable = torch.autograd.grad(scale * nats_PN.sum(), (e, table))
    if dhead_PVD is not None:
        dhead_PVD += dtable.to(dhead_PVD.dtype)
    return nats_PN.detach(), de


def head_loss(e_PND: Tensor, head_PVD: Tensor, labels_PN: Tensor) -> Tensor:
    """Return the nats of the labels, 0 where one is ignored; see `linear_cross_entropy.loss`."""
    rows = zip(e_PND, head_PVD, labels_PN, strict=True)
    return torch.stack([_nats(e_ND, c_VD, labels_N) for e_ND, c_VD, labels_N in rows])


def add_row_sums(values_PN: Tensor, sums_P: Tensor) -> None:
    """Add each row to its sum; see `row_sums`."""
    for row, values_N in enumerate(values_PN):
        sums_P[row] += values_N.sum(dtype=torch.float64)


def gradient_norms(grads_PS: Tensor) -> Tensor:
    """Return each proxy's global gradient norm, [P] float32; see `adamw`."""
    return torch.stack([grads_S.norm() for grads_S in grads_PS]).float()


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
    """Update every proxy that has not failed, in place; see `adamw.update`."""
    for row, norm in enumerate(norms_P.tolist()):
        if not math.isfinite(norm):
            failed_P[row] = 1
        if not failed_P[row]:
            counts_P[row] += 1
            clip = 1.0 if clip_norm is None else reference.clip_scale(norm, clip_norm)
            params_PS[row], mean_PS[row], square_PS[row] = reference.adamw(
                params_PS[row],
                grads_PS[row] * clip,
                mean_PS[row],
                square_PS[row],
                int(counts_P[row]),
                lr=float(lr),
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
            )
            if copy_PS is not None:
                copy_PS[row] = params_PS[row]
    grads_PS.zero_()


def functions() -> dict[str, Callable[..., Any]]:
    """Return every function under the name that a fused stack calls it by."""
    own = (
        *(plan, add_rows, embed, rmsnorm, rmsnorm_backward, swiglu, swiglu_backward, rotate),
        *(attention, attention_backward, head, head_loss, add_row_sums, gradient_norms, update),
    )
    return {function.__name__: function for function in own}


def sdpa_functions() -> dict[str, Callable[..., Any]]:
    """Return attention by PyTorch's own fused one, under the names of `functions`."""
    return {"attention": sdpa, "attention_backward": sdpa_backward}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _nats(e_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    kept_N = labels_N != IGNORED
    nats_N = reference.linear_cross_entropy(e_ND, head_VD, labels_N.long().clamp(min=0))
    return torch.where(kept_N, nats_N, torch.zeros_like(nats_N))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Proxies and sequences are one dimension to it.
    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q_flat, k_flat, v_flat, is_causal=True)
    return out.unflatten(0, q.shape[:2])


def _backward(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    dout: Tensor,
    qkv_PNC: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
) -> Tensor:
    leaf = _leaf(qkv_PNC)
    with torch.enable_grad():
        out = _merge(attend(*_split(leaf, num_heads, num_kv_heads, seq_len)))
        (grad,) = torch.autograd.grad(out, leaf, dout)
    # The transpose of a rotation turns the other way.
    return _rotated(grad, cos_TR2, -sin_TR2, num_heads, num_kv_heads)


def _rotated(
    x_PNC: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, num_heads: int, num_kv_heads: int
) -> Tensor:
    half, rotated = cos_TR2.shape[1], num_heads + num_kv_heads
    heads = x_PNC.unflatten(1, (-1, cos_TR2.shape[0])).unflatten(-1, (-1, 2 * half))
    # Computed in float32 where the rows have fewer bits, as `rope.rotate_` does.
    exact = torch.promote_types(x_PNC.dtype, torch.float32)
    cos, sin = (table[:, None].to(exact) for table in (cos_TR2, sin_TR2))
    low, high = (part.to(exact) for part in heads[..., :rotated, :].split(half, dim=-1))
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    both = torch.cat((turned.to(x_PNC.dtype), heads[..., rotated:, :]), dim=-2)
    return both.flatten(-2).flatten(1, 2)


def _split(
    qkv_PNC: Tensor, num_heads: int, num_kv_heads: int, seq_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as [P, B, H, T, R], key and value heads repeated for their queries."""
    heads = qkv_PNC.unflatten(1, (-1, seq_len)).unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.transpose(2, 3).split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    repeats = num_heads // num_kv_heads
    return q, k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)


def _merge(out_PBHTR: Tensor) -> Tensor:
    """Return [P, N, H R]."""
    return out_PBHTR.transpose(2, 3).flatten(3).flatten(1, 2)
