"""Chunks of lit-gpt's PackedDataset, as TinyLlama and sail-sg/regmix prepare them.

A file is a 24-byte header (`LITPKDS`, uint64 version 1, uint8 code of the type, uint64 number of
ids) and the ids. A chunk that the documents did not fill is padded with the separator; the
reference's preparation never writes its last chunk, so what was left for it is lost before us.

Enters: a path. Leaves: where the ids lie, the padding left out. Reads the end of the ids only.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from regmix.data.foreign.token_file import TokenFile, read_start, refuse, regular_size, token_file

MAGIC = b"LITPKDS"
HEADER_BYTES = 24
_TYPES = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64", "uint16")
_CODES = dict(enumerate(_TYPES, start=1))
_RESTORE = "Restore the file, or prepare it again"
# The reference writes <split>_<name>_<process>_<10 digits>.bin; others leave <process> out.
_NAME = re.compile(r"(?P<prefix>.+)_(?P<chunk>\d{10})\.bin")
_TAIL_BYTES = 1 << 16


def read_litpkds(path: Path, separator_id: int) -> TokenFile:
    """Return the layout of a chunk; of the separators at its end one is kept."""
    size = regular_size(path)
    header = read_start(path, HEADER_BYTES)
    if header[:7] != MAGIC:
        raise refuse(path, "no LITPKDS file", cure="Correct its format in the description")
    if len(header) < HEADER_BYTES:
        raise refuse(path, "cut short within its header", cure=_RESTORE)
    version, code, tokens = struct.unpack("<QBQ", header[7:])
    if version != 1 or code not in _CODES:
        raise refuse(
            path, f"unknown LITPKDS version {version} or type code {code}: damaged", cure=_RESTORE
        )
    layout = token_file(path, _CODES[code], start=HEADER_BYTES, size=size, tokens=tokens)
    padding = _num_padding(layout, separator_id)
    return replace(layout, tokens=tokens - padding, padding=padding)


def _num_padding(layout: TokenFile, separator_id: int) -> int:
    """Return the separators at the end of the ids, but for one."""
    itemsize, padding = layout.dtype.itemsize, 0
    step = 2 * itemsize  # most chunks have no padding: two ids tell
    with open(layout.path, "rb") as stream:
        end = layout.start + layout.tokens * itemsize
        while end > layout.start:
            begin = max(layout.start, end - step)
            stream.seek(begin)
            ids = np.frombuffer(stream.read(end - begin), layout.dtype)
            others = np.flatnonzero(ids != separator_id)
            if len(others):
                return max(0, padding + len(ids) - 1 - int(others[-1]) - 1)
            padding += len(ids)
            end, step = begin, _TAIL_BYTES
    return padding - 1


def split_name(name: str) -> tuple[str, int] | None:
    """Return (prefix, number of the chunk) of a file's name; None for another name."""
    match = _NAME.fullmatch(name)
    return (match["prefix"], int(match["chunk"])) if match else None


def missing_chunk(names: Iterable[str]) -> str | None:
    """Return a chunk that is missing between 0 and the last of its prefix, or None."""
    chunks: dict[str, set[int]] = {}
    for name in names:
        if (parts := split_name(name)) is not None:
            chunks.setdefault(parts[0], set()).add(parts[1])
    for prefix, numbers in sorted(chunks.items()):
        for number in range(max(numbers)):
            if number not in numbers:
                return f"{prefix}_{number:010d}.bin"
    return None
