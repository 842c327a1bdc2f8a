"""The model's operations on a CPU: forward and backward, written into buffers that stay.

Enters: activations, features first: a stack's activation is [G, D, N], so that every bias, norm,
rotation and gate runs along contiguous tokens and no matrix product needs a transposed copy.
Leaves: results in the buffers given, and gradients by hand: no autograd, nothing allocated per
step. Each pair is specified by the function of the same name in `regmix_kernels.reference`.
Does not know the order of the layers: `llama` does.

G proxies of a group, D width, N = B x T tokens, H heads, K key and value heads, R head size,
F hidden, V vocabulary, C tokens of a chunk.

Sums of exponentials are first taken unshifted, which saves two passes over scores and logits;
where a sum leaves the range in which float32 is safe, that proxy alone is done again with the
maximum subtracted. The choice depends on nothing but the proxy's own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Unshifted sums of exponentials outside of this range are done again, shifted: below, terms
# would lose bits to underflow; above, a product with the sum could overflow float32.
_SAFE_SUM = (1e-25, 1e25)

# Logits of a chunk: 4 MiB. Smaller chunks stay in L2 but read and rewrite the head's gradient more
# often: 1 MiB took 1.05 to 1.24 times as long (vocabulary 4096 and 8192, width 64 and 128).
_LOGIT_FLOATS = 1 << 20

# Scores of one call: 1 MiB, which stays in L2 from the product to the sum.
_SCORE_FLOATS = 1 << 18


def path(device: torch.device | str = "cpu") -> str:
    """Return the name of the implementation that serves `device`, for `doctor` and reports."""
    return f"torch-{torch.device(device).type}"


class Workspace:
    """Buffers by name, allocated at first use and kept for the next step."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the buffer called `name`, of `like`'s dtype and device; its content is stale."""
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.shape != shape
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
            self._buffers[name] = buffer
        return buffer

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def safe_sums(sums: Tensor) -> bool:
    """Return whether every sum of exponentials is in the safe range (NaN is not)."""
    low, high = torch.aminmax(sums)
    return float(low) > _SAFE_SUM[0] and float(high) < _SAFE_SUM[1]


# RMSNorm. The weight is folded into the matrix that follows (a few thousand numbers instead of
# a pass over all tokens), so these two know only the normalisation.


def normalize(x_GDN: Tensor, out_GDN: Tensor, rstd_G1N: Tensor, eps: float) -> None:
    """Write x / rms(x) over the features, and 1 / rms(x)."""
    torch.mul(x_GDN, x_GDN, out=out_GDN)
    torch.sum(out_GDN, dim=1, keepdim=True, out=rstd_G1N)
    rstd_G1N.div_(x_GDN.shape[1]).add_(eps).rsqrt_()
    torch.mul(x_GDN, rstd_G1N, out=out_GDN)


def normalize_backward(
    dy_GDN: Tensor, y_GDN: Tensor, rstd_G1N: Tensor, dx_GDN: Tensor, scratch_GDN: Tensor
) -> None:
    """Add the gradient of `normalize` to `dx_GDN`; `y_GDN` is what it wrote."""
    torch.mul(dy_GDN, y_GDN, out=scratch_GDN)
    mean_G1N = scratch_GDN.sum(dim=1, keepdim=True).div_(y_GDN.shape[1])
    torch.addcmul(dy_GDN, y_GDN, mean_G1N, value=-1, out=scratch_GDN)
    dx_GDN.addcmul_(scratch_GDN, rstd_G1N)


# Rotary embedding, the halves convention of transformers' Llama.


def rope_tables(seq_len: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [R/2, T] each."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=like.device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float64, device=like.device)
    angles = torch.outer(base**-steps, positions)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, backward: bool = False) -> None:
    """Write `x` [..., R, T] rotated by position; `backward` turns the other way."""
    half = cos.shape[0]
    x_low, x_high = x[..., :half, :], x[..., half:, :]
    out_low, out_high = out[..., :half, :], out[..., half:, :]
    sign = 1 if backward else -1
    torch.mul(x_low, cos, out=out_low)
    out_low.addcmul_(x_high, sin, value=sign)
    torch.mul(x_high, cos, out=out_high)
    out_high.addcmul_(x_low, sin, value=-sign)


