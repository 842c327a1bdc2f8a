"""Which implementation serves each operation of the fused stack: Triton's, or the reference.

Enters: a device, a shape, and wishes by operation. Leaves: the functions, under one interface, and
their names for `doctor` and for reports. Nothing is chosen by trying: the choice depends on the
device and the shape only, and is the same on every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from regmix_kernels.launches import MAX_FUSED_WIDTH, MAX_HEAD_DIM

from regmix.errors import ModelError, nearest
from regmix.model.presets import ModelShape

# Operation -> its implementations, the default on a GPU first.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "embedding": ("triton", "reference"),
    "rmsnorm": ("triton", "reference"),
    "swiglu": ("triton", "reference"),
    "rope": ("triton", "reference"),
    "attention": ("triton", "sdpa", "reference"),
    "head": ("streamed", "chunked", "reference"),
    "row_sums": ("triton", "reference"),
    "adamw": ("triton", "reference"),
}


@dataclass(frozen=True, kw_only=True)
class Operations:
    """The functions that a fused stack calls, each as its module in `regmix_kernels` says.

    names: operation -> implementation, for what is shown and stored.
    """

    names: dict[str, str]
    plan: Callable[..., Any]
    add_rows: Callable[..., None]
    embed: Callable[..., Any]
    rmsnorm: Callable[..., Any]
    rmsnorm_backward: Callable[..., Any]
    swiglu: Callable[..., Any]
    swiglu_backward: Callable[..., Any]
    rotate: Callable[..., None]
    attention: Callable[..., Any]
    attention_backward: Callable[..., Any]
    head: Callable[..., Any]
    head_loss: Callable[..., Any]
    add_row_sums: Callable[..., None]
    gradient_norms: Callable[..., Any]
    update: Callable[..., None]


def choose(
    shape: ModelShape, device_type: str, wishes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the implementation of every operation, by name.

    wishes: operation -> implementation, instead of the default; `ModelError` where there is none
    of that name, or the model is too wide for it.
    """
    on_gpu = device_type == "cuda"
    names = {op: kinds[0] if on_gpu else "reference" for op, kinds in IMPLEMENTATIONS.items()}
    if on_gpu and shape.width > MAX_FUSED_WIDTH:
        names["head"] = "chunked"
    if on_gpu and shape.head_dim > MAX_HEAD_DIM:
        names["attention"] = "sdpa"
    for op, kind in (wishes or {}).items():
        if op not in IMPLEMENTATIONS:
            raise ModelError(
                f"no operation is called '{op}'", cure=f"Correct it: {nearest(op, IMPLEMENTATIONS)}"
            )
        if kind not in IMPLEMENTATIONS[op]:
            known = nearest(kind, IMPLEMENTATIONS[op])
            raise ModelError(f"{op} has no implementation '{kind}'", cure=f"Correct it: {known}")
        if kind == "streamed" and shape.width > MAX_FUSED_WIDTH:
            raise ModelError(
                f"the streamed head holds a width of {MAX_FUSED_WIDTH} at most, not {shape.width}",
                cure="Use head=chunked",
            )
        if (op, kind) == ("attention", "triton") and shape.head_dim > MAX_HEAD_DIM:
            raise ModelError(
                f"our attention holds a head size of {MAX_HEAD_DIM} at most, not {shape.head_dim}",
                cure="Use attention=sdpa",
            )
        names[op] = kind
    return names


def operations(names: Mapping[str, str]) -> Operations:
    """Return the functions that `names` (of `choose`) stand for."""
    from regmix_kernels import by_reference

    functions: dict[str, Any] = by_reference.functions()
    triton = [op for op, kind in names.items() if kind in ("triton", "streamed", "chunked")]
    for op in triton:
        functions |= _triton_functions(op, names[op])
    if names["attention"] == "sdpa":
        functions |= by_reference.sdpa_functions()
    return Operations(names=dict(names), **functions)


def _triton_functions(op: str, kind: str) -> dict[str, Any]:
    from regmix_kernels import (
        adamw,
        attention,
        embedding,
        linear_cross_entropy,
        rmsnorm,
        rope,
        row_sums,
        segment_sum,
        swiglu,
    )

    tables: dict[str, dict[str, Any]] = {
        "embedding": {
            "embed": embedding.forward,
            "plan": segment_sum.plan,
            "add_rows": segment_sum.add_rows,
        },
        "rmsnorm": {"rmsnorm": rmsnorm.forward, "rmsnorm_backward": rmsnorm.backward},
        "swiglu": {"swiglu": swiglu.forward, "swiglu_backward": swiglu.backward},
        "rope": {"rotate": rope.rotate_},
        "attention": {"attention": attention.forward, "attention_backward": attention.backward},
        "head": {
            "head": linear_cross_entropy.fused
            if kind == "streamed"
            else linear_cross_entropy.chunked,
            "head_loss": linear_cross_entropy.loss,
        },
        "row_sums": {"add_row_sums": row_sums.add_row_sums},
        "adamw": {"gradient_norms": adamw.gradient_norms, "update": adamw.update},
    }
    return tables[op]
