"""Loss of a trained model on every validation set, in nats per token and bits per byte.

Enters: a model's folder and a corpus. Leaves: a table by target over whole validation sets.
Chooses no model and ranks none.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.config import build
from regmix.data.validation import read_windows
from regmix.errors import ModelError
from regmix.files import read_table
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

    from regmix.data.shards import ShardSet
    from regmix.study import Study


def load_model(folder: Path) -> tuple[ModelShape, dict[str, Tensor], dict[str, Any]]:
    """Return (shape, parameters [1, ...], config) of a model; `ModelError` where damaged."""
    from regmix.model.llama import parameter_shapes
    from regmix.swarm.checkpoint import read_tensors

    if not (folder / "summary.json").is_file():
        raise ModelError(
            f"{folder} holds no finished model", cure="Train it with: regmix-fast train"
        )
    config = read_table(folder / "config.json", "shape", "tokenizer")
    if not isinstance(config["tokenizer"], dict) or "hash" not in config["tokenizer"]:
        raise ModelError(f"{folder}: its config.json names no tokenizer", cure="Restore the file")
    shape = build(ModelShape, config["shape"], where=str(folder / "config.json"))
    try:
        parameters, _ = read_tensors(folder / "model.safetensors")
    except ValueError as error:
        raise ModelError(str(error), cure="Train the model again, or restore the file") from error
    found = {name: tuple(value.shape[1:]) for name, value in parameters.items()}
    if found != {name: tuple(size) for name, size in parameter_shapes(shape).items()}:
        raise ModelError(
            f"{folder}: its weights do not have the shape that its config.json says",
            cure="Restore the two files, or train the model again",
        )
    return shape, parameters, config


def evaluate_model(study: Study, folder: Path) -> dict[str, Any]:
    """Evaluate a model of the study on all of its targets; returns `evaluation_table`'s table."""
    from regmix.model.llama import StackedLlama
    from regmix.swarm.engine import mean_losses

    shape, parameters, config = load_model(folder)
    shards = study.open_shards()
    if config["tokenizer"]["hash"] != shards.tokenizer_hash:
        raise ModelError(
            f"{folder}: the model was trained with another tokenizer than {shards.path} has",
            cure="Evaluate it on shards packed with its own tokenizer",
        )
    evaluate = functools.partial(StackedLlama(shape).evaluate, parameters)
    losses = {}
    for target in study.config.targets:
        windows = read_windows(shards, target, seq_len=shape.seq_len)
        losses[target] = float(mean_losses(evaluate, windows)[0])
    return evaluation_table(study, shards, losses)


def evaluation_table(study: Study, shards: ShardSet, losses: dict[str, float]) -> dict[str, Any]:
    """Return losses by target [nats/token] with bits per byte, and the study's objective.

    Bits per byte: all nats of the set over ln 2 and its UTF-8 bytes, separators excluded; absent
    where token files of another program do not tell their bytes.
    """
    targets: dict[str, dict[str, Any]] = {}
    for target, loss in losses.items():
        stats = shards.stats("valid", target)
        num_predictions = stats.tokens - 1
        targets[target] = {"loss_nats": loss, "tokens": num_predictions}
        if stats.utf8_bytes:
            bits = loss * num_predictions / (math.log(2) * stats.utf8_bytes)
            targets[target].update(bits_per_byte=bits, utf8_bytes=stats.utf8_bytes)
    objective = study.config.objective
    total = sum(objective.values())
    mean = sum(weight * losses[target] for target, weight in objective.items()) / total
    return {"targets": targets, "objective": {"loss_nats": mean}}
