"""The published way to train a proxy, rebuilt for the same GPU in the same run.

As sail-sg/regmix (TinyLlama's code) describes it: one process and one model, bf16 autocast over
float32 weights, FlashAttention-2 (here through SDPA), logits in memory with cross-entropy, gradient
accumulation over micro-batches, clip at 1.0 through `clip_grad_norm_`, fused AdamW, the loss read
back every step, no graph. Its fused RMSNorm, rotation and SwiGLU come from packages that are not
needed here: `fused` compiles those three by torch.compile instead, `compiled` the whole forward and
loss, `eager` nothing.

Enters: a shape, a variant. Leaves: a step to time, or one block. B sequences, T tokens, N = B x T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from regmix.model.presets import ModelShape
from regmix_bench.gpu.attention import rotated
from regmix_bench.peer_llama import make_peer

VARIANTS = ("eager", "fused", "compiled")
Part = Callable[..., Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, as Llama's code has it."""
    exact = x.float()
    rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * rstd).to(x.dtype) * weight.to(x.dtype)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's gate."""
    return functional.silu(gate) * up


class Parts:
    """The three small operations, as they are or each compiled."""

    def __init__(self, compiled: bool) -> None:
        wrap: Callable[[Part], Part] = torch.compile if compiled else (lambda part: part)
        self.norm, self.gate, self.rotate = wrap(rms_norm), wrap(silu_times), wrap(rotated)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, shape: ModelShape, parts: Parts, backend: str | None) -> None:
        super().__init__()
        self.shape, self.parts, self.backend = shape, parts, backend
        width = shape.width
        heads = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim
        self.norm_1, self.norm_2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.qkv = nn.Linear(width, heads, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, shape.hidden, bias=False)
        self.up = nn.Linear(width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        shape, parts = self.shape, self.parts
        batch, seq_len, width = x_BTD.shape
        y = parts.norm(x_BTD, self.norm_1, shape.norm_eps)
        all_heads = shape.num_heads + 2 * shape.kv_heads
        qkv = self.qkv(y).view(batch, seq_len, all_heads, shape.head_dim).transpose(1, 2)
        q, k, v = qkv.split((shape.num_heads, shape.kv_heads, shape.kv_heads), dim=1)
        q, k = (parts.rotate(x, cos.to(x.dtype), sin.to(x.dtype)) for x in (q, k))
        attended = self._attend(q, k, v).transpose(1, 2).reshape(batch, seq_len, width)
        x_BTD = x_BTD + self.out(attended)
        y = parts.norm(x_BTD, self.norm_2, shape.norm_eps)
        return x_BTD + self.down(parts.gate(self.gate(y), self.up(y)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend: Any = functional.scaled_dot_product_attention
        if self.shape.kv_heads != self.shape.num_heads:
            attend = functools.partial(attend, enable_gqa=True)
        if self.backend is None:
            return attend(q, k, v, is_causal=True)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.backend)):
            return attend(q, k, v, is_causal=True)


class Llama(nn.Module):
    """The proxy; `forward` returns the mean loss of a micro-batch."""

    def __init__(self, shape: ModelShape, parts: Parts, backend: str | None) -> None:
        from regmix_kernels.rope import rope_tables

        super().__init__()
        self.shape, self.parts = shape, parts
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, parts, backend) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(shape.width))
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=(2.0 / (5.0 * shape.width)) ** 0.5)
        cos, sin = rope_tables(shape.seq_len, shape.head_dim, shape.rope_base, "cpu")
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens_BT1: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.embedding(tokens_BT1[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.parts.norm(x, self.norm, self.shape.norm_eps))
        labels_N = tokens_BT1[:, 1:].reshape(-1)
        return functional.cross_entropy(logits.view(-1, self.shape.vocab_size), labels_N)


def make_step(
    shape: ModelShape, variant: str, *, batch: int, micro: int, device: torch.device
) -> Callable[[int], None]:
    """Return one training step of `batch` sequences on tokens that are on the device already."""
    torch.manual_seed(0)
    # Compiled, SDPA chooses by itself: a context manager would break the graph.
    flash = device.type == "cuda" and variant != "compiled"
    backend = "FLASH_ATTENTION" if flash else None
    model = Llama(shape, Parts(compiled=variant == "fused"), backend).to(device)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if variant == "compiled" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, shape.seq_len + 1)
    tokens = torch.randint(0, shape.vocab_size, size, generator=generator, device=device)
    return functools.partial(_step, model, forward, optimizer, tokens, micro)


def transformers_step(
    shape: ModelShape, *, batch: int, micro: int, device: torch.device, compiled: bool
) -> Callable[[int], None]:
    """Return one training step of transformers' Llama with SDPA; raises where it is missing."""
    model, loss = make_peer(shape)
    model = model.to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    size = (batch, shape.seq_len + 1)
    tokens = torch.randint(0, shape.vocab_size, size, device=device)
    forward: Callable[[Tensor], Tensor] = torch.compile(loss) if compiled else loss
    return functools.partial(_step, model, forward, optimizer, tokens, micro)


def _step(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    micro: int,
    call: int,
) -> None:
    kind = tokens.device.type
    for part in tokens.split(micro):
        with torch.autocast(kind, dtype=torch.bfloat16):
            loss = forward(part)
        (loss * (len(part) / len(tokens))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()  # logged every step
