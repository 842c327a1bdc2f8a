"""What packing will read and write, before it starts.

Enters: the sources. Leaves: a `PackPlan`, or `StorageError` where the disk cannot hold the shards.
Reads no document: all of it are estimates from the sizes of files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from regmix.data.packing.sources import Source
from regmix.display import size
from regmix.errors import StorageError
from regmix.files import free_bytes

# Text per byte on disk, and text per token, for the estimate before anything is known.
EXPANSION = {"": 1.0, ".gz": 3.3, ".zst": 4.2}
PARQUET_EXPANSION = 3.0
BYTES_PER_TOKEN = 2.5
# Units hold a domain's tokens until it is in the shards: bytes for each byte of text.
UNIT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What packing will read and write, before it starts; both estimates are rough."""

    num_files: int
    domains: tuple[str, ...]
    source_bytes: int
    text_bytes: int  # estimated
    disk_bytes: int  # estimated, of the shards
    working_bytes: int  # estimated, while packing only
    free_bytes: int
    valid_fraction: float | None  # None where folders decide
    ignored: tuple[str, ...]


def make_plan(
    files: tuple[Source, ...],
    ignored: tuple[str, ...],
    folder: Path,
    fraction: float | None,
    *,
    dedup: bool,
) -> PackPlan:
    """Return the plan of packing these files into a folder."""
    text: Counter[str] = Counter()
    for source in files:
        factor = PARQUET_EXPANSION if source.format == "parquet" else EXPANSION[source.compression]
        text[source.domain] += int(source.num_bytes * factor)
    # With deduplication all units stay until the end.
    held = text.total() if dedup else max(text.values())
    return PackPlan(
        num_files=len(files),
        domains=tuple(sorted(text)),
        source_bytes=sum(source.num_bytes for source in files),
        text_bytes=text.total(),
        disk_bytes=int(text.total() / BYTES_PER_TOKEN * 2),
        working_bytes=int(held * UNIT_SHARE),
        free_bytes=free_bytes(folder),
        valid_fraction=fraction,
        ignored=ignored,
    )


def check_space(folder: Path, plan: PackPlan) -> None:
    """Raise `StorageError` where shards and units do not fit on the disk."""
    needed = plan.disk_bytes + plan.working_bytes
    if needed > plan.free_bytes:
        raise StorageError(
            f"{folder}: the shards take about {size(plan.disk_bytes)} and "
            f"{size(plan.working_bytes)} more while packing; {size(plan.free_bytes)} are free",
            cure="Free some space on that disk, or name a folder on another one",
        )
