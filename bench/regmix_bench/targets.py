"""The targets of the data path beside what was measured, from records and from nothing else.

Enters: the records of the sampler and the pack suite. Leaves: a table of target, achieved, met or
not, and why. A target whose measurement is not among the records says so; it counts as neither.

    python -m regmix_bench.targets --json sampler.jsonl --json pack.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from regmix_bench.harness import Record

# The published loader read 94,200 sequences/s on the machine that the targets were set on.
REFERENCE_SPEED, REFERENCE_SPREAD = 94_200.0, 0.2

Records = list[Record]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the records say of a target."""

    value: float
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One row: what is asked, how it is read from the records, and which way is better."""

    name: str
    asked: float
    unit: str
    read: Callable[[Records], Found | None]
    at_most: bool = False
    suite: str = "sampler"

    def row(self, records: Records) -> tuple[str, str, str, str, str]:
        """Return target, asked, achieved, met, why."""
        sign = "at most" if self.at_most else "at least"
        asked = f"{sign} {self.asked:g}{self.unit}"
        found = self.read(records)
        if found is None:
            return self.name, asked, "-", "-", "not measured in this run"
        met = found.value <= self.asked if self.at_most else found.value >= self.asked
        achieved = f"{found.value:.4g}{self.unit}"
        if "reference loader" in self.name and _stand_in_share(records) < -REFERENCE_SPREAD:
            return self.name, asked, achieved, "NOT CLAIMED", found.why
        return self.name, asked, achieved, "met" if met else "NOT MET", found.why


def against(system: str, peer: str) -> Callable[[Records], Found | None]:
    """Read the smallest ratio of a system to a peer, over all of the peer's settings."""

    def read(records: Records) -> Found | None:
        found = [
            (record.ratio_to_peer, record)
            for record in records
            if record.case == system and (record.peer or "").startswith(f"{peer}, ")
        ]
        ratios = [(ratio, record) for ratio, record in found if ratio is not None]
        if not ratios:
            return None
        ratio, record = min(ratios, key=lambda pair: pair[0])
        speed = _speed(records, record.peer or "")
        why = f"{record.value:,.0f} against {speed:,.0f} sequences/s ({record.peer})"
        return Found(value=ratio, why=why)

    return read


def against_ceiling(system: str) -> Callable[[Records], Found | None]:
    """Read the ratio of a system to the gathering of known ids."""

    def read(records: Records) -> Found | None:
        for record in records:
            if record.case == system and record.ratio_to_ceiling is not None:
                top = _speed(records, record.ceiling or "")
                why = f"{record.value:,.0f} of {top:,.0f} sequences/s"
                return Found(value=record.ratio_to_ceiling, why=why)
        return None

    return read


def largest(metric: str, *, case: str = "") -> Callable[[Records], Found | None]:
    """Read the largest value of a metric over all cases that begin with `case`."""

    def read(records: Records) -> Found | None:
        found = [r for r in records if r.metric == metric and r.case.startswith(case)]
        if not found:
            return None
        worst = max(found, key=lambda record: record.value)
        return Found(value=worst.value, why=worst.case)

    return read


def ratio_of(metric: str, case: str, peer: str) -> Callable[[Records], Found | None]:
    """Read the ratio of a case to a peer for a metric."""

    def read(records: Records) -> Found | None:
        for record in records:
            wanted = record.metric == metric and record.case == case and record.peer == peer
            if wanted and record.ratio_to_peer is not None:
                why = f"{record.value:.3g} {record.unit}, {peer} beside it"
                return Found(value=record.ratio_to_peer, why=why)
        return None

    return read


def _speed(records: Records, case: str) -> float:
    return next((r.value for r in records if r.case == case and r.metric == "speed"), float("nan"))


def _stand_in_share(records: Records) -> float:
    """Return how far the stand-in is above or below the published loader, as a share."""
    return _speed(records, STAND_IN) / REFERENCE_SPEED - 1


