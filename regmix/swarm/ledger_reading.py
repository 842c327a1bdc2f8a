"""What a ledger says: states, attempts and losses of a study's proxies.

Enters: a ledger of this version, the file that is written to or a copy of it in memory. Leaves:
plain records, and the tables `losses.csv` and `trajectories.csv`. Writes nothing to the ledger.
"""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.files import write_text
from regmix.swarm.ledger_schema import check_rows, open_for_reading, reading_errors

if TYPE_CHECKING:
    from regmix.swarm.jobs import StackJob

# What waits to be trained, or is: a stack whose training ended is done, whatever came of it.
UNFINISHED = ("pending", "running", "retried", "failed")


@dataclass(frozen=True)
class ProxyRow:
    """One proxy: `error` says why it failed, or why its stack could not be trained.

    state: pending (never begun), running, retried (waits again after an attempt that broke off),
    done, failed, or cancelled (taken out by the user). stack: None where it was taken out before
    it was planned. attempts: how often a worker began on it; those before version 2 are unknown.
    """

    index: int
    stack: str | None
    state: str
    weights: dict[str, float]
    error: str | None
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class StackRow:
    """One stack: its state as of a proxy, but `done` once it was trained, whatever came of it.

    reason: why it could not be trained, with the cure. seconds, tokens: of the process that ended
    it. proxies: indices of the proxies that were planned in it.
    """

    name: str
    state: str
    reason: str | None
    seconds: float | None
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class AttemptRow:
    """One attempt of a worker at a stack.

    state: running, done, failed, died, hung, preempted, lost, stopped or replaced. environment:
    what the worker said of itself. started, ended: UTC, for people. seconds: by a clock that is
    never set. reason: why it did not end well.
    """

    stack: str
    number: int
    state: str
    worker: str | None
    machine: str | None
    device: str | None
    environment: dict[str, Any]
    first_step: int | None
    started: str | None
    ended: str | None
    seconds: float | None
    reason: str | None


