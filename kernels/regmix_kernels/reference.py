"""Every operation of the model in plain PyTorch: the specification that fast versions meet.

Enters: tensors of any float dtype. Leaves: new tensors; autograd gives the backward. Written to
be read and to be run in float64, not to be fast; imports torch only.

... any leading dimensions, N tokens, T tokens of a sequence, D width, H heads, R head size,
F hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A label that counts for nothing, as in PyTorch's own cross-entropy.
IGNORED = -100


def rmsnorm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""
    return x_ND * torch.rsqrt(x_ND.square().mean(dim=-1, keepdim=True) + eps) * weight_D


def rope(x_TR: Tensor, base: float) -> Tensor:
    """Return [..., T, R] rotated by position: pairs are (i, i + R/2), as in transformers' Llama."""
    seq_len, head_dim = x_TR.shape[-2:]
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=x_TR.device) / head_dim
    positions = torch.arange(seq_len, dtype=torch.float64, device=x_TR.device)
    angles = torch.outer(positions, base**-steps)
    cos, sin = angles.cos().to(x_TR.dtype), angles.sin().to(x_TR.dtype)
    low, high = x_TR.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def causal_attention(q_HTR: Tensor, k_HTR: Tensor, v_HTR: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(R), keys up to the query) v, [..., T, R]."""
    seq_len, head_dim = q_HTR.shape[-2:]
    scores = q_HTR @ k_HTR.transpose(-1, -2) / math.sqrt(head_dim)
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q_HTR.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v_HTR


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Return silu(gate) * up (arXiv 2002.05202)."""
    return gate_NF * torch.sigmoid(gate_NF) * up_NF


def linear_cross_entropy(e_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the nats of each label under softmax(e head^T), [N]."""
    logits = e_ND @ head_VD.T
    return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels_N[:, None])[:, 0]


def embedding_grad(dx_ND: Tensor, tokens_N: Tensor, vocab_size: int) -> Tensor:
    """Return the gradient of the embedding: rows of `dx_ND` summed by token, [V, D]."""
    grad = torch.zeros(vocab_size, dx_ND.shape[1], dtype=dx_ND.dtype, device=dx_ND.device)
    for token, row in zip(tokens_N.tolist(), dx_ND, strict=True):
        grad[token] += row
    return grad


def adamw(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    count: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameter and moments after update number `count`, from 1 (arXiv 1711.05101)."""
    mean = betas[0] * mean + (1 - betas[0]) * grad
    square = betas[1] * square + (1 - betas[1]) * grad.square()
    corrected = mean / (1 - betas[0] ** count)
    root = (square / (1 - betas[1] ** count)).sqrt()
    return param * (1 - lr * weight_decay) - lr * corrected / (root + eps), mean, square


def clip_scale(norm: float, limit: float) -> float:
    """Return what gradients of global norm `norm` are multiplied with, at most 1."""
    return min(1.0, limit / norm) if norm > 0 else 1.0
