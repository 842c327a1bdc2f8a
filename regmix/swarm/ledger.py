"""The ledger: what has happened to every proxy of a study.

Enters: the swarm's stacks, then their results. Leaves: states, losses, and `losses.csv`. SQLite
with its rollback journal, one writer at a time (the study's lock). A row is written after the
files that it speaks of. Trains nothing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.errors import StorageError, StudyError
from regmix.files import write_text
from regmix.swarm.engine import StackJob

LEDGER_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE stacks (name TEXT PRIMARY KEY, job TEXT NOT NULL, state TEXT NOT NULL,
                     seconds REAL, tokens INTEGER);
CREATE TABLE proxies (proxy INTEGER PRIMARY KEY, stack TEXT NOT NULL REFERENCES stacks(name),
                      state TEXT NOT NULL, weights TEXT NOT NULL, error TEXT);
CREATE TABLE losses (proxy INTEGER NOT NULL REFERENCES proxies(proxy), step INTEGER NOT NULL,
                     target TEXT NOT NULL, loss_nats REAL NOT NULL,
                     PRIMARY KEY (proxy, step, target));
"""
# Made with the first remark: a ledger without it is as good, and read without being written to.
_REMARKS = """
CREATE TABLE IF NOT EXISTS remarks (proxy INTEGER NOT NULL REFERENCES proxies(proxy),
                                    remark TEXT NOT NULL)
"""


@dataclass(frozen=True)
class ProxyRow:
    """One proxy: `state` is pending, done or failed; `error` says why it failed."""

    index: int
    stack: str
    state: str
    weights: dict[str, float]
    error: str | None


