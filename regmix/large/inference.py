"""The forward of one model, with keys and values kept: for evaluation and generation.

Enters: parameters [1, ...] and tokens. Leaves: logits of the next token, or sums of nats. On any
device, in float32 or bfloat16, norms and the loss always in float32. Computes no gradient, and
draws no token.

B sequences, T tokens, D width, F hidden, H heads, K key and value heads, R head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention, silu

from regmix.errors import ModelError
from regmix.model import ops
from regmix.model.presets import ModelShape

# Logits that the loss holds at once, 256 MiB in float32.
_LOGITS = 1 << 26
_ROPE_ROWS = 4096  # of the rotary embedding, at first


class KeyCache:
    """Keys and values of one sequence by layer, [1, K, T, R] each; `length` tokens are there."""

    def __init__(self, shape: ModelShape, capacity: int, like: Tensor) -> None:
        size = (1, shape.kv_heads, capacity, shape.head_dim)
        self.keys = [like.new_empty(size) for _ in range(shape.num_layers)]
        self.values = [like.new_empty(size) for _ in range(shape.num_layers)]
        self.capacity, self.length = capacity, 0


class LlamaForward:
    """One model, ready to compute; parameters [1, ...] are moved to the device and the type."""

    def __init__(
        self,
        shape: ModelShape,
        parameters: Mapping[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        # Of a stack of one, the one; a matrix of the right device and type is not copied.
        self._weights = {
            name: value[0].to(device=device, dtype=dtype) for name, value in parameters.items()
        }
        self._head_VD = self._weights["embedding" if shape.tied else "head"]
        self._cos_TR = self._sin_TR = torch.empty(0, device=device)

    def new_cache(self, capacity: int) -> KeyCache:
        """Return an empty cache for a sequence of at most `capacity` tokens."""
        return KeyCache(self.shape, capacity, self._head_VD)

    @torch.inference_mode()
    def next_logits(self, tokens_T: Tensor, cache: KeyCache) -> Tensor:
        """Return the logits [V] float32 after the tokens, which follow those in the cache."""
        if cache.length + len(tokens_T) > cache.capacity:
            raise ModelError(
                f"{cache.length + len(tokens_T)} tokens in a cache for {cache.capacity}",
                cure="Make a larger cache",
            )
        x_BTD = self._hidden(tokens_T[None].to(self._head_VD.device), cache)
        return linear(x_BTD[0, -1], self._head_VD).float()

    @torch.inference_mode()
    def evaluate(self, tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the sum of nats where `mask_BT` holds, [1] float64 on the CPU."""
        device = self._head_VD.device
        x_ND = self._hidden(tokens_BT1[:, :-1].to(device), None).flatten(0, 1)
        labels_N = tokens_BT1[:, 1:].reshape(-1).to(device)
        kept_N = mask_BT.reshape(-1).to(device, torch.bool)
        x_ND, labels_N = x_ND[kept_N], labels_N[kept_N]
        at_once = max(1, _LOGITS // self.shape.vocab_size)
        total = torch.zeros(1, dtype=torch.float64)
        for first in range(0, len(labels_N), at_once):
            rows = slice(first, first + at_once)
            logits = linear(x_ND[rows], self._head_VD).float()
            nats = cross_entropy(logits, labels_N[rows], reduction="none")
            total += nats.sum(dtype=torch.float64).cpu()
        return total

    def _hidden(self, tokens_BT: Tensor, cache: KeyCache | None) -> Tensor:
        """Return the normed residual stream [B, T, D] after the last layer."""
        start = 0 if cache is None else cache.length
        length = tokens_BT.shape[1]
        self._check(tokens_BT)
        self._grow_rope(start + length)
        x_BTD = self._weights["embedding"][tokens_BT]
        for layer in range(self.shape.num_layers):
            x_BTD = x_BTD + self._attend(layer, x_BTD, start, cache)
            weights = self._weights
            normed_BTD = self._norm(x_BTD, weights[f"layers.{layer}.mlp_norm"])
            gate, up = linear(normed_BTD, weights[f"layers.{layer}.gate_up"]).chunk(2, dim=-1)
            x_BTD = x_BTD + linear(silu(gate) * up, weights[f"layers.{layer}.down"])
        if cache is not None:
            cache.length += length
        return self._norm(x_BTD, self._weights["norm"])

    def _attend(self, layer: int, x_BTD: Tensor, start: int, cache: KeyCache | None) -> Tensor:
        shape, weights, length = self.shape, self._weights, x_BTD.shape[1]
        heads, kv_heads = shape.num_heads, shape.kv_heads
        normed_BTD = self._norm(x_BTD, weights[f"layers.{layer}.attention_norm"])
        qkv = linear(normed_BTD, weights[f"layers.{layer}.qkv"])
        qkv = qkv.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        q_BHTR, k_BKTR, v_BKTR = qkv.split([heads, kv_heads, kv_heads], dim=1)
        q_BHTR, k_BKTR = self._rotate(q_BHTR, start), self._rotate(k_BKTR, start)
        if cache is not None:
            end = start + length
            cache.keys[layer][:, :, start:end] = k_BKTR
            cache.values[layer][:, :, start:end] = v_BKTR
            k_BKTR, v_BKTR = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        mask = None
        if start and length > 1:
            ones = torch.ones(length, start + length, dtype=torch.bool, device=x_BTD.device)
            mask = ones.tril(diagonal=start)
        out = scaled_dot_product_attention(
            q_BHTR,
            k_BKTR,
            v_BKTR,
            attn_mask=mask,
            is_causal=start == 0 and length > 1,
            enable_gqa=heads != kv_heads,
        )
        return linear(out.transpose(1, 2).flatten(2), weights[f"layers.{layer}.attention_out"])

    def _norm(self, x_BTD: Tensor, weight_D: Tensor) -> Tensor:
        x = x_BTD.float()
        rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.shape.norm_eps)
        return (x * rstd).to(x_BTD.dtype) * weight_D

    def _rotate(self, x_BHTR: Tensor, start: int) -> Tensor:
        rows = slice(start, start + x_BHTR.shape[2])
        low, high = x_BHTR.float().chunk(2, dim=-1)
        cos, sin = self._cos_TR[rows], self._sin_TR[rows]
        turned = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return turned.to(x_BHTR.dtype)

    def _grow_rope(self, length: int) -> None:
        if len(self._cos_TR) < length:
            like = torch.empty(0, device=self._head_VD.device)
            # Not for all of seq_len: a checkpoint may claim any number.
            longer = max(length, min(self.shape.seq_len, _ROPE_ROWS), 2 * len(self._cos_TR))
            cos, sin = ops.rope_tables(longer, self.shape.head_dim, self.shape.rope_base, like)
            self._cos_TR, self._sin_TR = cos.t().contiguous(), sin.t().contiguous()

    def _check(self, tokens_BT: Tensor) -> None:
        low, high = (int(end) for end in torch.aminmax(tokens_BT))
        if low < 0 or high >= self.shape.vocab_size:
            raise ModelError(
                f"token {low if low < 0 else high} with a vocabulary of {self.shape.vocab_size}",
                cure="Use the tokenizer that the model was trained with",
            )
