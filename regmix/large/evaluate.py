"""Loss of a trained model on every validation set, in nats per token and bits per byte.

Enters: a model's folder, or a Hugging Face checkpoint of the corpus's tokenizer, and a corpus.
Leaves: a table by target over whole validation sets. Chooses no model and ranks none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.config import build
from regmix.data.validation import read_windows
from regmix.errors import ModelError
from regmix.files import read_table
from regmix.large.vocabulary import check_own_tokens, check_same_tokens
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from regmix.data.shards import ShardSet
    from regmix.large.inference import LlamaForward
    from regmix.study import Study

Report = Callable[[int], None]
LONGEST_WINDOW = 2048
_TOKENS_AT_ONCE = 8192


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


def evaluate_model(
    study: Study, folder: Path, *, gpu: bool = False, report: Report = lambda _: None
) -> dict[str, Any]:
    """Evaluate a model of the study on all of its targets; returns `evaluation_table`'s table.

    gpu: compute on the first GPU in bfloat16, else on the CPU in float32. report: is told of
    every batch how many tokens it predicted.
    """
    shape, parameters, config = load_model(folder)
    shards = study.open_shards()
    check_own_tokens(folder, config, shards)
    forward = _forward(shape, parameters, shards, gpu=gpu)
    return _measure(study, shards, forward, shape.seq_len, report)


def evaluate_hugging_face(
    study: Study,
    folder: Path,
    *,
    seq_len: int | None = None,
    gpu: bool = False,
    report: Report = lambda _: None,
) -> dict[str, Any]:
    """Evaluate a Hugging Face Llama checkpoint on the study's targets, as `evaluate_model`.

    seq_len: tokens of a window, which a loss depends on; None for the checkpoint's own length, at
    most `LONGEST_WINDOW`. Raises `ModelError` where its tokenizer is not the corpus's.
    """
    from regmix.large.importing import load_hugging_face, read_shape

    shape, shards = read_shape(folder), study.open_shards()
    check_same_tokens(folder, shards)
    if seq_len is not None and seq_len > shape.seq_len:
        raise ModelError(
            f"windows of {seq_len} tokens, and {folder} was trained for {shape.seq_len}",
            cure=f"Give --seq-len {shape.seq_len} or less",
        )
    shape, parameters = load_hugging_face(folder)
    length = min(shape.seq_len, LONGEST_WINDOW) if seq_len is None else seq_len
    return _measure(study, shards, _forward(shape, parameters, shards, gpu=gpu), length, report)


def pick_device(gpu: bool) -> tuple[str, torch.dtype]:
    """Return the device and the type to compute in; `ModelError` where there is no GPU."""
    import torch

    if not gpu:
        return "cpu", torch.float32
    if not torch.cuda.is_available():
        raise ModelError("this machine has no GPU that torch can use", cure="Leave --gpu out")
    return "cuda", torch.bfloat16


def _forward(
    shape: ModelShape, parameters: dict[str, Tensor], shards: ShardSet, *, gpu: bool
) -> LlamaForward:
    from regmix.large.inference import LlamaForward

    if shape.vocab_size < shards.vocab_size:
        raise ModelError(
            f"a vocabulary of {shape.vocab_size}, and {shards.path} has {shards.vocab_size} tokens",
            cure="Evaluate a model of the corpus's tokenizer",
        )
    device, dtype = pick_device(gpu)
    return LlamaForward(shape, parameters, device=device, dtype=dtype)


def _measure(
    study: Study, shards: ShardSet, forward: LlamaForward, seq_len: int, report: Report
) -> dict[str, Any]:
    from regmix.swarm.engine import mean_losses

    def told(tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        nats = forward.evaluate(tokens_BT1, mask_BT)
        report(int(mask_BT.sum()))
        return nats

    at_once = max(1, _TOKENS_AT_ONCE // seq_len)
    losses = {}
    for target in study.config.targets:
        windows = read_windows(shards, target, seq_len=seq_len)
        losses[target] = float(mean_losses(told, windows, at_once)[0])
    table = evaluation_table(study, shards, losses)
    # For a reader of the table: a loss depends on both, slightly on the second.
    table |= {"seq_len": seq_len, "computed_in": str(forward.dtype).removeprefix("torch.")}
    return table


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
