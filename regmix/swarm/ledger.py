"""The ledger: what has happened to every proxy of a study, as its single writer keeps it.

Enters: the swarm's stacks, what becomes of each attempt to train one, and their results. Leaves:
states, attempts and losses. SQLite with its rollback journal; one writer at a time (the study's
lock), each of its transactions fenced. A row is written after the files that it speaks of. Trains
nothing.

A stack and its proxies go from pending to running; an attempt that breaks off makes them retried,
until one ends: done or failed. What a killed writer left as running is retried when the next one
opens the ledger, and its attempts are lost.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from regmix.errors import StudyError
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger_reading import AttemptRow, LedgerReader, ProxyRow, StackRow
from regmix.swarm.ledger_schema import (
    LEDGER_VERSION,
    copy_ledger,
    open_for_writing,
    transaction,
)

__all__ = ["LEDGER_VERSION", "AttemptRow", "Ledger", "LedgerReader", "ProxyRow", "StackRow"]

LOST = "its coordinator ended without a word: killed, or the machine went down"


class Ledger(LedgerReader):
    """An open ledger, to be written by this process alone; use as a context manager.

    Opening it takes it over: a process that wrote to it before, and lost the study's lease while
    it stood still, gets a `StudyError` from its next write on.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, open_for_writing(path))
        self._token = secrets.token_hex(8)
        self._begun: dict[str, float] = {}
        try:
            with transaction(self._db, path):
                self._db.execute(
                    "INSERT INTO meta VALUES ('writer', ?) "
                    "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                    [self._token],
                )
                self._take_back_lost_attempts()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with transaction(self._db, self.path):
            row = self._db.execute("SELECT value FROM meta WHERE key = 'writer'").fetchone()
            if row is None or row[0] != self._token:
                raise StudyError(
                    f"{self.path}: another command took the study over while this one stood still",
                    cure="Let the other one go on: nothing is lost (regmix-fast status shows it)",
                )
            yield

    def _take_back_lost_attempts(self) -> None:
        self._db.execute(
            "UPDATE attempts SET state = 'lost', ended = ?, reason = ? WHERE state = 'running'",
            [_now(), LOST],
        )
        for table in ("stacks", "proxies"):
            self._db.execute(f"UPDATE {table} SET state = 'retried' WHERE state = 'running'")

    def copy_to(self, path: Path) -> None:
        """Write a checked copy of the ledger; raises like a write."""
        with self._transaction():
            # Only whoever may write may replace the copy.
            pass
        copy_ledger(self._db, self.path, path)

    def add_stacks(self, jobs: Sequence[StackJob]) -> None:
        """Store new stacks and their proxies as pending, before any of them is trained."""
        with self._transaction():
            for job in jobs:
                self._add_stack(job, "pending")
                # One that was taken out before it was planned has a row.
                self._db.executemany(
                    "DELETE FROM proxies WHERE proxy = ? AND stack IS NULL", _keys(job)
                )
                self._db.executemany(
                    "INSERT INTO proxies (proxy, stack, state, weights) "
                    "VALUES (?, ?, 'pending', ?)",
                    [(int(m.name), job.name, json.dumps(m.weights)) for m in job.members],
                )

    def _add_stack(self, job: StackJob, state: str) -> None:
        self._db.execute(
            "INSERT INTO stacks (name, job, state) VALUES (?, ?, ?)",
            [job.name, json.dumps(job.to_table()), state],
        )

    def replace_stack(
        self, job: StackJob, parts: Sequence[StackJob], remark: str | None = None
    ) -> None:
        """Put stacks with the same members in the place of one, all at once or not at all.

        remark: kept for every member, as something about how its losses came about.
        """
        with self._transaction():
            row = self._db.execute("SELECT state FROM stacks WHERE name = ?", [job.name]).fetchone()
            # A part goes on where the stack was; one that was taken out stays out.
            kept = ("pending", "cancelled")
            state = row[0] if row is not None and row[0] in kept else "retried"
            self._db.execute("DELETE FROM stacks WHERE name = ?", [job.name])
            self._close_attempt(job, "replaced", remark)
            for part in parts:
                self._add_stack(part, state)
                self._db.executemany(
                    "UPDATE proxies SET stack = ?, state = ?, error = NULL WHERE proxy = ?",
                    [(part.name, state, int(member.name)) for member in part.members],
                )
            if remark is not None:
                self._db.executemany(
                    "INSERT INTO remarks (proxy, remark) VALUES (?, ?)",
                    [(int(member.name), remark) for member in job.members],
                )

    def begin_attempt(
        self,
        job: StackJob,
        *,
        worker: str,
        machine: str,
        device: str,
        step: int | None,
        environment: dict[str, Any],
    ) -> None:
        """Store that a worker begins to train a stack, at `step`, and what it says of itself."""
        content = json.dumps(environment, sort_keys=True)
        self._begun[job.name] = time.monotonic()
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO environments (content) VALUES (?)", [content])
            self._db.execute(
                "INSERT INTO attempts (stack, number, state, worker, machine, device, environment,"
                " first_step, started) VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM "
                "attempts WHERE stack = ?), 'running', ?, ?, ?, (SELECT environment FROM "
                "environments WHERE content = ?), ?, ?)",
                [job.name, job.name, worker, machine, device, content, step, _now()],
            )
            self._set_state(job, "running")
            self._db.executemany(
                "UPDATE proxies SET attempts = attempts + 1 WHERE proxy = ?", _keys(job)
            )

    def break_off_attempt(self, job: StackJob, state: str, reason: str | None = None) -> None:
        """Store that an attempt did not come to its end, and that the stack waits again.

        state: died, hung, preempted, lost, failed or stopped.
        """
        with self._transaction():
            self._close_attempt(job, state, reason)
            self._set_state(job, "retried")

    def fail_stack(self, job: StackJob, reason: str) -> None:
        """Store that a stack could not be trained, and why; the next run tries it again."""
        with self._transaction():
            self._close_attempt(job, "failed", reason)
            self._set_state(job, "failed", reason)

    def queue(self, jobs: Iterable[StackJob]) -> None:
        """Let stacks wait again that could not be trained, or were taken out."""
        with self._transaction():
            rows = self._db.execute(
                "SELECT name FROM stacks WHERE state IN ('failed', 'cancelled')"
            )
            names = {name for (name,) in rows}
            for job in jobs:
                if job.name in names:
                    self._set_state(job, "retried")

    def try_again(self, jobs: Sequence[StackJob]) -> None:
        """Store new stacks of proxies that failed: they wait again, and lose their reason."""
        with self._transaction():
            for job in jobs:
                self._add_stack(job, "retried")
                self._db.executemany(
                    "UPDATE proxies SET stack = ?, state = 'retried', error = NULL WHERE proxy = ?",
                    [(job.name, *key) for key in _keys(job)],
                )

    def cancel(
        self, jobs: Sequence[StackJob], unplanned: Mapping[int, Mapping[str, float]]
    ) -> None:
        """Take stacks out, and proxies (index -> weights) that no stack holds yet."""
        with self._transaction():
            for job in jobs:
                self._set_state(job, "cancelled")
            self._db.executemany(
                "INSERT INTO proxies (proxy, stack, state, weights) "
                "VALUES (?, NULL, 'cancelled', ?)",
                [(index, json.dumps(dict(weights))) for index, weights in unplanned.items()],
            )

    def finish_stack(self, job: StackJob, result: dict[str, Any]) -> None:
        """Store the losses of a trained stack; a proxy without finite losses has failed."""
        with self._transaction():
            self._close_attempt(job, "done", None)
            self._db.execute(
                "UPDATE stacks SET state = 'done', seconds = ?, tokens = ?, reason = NULL "
                "WHERE name = ?",
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
        if error is not None:
            return
        for step, losses in result["evaluations"]:
            pairs = zip(job.targets, losses[position], strict=True)
            # A loss that was not finite on the way, in a run that came back from it, is absent.
            finite = {target: loss for target, loss in pairs if loss is not None}
            self._db.execute(
                "INSERT OR REPLACE INTO evaluations (proxy, step, losses) VALUES (?, ?, ?)",
                [proxy, step, json.dumps(finite)],
            )

    def _set_state(self, job: StackJob, state: str, reason: str | None = None) -> None:
        self._db.execute(
            "UPDATE stacks SET state = ?, reason = ? WHERE name = ?", [state, reason, job.name]
        )
        self._db.executemany(
            "UPDATE proxies SET state = ?, error = ? WHERE proxy = ?",
            [(state, reason, *key) for key in _keys(job)],
        )

    def _close_attempt(self, job: StackJob, state: str, reason: str | None) -> None:
        begun = self._begun.pop(job.name, None)
        self._db.execute(
            "UPDATE attempts SET state = ?, ended = ?, seconds = ?, reason = ? "
            "WHERE stack = ? AND state = 'running'",
            [state, _now(), begun and time.monotonic() - begun, reason, job.name],
        )


def _keys(job: StackJob) -> list[tuple[int]]:
    return [(int(member.name),) for member in job.members]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
