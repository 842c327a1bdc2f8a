"""The operations that only move bytes, ours against torch.compile, each against the copy rate.

Enters: a run. Leaves: GB/s and times of RMSNorm, SwiGLU, rotation, embedding and AdamW at the
reference shape. The bytes are the least that an operation must read and write, so a ratio to
torch.compile compares times, and GB/s says how near the copy rate each is.

P proxies, N tokens, D width, F hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regmix_bench import timing
from regmix_bench.gpu.attention import rotated
from regmix_bench.gpu.run import Contender, Run, prepare

EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens, width, hidden, vocabulary, heads and sequence length."""

    tokens: int
    width: int
    hidden: int
    vocab: int
    heads: int
    seq_len: int


REFERENCE = Sizes(tokens=32768, width=256, hidden=512, vocab=50432, heads=8, seq_len=2048)
TINY = Sizes(tokens=32, width=32, hidden=32, vocab=65, heads=2, seq_len=16)

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """make: inputs of one set; ours, theirs: take them; num_bytes: the least that is moved."""

    name: str
    make: Callable[[int], tuple[Any, ...]]
    ours: Function
    theirs: Function
    num_bytes: float


def pointwise(run: Run) -> None:
    """Time every operation."""
    sizes = TINY if run.tiny else REFERENCE
    for make in (norm, norm_backward, swiglu, swiglu_backward, rotation, embedding, optimizer):
        name = make.__name__.replace("_", " ")
        work = functools.partial(_time, run, make, sizes)
        run.attempt(f"pointwise, {name}", work, needs=5, has_contenders=True)


def _time(run: Run, make: Callable[[Run, Sizes], Case], sizes: Sizes) -> None:
    case = make(run, sizes)
    sets = timing.Rotation(case.make, num_bytes=case.num_bytes, device=run.device)
    contenders = {
        "ours": Contender(make=lambda: lambda call: case.ours(*sets[call]), ours=True),
        "eager": Contender(make=lambda: lambda call: case.theirs(*sets[call])),
    }
    if run.compiles:
        contenders["torch.compile"] = Contender(make=lambda: _compiled(case.theirs, sets), needs=12)
    label = f"pointwise, {case.name}, {sizes.tokens} tokens"
    there = prepare(run, label, contenders)
    found = run.take_turns(there, rounds=5, seconds=0.03)
    limits = run.limits()
    for name, times in found.items():
        rate = case.num_bytes / statistics.median(times)
        full = f"{label}; {name}"
        against = {"ceiling": "copy measured here", "ratio_to_ceiling": rate / limits.copy_bytes}
        run.record(full, "least bytes moved", rate / 1e9, "GB/s", **against)
        ns = 1e9 * statistics.median(times) / sizes.tokens
        run.record(full, "time", ns, "ns/token")
        if name == "ours":
            for other, theirs in found.items():
                if other != name:
                    ratio = timing.times_as_fast(times, theirs)
                    run.record(full, "time", ns, "ns/token", peer=other, ratio_to_peer=ratio)


def _compiled(function: Function, sets: timing.Rotation[tuple[Any, ...]]) -> timing.Work:
    # In-place peers must not be traced as if their inputs were fresh; dynamic shapes cost time.
    made = torch.compile(function, dynamic=False)
    return lambda call: made(*sets[call])


def _normal(run: Run, seed: int, *size: int) -> Tensor:
    generator = torch.Generator(run.device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=run.device).to(run.dtype)


def norm(run: Run, sizes: Sizes) -> Case:
    """RMSNorm with the addition of the residual stream."""
    from regmix_kernels import rmsnorm

    rows = (1, sizes.tokens, sizes.width)

    def make(seed: int) -> tuple[Any, ...]:
        weight = torch.ones(1, sizes.width, device=run.device)
        return _normal(run, seed, *rows), _normal(run, seed + 1, *rows), weight

    def ours(x: Tensor, branch: Tensor, weight: Tensor) -> object:
        return rmsnorm.forward(x, weight, EPS, branch)

    def theirs(x: Tensor, branch: Tensor, weight: Tensor) -> object:
        stream = x + branch
        exact = stream.float()
        rstd = torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS)
        return (exact * rstd * weight).to(x.dtype), stream, rstd

    size = 4.0 * sizes.tokens * sizes.width * run.dtype.itemsize
    return Case(name="RMSNorm + residual", make=make, ours=ours, theirs=theirs, num_bytes=size)


def norm_backward(run: Run, sizes: Sizes) -> Case:
    """RMSNorm's backward, with the residual's gradient and that of the weight."""
    from regmix_kernels import rmsnorm

    rows = (1, sizes.tokens, sizes.width)

    def make(seed: int) -> tuple[Any, ...]:
        weight = torch.ones(1, sizes.width, device=run.device)
        x = _normal(run, seed, *rows)
        rstd = torch.rsqrt(x.float().square().mean(-1) + EPS)
        return (
            *(_normal(run, seed + 1, *rows), x, weight, rstd),
            *(torch.zeros_like(weight), _normal(run, seed + 2, *rows)),
        )

    def ours(*given: Tensor) -> object:
        return rmsnorm.backward(*given)

    def theirs(
        dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dweight: Tensor, dresidual: Tensor
    ) -> object:
        normed = x.float() * rstd[..., None]
        dweight += (dy.float() * normed).sum(1)
        dnormed = dy.float() * weight
        mean = (dnormed * normed).mean(-1, keepdim=True)
        return ((dnormed - normed * mean) * rstd[..., None] + dresidual.float()).to(dy.dtype)

    size = 4.0 * sizes.tokens * sizes.width * run.dtype.itemsize
    return Case(name="RMSNorm backward", make=make, ours=ours, theirs=theirs, num_bytes=size)


