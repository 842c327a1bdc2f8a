"""Forward and backward of a stack's micro-batch, over the fused operations.

Enters: the flat parameters of a stack, tokens and labels of a micro-batch. Leaves: nats per token,
and gradients added to the float32 buffers. Nothing waits for the device and nothing depends on
numbers that lie there, so a graph can be captured of it. Updates no parameter.

Activations are token-major, [P, N, ...], in the dtype of the working copy; statistics, gradients of
parameters and losses are float32. The residual stream is kept after every addition, since the
norms' backward reads it.

P proxies, N tokens of a micro-batch, D width, F hidden, V vocabulary, C columns of packed QKV.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from regmix_kernels.products import matmul
from torch import Tensor

from regmix.model.fused.flat import FlatParameters
from regmix.model.fused.operations import Operations
from regmix.model.presets import ModelShape


@dataclass
class _Normed:
    """A norm's input after the addition, its result, and 1 / rms."""

    x_PND: Tensor
    y_PND: Tensor
    rstd_PN: Tensor


@dataclass
class _LayerState:
    """What the backward of one layer reads."""

    attention_norm: _Normed
    qkv_PNC: Tensor  # rotated
    attended_PND: Tensor
    lse: Tensor
    mlp_norm: _Normed
    gate_up_PN2F: Tensor


class FusedLlama:
    """Llamas of one shape over `Operations`; the parameters are given to each call."""

    def __init__(self, shape: ModelShape, ops: Operations, device: torch.device) -> None:
        from regmix_kernels.rope import rope_tables

        self.shape, self.ops = shape, ops
        self._cos, self._sin = rope_tables(
            shape.seq_len, shape.head_dim, shape.rope_base, device, torch.float32
        )

    def forward_backward(
        self, flat: FlatParameters, tokens_PN: Tensor, labels_PN: Tensor, scale: float
    ) -> Tensor:
        """Return nats [P, N] float32; add the gradients of scale x their sum to `flat.grads`.

        Tokens and labels are int32, whole sequences of the shape's length one after the other.
        """
        weights, grads, ops = flat.weights, flat.grads, self.ops
        layers: list[_LayerState] = []
        last = self._forward(flat, tokens_PN, layers)
        table = "embedding" if self.shape.tied else "head"
        nats_PN, dy = ops.head(
            last.y_PND, weights[table], labels_PN, scale=scale, dhead_PVD=grads[table]
        )
        dx = self._norm_backward(flat, "norm", last, dy, None)
        for layer in reversed(range(self.shape.num_layers)):
            dx = self._layer_backward(flat, layer, layers[layer], dx)
        plan = ops.plan(tokens_PN, self.shape.vocab_size)
        ops.add_rows(dx, plan, grads["embedding"])
        return nats_PN

    def loss(self, flat: FlatParameters, tokens_PN: Tensor, labels_PN: Tensor) -> Tensor:
        """Return nats [P, N] float32, 0 where a label is ignored; no gradient."""
        last = self._forward(flat, tokens_PN)
        table = "embedding" if self.shape.tied else "head"
        return self.ops.head_loss(last.y_PND, flat.weights[table], labels_PN)

    def _forward(
        self, flat: FlatParameters, tokens_PN: Tensor, layers: list[_LayerState] | None = None
    ) -> _Normed:
        """Return the final norm; append to `layers` what their backward reads."""
        x = self.ops.embed(flat.weights["embedding"], tokens_PN)
        branch = None
        for layer in range(self.shape.num_layers):
            state, branch = self._layer_forward(flat, layer, x, branch)
            x = state.mlp_norm.x_PND
            if layers is not None:
                layers.append(state)
            del state
        return self._norm(flat, "norm", x, branch)

    def _layer_forward(
        self, flat: FlatParameters, layer: int, x_PND: Tensor, branch_PND: Tensor | None
    ) -> tuple[_LayerState, Tensor]:
        weights, shape, ops, name = flat.weights, self.shape, self.ops, f"layers.{layer}"
        heads = (shape.num_heads, shape.kv_heads)
        before = self._norm(flat, f"{name}.attention_norm", x_PND, branch_PND)
        qkv = matmul(before.y_PND, weights[f"{name}.qkv"].mT)
        ops.rotate(qkv, self._cos, self._sin, *heads)
        attended, lse = ops.attention(qkv, *heads, shape.seq_len)
        branch = matmul(attended, weights[f"{name}.attention_out"].mT)
        between = self._norm(flat, f"{name}.mlp_norm", before.x_PND, branch)
        gate_up = matmul(between.y_PND, weights[f"{name}.gate_up"].mT)
        branch = matmul(ops.swiglu(gate_up), weights[f"{name}.down"].mT)
        return _LayerState(before, qkv, attended, lse, between, gate_up), branch

    def _layer_backward(
        self, flat: FlatParameters, layer: int, state: _LayerState, dx_PND: Tensor
    ) -> Tensor:
        """Return the gradient at the layer's input; `dx_PND` is the one at its output."""
        weights, grads, ops = flat.weights, flat.grads, self.ops
        shape, name = self.shape, f"layers.{layer}"
        dhidden = matmul(dx_PND, weights[f"{name}.down"])
        dgate_up, hidden = ops.swiglu_backward(dhidden, state.gate_up_PN2F)
        matmul(dx_PND.mT, hidden, out=grads[f"{name}.down"], accumulate=True)
        normed = state.mlp_norm
        matmul(dgate_up.mT, normed.y_PND, out=grads[f"{name}.gate_up"], accumulate=True)
        dy = matmul(dgate_up, weights[f"{name}.gate_up"])
        dx = self._norm_backward(flat, f"{name}.mlp_norm", normed, dy, dx_PND)

        dout = matmul(dx, weights[f"{name}.attention_out"])
        matmul(dx.mT, state.attended_PND, out=grads[f"{name}.attention_out"], accumulate=True)
        dqkv = ops.attention_backward(
            *(dout, state.qkv_PNC, state.attended_PND, state.lse, self._cos, self._sin),
            *(shape.num_heads, shape.kv_heads, shape.seq_len),
        )
        normed = state.attention_norm
        matmul(dqkv.mT, normed.y_PND, out=grads[f"{name}.qkv"], accumulate=True)
        dy = matmul(dqkv, weights[f"{name}.qkv"])
        return self._norm_backward(flat, f"{name}.attention_norm", normed, dy, dx)

    def _norm(
        self, flat: FlatParameters, name: str, x_PND: Tensor, branch_PND: Tensor | None
    ) -> _Normed:
        # The float32 weights: there are few, and the kernel computes in float32 anyway.
        y, x, rstd = self.ops.rmsnorm(x_PND, flat.values[name], self.shape.norm_eps, branch_PND)
        return _Normed(x, y, rstd)

    def _norm_backward(
        self,
        flat: FlatParameters,
        name: str,
        normed: _Normed,
        dy_PND: Tensor,
        dresidual_PND: Tensor | None,
    ) -> Tensor:
        return self.ops.rmsnorm_backward(
            *(dy_PND, normed.x_PND, flat.values[name], normed.rstd_PN, flat.grads[name]),
            dresidual_PND,
        )