class LedgerReader:
    """What can be read of a ledger; use as a context manager. Make one with `Ledger.read`."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self._db = path, db

    @classmethod
    def read(cls, path: Path) -> LedgerReader:
        """Open a ledger to read what it says now; nothing is written, not even beside it."""
        return LedgerReader(path, open_for_reading(path))

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with reading_errors(self.path):
            return self._db.execute(query, values).fetchall()

    def stacks(self) -> list[StackJob]:
        """Return all stacks, in the order they were added."""
        return self._jobs("SELECT job FROM stacks ORDER BY rowid")

    def pending_stacks(self) -> list[StackJob]:
        """Return the stacks that are to be trained, in the order they were added."""
        marks = ", ".join("?" * len(UNFINISHED))
        query = f"SELECT job FROM stacks WHERE state IN ({marks}) ORDER BY rowid"
        return self._jobs(query, UNFINISHED)

    def cancelled_stacks(self) -> list[StackJob]:
        """Return the stacks that the user took out."""
        return self._jobs("SELECT job FROM stacks WHERE state = 'cancelled' ORDER BY rowid")

    def next_stack_number(self) -> int:
        """Return a number that no stack has had in its name."""
        numbers = [
            int(digits)
            for (name,) in self._rows("SELECT name FROM stacks UNION SELECT stack FROM attempts")
            if (digits := name.removeprefix("stack-").partition("-")[0]).isdigit()
        ]
        return max(numbers, default=-1) + 1

    def _jobs(self, query: str, values: Sequence[object] = ()) -> list[StackJob]:
        # Not above: a status reads no job.
        from regmix.swarm.jobs import StackJob

        return [StackJob.from_table(json.loads(job)) for (job,) in self._rows(query, values)]

    def job_tables(self) -> list[dict[str, Any]]:
        """Return all stacks as the plain tables that they are stored as: cheaper than jobs."""
        return [json.loads(job) for (job,) in self._rows("SELECT job FROM stacks ORDER BY rowid")]

    def stack_rows(self) -> list[StackRow]:
        """Return what became of every stack, in the order they were added."""
        query = "SELECT name, state, reason, seconds, tokens FROM stacks ORDER BY rowid"
        fields = ("name", "state", "reason", "seconds", "tokens")
        return [StackRow(**dict(zip(fields, row, strict=True))) for row in self._rows(query)]

    def trained_stacks(self) -> set[str]:
        """Return the names of the stacks whose training has ended, whatever came of it."""
        return {name for (name,) in self._rows("SELECT name FROM stacks WHERE state = 'done'")}

    def num_stacks(self) -> int:
        """Return how many stacks there are."""
        return int(self._rows("SELECT count(*) FROM stacks")[0][0])

    def proxies(self) -> list[ProxyRow]:
        """Return every proxy, by index."""
        query = "SELECT proxy, stack, state, weights, error, attempts FROM proxies ORDER BY proxy"
        return [
            ProxyRow(index, stack, state, json.loads(weights), error, attempts)
            for index, stack, state, weights, error, attempts in self._rows(query)
        ]

    def attempts(self) -> list[AttemptRow]:
        """Return every attempt, in the order in which they began."""
        environments = {
            number: json.loads(content)
            for number, content in self._rows("SELECT environment, content FROM environments")
        }
        query = (
            "SELECT stack, number, state, worker, machine, device, environment, first_step, "
            "started, ended, seconds, reason FROM attempts ORDER BY rowid"
        )
        fields = tuple(AttemptRow.__dataclass_fields__)
        rows = []
        for row in self._rows(query):
            values = dict(zip(fields, row, strict=True))
            values["environment"] = environments.get(values["environment"], {})
            rows.append(AttemptRow(**values))
        return rows

    def remarks(self) -> list[tuple[int, str]]:
        """Return (proxy, remark) of what a person should know of proxies, in order."""
        rows = self._rows("SELECT proxy, remark FROM remarks ORDER BY proxy, rowid")
        return [(int(proxy), str(remark)) for proxy, remark in rows]

    def totals(self) -> tuple[float, int]:
        """Return the seconds and the tokens of all trained stacks, as their workers counted."""
        ((seconds, tokens),) = self._rows(
            "SELECT coalesce(sum(seconds), 0), coalesce(sum(tokens), 0) FROM stacks "
            "WHERE state = 'done'"
        )
        return float(seconds), int(tokens)

    def final_losses(self) -> dict[int, dict[str, float]]:
        """Return proxy -> target -> loss in nats at its last step, of those that are done."""
        self._check_rows()
        rows = self._rows("SELECT proxy, losses FROM evaluations ORDER BY proxy, step")
        # The last of a proxy is the final one.
        return {proxy: json.loads(losses) for proxy, losses in dict(rows).items()}

    def export_losses(
        self, path: Path, targets: Sequence[str], *, without: frozenset[int] = frozenset()
    ) -> int:
        """Write the final losses of the finished proxies, but for `without`, as CSV.

        Returns how many there are.
        """
        rows = [
            [proxy, *(repr(losses[target]) for target in targets)]
            for proxy, losses in self.final_losses().items()
            if proxy not in without
        ]
        write_csv(path, ["index", *loss_columns(targets)], rows)
        return len(rows)

    def export_trajectories(self, path: Path, targets: Sequence[str]) -> None:
        """Write every evaluation of all finished proxies as CSV; a loss that is absent is empty."""
        self._check_rows()
        rows = []
        for proxy, step, text in self._evaluations():
            losses = json.loads(text)
            cells = (repr(losses[target]) if target in losses else "" for target in targets)
            rows.append([proxy, step, *cells])
        write_csv(path, ["index", "step", *loss_columns(targets)], rows)

    def _evaluations(self) -> Iterator[tuple[int, int, str]]:
        yield from self._rows("SELECT proxy, step, losses FROM evaluations ORDER BY proxy, step")

    def _check_rows(self) -> None:
        with reading_errors(self.path):
            check_rows(self._db, "evaluations")


def loss_columns(targets: Sequence[str]) -> list[str]:
    """Return the columns of a table of losses in RegMix's published format."""
    return [f"metric/{target}_val_loss" for target in targets]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table atomically; a float as Python's shortest text of it, None as nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
