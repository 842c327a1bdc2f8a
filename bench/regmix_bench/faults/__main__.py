"""Run the fault suite: every fault, or those that are named; see `regmix_bench.faults`.

Enters: an empty folder. Leaves: records, a table for people, and an exit code that is 0 only where
no result was lost or doubled and every fault did what it should. A fault that cannot be injected
here is named with the reason. The seed is printed; what fails says how to repeat it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from regmix_bench.faults.fault import Fault, Row
from regmix_bench.faults.registry import every_fault
from regmix_bench.faults.stage import Size, Stage
from regmix_bench.harness import Record, append

# A sweep that lasts long enough to be hit many times.
LONG = Size(num_proxies=16, num_steps=1200, stack_size=4)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a fault: its row, or why there is none."""

    fault: Fault
    row: Row | None
    seconds: float
    problem: str = ""
    skipped: str = ""


def records(result: Result) -> list[Record]:
    """Return a fault's numbers as bench records."""
    if result.row is None:
        return []
    proof = result.row.proof
    numbers = (
        ("injected", result.row.injected, "times"),
        ("lost", len(proof.lost), "results"),
        ("doubled", len(proof.doubled), "results"),
        ("different", len(proof.different), "files"),
        ("compared", proof.num_compared, "files and rows"),
        ("duration", round(result.seconds, 1), "s"),
    )
    return [
        Record(suite="faults", case=result.fault.name, metric=metric, value=value, unit=unit)
        for metric, value, unit in numbers
    ]


def markdown(results: Iterable[Result]) -> str:
    """Return the table for people."""
    lines = [
        "| fault | times | what the user sees | outcome | lost | doubled |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        row = result.row
        if row is None:
            why = f"not injected: {result.skipped}" if result.skipped else "FAILED"
            lines.append(f"| {result.fault.name} | 0 | | {why} | | |")
            continue
        sees = row.sees.replace("|", "\\|").replace("<", "\\<")
        lost, doubled = len(row.proof.lost), len(row.proof.doubled)
        lines.append(
            f"| {result.fault.name} | {row.injected} | {sees} | {row.outcome} | {lost} "
            f"| {doubled} |"
        )
    return "\n".join(lines) + "\n"


def run(faults: Sequence[Fault], out: Path, seed: int, minutes: float | None) -> list[Result]:
    """Run the faults of the short and of the long stage side by side, each one after another.

    No new one is begun after so many minutes.
    """
    with ThreadPoolExecutor(2) as pool:
        of_stage = [[f for f in faults if f.is_long == is_long] for is_long in (True, False)]
        runs = [pool.submit(_run_stage, some, out, seed, minutes) for some in of_stage]
        results = [result for done in runs for result in done.result()]
    return sorted(results, key=lambda result: faults.index(result.fault))


def _run_stage(
    faults: Sequence[Fault], out: Path, seed: int, minutes: float | None
) -> list[Result]:
    started = time.monotonic()
    stage: Stage | None = None
    results = []
    for number, fault in enumerate(faults, start=1):
        began = time.monotonic()
        row, problem, skipped = None, "", fault.needs() or ""
        if minutes is not None and began - started > 60 * minutes:
            skipped = skipped or f"the {minutes:.0f} minutes were over"
        if not skipped:
            try:
                if stage is None:
                    folder = out / ("long" if fault.is_long else "short")
                    stage = Stage(folder, LONG if fault.is_long else None)
                row = fault.run(stage, seed)
            except Exception:
                problem = traceback.format_exc()
        results.append(
            Result(
                fault=fault,
                row=row,
                seconds=time.monotonic() - began,
                problem=problem,
                skipped=skipped,
            )
        )
        _show(results[-1], number, len(faults), seed)
        if row is not None and stage is not None:
            shutil.rmtree(stage.folder / "cases", ignore_errors=True)
    return results


def _show(result: Result, number: int, total: int, seed: int) -> None:
    head = f"[{number}/{total}] {result.fault.name}"
    if result.row is not None:
        row = result.row
        text = f"{row.injected} times, {result.seconds:.0f} s: {row.outcome}. Seen: {row.sees}"
    elif result.skipped:
        text = f"not injected: {result.skipped}"
    else:
        again = f'python -m regmix_bench.faults --out FOLDER --seed {seed} --only "^'
        text = f'FAILED. Repeat it: {again}{result.fault.name}$"\n{result.problem}'
    print(f"{head}: {text}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="An empty folder.")
    parser.add_argument("--json", type=Path, help="Where records are appended.")
    parser.add_argument("--table", type=Path, help="Where the table is written, as Markdown.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="Begin no fault after so many.")
    parser.add_argument("--only", help="A pattern that the faults' names match.")
    parser.add_argument("--list", action="store_true", help="Name the faults and end.")
    options = parser.parse_args()
    faults = every_fault(options.only)
    if options.list:
        print("\n".join(fault.name for fault in faults))
        return
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    print(f"{len(faults)} faults, seed {options.seed}", flush=True)
    results = run(faults, options.out, options.seed, options.minutes)
    if options.json:
        append(options.json, [record for result in results for record in records(result)])
    if options.table:
        options.table.write_text(markdown(results), encoding="utf-8")
    rows = [result.row for result in results if result.row is not None]
    failed = [result.fault.name for result in results if result.problem]
    lost = sum(len(row.proof.lost) for row in rows)
    doubled = sum(len(row.proof.doubled) for row in rows)
    injected = sum(row.injected for row in rows)
    print(
        f"{injected} faults injected, {lost} results lost, {doubled} doubled; {len(failed)} of "
        f"{len(faults)} kinds failed, {sum(bool(r.skipped) for r in results)} left out"
    )
    if failed or lost or doubled:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
