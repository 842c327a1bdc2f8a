"""A large Llama as a PyTorch module: a stack of one, differentiated by autograd.

Enters: tokens [B, T+1]. Leaves: the sum of nats over the tokens that are predicted, or logits.
Parameters have the names of `model.parameters` and the shapes [1, ...], so checkpoints, `evaluate`
and `export` take them as they take a stack's. Updates no parameter and knows no rank.

B sequences, T tokens of one, D width, H heads, K kv heads, R head size, F hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regmix.large.distributed import operations as ops
from regmix.model.parameters import parameter_shapes
from regmix.model.presets import ModelShape


class Block(nn.Module):
    """One layer; `recompute`: keep its input only, and run it again in the backward."""

    attention_norm: Tensor
    qkv: Tensor
    attention_out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor

    def __init__(self, shape: ModelShape, sizes: dict[str, tuple[int, ...]], recompute: bool):
        super().__init__()
        self.shape, self.recompute = shape, recompute
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(1, *size)))

    def forward(
        self, x_BTD: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, mask_B1TT: Tensor | None
    ) -> Tensor:
        """Return the residual stream after attention and SwiGLU."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                self._run, x_BTD, cos_TR2, sin_TR2, mask_B1TT, use_reentrant=False
            )
            return out
        return self._run(x_BTD, cos_TR2, sin_TR2, mask_B1TT)

    def _run(
        self, x_BTD: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, mask_B1TT: Tensor | None
    ) -> Tensor:
        shape = self.shape
        heads, kv_heads = shape.num_heads, shape.kv_heads
        normed = ops.rms_norm(x_BTD, self.attention_norm, shape.norm_eps)
        qkv = ops.linear(normed, self.qkv).unflatten(-1, (heads + 2 * kv_heads, shape.head_dim))
        q_BTHR, k_BTKR, v_BTKR = qkv.split([heads, kv_heads, kv_heads], dim=2)
        q_BTHR = ops.rotate(q_BTHR, cos_TR2, sin_TR2)
        k_BTKR = ops.rotate(k_BTKR, cos_TR2, sin_TR2)
        attended = ops.attention(q_BTHR, k_BTKR, v_BTKR, mask_B1TT).flatten(2)
        x_BTD = x_BTD + ops.linear(attended, self.attention_out)
        normed = ops.rms_norm(x_BTD, self.mlp_norm, shape.norm_eps)
        hidden = ops.swiglu(ops.linear(normed, self.gate_up))
        return x_BTD + ops.linear(hidden, self.down)


class LargeLlama(nn.Module):
    """A model of `shape`; its parameters are empty until they are filled.

    dtype: of activations and products; parameters are float32 unless who shards them casts them.
    separator: the token that ends a document, to attend within documents only; None to attend
    across. recompute: activation checkpointing of every layer.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        dtype: torch.dtype = torch.float32,
        separator: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.separator = shape, dtype, separator
        sizes = parameter_shapes(shape)
        self.embedding = nn.Parameter(torch.empty(1, *sizes["embedding"]))
        blocks = []
        for layer in range(shape.num_layers):
            prefix = f"layers.{layer}."
            own = {n.removeprefix(prefix): s for n, s in sizes.items() if n.startswith(prefix)}
            blocks.append(Block(shape, own, recompute))
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.Parameter(torch.empty(1, *sizes["norm"]))
        self.head = None if shape.tied else nn.Parameter(torch.empty(1, *sizes["head"]))
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, tokens_BT1: Tensor, kept_BT: Tensor | None = None) -> Tensor:
        """Return the sum of nats, float64 []; of the predictions where `kept_BT` holds, or of all.

        Everything that reads a parameter happens in here, since FSDP gathers them for the call.
        """
        labels_BT = tokens_BT1[:, 1:]
        if kept_BT is not None:
            labels_BT = labels_BT.masked_fill(~kept_BT, ops.IGNORED)
        e_BTD = self._features(tokens_BT1[:, :-1])
        return ops.linear_cross_entropy(e_BTD.flatten(0, 1), self._head(), labels_BT.reshape(-1))

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return logits [B, T, V]; for tests and generation, not under FSDP."""
        return ops.linear(self._features(tokens_BT), self._head())

    def _head(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _features(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = nn.functional.embedding(tokens_BT, self.embedding.squeeze(0)).to(self.dtype)
        mask = None if self.separator is None else ops.document_mask(tokens_BT, self.separator)
        cos_TR2, sin_TR2 = self._rope(tokens_BT.shape[1], x_BTD.device)
        for block in self.layers:
            x_BTD = block(x_BTD, cos_TR2, sin_TR2, mask)
        return ops.rms_norm(x_BTD, self.norm, self.shape.norm_eps)

    def _rope(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (seq_len, device)
        if key not in self._tables:
            shape = self.shape
            exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
            angles = torch.outer(
                torch.arange(seq_len, dtype=torch.float64), shape.rope_base**-exponents
            )
            # float32 whatever the activations are: bfloat16 has 8 bits for a position's angle.
            self._tables[key] = (angles.cos().float().to(device), angles.sin().float().to(device))
        return self._tables[key]