# Causal attention. Sequences come first and lie apart, [B, G, H, R, T], because bmm is batched
# only into contiguous results; scores are kept as [keys, queries], so sums run over rows.


@dataclass
class AttentionState:
    """What the backward of one layer's attention needs."""

    q: Tensor  # [B, G, H, R, T], rotated
    k: Tensor
    v: Tensor
    weights: Tensor  # [B, G, H, T keys, T queries], exponentials, not normalised
    inverse: Tensor  # [B, G, H, 1, T], 1 / sum of the exponentials
    out: Tensor  # [B, G, H, R, T], not normalised


def by_sequence(x_GDN: Tensor, num_sequences: int, num_heads: int) -> Tensor:
    """Return [G, D, N] seen as [B, G, H, R, T]."""
    group, width, num_tokens = x_GDN.shape
    split = (group, num_heads, width // num_heads, num_sequences, num_tokens // num_sequences)
    return x_GDN.view(split).permute(3, 0, 1, 2, 4)


def causal_mask(seq_len: int, like: Tensor) -> Tensor:
    """Return 1 where a query may see a key and 0 elsewhere, [T keys, T queries]."""
    return torch.ones((seq_len, seq_len), dtype=like.dtype, device=like.device).triu_()


def attend(state: AttentionState, mask: Tensor, out_BGHRT: Tensor) -> None:
    """Fill `weights`, `inverse` and `out` from q, k and v; write the attention's result."""
    scale = state.q.shape[-2] ** -0.5
    for part in _parts(state.weights):
        weights = _flat(state.weights[part])
        k_t = _flat(state.k[part]).transpose(1, 2)
        torch.baddbmm(weights, k_t, _flat(state.q[part]), beta=0, alpha=scale, out=weights)
        # Masked after exp: exp(-inf) takes the vector library's slow path (30 times slower).
        weights.exp_().mul_(mask)
        torch.sum(weights, dim=1, keepdim=True, out=_flat(state.inverse[part]))
        torch.bmm(_flat(state.v[part]), weights, out=_flat(state.out[part]))
    if not safe_sums(state.inverse):
        _attend_shifted(state, mask)
    state.inverse.reciprocal_()
    torch.mul(state.out, state.inverse, out=out_BGHRT)


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[-2:])


def _parts(weights: Tensor) -> list[slice]:
    batch = weights.shape[0]
    size = max(1, _SCORE_FLOATS * batch // weights.numel())
    return [slice(start, start + size) for start in range(0, batch, size)]


def _attend_shifted(state: AttentionState, mask: Tensor) -> None:
    scale = state.q.shape[-2] ** -0.5
    for proxy in range(state.q.shape[1]):
        if safe_sums(state.inverse[:, proxy]):
            continue
        q, k, v = (x[:, proxy] for x in (state.q, state.k, state.v))
        scores = (k.transpose(-1, -2) @ q).mul_(scale).masked_fill_(mask == 0, float("-inf"))
        scores.sub_(scores.amax(dim=-2, keepdim=True)).exp_()
        state.weights[:, proxy] = scores
        state.inverse[:, proxy] = scores.sum(dim=-2, keepdim=True)
        state.out[:, proxy] = v @ scores


def attend_backward(
    state: AttentionState, dout_BGHRT: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, spare: Workspace
) -> None:
    """Write dq, dk and dv, [B, G, H, R, T] contiguous; `state.out` is overwritten."""
    scale = state.q.shape[-2] ** -0.5
    dout = spare.get("dout_by_sequence", tuple(state.q.shape), state.q)
    torch.mul(dout_BGHRT, state.inverse, out=dout)
    state.out.mul_(dout)
    delta = torch.sum(state.out, dim=-2, keepdim=True).mul_(state.inverse)
    for part in _parts(state.weights):
        weights, dout_part = _flat(state.weights[part]), _flat(dout[part])
        scores = spare.get("dscores", tuple(weights.shape), weights)
        torch.bmm(dout_part, weights.transpose(1, 2), out=_flat(dv[part]))
        torch.bmm(_flat(state.v[part]).transpose(1, 2), dout_part, out=scores)
        scores.sub_(_flat(delta[part])).mul_(weights)
        dq_part, dk_part = _flat(dq[part]), _flat(dk[part])
        k, q = _flat(state.k[part]), _flat(state.q[part])
        torch.baddbmm(dq_part, k, scores, beta=0, alpha=scale, out=dq_part)
        scores_t = scores.transpose(1, 2)
        torch.baddbmm(dk_part, q, scores_t, beta=0, alpha=scale, out=dk_part)


# SwiGLU: gate in the first F features, up in the other F.


def swiglu(gate_up_GFN: Tensor, silu_GFN: Tensor, out_GFN: Tensor) -> None:
    """Write silu(gate) and silu(gate) * up."""
    gate, up = gate_up_GFN.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate, out=silu_GFN)
    torch.mul(silu_GFN, up, out=out_GFN)


