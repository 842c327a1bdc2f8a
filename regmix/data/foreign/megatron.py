"""Megatron's indexed datasets: `<name>.bin` of ids and `<name>.idx` with their lengths.

The index is `MMIDIDX\\0\\0`, uint64 version 1, uint8 code of the type, uint64 sequences, uint64
document bounds, then int32 lengths, int64 byte positions, int64 document bounds (in sequences),
and for multimodal data an int8 mode a sequence.

Enters: the path of a `.bin`. Leaves: where the ids lie, and the first id of each document. Only
sequences laid end to end are read, as Megatron's own builder writes them.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from regmix.data.foreign.token_file import TokenFile, read_start, refuse, regular_size, token_file

MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_TYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
_CODES = dict(enumerate(_TYPES, start=1))
_RESTORE = "Restore the file, or run Megatron's preprocess_data.py again"


def index_path(path: Path) -> Path:
    """Return the index that belongs to a `.bin`."""
    return path.with_suffix(".idx")


def read_megatron(path: Path) -> TokenFile:
    """Return the layout of a dataset; reads the index's header and its last entry."""
    size = regular_size(path)
    index = index_path(path)
    code, sequences, bounds = _read_header(index)
    expected = _HEADER_BYTES + 12 * sequences + 8 * bounds
    if regular_size(index) not in (expected, expected + sequences):
        raise refuse(
            index,
            f"{regular_size(index)} bytes where {expected} were written: cut short or changed",
            cure=_RESTORE,
        )
    with open(index, "rb") as stream:
        stream.seek(_HEADER_BYTES + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_HEADER_BYTES + 12 * sequences - 8)
        (position,) = struct.unpack("<q", stream.read(8))
    whole = token_file(path, _CODES[code], start=0, size=size)
    if position + length * whole.dtype.itemsize != size:
        raise refuse(
            path,
            f"{size} bytes where its index says {position + length * whole.dtype.itemsize}: cut "
            "short or changed",
            cure=_RESTORE,
        )
    return token_file(path, _CODES[code], start=0, size=size, index=index)


def _read_header(index: Path) -> tuple[int, int, int]:
    regular_size(index)
    header = read_start(index, _HEADER_BYTES)
    if header[:9] != MAGIC:
        raise refuse(index, "no index of a Megatron dataset", cure=_RESTORE)
    if len(header) < _HEADER_BYTES:
        raise refuse(index, "cut short within its header", cure=_RESTORE)
    version, code, sequences, bounds = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in _CODES or sequences < 1 or bounds < 1:
        raise refuse(
            index,
            f"version {version}, type code {code}, {sequences} sequences, {bounds} bounds: "
            "damaged or of an unknown version",
            cure=_RESTORE,
        )
    return code, sequences, bounds


def read_offsets(layout: TokenFile) -> np.ndarray:
    """Return the first id of each document (uint64); `ShardError` where the index makes no sense.

    Documents without ids are left out.
    """
    index = index_path(layout.path)
    _, sequences, bounds = _read_header(index)
    content = index.read_bytes()[_HEADER_BYTES : _HEADER_BYTES + 12 * sequences + 8 * bounds]
    if len(content) != 12 * sequences + 8 * bounds:
        raise refuse(index, "cut short", cure=_RESTORE)
    lengths = np.frombuffer(content, "<i4", sequences).astype(np.int64)
    positions = np.frombuffer(content, "<i8", sequences, offset=4 * sequences)
    documents = np.frombuffer(content, "<i8", bounds, offset=12 * sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if lengths.min() < 0 or starts[-1] != layout.tokens:
        raise refuse(index, "its lengths do not add up to the ids there are", cure=_RESTORE)
    if not np.array_equal(positions, starts[:-1] * layout.dtype.itemsize):
        raise refuse(
            index,
            "its sequences are not laid end to end",
            cure="Restore the file, or write the dataset again with IndexedDatasetBuilder",
        )
    if documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise refuse(index, "its document bounds are damaged", cure=_RESTORE)
    return np.unique(starts[documents[:-1]][starts[documents[:-1]] < starts[documents[1:]]]).astype(
        np.uint64
    )