def swiglu(run: Run, sizes: Sizes) -> Case:
    """SwiGLU's gate."""
    from regmix_kernels import swiglu as kernel

    def make(seed: int) -> tuple[Any, ...]:
        return (_normal(run, seed, 1, sizes.tokens, 2 * sizes.hidden),)

    def theirs(gate_up: Tensor) -> object:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    size = 3.0 * sizes.tokens * sizes.hidden * run.dtype.itemsize
    return Case(name="SwiGLU", make=make, ours=kernel.forward, theirs=theirs, num_bytes=size)


def swiglu_backward(run: Run, sizes: Sizes) -> Case:
    """SwiGLU's backward with the hidden rows made again."""
    from regmix_kernels import swiglu as kernel

    def make(seed: int) -> tuple[Any, ...]:
        dhidden = _normal(run, seed, 1, sizes.tokens, sizes.hidden)
        return dhidden, _normal(run, seed + 1, 1, sizes.tokens, 2 * sizes.hidden)

    def theirs(dhidden: Tensor, gate_up: Tensor) -> object:
        gate, up = gate_up.float().chunk(2, dim=-1)
        sigmoid, dhidden = torch.sigmoid(gate), dhidden.float()
        silu = gate * sigmoid
        dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        gradient = torch.cat((dgate, dhidden * silu), dim=-1)
        return gradient.to(gate_up.dtype), (silu * up).to(gate_up.dtype)

    size = 6.0 * sizes.tokens * sizes.hidden * run.dtype.itemsize
    ours = kernel.backward
    return Case(name="SwiGLU backward", make=make, ours=ours, theirs=theirs, num_bytes=size)


def rotation(run: Run, sizes: Sizes) -> Case:
    """The rotation of queries and keys inside packed QKV, in place."""
    from regmix_kernels import rope

    head_dim = sizes.width // sizes.heads
    cos, sin = rope.rope_tables(sizes.seq_len, head_dim, 10000.0, run.device)
    shape = (-1, sizes.seq_len, 3 * sizes.heads, head_dim)

    def make(seed: int) -> tuple[Any, ...]:
        return (_normal(run, seed, 1, sizes.tokens, 3 * sizes.width),)

    def ours(qkv: Tensor) -> object:
        rope.rotate_(qkv, cos, sin, sizes.heads, sizes.heads)
        return qkv

    def theirs(qkv: Tensor) -> object:
        heads = qkv.view(shape).transpose(1, 2)[:, : 2 * sizes.heads]
        return heads.copy_(rotated(heads.float(), cos, sin))

    size = 4.0 * sizes.tokens * sizes.width * run.dtype.itemsize
    return Case(name="rotation", make=make, ours=ours, theirs=theirs, num_bytes=size)


def embedding(run: Run, sizes: Sizes) -> Case:
    """The embedding's gradient: rows sorted by token and summed, the sort included."""
    from regmix_kernels import embedding as kernel
    from regmix_kernels import segment_sum

    def make(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator(run.device).manual_seed(seed)
        draw = torch.rand(1, sizes.tokens, generator=generator, device=run.device)
        tokens = (sizes.vocab**draw).long().clamp_(1, sizes.vocab) - 1
        table = torch.zeros(1, sizes.vocab, sizes.width, device=run.device)
        return _normal(run, seed, 1, sizes.tokens, sizes.width), tokens, table

    def ours(dx: Tensor, tokens: Tensor, table: Tensor) -> object:
        kernel.backward(dx, segment_sum.plan(tokens, sizes.vocab), table)
        return table

    def theirs(dx: Tensor, tokens: Tensor, table: Tensor) -> object:
        return table[0].index_add_(0, tokens[0], dx[0].float())

    size = sizes.tokens * sizes.width * (run.dtype.itemsize + 8.0)
    name = "embedding gradient (the peer adds in any order)"
    return Case(name=name, make=make, ours=ours, theirs=theirs, num_bytes=size)


def optimizer(run: Run, sizes: Sizes) -> Case:
    """Norm, clip and AdamW over all parameters of a proxy, against PyTorch's fused AdamW."""
    from regmix_kernels import adamw

    num = 2 * sizes.vocab * sizes.width // 256 * 256
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    rate = torch.tensor([4e-4], device=run.device)

    def make(seed: int) -> tuple[Any, ...]:
        values = [torch.full((1, num), 0.01 * (1 + part), device=run.device) for part in range(4)]
        copy = torch.empty(1, num, dtype=run.dtype, device=run.device)
        counts = torch.zeros(1, dtype=torch.int32, device=run.device)
        failed = torch.zeros(1, dtype=torch.uint8, device=run.device)
        steps = torch.zeros((), device=run.device)
        return (*values, copy, counts, failed, steps)

    def ours(*given: Tensor) -> object:
        param, grad, mean, square, copy, counts, failed, _ = given
        norms = adamw.gradient_norms(grad)
        adamw.update(
            *(param, grad, mean, square, copy, norms, rate, counts, failed),
            **settings,
            clip_norm=1.0,
        )
        return copy

    def theirs(*given: Tensor) -> object:
        param, grad, mean, square, copy, _, _, steps = given
        norm = torch.linalg.vector_norm(grad)
        grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        steps += 1
        torch._fused_adamw_(
            *([param], [grad], [mean], [square], [], [steps]),
            lr=4e-4,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        grad.zero_()
        return copy.copy_(param)

    # Gradients twice and zeroed, three tensors read and written, the copy written.
    size = num * (3 * 4.0 + 3 * 8.0 + run.dtype.itemsize)
    name = "norm, clip, AdamW, copy"
    return Case(name=name, make=make, ours=ours, theirs=theirs, num_bytes=size)
