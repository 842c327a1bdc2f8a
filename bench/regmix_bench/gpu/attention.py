"""Causal attention by our kernel and by every backend of SDPA, in turns.

Enters: a run. Leaves: ns/token forward, and forward and backward, at head sizes 32 (the reference
proxy) and 128 (the 1B model): of attention alone on rotated, split heads, and of the whole way
from packed QKV to packed gradients, rotation included, which is what the model pays.

P proxies, N tokens, C columns of packed QKV, B sequences, T tokens of one, H heads, R head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from regmix_bench import timing
from regmix_bench.gpu.run import Contender, Run, bake_off

ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """B sequences of T tokens, H heads of size R; no grouped keys, as in the presets."""

    sequences: int
    seq_len: int
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.seq_len

    @property
    def name(self) -> str:
        """In the records."""
        return f"{self.sequences} x {self.seq_len}, {self.heads} heads of {self.head_dim}"

    def flops(self, passes: int) -> float:
        """FLOPs of the products, causal; 1 pass forward, 3 with the backward."""
        return passes * 2.0 * self.tokens * self.heads * self.head_dim * (self.seq_len + 1)


REFERENCE = (
    Sizes(sequences=16, seq_len=2048, heads=8, head_dim=32),
    Sizes(sequences=4, seq_len=2048, heads=16, head_dim=128),
)
TINY = (Sizes(sequences=2, seq_len=16, heads=2, head_dim=16),)


@dataclass(frozen=True)
class Inputs:
    """Packed QKV and its like for the output's gradient, rotated and split as each side wants."""

    qkv_PNC: Tensor
    dout_PND: Tensor
    q: Tensor  # [B, H, T, R]
    k: Tensor
    v: Tensor
    dout: Tensor


def attention_bake_off(run: Run) -> None:
    """Time attention at every head size."""
    for sizes in TINY if run.tiny else REFERENCE:
        sets = timing.Rotation(
            functools.partial(_inputs, sizes, run=run),
            num_bytes=4.0 * sizes.tokens * sizes.heads * sizes.head_dim * 2,
            device=run.device,
        )
        for passes, metric in ((1, "forward"), (3, "forward and backward")):
            case = f"attention, {sizes.name}"
            run.attempt(
                f"{case}, {metric}",
                functools.partial(_alone, run, case, metric, sizes, passes, sets),
                needs=5,
                has_contenders=True,
            )
        case = f"packed QKV with rotation, {sizes.name}"
        work = functools.partial(_packed, run, case, sizes, sets)
        run.attempt(case, work, needs=5, has_contenders=True)


def _inputs(sizes: Sizes, seed: int, *, run: Run) -> Inputs:
    generator = torch.Generator(run.device).manual_seed(seed)
    width = sizes.heads * sizes.head_dim
    draw = functools.partial(torch.randn, generator=generator, device=run.device)
    qkv = draw(1, sizes.tokens, 3 * width).to(run.dtype)
    dout = draw(1, sizes.tokens, width).to(run.dtype)
    q, k, v = (_split(x, sizes).contiguous() for x in qkv[0].chunk(3, dim=-1))
    return Inputs(qkv, dout, q, k, v, _split(dout[0], sizes).contiguous())


def _split(x_ND: Tensor, sizes: Sizes) -> Tensor:
    return x_ND.view(sizes.sequences, sizes.seq_len, sizes.heads, sizes.head_dim).transpose(1, 2)


