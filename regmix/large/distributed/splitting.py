"""Whether FSDP can split a model over so many processes.

Enters: a shape and a number of processes. Leaves: yes, or the error that says what fits. Splits
nothing itself; imports no torch, so that a plan can ask.
"""

from __future__ import annotations

from regmix.errors import ModelError
from regmix.model.presets import ModelShape


def _rows(shape: ModelShape) -> dict[str, int]:
    """Return the length of dimension 1 of each kind of parameter, which is what FSDP splits."""
    return {
        "embedding": shape.vocab_size,
        "qkv": (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim,
        "gate_up": 2 * shape.hidden,
        "attention_out, down and the norms": shape.width,
    }


def is_even(shape: ModelShape, num_ranks: int) -> bool:
    """Return whether every parameter can be split evenly: past dimension 0, FSDP2 asks for it."""
    return all(rows % num_ranks == 0 for rows in _rows(shape).values())


def refuse_uneven(shape: ModelShape, num_ranks: int) -> None:
    """Raise `ModelError` where FSDP cannot split the model over so many processes."""
    if is_even(shape, num_ranks):
        return
    name, rows = next((n, rows) for n, rows in _rows(shape).items() if rows % num_ranks)
    fewer = next(n for n in range(num_ranks - 1, 0, -1) if is_even(shape, n))
    raise ModelError(
        f"FSDP over {num_ranks} processes cannot split '{name}', which has {rows} rows",
        cure=f"Use {fewer} processes, or --parallel ddp where the model fits each",
    )
