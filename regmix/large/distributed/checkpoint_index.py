"""The index of a checkpoint: which files it has, what they hold, and the run's state.

Enters: what every rank wrote, or the text of an index. Leaves: the text with its own checksum, or
an `Index` that was checked against it. Opens no file; a name in an index is never a path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import xxhash

from regmix.errors import ModelError
from regmix.large.distributed.pieces import Box, whole

INDEX = "index.json"
FORMAT = "regmix-fast sharded checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Outline:
    """What a whole tensor is, sharded or not."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardRecord:
    """One file of a checkpoint, written by one rank."""

    bytes: int
    xxh3_64: str
    pieces: dict[str, Box]  # by name of the tensor


@dataclass(frozen=True)
class Index:
    """Everything an index says; the shards in the order of their ranks."""

    step: int
    tensors: dict[str, Outline]
    shards: tuple[ShardRecord, ...]
    state: dict[str, Any]

    def shard_names(self) -> list[str]:
        """Return the names of the files, in the order of `shards`."""
        return [shard_name(rank, len(self.shards)) for rank in range(len(self.shards))]


def shard_name(rank: int, num_ranks: int) -> str:
    """Return the name of the file that `rank` writes."""
    return f"shard-{rank:05d}-of-{num_ranks:05d}.safetensors"


def render(index: Index) -> str:
    """Return the text of an index; equal indexes give equal text."""
    files = zip(index.shard_names(), index.shards, strict=True)
    table = {
        "format": FORMAT,
        "version": VERSION,
        "step": index.step,
        "tensors": {
            name: {"dtype": outline.dtype, "shape": list(outline.shape)}
            for name, outline in sorted(index.tensors.items())
        },
        "shards": [
            {
                "file": file,
                "bytes": shard.bytes,
                "xxh3_64": shard.xxh3_64,
                "pieces": {
                    name: {"offset": list(box.offset), "shape": list(box.shape)}
                    for name, box in sorted(shard.pieces.items())
                },
            }
            for file, shard in files
        ],
        "state": json.loads(json.dumps(index.state, sort_keys=True)),
    }
    return _text({**table, "checksum": _digest(table)})


def parse(text: str, step: int) -> Index:
    """Return the index of `step` from its text.

    `ValueError` says what is wrong with it; `ModelError` where a newer version wrote it.
    """
    try:
        table = json.loads(text)
        digest = table.pop("checksum")
        if table["format"] != FORMAT:
            raise ValueError("not an index of a checkpoint")
        if _text({**table, "checksum": digest}) != text or digest != _digest(table):
            raise ValueError("its checksum does not fit: changed or damaged")
        if table["version"] > VERSION:
            raise ModelError(
                f"a checkpoint of format version {table['version']}, read here up to {VERSION}",
                cure="Install the newer regmix-fast that wrote it",
            )
        index = _from_table(table)
        names = [shard["file"] for shard in table["shards"]]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged ({error!r})") from error
    if index.step != step:
        raise ValueError(f"the index of step {index.step}, not of {step}")
    if names != index.shard_names():
        raise ValueError("the names of its shards are not those of a checkpoint")
    _check_cover(index)
    return index


def _from_table(table: dict[str, Any]) -> Index:
    return Index(
        step=table["step"],
        tensors={
            name: Outline(str(entry["dtype"]), _sizes(entry["shape"]))
            for name, entry in table["tensors"].items()
        },
        shards=tuple(
            ShardRecord(
                bytes=shard["bytes"],
                xxh3_64=shard["xxh3_64"],
                pieces={
                    name: Box(_sizes(piece["offset"]), _sizes(piece["shape"]))
                    for name, piece in shard["pieces"].items()
                },
            )
            for shard in table["shards"]
        ),
        state=table["state"],
    )


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise ValueError(f"{value!r} are no sizes")
    return tuple(value)


def _check_cover(index: Index) -> None:
    """Raise `ValueError` unless a tensor's pieces are inside it and as large as it together."""
    boxes: dict[str, list[Box]] = {name: [] for name in index.tensors}
    for shard in index.shards:
        for name, box in shard.pieces.items():
            if name not in boxes:
                raise ValueError(f"a piece of '{name}', which is no tensor of it")
            boxes[name].append(box)
    for name, outline in index.tensors.items():
        total = whole(outline.shape)
        if any(box.overlap(total) != box for box in boxes[name]):
            raise ValueError(f"a piece of '{name}' lies outside it")
        if sum(box.numel for box in boxes[name]) != total.numel:
            raise ValueError(f"the pieces of '{name}' do not fill it")


def _digest(table: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(_text(table).encode())


def _text(table: dict[str, Any]) -> str:
    # One line: at 64 ranks an indented index of a 7B model would have over half a million.
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")) + "\n"
