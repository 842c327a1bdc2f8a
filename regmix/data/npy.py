"""NumPy's `.npy` files from others, read as data.

Enters: a path. Leaves: what the header says, or the numbers; `ValueError` says what is wrong. Makes
no array larger than the file, holds no objects, unpickles nothing.
"""

from __future__ import annotations

import math
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class NpyHeader:
    """shape, dtype and order (`fortran`) of an array; start: byte of its first number."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int


def read_header(path: Path) -> NpyHeader:
    """Return the header of a file; `ValueError` where it is none, or one of objects."""
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            start = stream.tell()
    except (
        # NumPy parses the header as a Python literal, which can fail in all ways of a parser.
        *(ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError),
        *(KeyError, IndexError, AttributeError, OverflowError),
    ) as error:
        raise ValueError(f"no .npy file ({' '.join(str(error).split())[:100]})") from error
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read: a pickle can run anything")
    return NpyHeader(tuple(int(size) for size in shape), dtype, bool(fortran), start)


def read_numbers(path: Path) -> np.ndarray:
    """Return the numbers of a file [...]; `ValueError` where it is cut short or holds none.

    Raises `OSError` where it cannot be read.
    """
    header = read_header(path)
    if header.dtype.kind not in "iuf":
        raise ValueError(f"values of type {header.dtype} are no numbers")
    count = math.prod(header.shape)
    room = path.stat().st_size - header.start
    if min(header.shape, default=0) < 0 or count * header.dtype.itemsize != room:
        raise ValueError(f"{room} bytes where {count * header.dtype.itemsize} were written")
    values = np.fromfile(path, header.dtype, count, offset=header.start)
    return values.reshape(header.shape, order="F" if header.fortran else "C")