def sdpa(backend: str | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention by one backend of PyTorch's, or by its own choice."""
    if backend is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _backends(run: Run) -> dict[str, str]:
    if run.device.type != "cuda":
        return {"SDPA math": "MATH"}
    return {
        "SDPA flash": "FLASH_ATTENTION",
        "SDPA cuDNN": "CUDNN_ATTENTION",
        "SDPA efficient": "EFFICIENT_ATTENTION",
    }


def _alone(
    run: Run, case: str, metric: str, sizes: Sizes, passes: int, sets: timing.Rotation[Inputs]
) -> None:
    from regmix_kernels import attention, rope

    heads = (sizes.heads, sizes.heads)
    cos, sin = rope.rope_tables(sizes.seq_len, sizes.head_dim, ROPE_BASE, run.device)

    def ours(call: int) -> object:
        given = sets[call]
        out, lse = attention.forward(given.qkv_PNC, *heads, sizes.seq_len)
        if passes == 1:
            return out
        return attention.backward(
            given.dout_PND, given.qkv_PNC, out, lse, cos, sin, *heads, sizes.seq_len
        )

    def theirs(backend: str, call: int) -> object:
        given = sets[call]
        if passes == 1:
            with torch.no_grad():
                return sdpa(backend, given.q, given.k, given.v)
        leaves = [x.detach().requires_grad_() for x in (given.q, given.k, given.v)]
        return torch.autograd.grad(sdpa(backend, *leaves), leaves, given.dout)

    contenders = {"ours": Contender(make=lambda: ours, ours=True)}
    for name, backend in _backends(run).items():
        contenders[name] = Contender(
            make=functools.partial(_constant, functools.partial(theirs, backend))
        )
    limits = run.limits()
    bake_off(
        run,
        case,
        metric,
        contenders,
        tokens=sizes.tokens,
        least_seconds=sizes.flops(passes) / limits.flops,
        ceiling=limits.gemm_words,
    )


def _constant(work: timing.Work) -> timing.Work:
    return work


def rotated(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Return [B, H, T, R] rotated by position, as an eager model does."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos_TR2 - high * sin_TR2, high * cos_TR2 + low * sin_TR2), dim=-1)


def _packed(run: Run, case: str, sizes: Sizes, sets: timing.Rotation[Inputs]) -> None:
    from regmix_kernels import attention, rope

    heads = (sizes.heads, sizes.heads)
    cos, sin = rope.rope_tables(sizes.seq_len, sizes.head_dim, ROPE_BASE, run.device)
    low_cos, low_sin = cos.to(run.dtype), sin.to(run.dtype)

    def ours(call: int) -> object:
        # The numbers are rotated again on every visit: a rotation keeps their size.
        given = sets[call]
        rope.rotate_(given.qkv_PNC, cos, sin, *heads)
        out, lse = attention.forward(given.qkv_PNC, *heads, sizes.seq_len)
        return attention.backward(
            given.dout_PND, given.qkv_PNC, out, lse, cos, sin, *heads, sizes.seq_len
        )

    def model(backend: str | None, qkv_NC: Tensor) -> Tensor:
        q, k, v = (_split(x, sizes) for x in qkv_NC.chunk(3, dim=-1))
        q, k = (rotated(x, low_cos, low_sin) for x in (q, k))
        return sdpa(backend, q, k, v).transpose(1, 2).reshape(sizes.tokens, -1)

    def theirs(function: Callable[[Tensor], Tensor], call: int) -> object:
        leaf = sets[call].qkv_PNC[0].detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, sets[call].dout_PND[0])

    contenders = {"ours": Contender(make=lambda: ours, ours=True)}
    for name, backend in list(_backends(run).items())[:2]:
        function = functools.partial(model, backend)
        contenders[f"{name}, eager rotation"] = Contender(
            make=functools.partial(_constant, functools.partial(theirs, function))
        )
    if run.compiles:
        # SDPA chooses by itself here: a context manager would break the graph.
        function = functools.partial(model, None)
        contenders["SDPA, torch.compile"] = Contender(
            make=lambda: functools.partial(theirs, torch.compile(function)), needs=20
        )
    limits = run.limits()
    bake_off(
        run,
        case,
        "forward and backward",
        contenders,
        tokens=sizes.tokens,
        least_seconds=sizes.flops(3) / limits.flops,
        ceiling=limits.gemm_words,
    )
