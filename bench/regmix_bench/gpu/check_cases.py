"""What is checked: every operation of `regmix_kernels` with inputs, our call and its specification.

Enters: sizes, a seed, a dtype. Leaves: inputs of one proxy; results of a stack by our kernels; the
same results of one proxy in float64, by autograd over `regmix_kernels.reference`.

P proxies, N tokens, T tokens of a sequence, D width, H heads, K key-value heads, R head size,
F hidden, V vocabulary. A row's tensors lack P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from regmix_kernels import reference
from torch import Tensor

Tensors = dict[str, Tensor]
EPS, ROPE_BASE, IGNORED = 1e-5, 10000.0, -100
BETAS, WEIGHT_DECAY, CLIP_NORM, LEARNING_RATE = (0.9, 0.95), 0.1, 1.0, 4e-4
WIDEST_FUSED = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one proxy's inputs."""

    name: str
    tokens: int
    seq_len: int
    width: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Size inside SwiGLU."""
        return 2 * self.width

    @property
    def channels(self) -> int:
        """Columns of packed QKV."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Case:
    """inputs: of one proxy; ours: of a stack, which may change its inputs; wanted: of one proxy.

    Inputs are made on torch's default device.
    """

    inputs: Callable[[Sizes, int, torch.dtype], Tensors]
    ours: Callable[[Tensors, Sizes], Tensors]
    wanted: Callable[[Tensors, Sizes], Tensors]
    fits: Callable[[Sizes], bool] = lambda sizes: True


def normals(seed: int, dtype: torch.dtype, **sizes: tuple[int, ...]) -> Tensors:
    """Return normal numbers by name, in the dtype."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {name: torch.randn(*size, generator=generator).to(dtype) for name, size in sizes.items()}


def integers(seed: int, size: int, high: int) -> Tensor:
    """Return integers from 0 to below `high`, small ones more often, as tokens are."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 1000)
    return (high ** torch.rand(size, generator=generator)).long().clamp_(1, high) - 1


