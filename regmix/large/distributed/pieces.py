"""The part of each tensor that a rank holds, as a box of the whole tensor.

Enters: tensors, sharded over the ranks (`DTensor`) or the same on all. Leaves: the local part and
its box; which rank writes which box, so that each is written once. Reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Box:
    """A block of a tensor: its first element and its lengths, one of each per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """Return what both boxes hold, or None where that is nothing."""
        starts = tuple(map(max, self.offset, other.offset))
        stops = tuple(map(min, self._stop(), other._stop()))
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, shape) if all(length > 0 for length in shape) else None

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices that cut this box out of a tensor that holds `outer`."""
        return tuple(
            slice(start - base, start - base + length)
            for start, base, length in zip(self.offset, outer.offset, self.shape, strict=True)
        )

    def _stop(self) -> tuple[int, ...]:
        return tuple(start + length for start, length in zip(self.offset, self.shape, strict=True))


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def held(tensor: Tensor) -> tuple[Box, Tensor]:
    """Return the box of `tensor` that this rank holds, and its storage; the box may be empty.

    A plain tensor is held whole. `ValueError` for a `DTensor` with other placements than
    `Shard` and `Replicate` (partial sums and interleaved shards are not one box), or of a mesh
    without this rank.
    """
    if not isinstance(tensor, DTensor):
        return whole(tensor.shape), tensor.detach()
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this rank is not in the tensor's mesh")
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            dim = placement.dim % tensor.ndim
            # As torch.chunk: equal lengths, the last ones shorter or empty.
            longest = -(-shape[dim] // mesh.size(mesh_dim))
            start = min(longest * coordinate[mesh_dim], shape[dim])
            offset[dim] += start
            shape[dim] = min(longest, shape[dim] - start)
        elif type(placement) is not Replicate:
            raise ValueError(f"placement {placement} cannot be stored as one box")
    with torch.no_grad():
        local = tensor.to_local()
    if tuple(local.shape) != tuple(shape):
        raise ValueError(f"a shard of shape {tuple(local.shape)} where {tuple(shape)} was due")
    return Box(tuple(offset), tuple(shape)), local


def assign(
    held_by_rank: Sequence[Mapping[str, Box]], itemsize: Mapping[str, int]
) -> list[set[str]]:
    """Return for each rank the names of the tensors whose box it writes: every box once.

    Of the ranks that hold the same box, the one with the fewest bytes so far takes it, largest
    boxes first; so replicas are written by all ranks in turn. Empty boxes are written by none.
    """
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, boxes in enumerate(held_by_rank):
        for name, box in boxes.items():
            if box.numel:
                holders.setdefault((name, box), []).append(rank)
    load = [0] * len(held_by_rank)
    names: list[set[str]] = [set() for _ in held_by_rank]
    sized = sorted(
        (-box.numel * itemsize[name], name, box.offset, ranks)
        for (name, box), ranks in holders.items()
    )
    for minus_bytes, name, _, ranks in sized:
        rank = min(ranks, key=lambda rank: (load[rank], rank))
        load[rank] -= minus_bytes
        names[rank].add(name)
    return names