class Ledger:
    """An open ledger; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        new = not path.exists()
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=DELETE")
            self._db.execute("PRAGMA synchronous=FULL")
            if new or not self._tables():
                with self._transaction():
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO meta VALUES ('version', ?)", [LEDGER_VERSION])
            self._check()
        except sqlite3.DatabaseError as error:
            raise StudyError(
                f"{path}: the ledger cannot be read ({error})",
                cure="Restore it from a copy, or move it away: the sweep then starts again",
            ) from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def _tables(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])

    def _check(self) -> None:
        answer = self._db.execute("PRAGMA integrity_check").fetchone()[0]
        if answer != "ok":
            raise sqlite3.DatabaseError(answer.splitlines()[0])
        version = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if version is None or int(version[0]) != LEDGER_VERSION:
            raise StudyError(
                f"{self.path}: made by another version of regmix-fast (ledger format "
                f"{version and version[0]}, this one reads {LEDGER_VERSION})",
                cure="Use the version of regmix-fast that made it",
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            # On a full disk SQLite has rolled back by itself.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise StorageError(
                    f"{self.path}: the ledger cannot be written ({error})",
                    cure="Free some space, check the permissions, then run the command again",
                ) from error
            raise

    def add_stacks(self, jobs: Sequence[StackJob]) -> None:
        """Store new stacks and their proxies as pending, before any of them is trained."""
        with self._transaction():
            for job in jobs:
                self._add_stack(job)
                self._db.executemany(
                    "INSERT INTO proxies (proxy, stack, state, weights) "
                    "VALUES (?, ?, 'pending', ?)",
                    [(int(m.name), job.name, json.dumps(m.weights)) for m in job.members],
                )

    def _add_stack(self, job: StackJob) -> None:
        self._db.execute(
            "INSERT INTO stacks (name, job, state) VALUES (?, ?, 'pending')",
            [job.name, json.dumps(job.to_table())],
        )

    def replace_stack(
        self, job: StackJob, parts: Sequence[StackJob], remark: str | None = None
    ) -> None:
        """Put stacks with the same members in the place of one, all at once or not at all.

        remark: kept for every member, as something about how its losses came about.
        """
        with self._transaction():
            self._db.execute(_REMARKS)
            self._db.execute("DELETE FROM stacks WHERE name = ?", [job.name])
            for part in parts:
                self._add_stack(part)
                self._db.executemany(
                    "UPDATE proxies SET stack = ? WHERE proxy = ?",
                    [(part.name, int(member.name)) for member in part.members],
                )
            if remark is not None:
                self._db.executemany(
                    "INSERT INTO remarks VALUES (?, ?)",
                    [(int(member.name), remark) for member in job.members],
                )

    def remarks(self) -> list[tuple[int, str]]:
        """Return (proxy, remark) of what a person should know of proxies, in order."""
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'remarks'"
        if not self._db.execute(query).fetchone()[0]:
            return []
        rows = self._db.execute("SELECT proxy, remark FROM remarks ORDER BY proxy, rowid")
        return [(int(proxy), str(remark)) for proxy, remark in rows]

    def stacks(self) -> list[StackJob]:
        """Return all stacks, in the order they were added."""
        rows = self._db.execute("SELECT job FROM stacks ORDER BY rowid")
        return [StackJob.from_table(json.loads(job)) for (job,) in rows]

    def pending_stacks(self) -> list[StackJob]:
        """Return the stacks that are not trained, in the order they were added."""
        rows = self._db.execute("SELECT job FROM stacks WHERE state = 'pending' ORDER BY rowid")
        return [StackJob.from_table(json.loads(job)) for (job,) in rows]

    def num_stacks(self) -> int:
        """Return how many stacks there are."""
        return int(self._db.execute("SELECT count(*) FROM stacks").fetchone()[0])

    def finish_stack(self, job: StackJob, result: dict[str, Any]) -> None:
        """Store the losses of a trained stack; a proxy without finite losses has failed."""
        with self._transaction():
            self._db.execute(
                "UPDATE stacks SET state = 'done', seconds = ?, tokens = ? WHERE name = ?",
                [result["seconds"], result["tokens"], job.name],
            )
            for position, member in enumerate(job.members):
                self._finish_proxy(job, int(member.name), position, result)

    def _finish_proxy(
        self, job: StackJob, proxy: int, position: int, result: dict[str, Any]
    ) -> None:
        error = None
        if result["failed"][position]:
            error = "its gradient was not finite, so it was frozen"
        elif any(loss is None for loss in result["losses"][position]):
            error = "its validation loss is not finite"
        state = "done" if error is None else "failed"
        self._db.execute(
            "UPDATE proxies SET state = ?, error = ? WHERE proxy = ?", [state, error, proxy]
        )
        if error is None:
            rows = [
                (proxy, step, target, loss)
                for step, losses in result["evaluations"]
                for target, loss in zip(job.targets, losses[position], strict=True)
                # A loss that was not finite on the way, in a run that came back from it.
                if loss is not None
            ]
            self._db.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?, ?, ?)", rows)

    def proxies(self) -> list[ProxyRow]:
        """Return every proxy, by index."""
        rows = self._db.execute(
            "SELECT proxy, stack, state, weights, error FROM proxies ORDER BY proxy"
        )
        return [
            ProxyRow(index, stack, state, json.loads(weights), error)
            for index, stack, state, weights, error in rows
        ]

    def totals(self) -> tuple[float, int]:
        """Return the seconds and the tokens of all trained stacks, as their workers counted."""
        row = self._db.execute(
            "SELECT coalesce(sum(seconds), 0), coalesce(sum(tokens), 0) FROM stacks "
            "WHERE state = 'done'"
        ).fetchone()
        return float(row[0]), int(row[1])

    def export_losses(
        self, path: Path, targets: Sequence[str], *, without: frozenset[int] = frozenset()
    ) -> int:
        """Write the final losses of the finished proxies, but for `without`, as CSV.

        Returns how many there are.
        """
        final: dict[int, dict[str, float]] = {}
        for proxy, _, target, loss in self._evaluations():
            if proxy not in without:
                final.setdefault(proxy, {})[target] = loss
        rows = [
            [proxy, *(repr(losses[target]) for target in targets)]
            for proxy, losses in final.items()
        ]
        _write_csv(path, ["index", *_loss_columns(targets)], rows)
        return len(rows)

    def export_trajectories(self, path: Path, targets: Sequence[str]) -> None:
        """Write every evaluation of all finished proxies as CSV; a loss that is absent is empty."""
        cells: dict[tuple[int, int], dict[str, float]] = {}
        for proxy, step, target, loss in self._evaluations():
            cells.setdefault((proxy, step), {})[target] = loss
        rows = [
            [*place, *(repr(losses[target]) if target in losses else "" for target in targets)]
            for place, losses in cells.items()
        ]
        _write_csv(path, ["index", "step", *_loss_columns(targets)], rows)

    def _evaluations(self) -> Iterator[tuple[int, int, str, float]]:
        return self._db.execute(
            "SELECT proxy, step, target, loss_nats FROM losses ORDER BY proxy, step"
        )


def _loss_columns(targets: Sequence[str]) -> list[str]:
    return [f"metric/{target}_val_loss" for target in targets]


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())
