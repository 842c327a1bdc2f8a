"""What a disturbed study has, held against an undisturbed one: lost, doubled, different.

Enters: two study folders. Leaves: a `Proof`. Reads files and the ledger by itself, with none of
the package's code, so that no defect there hides a loss.

Lost: a proxy that the undisturbed study has and that lacks its row in `losses.csv`, its file in
`steps/`, or a row in the ledger that is done and has all its losses. Doubled: a proxy that counts
twice: in `losses.csv`, in the ledger's losses, as a member of a stack after its own, by two
attempts that both say done, or a row or file of a proxy that the undisturbed study does not have.
Different: a file or a ledger's loss that is not the same bit for bit.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was found, each as words; all empty where the studies are the same."""

    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    different: tuple[str, ...]
    num_compared: int

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, doubled or changed."""
        return not (self.lost or self.doubled or self.different)

    def __str__(self) -> str:
        parts = [
            f"{name}: {', '.join(getattr(self, name)[:5])}"
            for name in ("lost", "doubled", "different")
            if getattr(self, name)
        ]
        return "; ".join(parts) or f"{self.num_compared} files and ledger rows are the same"


def results(study: Path) -> dict[str, bytes]:
    """Return the files that hold a study's results, by name."""
    paths = [study / "losses.csv", *sorted(study.glob("steps/*"))]
    return {str(path.relative_to(study)): path.read_bytes() for path in paths if path.is_file()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, but what every command may write: locks and logs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".lease") and path.parent.name != "logs"
    }


def prove(whole: Path, study: Path, *, without: frozenset[str] = frozenset()) -> Proof:
    """Compare a study with the undisturbed one; `without`: proxies that failed on purpose."""
    expected, found = results(whole), results(study)
    if without:
        expected = _without(expected, without)
        found = {name: data for name, data in found.items() if name not in _steps(without)}
    proxies = {line.split(b",")[0].decode() for line in _rows(expected)}
    lost, doubled = _in_files(proxies, found)
    rows, more_lost, more_doubled = _in_ledger(study / "ledger.sqlite", proxies, without)
    expected_rows, _, _ = _in_ledger(whole / "ledger.sqlite", proxies, without)
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    different += [f"ledger: proxy {k[0]}" for k, v in expected_rows.items() if rows.get(k) != v]
    return Proof(
        lost=tuple(lost + more_lost),
        doubled=tuple(doubled + more_doubled),
        different=tuple(sorted(set(different))),
        num_compared=len(expected) + len(expected_rows),
    )


def _steps(proxies: frozenset[str]) -> set[str]:
    return {f"steps/{proxy}.npy" for proxy in proxies}


def _without(files: dict[str, bytes], proxies: frozenset[str]) -> dict[str, bytes]:
    kept = {name: data for name, data in files.items() if name not in _steps(proxies)}
    lines = kept["losses.csv"].splitlines(keepends=True)
    kept["losses.csv"] = b"".join(
        line for line in lines if line.split(b",")[0].decode() not in proxies
    )
    return kept


def _rows(files: dict[str, bytes]) -> list[bytes]:
    return files.get("losses.csv", b"").splitlines()[1:]


def _in_files(proxies: set[str], found: dict[str, bytes]) -> tuple[list[str], list[str]]:
    counts = Counter(line.split(b",")[0].decode() for line in _rows(found))
    steps = {name for name in found if name != "losses.csv"}
    wanted = {f"steps/{proxy}.npy" for proxy in proxies}
    lost = [f"losses.csv has no row {proxy}" for proxy in sorted(proxies - set(counts))]
    lost += [f"{name} is missing" for name in sorted(wanted - steps)]
    doubled = [f"losses.csv has {n} rows {proxy}" for proxy, n in counts.items() if n > 1]
    doubled += [f"losses.csv has a row {proxy}" for proxy in sorted(set(counts) - proxies)]
    doubled += [f"{name} is of no proxy" for name in sorted(steps - wanted)]
    return lost, doubled


def _in_ledger(
    path: Path, proxies: set[str], without: frozenset[str]
) -> tuple[dict[tuple[str, int], str], list[str], list[str]]:
    """Return the losses by (proxy, step), and what is lost and doubled."""
    if not path.is_file():
        return {}, [f"the ledger has no proxy {proxy}" for proxy in sorted(proxies)], []
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
        proxy_rows = database.execute("SELECT proxy, state, stack FROM proxies").fetchall()
        losses = database.execute("SELECT proxy, step, losses FROM evaluations").fetchall()
        jobs = [json.loads(j) for (j,) in database.execute("SELECT job FROM stacks ORDER BY rowid")]
        twice = database.execute(
            "SELECT stack, count(*) FROM attempts WHERE state = 'done' GROUP BY stack "
            "HAVING count(*) > 1"
        ).fetchall()
    database.close()
    done = {str(proxy) for proxy, state, _ in proxy_rows if state == "done"}
    lost = [f"the ledger: proxy {proxy} is not done" for proxy in sorted(proxies - done)]
    with_losses = {str(proxy) for proxy, _, _ in losses}
    lost += [f"the ledger: proxy {proxy} has no loss" for proxy in sorted(proxies - with_losses)]
    counts = Counter(str(proxy) for proxy, _, _ in proxy_rows)
    counts += _memberships(jobs, {str(proxy): stack for proxy, _, stack in proxy_rows})
    doubled = [f"the ledger has proxy {proxy} {n} times" for proxy, n in counts.items() if n > 1]
    doubled += [f"{n} attempts at {stack} say done" for stack, n in twice]
    seen = Counter((str(proxy), int(step)) for proxy, step, _ in losses)
    doubled += [f"the ledger has losses {key} {n} times" for key, n in seen.items() if n > 1]
    return {(str(p), int(s)): v for p, s, v in losses if str(p) not in without}, lost, doubled


def _memberships(jobs: list[dict[str, Any]], stack_of: dict[str, str]) -> Counter[str]:
    """Count the stacks that hold a proxy and came after the one that its row names.

    The stacks before that one hold it where it failed there and was tried again.
    """
    order = [job["name"] for job in jobs]
    return Counter(
        member["name"]
        for place, job in enumerate(jobs)
        for member in job["members"]
        if place > order.index(stack_of[member["name"]])
    )