def swiglu_backward(
    dout_GFN: Tensor, gate_up_GFN: Tensor, silu_GFN: Tensor, dgate_up_GFN: Tensor
) -> None:
    """Write the gradient of gate and up; `dout_GFN` is overwritten."""
    gate, up = gate_up_GFN.chunk(2, dim=1)
    dgate, dup = dgate_up_GFN.chunk(2, dim=1)
    torch.mul(dout_GFN, silu_GFN, out=dup)
    dout_GFN.mul_(up)
    torch.ops.aten.silu_backward.grad_input(dout_GFN, gate, grad_input=dgate)


# Head and cross-entropy, fused and chunked, one proxy at a time. With p = exp(logits) and
# l = sum(p), take l off p at the label; then dE = (p C) / l and dC = p^T (E / l): the logits see
# one product, one exp and one sum forward, two products backward, and are never divided.


def chunk_columns(vocab_size: int, num_tokens: int) -> int:
    """Return how many tokens the head handles at once."""
    chunk = _LOGIT_FLOATS // vocab_size // 16 * 16
    return min(num_tokens, max(32, min(chunk, 256)))


def head_loss(
    e_DN: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    spare: Workspace,
    grad_e_DN: Tensor | None = None,
    grad_head_VD: Tensor | None = None,
) -> Tensor:
    """Return nats per token [N]; write the gradients of their mean where buffers are given."""
    (width, num_tokens), vocab_size = e_DN.shape, head_VD.shape[0]
    chunk = chunk_columns(vocab_size, num_tokens)
    nats_N = torch.empty(num_tokens, dtype=e_DN.dtype, device=e_DN.device)
    for start in range(0, num_tokens, chunk):
        columns = slice(start, min(start + chunk, num_tokens))
        e_DC, labels_C = e_DN[:, columns], labels_N[columns]
        size = labels_C.shape[0]
        p_VC = spare.get(f"logits.{size}", (vocab_size, size), e_DN)
        at_label_C = torch.arange(size, device=e_DN.device).add_(labels_C, alpha=size)
        torch.mm(head_VD, e_DC, out=p_VC)
        label_logits_C = p_VC.view(-1).index_select(0, at_label_C)
        p_VC.exp_()
        sums_C = p_VC.sum(dim=0)
        if not safe_sums(sums_C):
            torch.mm(head_VD, e_DC, out=p_VC)
            shift_C = p_VC.amax(dim=0)
            p_VC.sub_(shift_C).exp_()
            torch.sum(p_VC, dim=0, out=sums_C)
            label_logits_C.sub_(shift_C)
        torch.sub(sums_C.log(), label_logits_C, out=nats_N[columns])
        if grad_e_DN is None or grad_head_VD is None:
            continue
        p_VC.view(-1).index_add_(0, at_label_C, sums_C, alpha=-1)
        inverse_C = sums_C.mul_(num_tokens).reciprocal_()
        torch.mm(head_VD.t(), p_VC, out=grad_e_DN[:, columns])
        grad_e_DN[:, columns].mul_(inverse_C)
        scaled_CD = spare.get(f"scaled.{size}", (size, width), e_DN)
        torch.mul(e_DC, inverse_C, out=scaled_CD.t())
        if start == 0:
            torch.mm(p_VC, scaled_CD, out=grad_head_VD)
        else:
            grad_head_VD.addmm_(p_VC, scaled_CD)
    return nats_N
