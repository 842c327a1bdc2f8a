"""Token ids without a format of their own: NumPy's `.npy`, and plain bytes.

Enters: a path, and for plain bytes the type of the ids and the length of what stands before them.
Leaves: where the ids lie. Nothing is unpickled.
"""

from __future__ import annotations

import math
from pathlib import Path

from regmix.data.foreign.token_file import TokenFile, refuse, regular_size, token_file
from regmix.data.npy import read_header

_RESTORE = "Restore the file, or save it again with numpy.save"


def read_npy(path: Path) -> TokenFile:
    """Return the layout of an array [N] or [N, T] in C order; rows follow each other."""
    size = regular_size(path)
    try:
        header = read_header(path)
    except (ValueError, OSError) as error:
        raise refuse(path, str(error), cure=_RESTORE) from error
    shape, dtype, fortran = header.shape, header.dtype, header.fortran
    if len(shape) not in (1, 2) or (fortran and len(shape) == 2) or dtype.byteorder == ">":
        raise refuse(
            path,
            f"an array of shape {shape}, type {dtype.str}, "
            f"{'Fortran' if fortran else 'C'} order cannot be read in place",
            cure="Save the ids as one C-ordered little-endian array [N]",
        )
    tokens = math.prod(shape)
    return token_file(path, dtype.name, start=header.start, size=size, tokens=tokens)


def read_raw(path: Path, dtype: str, *, header_bytes: int) -> TokenFile:
    """Return the layout of plain little-endian ids after `header_bytes` of anything."""
    return token_file(path, dtype, start=header_bytes, size=regular_size(path))
