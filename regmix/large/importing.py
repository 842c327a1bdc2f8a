"""A Hugging Face Llama checkpoint as a starting point: for more training, evaluation, generation.

Enters: a folder with `config.json` and safetensors files, one or several with their index.
Leaves: a `ModelShape` and float32 parameters [1, ...] under our names. What our model cannot
compute (scaled rotary embeddings, biases, other activations) is refused; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regmix.errors import ModelError
from regmix.files import read_table, storage_errors
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# transformers' own defaults, for what a configuration leaves out.
_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0}
# A buffer of older releases, which the base of the rotary embedding determines.
_BUFFER = ".rotary_emb.inv_freq"
_HEAD = "lm_head.weight"
_DTYPES = ("F32", "BF16", "F16")
_AGAIN = "Restore the files, or download the checkpoint again"


class _Stored(NamedTuple):
    """Where a tensor lies, its size, and its type as safetensors names it."""

    path: Path
    size: tuple[int, ...]
    dtype: str


def load_hugging_face(folder: Path | str) -> tuple[ModelShape, dict[str, Tensor]]:
    """Return (shape, parameters [1, ...] float32) of a Llama checkpoint.

    The shape's `seq_len` is the checkpoint's `max_position_embeddings`. Raises `ModelError` where
    it is no Llama that our model computes, or a file is missing, damaged or outside the folder.
    """
    import torch

    from regmix.model.parameters import parameter_shapes

    folder = Path(folder)
    shape = read_shape(folder)
    stored = _read_headers(_weight_files(folder))
    places = _checked_places(folder, shape, stored)
    parameters = {name: torch.empty(1, *size) for name, size in parameter_shapes(shape).items()}
    for path in sorted({weight.path for weight in stored.values()}):
        with _opened(path) as stream:
            for name, (ours, first, last) in places.items():
                if stored[name].path == path:
                    _fill(parameters[ours][0, first:last], stream.get_tensor(name), name, path)
    if shape.tied and _HEAD in stored:
        with _opened(stored[_HEAD].path) as stream:
            head = stream.get_tensor(_HEAD).float()
        if not torch.equal(head, parameters["embedding"][0]):
            raise ModelError(
                f"{folder}: its head is not its embedding, though its config.json says so",
                cure="Set tie_word_embeddings to false there if the head was trained apart",
            )
    return shape, parameters


def check_files(folder: Path) -> None:
    """Raise `ModelError` where `load_hugging_face` would, as far as headers of files tell."""
    _checked_places(folder, read_shape(folder), _read_headers(_weight_files(folder)))


def read_shape(folder: Path) -> ModelShape:
    """Return the shape that a checkpoint's `config.json` describes; `ModelError` for another."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} holds no Hugging Face checkpoint (no config.json)",
            cure="Name the folder that holds config.json and the safetensors files",
        )
    table = read_table(path)
    _refuse_other_models(path, table)
    size = {
        name: _whole_number(path, table, key)
        for name, key in (
            ("num_layers", "num_hidden_layers"),
            ("width", "hidden_size"),
            ("num_heads", "num_attention_heads"),
            ("hidden", "intermediate_size"),
            ("vocab_size", "vocab_size"),
            ("seq_len", "max_position_embeddings"),
        )
    }
    kv_heads = None
    if table.get("num_key_value_heads") is not None:
        kv_heads = _whole_number(path, table, "num_key_value_heads")
    try:
        shape = ModelShape(
            **size,
            num_kv_heads=None if kv_heads == size["num_heads"] else kv_heads,
            rope_base=_rope_base(path, table),
            norm_eps=_number(path, "rms_norm_eps", table.get("rms_norm_eps")),
            tied=table.get("tie_word_embeddings", False) is True,
        )
    except ModelError as error:
        raise ModelError(f"{path}: {error.what}", cure=error.cure) from error
    head_dim = table.get("head_dim")
    if head_dim not in (None, shape.head_dim):
        raise ModelError(
            f"{path}: heads of size {head_dim}, where width / heads is {shape.head_dim}",
            cure="Name a checkpoint whose heads divide its width",
        )
    return shape