STAND_IN = "reference, 0 workers"
BATCH, NUMBA = "regmix, batch()", "regmix, batch(), Numba"
RING, RING_2 = "regmix, ring, int32, 1 thread", "regmix, ring, int32, 2 threads"
MOSAIC = "mosaicml-streaming"
PACK, SCRIPT = "regmix pack, 1 worker", "reference script, 1 process"
TARGETS = (
    Target(
        name="int64 batch() against the reference loader",
        asked=8,
        unit="x",
        read=against(BATCH, "reference"),
    ),
    Target(
        name="int32 ring against the reference loader",
        asked=10,
        unit="x",
        read=against(RING, "reference"),
    ),
    Target(name="int64 against litdata", asked=20, unit="x", read=against(BATCH, "litdata")),
    Target(name="int64 against Megatron", asked=50, unit="x", read=against(BATCH, "megatron")),
    Target(name=f"int64 against {MOSAIC}", asked=140, unit="x", read=against(BATCH, MOSAIC)),
    Target(name="int32 ring, 1 thread: ceiling", asked=0.9, unit="x", read=against_ceiling(RING)),
    Target(
        name="int32 ring, 2 threads: ceiling", asked=0.9, unit="x", read=against_ceiling(RING_2)
    ),
    Target(name="int64 batch(): ceiling", asked=0.9, unit="x", read=against_ceiling(BATCH)),
    Target(
        name="Numba against the reference loader",
        asked=4,
        unit="x",
        read=against(NUMBA, "reference"),
    ),
    Target(
        name="weight error of any prefix, any weights",
        asked=1,
        unit=" sequences",
        at_most=True,
        read=largest("worst weight error of any prefix"),
    ),
    Target(
        name="start-up with 17 domains",
        asked=50,
        unit=" ms",
        at_most=True,
        read=largest("start-up: open, sampler, first batch", case="17 domains"),
    ),
    Target(
        name="resume at step 1M",
        asked=1,
        unit=" ms",
        at_most=True,
        read=largest("resume: restore, first batch", case="step 1,000,000"),
    ),
    Target(
        name="truncations found at open",
        asked=1,
        unit=" of all",
        read=largest("truncations found at open"),
    ),
    Target(
        name="flipped bits found on first touch",
        asked=1,
        unit=" of all",
        read=largest("flipped bits found on first touch"),
    ),
    Target(
        name="pack per core against the reference script",
        asked=30,
        unit="x",
        read=ratio_of("text per core", PACK, SCRIPT),
        suite="pack",
    ),
    Target(
        name="pack: ids identical to tokenizers",
        asked=1,
        unit=" of all",
        read=largest("documents with identical ids", case="regmix pack"),
        suite="pack",
    ),
    Target(
        name="pack: memory",
        asked=1,
        unit=" GB",
        at_most=True,
        read=largest("peak memory", case="regmix pack"),
        suite="pack",
    ),
)


def table(records: Iterable[Record]) -> str:
    """Return the targets of the suites that ran as aligned text, and the reference's own speed."""
    found = list(records)
    suites = {record.suite for record in found}
    rows = [("target", "asked", "achieved", "", "why")]
    rows += [target.row(found) for target in TARGETS if target.suite in suites]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *reference_note(found)])


def reference_note(records: Records) -> list[str]:
    """Say how the stand-in's speed compares with the published loader's on the targets' machine."""
    speed, share = _speed(records, STAND_IN), _stand_in_share(records)
    if speed != speed:
        return []
    words = (
        f"The stand-in of the reference loader reads {speed:,.0f} sequences/s here, "
        f"{abs(share):.0%} {'above' if share >= 0 else 'below'} the {REFERENCE_SPEED:,.0f} "
        "measured of the original on another machine"
    )
    if share < -REFERENCE_SPREAD:
        return [
            f"{words}: too slow for a claim, unless this machine is known to be as much slower."
        ]
    return [f"{words}; all ratios are to the stand-in, in this run."]


def read_records(paths: Iterable[str]) -> Records:
    """Read records from files of JSON lines."""
    lines = [line for path in paths for line in Path(path).read_text("utf-8").splitlines()]
    return [Record(**json.loads(line)) for line in lines if line.strip()]


def main() -> None:
    """Print the table of the targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", action="append", required=True, help="records")
    print(table(read_records(parser.parse_args().json)))


if __name__ == "__main__":
    main()
