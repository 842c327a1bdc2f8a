"""Records as tables: those of one run, and those of two runs beside each other.

Enters: records, or a file of them. Leaves: aligned text. Everything shown is in the records; what
is better follows from the unit alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from regmix.errors import ConfigError, StorageError
from regmix_bench.harness import Record

# A smaller number of these is better. Rates, "/s" and "/h", are better when larger.
LOWER = {
    *("ns/token", "ns", "us", "ms", "s", "min", "h"),
    *("nats", "GB", "MB", "currency", "failures", "relative error", "sequences"),
}
HIGHER = {"% of peak", "points", "equal"}
SAME = 0.005  # the share that three digits do not show


def read_records(path: Path | str) -> list[Record]:
    """Return the records of a file; `RegmixError` where it is none."""
    place = Path(path)
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{place}: {error}", cure="Name a file of bench records") from error
    known = {field.name for field in dataclasses.fields(Record)}
    required = ("suite", "case", "metric", "value", "unit")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
            fine = isinstance(table, dict) and all(name in table for name in required)
            # The machine and the rest must be the file's, never this run's.
            stored = {"machine": "", "revision": "", "date": "", "versions": {}}
            found = {name: value for name, value in table.items() if name in known} if fine else {}
            record = Record(**{**stored, **found}) if fine else None
            fine = record is not None and math.isfinite(float(record.value))
        except (ValueError, TypeError) as error:
            raise _not_a_record(place, number) from error
        if not fine or record is None:
            raise _not_a_record(place, number)
        records.append(record)
    return records


def _not_a_record(place: Path, number: int) -> ConfigError:
    return ConfigError(
        f"{place}, line {number}: not a bench record",
        cure="Name a file that `regmix-fast bench --json` wrote",
    )


def higher_is_better(unit: str) -> bool | None:
    """Return whether more of the unit is better; None where the unit does not say."""
    if unit in LOWER:
        return False
    return True if unit in HIGHER or unit.endswith(("/s", "/h")) else None


def verdict(old: float, new: float, unit: str) -> str:
    """Return "better", "worse", "same", or nothing where the unit does not say."""
    higher = higher_is_better(unit)
    if higher is None:
        return ""
    if math.isclose(old, new, rel_tol=SAME):
        return "same"
    return "better" if (new > old) == higher else "worse"


def amount(value: float) -> str:
    """Return a number in four digits, large ones without an exponent."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns; the first row is the headings."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def wide_table(records: Iterable[Record]) -> str:
    """Return records by case: what was reached, the ceiling and the peer, each with its ratio."""

    def times(ratio: float | None) -> str:
        return "" if ratio is None else f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.3g}x"

    rows = [("", "achieved", "unit", "ceiling", "of it", "peer", "against it")]
    cases: list[str] = []
    before: tuple[str, ...] = ()
    for record in records:
        head = (f"  {record.metric}", amount(record.value), record.unit)
        repeated = cases and cases[-1] == record.case and head == before
        before = head
        ceiling = (record.ceiling or "", times(record.ratio_to_ceiling))
        rows.append(
            (
                *(("", "", "") if repeated else head),
                *ceiling,
                *(record.peer or "", times(record.ratio_to_peer)),
            )
        )
        cases.append(record.case)
    used = [0, 1, 2, *(c for c in range(3, 7) if any(row[c] for row in rows[1:]))]
    first, *lines = aligned([[row[column] for column in used] for row in rows]).split("\n")
    shown, last = [first], ""
    for case, line in zip(cases, lines, strict=True):
        if case != last:
            shown.append(case)
        last = case
        shown.append(line)
    return "\n".join(shown)


def comparison(old: Sequence[Record], new: Sequence[Record]) -> str:
    """Return new beside old, matched by suite, case and metric, with new / old and the verdict.

    Where a file holds several runs, the last one counts.
    """
    before = {(r.suite, r.case, r.metric): r for r in old}
    now = {(r.suite, r.case, r.metric): r for r in new}
    rows = [("suite", "case", "metric", "old", "new", "unit", "new/old", "")]
    for key, record in now.items():
        found = before.get(key)
        if found is None or found.unit != record.unit:
            continue
        ratio = f"{record.value / found.value:.3f}" if found.value else "-"
        words = verdict(found.value, record.value, record.unit)
        shown = (amount(found.value), amount(record.value), record.unit, ratio, words)
        rows.append((*key, *shown))
    lines = [aligned(rows)] if len(rows) > 1 else ["No measurement of this run is in the old file."]
    suites = {key[0] for key in now}
    gone = sum(key[0] in suites and key not in now for key in before)
    added = len(now) - (len(rows) - 1)
    if gone or added:
        lines.append(f"Without a counterpart: {added} new, {gone} old of these suites.")
    return "\n".join([*lines, *_different_machines(before.values(), now.values())])


def _different_machines(old: Iterable[Record], new: Iterable[Record]) -> list[str]:
    suites = {record.suite for record in new}
    machines = sorted({record.machine for record in old if record.suite in suites})
    others = sorted({record.machine for record in new})
    if not machines or machines == others:
        return []
    return [
        "The machines differ, so the ratios are not of the code alone: "
        f"old {' and '.join(machines)}; new {' and '.join(others)}."
    ]
