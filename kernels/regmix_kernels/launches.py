"""How each kernel is launched: tiles, warps and pipeline stages, apart from the kernels.

Enters: an operation's sizes and the GPU's compute capability. Leaves: a frozen table entry. No
entry depends on the number of proxies, so a proxy's sums have one order whatever it is stacked
with; nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AMPERE, HOPPER = 80, 90


def capability(device: torch.device) -> int:
    """Return the table to use on `device`: 80 (A100) or 90 (H100, H200 and newer).

    The interpreter's device, the CPU, takes Hopper's, so that tests run what Hopper runs.
    """
    if device.type != "cuda":
        return HOPPER
    return HOPPER if torch.cuda.get_device_capability(device) >= (9, 0) else AMPERE


@dataclass(frozen=True, kw_only=True)
class RotationTile:
    rows: int
    num_warps: int = 4


def rotation(head_dim):
    return RotationTile(rows=4096 // head_dim)


# ---- pointwise and per-row operations: rmsnorm, swiglu, embedding, segment_sum, adamw

# Widths and hidden sizes of the presets and of the paper's models: what `cases` compile.
WIDTHS = (32, 64, 128, 256, 768, 2048)
HIDDEN = (64, 128, 384, 512, 1536, 5632)


@dataclass(frozen=True, kw_only=True)
class SegmentSum:
    """rows: sorted rows of a block; parts: blocks added at a time; width: columns of a block."""

    rows: int
    parts: int
    width: int
    num_warps: int


def segment_sum(width: int, element_size: int) -> SegmentSum:
    """Return blocks of 16 rows: one program's rows are in flight together, and few cross blocks."""
    columns = min(256 if element_size == 2 else 128, max(16, _power_of_2(width)))
    return SegmentSum(rows=16, parts=16, width=columns, num_warps=4 if columns > 64 else 1)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """rows: rows of a tile; width: its columns, all of D; num_tiles: tiles of one program."""

    rows: int
    width: int
    num_tiles: int
    num_warps: int


def rows(width: int) -> Rows:
    """Return tiles of about 4,096 numbers, 32 a thread, each thread with loads of 16 bytes.

    A program of rmsnorm's backward goes through `num_tiles` of them, at least 32 rows, so that its
    partial sums of the weights' gradient stay small beside what it reads.
    """
    columns = max(16, _power_of_2(width))
    height = max(1, min(16, 4096 // columns))
    num_warps = max(1, min(8, height * columns // 1024))
    return Rows(rows=height, width=columns, num_tiles=max(4, 32 // height), num_warps=num_warps)


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
