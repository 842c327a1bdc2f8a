"""What packing did, read from the corpus that it made.

Enters: an opened corpus. Leaves: a `PackReport`. Opens no shard.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from regmix.config import build
from regmix.data.manifest import ShardStats, TokenizerRecord
from regmix.data.packing.plan import PackPlan
from regmix.data.packing.replacement import DROPPED, PACKING
from regmix.data.shards import ShardSet
from regmix.files import read_table


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did. `records` = documents packed and dropped, over all splits and domains."""

    path: str
    checksum: str
    already_complete: bool
    resumed_files: int  # finished by an earlier run that was stopped
    tokenizer: TokenizerRecord
    dtype: str
    splits: Mapping[str, Mapping[str, ShardStats]]
    records: int | None  # None where a corpus was there that does not say
    engine: str
    engine_version: str
    engine_reason: str  # why it is not the fast one
    verified_documents: int  # compared with `tokenizers`, whole or in part
    verified_bytes: int
    dropped_examples: tuple[str, ...]
    dropped_list: str | None  # file of the records that were dropped
    ignored: tuple[str, ...]
    source_bytes: int
    disk_bytes: int
    seconds: float

    def as_table(self) -> dict[str, object]:
        """Return the report as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Packing:
    """What `packing.json` says."""

    records: int | None = None
    engine: str = "tokenizers"
    engine_version: str = ""
    engine_reason: str = ""
    verified_documents: int = 0
    verified_bytes: int = 0
    dropped_examples: tuple[str, ...] = ()


def make_report(
    shards: ShardSet,
    plan: PackPlan,
    started: float,
    *,
    already_complete: bool = False,
    resumed: int = 0,
) -> PackReport:
    """Return the report; `started` is the monotonic time at which packing began."""
    splits = shards.manifest.splits
    files = [f for domains in splits.values() for s in domains.values() for f in s.files]
    path = shards.path / PACKING
    packing = _Packing()
    if path.is_file():  # an older version made none
        known, table = _Packing.__dataclass_fields__, read_table(path)
        told = {name: table[name] for name in known if name in table}
        packing = build(_Packing, told, where=str(path))
    dropped = shards.path / DROPPED
    return PackReport(
        path=str(shards.path),
        checksum=shards.checksum,
        already_complete=already_complete,
        resumed_files=resumed,
        tokenizer=shards.manifest.tokenizer,
        dtype=shards.dtype,
        splits=splits,
        **vars(packing),
        dropped_list=str(dropped) if dropped.is_file() else None,
        ignored=plan.ignored,
        source_bytes=plan.source_bytes,
        disk_bytes=sum(file.bytes for file in files),
        seconds=time.monotonic() - started,
    )
