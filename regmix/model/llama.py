"""A stack of Llamas: P models of one shape, trained by one step.

Enters: parameters [P, ...] by name and tokens. Leaves: losses, and gradients in the buffers
given. Does not update a parameter (`optim` does) and does not draw a batch.

Forward and backward are written out over the operations of `ops`; a few proxies at a time go
through both, so that their activations stay in the cache. No number of one proxy depends on
another, nor on P; documents are packed and attended across.

P proxies, G proxies of a group, B sequences, T tokens of one, N = B x T, D width, F hidden,
V vocabulary, R head size, H heads. Activations are [G, D, N]: features first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regmix.errors import ModelError
from regmix.model import ops
from regmix.model.optim import StackedAdamW
from regmix.model.parameters import init_parameters, parameter_shapes, transformers_state
from regmix.model.presets import ModelShape

__all__ = ["StackedLlama", "init_parameters", "parameter_shapes", "transformers_state"]

# A group's residual stream: 512 KiB, 4 proxies of width 64 at 512 tokens. On two threads that is
# 1.2 times as fast as one proxy at a time, on one thread the same; larger groups gain nothing.
_GROUP_FLOATS = 1 << 17


@dataclass
class _LayerState:
    """What the backward of one layer needs from its forward."""

    attention_in: Tensor  # [G, D, N], normalised
    attention_rstd: Tensor  # [G, 1, N]
    qkv_weight: Tensor  # [G, heads x R, D], the norm's weight folded in
    attention: ops.AttentionState
    attended: Tensor  # [G, D, N]
    mlp_in: Tensor
    mlp_rstd: Tensor
    gate_up_weight: Tensor
    gate_up: Tensor  # [G, 2F, N]
    silu: Tensor  # [G, F, N]
    hidden: Tensor


class StackedLlama:
    """P models of one shape; `group` proxies go through forward and backward together."""

    def __init__(self, shape: ModelShape, *, group: int | None = None) -> None:
        self.shape = shape
        self.group = group
        self._workspace = ops.Workspace()
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def loss_and_grads(
        self, params: dict[str, Tensor], grads: dict[str, Tensor], tokens_PBT1: Tensor
    ) -> Tensor:
        """Return each proxy's mean loss in nats, [P] float32; overwrite `grads`."""
        self._check_tokens(params, tokens_PBT1)
        losses_P = torch.empty(tokens_PBT1.shape[0], device=tokens_PBT1.device)
        for rows in self._groups(tokens_PBT1[:, :, :-1]):
            weights = {name: value[rows] for name, value in params.items()}
            targets = {name: value[rows] for name, value in grads.items()}
            losses_P[rows] = self._group_step(weights, targets, tokens_PBT1[rows])
        return losses_P

    def train_step(
        self,
        params: dict[str, Tensor],
        optimizer: StackedAdamW,
        tokens_PBT1: Tensor,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Train the stack by one step; return losses and gradient norms, [P] each.

        The same bits as `loss_and_grads` and `optimizer.step`, but a group's gradients live in
        one small buffer that the optimizer reads while it is still in the cache.
        """
        self._check_tokens(params, tokens_PBT1)
        losses_P = torch.empty(tokens_PBT1.shape[0], device=tokens_PBT1.device)
        norms_P = torch.empty(tokens_PBT1.shape[0])
        for rows in self._groups(tokens_PBT1[:, :, :-1]):
            weights = {name: value[rows] for name, value in params.items()}
            grads = {
                name: self._workspace.get(f"grads.{name}", tuple(value.shape), value)
                for name, value in weights.items()
            }
            losses_P[rows] = self._group_step(weights, grads, tokens_PBT1[rows])
            norms_P[rows] = optimizer.update(rows, grads, step)
        return losses_P, norms_P

    def _group_step(
        self, weights: dict[str, Tensor], grads: dict[str, Tensor], tokens_GBT1: Tensor
    ) -> Tensor:
        inputs_GBT, labels_GN = self._split(tokens_GBT1)
        x_GDN, layers = self._forward(weights, inputs_GBT)
        nats_GN, dx_GDN = self._head(weights, grads, x_GDN, labels_GN)
        self._backward(weights, grads, layers, dx_GDN)
        self._embedding_backward(grads, dx_GDN, inputs_GBT)
        return nats_GN.mean(dim=1, dtype=torch.float64).float()

    def evaluate(self, params: dict[str, Tensor], tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        """Return each proxy's sum of nats where `mask_BT` holds, [P] float64."""
        num_proxies = params["embedding"].shape[0]
        tokens_PBT1 = tokens_BT1.expand(num_proxies, -1, -1)
        self._check_tokens(params, tokens_PBT1)
        kept_N = mask_BT.reshape(-1).to(torch.bool)
        sums_P = torch.empty(num_proxies, dtype=torch.float64, device=tokens_BT1.device)
        for rows in self._groups(tokens_PBT1[:, :, :-1]):
            weights = {name: value[rows] for name, value in params.items()}
            inputs_GBT, labels_GN = self._split(tokens_PBT1[rows])
            x_GDN, _ = self._forward(weights, inputs_GBT)
            nats_GN, _ = self._head(weights, None, x_GDN, labels_GN)
            for row, nats_N in enumerate(nats_GN):
                sums_P[rows.start + row] = nats_N[kept_N].sum(dtype=torch.float64)
        return sums_P

    def logits(self, params: dict[str, Tensor], tokens_PBT: Tensor) -> Tensor:
        """Return logits [P, B, T, V]; for tests and comparisons, not for training."""
        num_proxies, num_sequences, seq_len = tokens_PBT.shape
        self._check_tokens(params, tokens_PBT)
        head_PVD = params["embedding" if self.shape.tied else "head"]
        logits = head_PVD.new_empty(num_proxies, num_sequences, seq_len, self.shape.vocab_size)
        for rows in self._groups(tokens_PBT):
            weights = {name: value[rows] for name, value in params.items()}
            x_GDN, _ = self._forward(weights, tokens_PBT[rows])
            e_GDN, _ = self._final_norm(weights, x_GDN)
            products = torch.bmm(e_GDN.transpose(1, 2), head_PVD[rows].transpose(1, 2))
            logits[rows] = products.view(-1, *logits.shape[1:])
        return logits

    def _check_tokens(self, params: dict[str, Tensor], tokens: Tensor) -> None:
        if tokens.dim() != 3 or tokens.shape[0] != params["embedding"].shape[0]:
            raise ModelError(
                f"Tokens of shape {list(tokens.shape)} for {params['embedding'].shape[0]} proxies",
                cure="Give [proxies, sequences, tokens]",
            )
        low, high = torch.aminmax(tokens)
        if int(low) < 0 or int(high) >= self.shape.vocab_size:
            raise ModelError(
                f"Token {int(low) if int(low) < 0 else int(high)} with a vocabulary of "
                f"{self.shape.vocab_size}",
                cure="Use shards of the tokenizer that the model's shape was made for",
            )

    def _groups(self, inputs_PBT: Tensor) -> list[slice]:
        num_proxies, batch, seq_len = inputs_PBT.shape
        group = self.group or max(1, _GROUP_FLOATS // (batch * seq_len * self.shape.width))
        return [
            slice(start, min(start + group, num_proxies)) for start in range(0, num_proxies, group)
        ]

    @staticmethod
    def _split(tokens_GBT1: Tensor) -> tuple[Tensor, Tensor]:
        labels_GN = tokens_GBT1[:, :, 1:].reshape(tokens_GBT1.shape[0], -1)
        return tokens_GBT1[:, :, :-1], labels_GN

    def _rope_and_mask(self, seq_len: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (seq_len, like.dtype, like.device)
        if key not in self._tables:
            shape = self.shape
            cos, sin = ops.rope_tables(seq_len, shape.head_dim, shape.rope_base, like)
            self._tables[key] = (cos, sin, ops.causal_mask(seq_len, like))
        return self._tables[key]

    def _forward(
        self, weights: dict[str, Tensor], tokens_GBT: Tensor
    ) -> tuple[Tensor, list[_LayerState]]:
        group, batch, seq_len = tokens_GBT.shape
        embedding_GVD = weights["embedding"]
        x_GDN = self._workspace.get(
            "residual", (group, self.shape.width, batch * seq_len), embedding_GVD
        )
        for row in range(group):
            x_GDN[row].copy_(embedding_GVD[row].index_select(0, tokens_GBT[row].reshape(-1)).t())
        layers = []
        for layer in range(self.shape.num_layers):
            layers.append(self._layer_forward(weights, layer, x_GDN, (batch, seq_len)))
        return x_GDN, layers

    def _layer_forward(
        self, weights: dict[str, Tensor], layer: int, x_GDN: Tensor, sizes: tuple[int, int]
    ) -> _LayerState:
        shape, (group, width, num_tokens) = self.shape, x_GDN.shape
        name = f"layers.{layer}"

        def buffer(label: str, *size: int) -> Tensor:
            return self._workspace.get(f"{name}.{label}", (group, *size), x_GDN)

        attention_in, attention_rstd = (
            buffer("attention_in", width, num_tokens),
            buffer("attention_rstd", 1, num_tokens),
        )
        ops.normalize(x_GDN, attention_in, attention_rstd, shape.norm_eps)
        qkv = weights[f"{name}.qkv"]
        qkv_weight = buffer("qkv_weight", *qkv.shape[1:])
        torch.mul(qkv, weights[f"{name}.attention_norm"][:, None, :], out=qkv_weight)
        attention = self._attention_state(layer, attention_in, qkv_weight, sizes)
        attended = buffer("attended", width, num_tokens)
        mask = self._rope_and_mask(sizes[1], x_GDN)[2]
        ops.attend(attention, mask, ops.by_sequence(attended, sizes[0], shape.num_heads))
        x_GDN.baddbmm_(weights[f"{name}.attention_out"], attended)

        mlp_in, mlp_rstd = buffer("mlp_in", width, num_tokens), buffer("mlp_rstd", 1, num_tokens)
        ops.normalize(x_GDN, mlp_in, mlp_rstd, shape.norm_eps)
        gate_up_weight = buffer("gate_up_weight", 2 * shape.hidden, width)
        norm = weights[f"{name}.mlp_norm"][:, None, :]
        torch.mul(weights[f"{name}.gate_up"], norm, out=gate_up_weight)
        gate_up = buffer("gate_up", 2 * shape.hidden, num_tokens)
        torch.bmm(gate_up_weight, mlp_in, out=gate_up)
        silu, hidden = (buffer(part, shape.hidden, num_tokens) for part in ("silu", "hidden"))
        ops.swiglu(gate_up, silu, hidden)
        x_GDN.baddbmm_(weights[f"{name}.down"], hidden)
        return _LayerState(
            attention_in,
            attention_rstd,
            qkv_weight,
            attention,
            attended,
            mlp_in,
            mlp_rstd,
            gate_up_weight,
            gate_up,
            silu,
            hidden,
        )

    def _attention_state(
        self, layer: int, x_GDN: Tensor, qkv_weight: Tensor, sizes: tuple[int, int]
    ) -> ops.AttentionState:
        shape, (group, _, num_tokens) = self.shape, x_GDN.shape
        heads, kv_heads, head_dim = shape.num_heads, shape.kv_heads, shape.head_dim

        def buffer(label: str, *size: int) -> Tensor:
            return self._workspace.get(f"layers.{layer}.{label}", size, x_GDN)

        batch, seq_len = sizes
        qkv = self._workspace.get("qkv", (group, qkv_weight.shape[1], num_tokens), x_GDN)
        torch.bmm(qkv_weight, x_GDN, out=qkv)
        qkv = ops.by_sequence(qkv, batch, heads + 2 * kv_heads)
        q = buffer("q", batch, group, heads, head_dim, seq_len)
        k = buffer("k", batch, group, kv_heads, head_dim, seq_len)
        v = buffer("v", *k.shape)
        cos, sin, _ = self._rope_and_mask(seq_len, x_GDN)
        ops.rotate(qkv[:, :, :heads], cos, sin, q)
        ops.rotate(qkv[:, :, heads:-kv_heads], cos, sin, k)
        v.copy_(qkv[:, :, -kv_heads:])
        if kv_heads != heads:
            k, v = (value.repeat_interleave(heads // kv_heads, dim=2) for value in (k, v))
        return ops.AttentionState(
            q,
            k,
            v,
            buffer("scores", batch, group, heads, seq_len, seq_len),
            buffer("inverse", batch, group, heads, 1, seq_len),
            buffer("out", *q.shape),
        )

    def _final_norm(self, weights: dict[str, Tensor], x_GDN: Tensor) -> tuple[Tensor, Tensor]:
        """Write x / rms(x) over x; return it multiplied by the norm's weight, and 1 / rms(x)."""
        group, _, num_tokens = x_GDN.shape
        rstd_G1N = self._workspace.get("final_rstd", (group, 1, num_tokens), x_GDN)
        e_GDN = self._workspace.get("head_in", tuple(x_GDN.shape), x_GDN)
        ops.normalize(x_GDN, e_GDN, rstd_G1N, self.shape.norm_eps)
        x_GDN.copy_(e_GDN)
        return e_GDN.mul_(weights["norm"][:, :, None]), rstd_G1N

    def _head(
        self,
        weights: dict[str, Tensor],
        grads: dict[str, Tensor] | None,
        x_GDN: Tensor,
        labels_GN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return nats per token and, with `grads`, the gradient of the residual stream."""
        shape, (group, _, num_tokens) = self.shape, x_GDN.shape
        e_GDN, rstd_G1N = self._final_norm(weights, x_GDN)
        table = "embedding" if shape.tied else "head"
        nats_GN = torch.empty(group, num_tokens, dtype=x_GDN.dtype, device=x_GDN.device)
        if grads is None:
            for row in range(group):
                nats_GN[row] = ops.head_loss(
                    e_GDN[row], weights[table][row], labels_GN[row], self._workspace
                )
            return nats_GN, x_GDN
        de_GDN = self._workspace.get("head_grad", tuple(x_GDN.shape), x_GDN)
        for row in range(group):
            nats_GN[row] = ops.head_loss(
                e_GDN[row],
                weights[table][row],
                labels_GN[row],
                self._workspace,
                de_GDN[row],
                grads[table][row],
            )
        torch.mul(de_GDN, x_GDN, out=e_GDN)
        torch.sum(e_GDN, dim=2, out=grads["norm"])
        de_GDN.mul_(weights["norm"][:, :, None])
        dx_GDN = self._workspace.get("residual_grad", tuple(x_GDN.shape), x_GDN).zero_()
        ops.normalize_backward(de_GDN, x_GDN, rstd_G1N, dx_GDN, e_GDN)
        return nats_GN, dx_GDN

    def _backward(
        self,
        weights: dict[str, Tensor],
        grads: dict[str, Tensor],
        layers: list[_LayerState],
        dx_GDN: Tensor,
    ) -> None:
        for layer in reversed(range(self.shape.num_layers)):
            self._mlp_backward(weights, grads, f"layers.{layer}", layers[layer], dx_GDN)
            self._attention_backward(weights, grads, f"layers.{layer}", layers[layer], dx_GDN)

    def _mlp_backward(
        self,
        weights: dict[str, Tensor],
        grads: dict[str, Tensor],
        name: str,
        state: _LayerState,
        dx_GDN: Tensor,
    ) -> None:
        get = self._workspace.get
        torch.bmm(dx_GDN, state.hidden.transpose(1, 2), out=grads[f"{name}.down"])
        dhidden = get("dhidden", tuple(state.hidden.shape), dx_GDN)
        torch.bmm(weights[f"{name}.down"].transpose(1, 2), dx_GDN, out=dhidden)
        dgate_up = get("dgate_up", tuple(state.gate_up.shape), dx_GDN)
        ops.swiglu_backward(dhidden, state.gate_up, state.silu, dgate_up)
        torch.bmm(dgate_up, state.mlp_in.transpose(1, 2), out=grads[f"{name}.gate_up"])
        _unfold_norm(weights, grads, f"{name}.gate_up", f"{name}.mlp_norm")
        dnormed, scratch = (get(part, tuple(dx_GDN.shape), dx_GDN) for part in ("dnormed", "spare"))
        torch.bmm(state.gate_up_weight.transpose(1, 2), dgate_up, out=dnormed)
        ops.normalize_backward(dnormed, state.mlp_in, state.mlp_rstd, dx_GDN, scratch)

    def _attention_backward(
        self,
        weights: dict[str, Tensor],
        grads: dict[str, Tensor],
        name: str,
        state: _LayerState,
        dx_GDN: Tensor,
    ) -> None:
        get, shape, attention = self._workspace.get, self.shape, state.attention
        group, _, num_tokens = dx_GDN.shape
        heads, kv_heads, head_dim = shape.num_heads, shape.kv_heads, shape.head_dim
        torch.bmm(dx_GDN, state.attended.transpose(1, 2), out=grads[f"{name}.attention_out"])
        dout = get("dattended", tuple(dx_GDN.shape), dx_GDN)
        torch.bmm(weights[f"{name}.attention_out"].transpose(1, 2), dx_GDN, out=dout)
        batch, seq_len = attention.q.shape[0], attention.q.shape[-1]
        dq, dk, dv = (get(part, tuple(attention.q.shape), dx_GDN) for part in ("dq", "dk", "dv"))
        dout = ops.by_sequence(dout, batch, heads)
        ops.attend_backward(attention, dout, dq, dk, dv, self._workspace)
        if kv_heads != heads:
            split = (batch, group, kv_heads, heads // kv_heads, head_dim, seq_len)
            dk, dv = (value.view(split).sum(dim=3) for value in (dk, dv))
        cos, sin, _ = self._rope_and_mask(seq_len, dx_GDN)
        dqkv = get("dqkv", (group, (heads + 2 * kv_heads) * head_dim, num_tokens), dx_GDN)
        split_dqkv = ops.by_sequence(dqkv, batch, heads + 2 * kv_heads)
        ops.rotate(dq, cos, sin, split_dqkv[:, :, :heads], backward=True)
        ops.rotate(dk, cos, sin, split_dqkv[:, :, heads:-kv_heads], backward=True)
        split_dqkv[:, :, -kv_heads:] = dv
        torch.bmm(dqkv, state.attention_in.transpose(1, 2), out=grads[f"{name}.qkv"])
        _unfold_norm(weights, grads, f"{name}.qkv", f"{name}.attention_norm")
        dnormed, scratch = (get(part, tuple(dx_GDN.shape), dx_GDN) for part in ("dnormed", "spare"))
        torch.bmm(state.qkv_weight.transpose(1, 2), dqkv, out=dnormed)
        ops.normalize_backward(dnormed, state.attention_in, state.attention_rstd, dx_GDN, scratch)

    def _embedding_backward(
        self, grads: dict[str, Tensor], dx_GDN: Tensor, tokens_GBT: Tensor
    ) -> None:
        if not self.shape.tied:
            grads["embedding"].zero_()
        for row, dx_DN in enumerate(dx_GDN):
            # One thread adds the rows in the order of the tokens: the sum is deterministic.
            grads["embedding"][row].index_add_(
                0, tokens_GBT[row].reshape(-1), dx_DN.t().contiguous()
            )


def _unfold_norm(
    weights: dict[str, Tensor], grads: dict[str, Tensor], matrix: str, norm: str
) -> None:
    """Split the gradient of weight x norm, which `grads[matrix]` holds, into its two factors."""
    grads[norm].copy_((grads[matrix] * weights[matrix]).sum(dim=1))
    grads[matrix].mul_(weights[norm][:, None, :])