def _leaf(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


# RMSNorm with the residual stream.


def _norm_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    rows = (sizes.tokens, sizes.width)
    found = normals(seed, dtype, x=rows, branch=rows, dy=rows, dresidual=rows, weight=rows[1:])
    return found | normals(seed + 50, torch.float32, dweight=rows[1:])


def _norm_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import rmsnorm

    y, stream, rstd = rmsnorm.forward(given["x"], given["weight"], EPS, given["branch"])
    dx = rmsnorm.backward(
        given["dy"], stream, given["weight"], rstd, given["dweight"], given["dresidual"]
    )
    return {"y": y, "stream": stream, "dx": dx, "dweight": given["dweight"]}


def _norm_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    rounded = (given["x"].float() + given["branch"].float()).to(given["x"].dtype)
    stream, weight = _leaf(rounded), _leaf(given["weight"])
    y = reference.rmsnorm(stream, weight, EPS)
    dx, dweight = torch.autograd.grad(y, (stream, weight), given["dy"].double())
    return {
        "y": y.detach(),
        "stream": given["x"].double() + given["branch"].double(),
        "dx": dx + given["dresidual"].double(),
        "dweight": dweight + given["dweight"].double(),
    }


# SwiGLU.


def _swiglu_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    gate_up, hidden = (sizes.tokens, 2 * sizes.hidden), (sizes.tokens, sizes.hidden)
    return normals(seed, dtype, gate_up=gate_up, dhidden=hidden)


def _swiglu_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import swiglu

    hidden = swiglu.forward(given["gate_up"])
    dgate_up, again = swiglu.backward(given["dhidden"], given["gate_up"])
    return {"hidden": hidden, "dgate_up": dgate_up, "hidden made again": again}


def _swiglu_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    gate_up = _leaf(given["gate_up"])
    hidden = reference.swiglu(*gate_up.chunk(2, dim=-1))
    (gradient,) = torch.autograd.grad(hidden, gate_up, given["dhidden"].double())
    hidden = hidden.detach()
    return {"hidden": hidden, "dgate_up": gradient, "hidden made again": hidden}


# Embedding and its gradient, the sorted segment sum.


def _embedding_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    table, rows = (sizes.vocab, sizes.width), (sizes.tokens, sizes.width)
    found = normals(seed, dtype, table=table, dx=rows)
    found |= normals(seed + 50, torch.float32, dtable=table)
    labels = integers(seed + 7, sizes.tokens, sizes.vocab)
    labels[::5] = IGNORED
    return found | {"tokens": integers(seed, sizes.tokens, sizes.vocab), "labels": labels}


def _embedding_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import embedding, segment_sum

    x = embedding.forward(given["table"], given["tokens"])
    by_label = given["dtable"].clone()
    plan = segment_sum.plan(given["tokens"], sizes.vocab)
    embedding.backward(given["dx"], plan, given["dtable"])
    labels = segment_sum.plan(given["labels"], sizes.vocab)
    segment_sum.add_rows(given["dx"], labels, by_label, -0.5)
    return {"x": x, "dtable": given["dtable"], "sums by label": by_label}


def _embedding_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    start, dx = given["dtable"].double(), given["dx"].double()
    kept = given["labels"] != IGNORED
    by_label = torch.zeros_like(start).index_add_(0, given["labels"][kept], dx[kept])
    return {
        "x": given["table"][given["tokens"]].double(),
        "dtable": start.index_add(0, given["tokens"], dx),
        "sums by label": start - 0.5 * by_label,
    }


# Attention with its rotation.


def _attention_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    out = (sizes.tokens, sizes.heads * sizes.head_dim)
    return normals(seed, dtype, qkv=(sizes.tokens, sizes.channels), dout=out)


def _attention_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import attention, rope

    heads = (sizes.heads, sizes.kv_heads)
    device = given["qkv"].device
    cos, sin = rope.rope_tables(sizes.seq_len, sizes.head_dim, ROPE_BASE, device)
    rope.rotate_(given["qkv"], cos, sin, *heads)
    out, lse = attention.forward(given["qkv"], *heads, sizes.seq_len)
    dqkv = attention.backward(
        given["dout"], given["qkv"], out, lse, cos, sin, *heads, sizes.seq_len
    )
    return {"rotated": given["qkv"], "out": out, "dqkv": dqkv}


def split_heads(qkv_NC: Tensor, sizes: Sizes) -> list[Tensor]:
    """Return queries, keys and values [B, heads, T, R] of packed QKV, with K heads of the last."""
    shape = (-1, sizes.seq_len, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    heads = qkv_NC.view(shape).transpose(1, 2)
    return list(heads.split((sizes.heads, sizes.kv_heads, sizes.kv_heads), dim=1))


def _attention_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    packed = _leaf(given["qkv"])
    q, k, v = split_heads(packed, sizes)
    q, k = reference.rope(q, ROPE_BASE), reference.rope(k, ROPE_BASE)
    rotated = torch.cat((q, k, v), dim=1).transpose(1, 2).reshape(packed.shape)
    # The kernel reads rotated numbers that were rounded; so does the specification.
    gap = rotated.detach().to(given["qkv"].dtype).double() - rotated.detach()
    q, k, v = split_heads(rotated + gap, sizes)
    group = sizes.heads // sizes.kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    out = reference.causal_attention(q, k, v).transpose(1, 2).reshape(given["dout"].shape)
    (gradient,) = torch.autograd.grad(out, packed, given["dout"].double())
    return {"rotated": rotated.detach(), "out": out.detach(), "dqkv": gradient}


# Head and loss.


def _head_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    shapes = {"e": (sizes.tokens, sizes.width), "head": (sizes.vocab, sizes.width)}
    found = normals(seed, torch.float32, **shapes)
    # Logits of standard deviation 1.5, as a proxy's.
    found["head"] *= 1.5 * sizes.width**-0.5
    labels = integers(seed, sizes.tokens, sizes.vocab)
    labels[::7] = IGNORED
    found = {name: value.to(dtype) for name, value in found.items()}
    return found | {"labels": labels} | normals(seed, torch.float32, dhead=shapes["head"])


def _head_scale(sizes: Sizes) -> float:
    return 1.0 / sizes.tokens


def _head_ours(kind: str) -> Callable[[Tensors, Sizes], Tensors]:
    def ours(given: Tensors, sizes: Sizes) -> Tensors:
        from regmix_kernels import linear_cross_entropy

        e, head, labels = given["e"], given["head"], given["labels"]
        dhead = torch.zeros_like(given["dhead"])
        call = getattr(linear_cross_entropy, kind)
        nats, de = call(e, head, labels, scale=_head_scale(sizes), dhead_PVD=dhead)
        # What was in the gradient stays: a second micro-batch is added.
        call(e, head, labels, scale=_head_scale(sizes), dhead_PVD=given["dhead"])
        alone = linear_cross_entropy.loss(e, head, labels)
        added = given["dhead"]
        return {"nats": nats, "de": de, "dhead": dhead, "added dhead": added, "loss only": alone}

    return ours


def _head_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    e, head = _leaf(given["e"]), _leaf(given["head"])
    kept = given["labels"] != IGNORED
    nats = reference.linear_cross_entropy(e, head, given["labels"].clamp_min(0)) * kept
    de, dhead = torch.autograd.grad(nats.sum() * _head_scale(sizes), (e, head))
    nats = nats.detach()
    added = dhead + given["dhead"].double()
    return {"nats": nats, "de": de, "dhead": dhead, "added dhead": added, "loss only": nats}


# AdamW over flat buffers; the first proxy of a stack has the seed whose gradients are clipped.


def _adamw_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    size = (sizes.width * sizes.hidden // 64 * 64,)
    found = normals(seed, torch.float32, param=size, grad=size, mean=size, square=size)
    found["grad"] *= 10.0 if seed % 2 == 0 else 1e-5
    found["square"].square_()
    zeros = torch.zeros(size, dtype=dtype)
    return found | {"copy": zeros, "count": torch.tensor(3), "failed": torch.tensor(False)}


def _adamw_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import adamw

    norms = adamw.gradient_norms(given["grad"])
    rate = torch.tensor([LEARNING_RATE], device=given["param"].device)
    counts = given["count"].to(torch.int32)
    adamw.update(
        given["param"],
        given["grad"],
        given["mean"],
        given["square"],
        given["copy"],
        norms,
        rate,
        counts,
        given["failed"],
        betas=BETAS,
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
        clip_norm=CLIP_NORM,
    )
    found = {name: given[name] for name in ("param", "mean", "square", "copy")}
    return found | {"norm": norms, "count": counts.float()}


def _adamw_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    tensors = {name: given[name].double() for name in ("param", "grad", "mean", "square")}
    norm = tensors["grad"].norm()
    tensors["grad"] = tensors["grad"] * reference.clip_scale(float(norm), CLIP_NORM)
    param, mean, square = reference.adamw(
        tensors["param"],
        tensors["grad"],
        tensors["mean"],
        tensors["square"],
        int(given["count"]) + 1,
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=1e-8,
        weight_decay=WEIGHT_DECAY,
    )
    found = {"param": param, "mean": mean, "square": square, "copy": param}
    return found | {"norm": norm, "count": given["count"].double() + 1}


# The library's products as the model calls them.


def _product_inputs(sizes: Sizes, seed: int, dtype: torch.dtype) -> Tensors:
    found = normals(seed, dtype, a=(sizes.tokens, sizes.width), b=(sizes.hidden, sizes.width))
    return found | normals(seed, torch.float32, out=(sizes.hidden, sizes.width))


def _product_ours(given: Tensors, sizes: Sizes) -> Tensors:
    from regmix_kernels import products

    c = products.matmul(given["a"], given["b"].transpose(1, 2))
    products.matmul(c.transpose(1, 2), given["a"], out=given["out"], accumulate=True)
    return {"c": c, "added": given["out"]}


def _product_wanted(given: Tensors, sizes: Sizes) -> Tensors:
    a, b = given["a"].double(), given["b"].double()
    rounded = (a @ b.T).to(given["a"].dtype).double()
    return {"c": a @ b.T, "added": given["out"].double() + rounded.T @ a}


CASES: dict[str, Case] = {
    "linear_cross_entropy.chunked": Case(
        inputs=_head_inputs, ours=_head_ours("chunked"), wanted=_head_wanted
    ),
    "linear_cross_entropy.fused": Case(
        inputs=_head_inputs,
        ours=_head_ours("fused"),
        wanted=_head_wanted,
        fits=lambda sizes: sizes.width <= WIDEST_FUSED,
    ),
    "attention": Case(inputs=_attention_inputs, ours=_attention_ours, wanted=_attention_wanted),
    "adamw": Case(inputs=_adamw_inputs, ours=_adamw_ours, wanted=_adamw_wanted),
    "rmsnorm": Case(inputs=_norm_inputs, ours=_norm_ours, wanted=_norm_wanted),
    "swiglu": Case(inputs=_swiglu_inputs, ours=_swiglu_ours, wanted=_swiglu_wanted),
    "embedding, segment_sum": Case(
        inputs=_embedding_inputs, ours=_embedding_ours, wanted=_embedding_wanted
    ),
    "products": Case(inputs=_product_inputs, ours=_product_ours, wanted=_product_wanted),
}
