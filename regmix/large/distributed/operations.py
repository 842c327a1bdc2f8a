"""The operations of a large model: the one place where their implementations are chosen.

Enters: activations, token-major, and weights of one model in any float dtype. Leaves: activations
in their own dtype, and the loss. Autograd runs through all of them. Knows no rank, no layer and
no optimizer.

B sequences, T tokens of one, N = B x T, D width, H heads, K kv heads, R head size, F hidden,
V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# A label that is not predicted: it adds no loss and no gradient.
IGNORED = -100
# Logits that are held at once, in float32: 2^26 of them are 256 MiB.
_LOGITS = 1 << 26


def linear(x: Tensor, weight_1OI: Tensor) -> Tensor:
    """Return x W^T in x's dtype; the weight is that of a stack of one."""
    # Not weight[0]: the gradient of an index is a tensor of zeros that a row is copied into.
    return functional.linear(x, weight_1OI.squeeze(0).to(x.dtype))


def rms_norm(x_BTD: Tensor, weight_1D: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) times the weight, in x's dtype; torch sums squares in float32."""
    weight_D = weight_1D.squeeze(0).to(x_BTD.dtype)
    return functional.rms_norm(x_BTD, (x_BTD.shape[-1],), weight_D, eps)


def rotate(x_BTHR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Return queries or keys turned by their position, computed in the tables' dtype."""
    low, high = x_BTHR.to(cos_TR2.dtype).chunk(2, dim=-1)
    cos, sin = cos_TR2[:, None, :], sin_TR2[:, None, :]
    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return turned.to(x_BTHR.dtype)


def attention(
    q_BTHR: Tensor, k_BTKR: Tensor, v_BTKR: Tensor, mask_B1TT: Tensor | None = None
) -> Tensor:
    """Return causal attention [B, T, H, R]; with a mask, only where it holds as well."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHR, k_BTKR, v_BTKR))
    out = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask_B1TT,
        is_causal=mask_B1TT is None,
        enable_gqa=q.shape[1] > k.shape[1],
    )
    return out.transpose(1, 2)


def document_mask(tokens_BT: Tensor, separator: int) -> Tensor:
    """Return where a query may see a key, [B, 1, T queries, T keys]: its document, up to itself.

    A document ends with its separator, so the token after one begins the next document.
    """
    document_BT = (tokens_BT == separator).cumsum(dim=1)
    document_BT = torch.cat([torch.zeros_like(document_BT[:, :1]), document_BT[:, :-1]], dim=1)
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same.tril()


def swiglu(gate_up_BT2F: Tensor) -> Tensor:
    """Return silu(gate) * up; gate in the first F features."""
    gate, up = gate_up_BT2F.chunk(2, dim=-1)
    return functional.silu(gate) * up


def linear_cross_entropy(e_ND: Tensor, head_1VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the sum of nats of the labels, float64 []; `IGNORED` ones count nothing.

    Logits are float32 and never whole: gradients are made with the loss, a chunk at a time
    (Liger-Kernel's linear cross-entropy, arXiv:2410.10989).
    """
    total: Tensor = _LinearCrossEntropy.apply(e_ND, head_1VD.squeeze(0).to(e_ND.dtype), labels_N)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, e_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float64, device=e_ND.device)
        de_ND = torch.empty_like(e_ND) if needed else None
        dhead_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needed else None
        chunk = max(1, _LOGITS // head_VD.shape[0])
        for start in range(0, e_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            e_CD, labels_C = e_ND[rows], labels_N[rows]
            logits_CV = (e_CD @ head_VD.t()).float()
            log_sums_C = logits_CV.logsumexp(dim=1)
            kept_C = labels_C != IGNORED
            labels_C1 = labels_C.clamp_min(0)[:, None]
            nats_C = log_sums_C - logits_CV.gather(1, labels_C1)[:, 0]
            total += torch.where(kept_C, nats_C, 0.0).sum(dtype=torch.float64)
            if de_ND is None or dhead_VD is None:
                continue
            p_CV = logits_CV.sub_(log_sums_C[:, None]).exp_()
            p_CV.scatter_add_(1, labels_C1, p_CV.new_full(labels_C1.shape, -1.0))
            p_CV = p_CV.mul_(kept_C[:, None]).to(e_ND.dtype)
            torch.mm(p_CV, head_VD, out=de_ND[rows])
            dhead_VD += p_CV.t() @ e_CD
        if de_ND is not None and dhead_VD is not None:
            ctx.save_for_backward(de_ND, dhead_VD)
            ctx.head_dtype = head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        de_ND, dhead_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            de_ND * scale.to(de_ND.dtype),
            (dhead_VD * scale.float()).to(ctx.head_dtype),
            None,
        )