def _refuse_other_models(path: Path, table: Mapping[str, Any]) -> None:
    """Raise `ModelError` for what changes the computation in a way that ours does not have."""
    cure = "Name a Llama without it: our model has no such part"
    if table.get("model_type") != "llama":
        raise ModelError(
            f"{path}: a model of type {table.get('model_type')!r}",
            cure="Name a Llama checkpoint (model_type 'llama')",
        )
    for key in ("attention_bias", "mlp_bias"):
        if table.get(key):
            raise ModelError(f"{path}: the model has biases ({key})", cure=cure)
    activation = table.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{path}: the activation {activation!r}", cure="Name a Llama with 'silu'")
    if table.get("quantization_config"):
        raise ModelError(
            f"{path}: its weights are quantized", cure="Name the checkpoint before quantization"
        )
    for key in ("rope_scaling", "rope_parameters"):
        rope = table.get(key)
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise ModelError(f"{path}: {key} is {rope!r}", cure="Restore the file")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelError(f"{path}: scaled rotary embeddings ({key} {kind!r})", cure=cure)
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{path}: rotary embeddings of a part of the head", cure=cure)


def _rope_base(path: Path, table: Mapping[str, Any]) -> float:
    # transformers keeps it in rope_parameters from 5 on, beside them before.
    nested = (table.get("rope_parameters") or {}).get("rope_theta")
    return _number(path, "rope_theta", table.get("rope_theta") if nested is None else nested)


