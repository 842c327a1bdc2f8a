"""The parameters of a stack: their names, their start, their names elsewhere.

Enters: a shape and seeds. Leaves: tensors [P, ...] by name, or one proxy's weights under the
names of transformers. Does not compute with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from regmix.errors import ModelError
from regmix.model.presets import ModelShape


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of one model, in the order of the stack."""
    width, hidden = shape.width, shape.hidden
    heads = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (shape.vocab_size, width)}
    for layer in range(shape.num_layers):
        shapes[f"layers.{layer}.attention_norm"] = (width,)
        shapes[f"layers.{layer}.qkv"] = (heads, width)
        shapes[f"layers.{layer}.attention_out"] = (width, width)
        shapes[f"layers.{layer}.mlp_norm"] = (width,)
        shapes[f"layers.{layer}.gate_up"] = (2 * hidden, width)
        shapes[f"layers.{layer}.down"] = (width, hidden)
    shapes["norm"] = (width,)
    if not shape.tied:
        shapes["head"] = (shape.vocab_size, width)
    return shapes


def init_parameters(shape: ModelShape, init_seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return float32 parameters [P, ...]; row i depends on `init_seeds[i]` alone.

    Values as `initial_values` has them.
    """
    if len(init_seeds) == 0:
        raise ModelError("A stack of no proxies", cure="Give at least one init seed")
    shapes = parameter_shapes(shape)
    params = {name: torch.empty(len(init_seeds), *size) for name, size in shapes.items()}
    for row, seed in enumerate(init_seeds):
        for name, value in initial_values(shape, seed):
            params[name][row] = value
    return params


def initial_values(shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield one model's parameters at its start, float32, in the order of the stack, one at a time.

    N(0, 2 / (5 width)) for embedding, linears and head; N(0, 1 / hidden) / num_layers for
    SwiGLU's output projection; ones for norms (sail-sg/regmix, as TinyLlama).
    """
    linear_std = (2.0 / (5.0 * shape.width)) ** 0.5
    down_std = shape.hidden**-0.5 / shape.num_layers
    generator = torch.Generator().manual_seed(int(seed))
    for name, size in parameter_shapes(shape).items():
        if name.endswith("norm"):
            yield name, torch.ones(size)
            continue
        std = down_std if name.endswith(".down") else linear_std
        yield name, torch.empty(size).normal_(0.0, std, generator=generator)


def transformers_state(params: dict[str, Tensor], row: int, shape: ModelShape) -> dict[str, Tensor]:
    """Return one proxy's weights under the names of transformers' `LlamaForCausalLM`."""
    q = shape.num_heads * shape.head_dim
    k = q + shape.kv_heads * shape.head_dim
    state = {"model.embed_tokens.weight": params["embedding"][row]}
    for layer in range(shape.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        qkv, gate_up = params[f"{ours}.qkv"][row], params[f"{ours}.gate_up"][row]
        state |= {
            f"{theirs}.input_layernorm.weight": params[f"{ours}.attention_norm"][row],
            f"{theirs}.self_attn.q_proj.weight": qkv[:q],
            f"{theirs}.self_attn.k_proj.weight": qkv[q:k],
            f"{theirs}.self_attn.v_proj.weight": qkv[k:],
            f"{theirs}.self_attn.o_proj.weight": params[f"{ours}.attention_out"][row],
            f"{theirs}.post_attention_layernorm.weight": params[f"{ours}.mlp_norm"][row],
            f"{theirs}.mlp.gate_proj.weight": gate_up[: shape.hidden],
            f"{theirs}.mlp.up_proj.weight": gate_up[shape.hidden :],
            f"{theirs}.mlp.down_proj.weight": params[f"{ours}.down"][row],
        }
    state["model.norm.weight"] = params["norm"][row]
    state["lm_head.weight"] = params["embedding" if shape.tied else "head"][row]
    return {name: value.contiguous() for name, value in state.items()}
