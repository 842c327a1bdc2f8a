"""Bench records: one JSON object a line, from which every table is made.

Enters: what was measured, of what, in which unit, and what it was measured against. Leaves: a
`Record` with the machine, the revision and the versions it was measured with. Measures nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from regmix.provenance import processor, revision, versions


@functools.cache
def machine() -> str:
    """Return this machine in words: processor, cores, GPU."""
    words = f"{processor()}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        words += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return words


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measured number. `peer` and `ceiling` are words; their ratios come from the same run."""

    suite: str
    case: str
    metric: str
    value: float
    unit: str
    ceiling: str | None = None
    ratio_to_ceiling: float | None = None
    peer: str | None = None
    ratio_to_peer: float | None = None
    machine: str = field(default_factory=machine)
    revision: str = field(default_factory=revision)
    date: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=versions)

    def line(self) -> str:
        """Return the record as one line of JSON, without what does not apply."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return json.dumps(values, ensure_ascii=False)


def append(path: Path | str, records: Iterable[Record]) -> None:
    """Append records to a file of JSON lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        for record in records:
            stream.write(record.line() + "\n")


def table(records: Iterable[Record]) -> str:
    """Return records as aligned text: case, metric, value, peer, ratio."""
    rows = [("case", "metric", "value", "unit", "against", "ratio")]
    for record in records:
        against = record.peer or record.ceiling or ""
        ratio = record.ratio_to_peer if record.peer else record.ratio_to_ceiling
        shown = "" if ratio is None else f"{ratio:.2f}x"
        value = f"{record.value:.4g}"
        rows.append((record.case, record.metric, value, record.unit, against, shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