def _number(path: Path, key: str, value: object) -> float:
    if value is None:
        return _DEFAULTS[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{path}: {key} is {value!r}", cure="Restore the file: it is a number")
    return float(value)


def _whole_number(path: Path, table: Mapping[str, Any], key: str) -> int:
    value = table.get(key, _DEFAULTS.get(key))
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(
            f"{path}: {key} is {value!r}", cure="Restore the file: it is a whole number"
        )
    return value


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights, all of them there and all of them in the folder."""
    index, single = folder / INDEX, folder / WEIGHTS
    if index.is_file():
        names = read_table(index, "weight_map")["weight_map"]
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index}: names no file of weights", cure="Restore the file")
        paths = [_inside(index, name) for name in sorted({str(name) for name in names.values()})]
    else:
        paths = [single]
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths
    if index.is_file():
        raise ModelError(f"{missing[0]} is missing, which {INDEX} names", cure=_AGAIN)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder}: only pickled weights ({pickled[0]}), which are not read: a pickle can run "
            "any program",
            cure="Have whoever you trust with them save them as safetensors: "
            "model.save_pretrained(FOLDER, safe_serialization=True)",
        )
    raise ModelError(
        f"{folder}: no weights (neither {WEIGHTS} nor {INDEX})",
        cure="Download the checkpoint again, its safetensors files included",
    )


def _inside(index: Path, name: str) -> Path:
    """Return a file that an index names; it must be a plain name, so that it is in the folder."""
    # Links are fine: the hub's cache is a folder of links, made on this machine.
    longest = 255  # bytes of a file's name
    if (
        Path(name).name != name
        or not name.endswith(".safetensors")
        or len(name.encode("utf-8", "replace")) > longest
    ):
        raise ModelError(
            f"{index}: names the file {name!r}, which is not a safetensors file of its folder",
            cure="Do not use this checkpoint: its index was made by hand",
        )
    return index.with_name(name)


def _places(shape: ModelShape) -> dict[str, tuple[str, int, int]]:
    """Return, for each name of transformers, our parameter and its rows there, first and last."""
    q = shape.num_heads * shape.head_dim
    k = q + shape.kv_heads * shape.head_dim
    v = k + shape.kv_heads * shape.head_dim
    width, hidden = shape.width, shape.hidden
    places = {
        "model.embed_tokens.weight": ("embedding", 0, shape.vocab_size),
        "model.norm.weight": ("norm", 0, width),
    }
    if not shape.tied:
        places[_HEAD] = ("head", 0, shape.vocab_size)
    for layer in range(shape.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        places |= {
            f"{theirs}.input_layernorm.weight": (f"{ours}.attention_norm", 0, width),
            f"{theirs}.self_attn.q_proj.weight": (f"{ours}.qkv", 0, q),
            f"{theirs}.self_attn.k_proj.weight": (f"{ours}.qkv", q, k),
            f"{theirs}.self_attn.v_proj.weight": (f"{ours}.qkv", k, v),
            f"{theirs}.self_attn.o_proj.weight": (f"{ours}.attention_out", 0, width),
            f"{theirs}.post_attention_layernorm.weight": (f"{ours}.mlp_norm", 0, width),
            f"{theirs}.mlp.gate_proj.weight": (f"{ours}.gate_up", 0, hidden),
            f"{theirs}.mlp.up_proj.weight": (f"{ours}.gate_up", hidden, 2 * hidden),
            f"{theirs}.mlp.down_proj.weight": (f"{ours}.down", 0, width),
        }
    return places


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import safetensors

    try:
        with storage_errors(path), safetensors.safe_open(path, framework="pt") as stream:
            yield stream
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"{path}: not a complete safetensors file ({error})", cure="Download the file again"
        ) from error


def _read_headers(paths: list[Path]) -> dict[str, _Stored]:
    """Return what the files hold by name, without reading a tensor."""
    stored: dict[str, _Stored] = {}
    for path in paths:
        with _opened(path) as stream:
            for name in stream.keys():  # noqa: SIM118
                if name in stored:
                    raise ModelError(
                        f"{path}: holds '{name}', as {stored[name].path.name} does",
                        cure="Download the checkpoint again into an empty folder",
                    )
                part = stream.get_slice(name)
                stored[name] = _Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
    return stored


def _checked_places(
    folder: Path, shape: ModelShape, stored: Mapping[str, _Stored]
) -> dict[str, tuple[str, int, int]]:
    """Return `_places`; `ModelError` where what is stored is not what they need."""
    from regmix.model.parameters import parameter_shapes

    if shape.num_layers > len(stored):  # before anything as long as a false number is made
        raise ModelError(
            f"{folder}: {len(stored)} weights for {shape.num_layers} layers", cure=_AGAIN
        )
    sizes, places = parameter_shapes(shape), _places(shape)
    for name, weight in stored.items():
        if name.endswith(_BUFFER) or (shape.tied and name == _HEAD):
            continue
        if name not in places:
            raise ModelError(
                f"{weight.path}: holds '{name}', which our Llama does not have",
                cure="Name a checkpoint without biases, adapters or other additions",
            )
        ours, first, last = places[name]
        expected = (last - first, *sizes[ours][1:])
        if weight.size != expected:
            raise ModelError(
                f"{weight.path}: '{name}' is {list(weight.size)}, where config.json says "
                f"{list(expected)}",
                cure=_AGAIN,
            )
        if weight.dtype not in _DTYPES:
            raise ModelError(
                f"{weight.path}: '{name}' is of type {weight.dtype}",
                cure="Name a checkpoint in float32, bfloat16 or float16",
            )
    missing = sorted(places.keys() - stored.keys())
    if missing:
        raise ModelError(
            f"{folder}: no weights '{missing[0]}' in it ({len(missing)} are missing)", cure=_AGAIN
        )
    return places


def _fill(place: Tensor, tensor: Tensor, name: str, path: Path) -> None:
    import torch

    if not torch.isfinite(tensor).all():
        raise ModelError(
            f"{path}: '{name}' holds numbers that are not finite", cure="Name another checkpoint"
        )
    place.copy_(tensor)
