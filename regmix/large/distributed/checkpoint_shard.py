"""One rank's file of a checkpoint: a safetensors file, written and read a tensor at a time.

Enters: tensors by name. Leaves: the file by atomic rename, its size and checksum; slices of its
tensors back. Knows nothing of ranks, and never holds a whole file in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from torch import Tensor

from regmix.errors import StorageError
from regmix.files import atomic_open, storage_errors

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLOCK_BYTES = 16 << 20


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file and return its size in bytes and its xxh3_64.

    Equal tensors give equal bytes. A tensor on a device is copied when its turn comes.
    """
    # Wide types first, so that every tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest, size = xxhash.xxh3_64(), 0
    with atomic_open(path) as stream:
        for block in _blocks(tensors, names):
            stream.write(block)
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a shard for reading slices; `StorageError` where its content is not to be read."""
    try:
        with storage_errors(path), safetensors.safe_open(path, framework="pt") as stream:
            yield stream
    except safetensors.SafetensorError as error:
        raise StorageError(
            f"{path}: cannot be read ({error})", cure="Check the disk, then run the command again"
        ) from error


def read_slice(stream: Any, name: str, shape: tuple[int, ...], cut: tuple[slice, ...]) -> Tensor:
    """Return a slice of the stored tensor `name`, whose shape must be `shape`."""
    stored = stream.get_slice(name)
    if tuple(stored.get_shape()) != shape:
        raise safetensors.SafetensorError(f"'{name}' is {stored.get_shape()}, not {list(shape)}")
    return stored[cut] if cut else stream.get_tensor(name)


def _blocks(tensors: Mapping[str, Tensor], names: list[str]) -> Iterator[bytes | memoryview]:
    header, position = {}, 0
    for name in names:
        tensor = tensors[name]
        stop = position + prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        plain = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = plain.numpy().data
        for start in range(0, len(data), _BLOCK_BYTES):
            yield data[start : start + _BLOCK_BYTES]
