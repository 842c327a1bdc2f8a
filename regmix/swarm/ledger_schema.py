"""The ledger's tables: how they are made, opened, checked, and brought up to date.

Enters: the path of a ledger. Leaves: a connection whose tables are those of this version and whose
every row is the one that was written, or a `StudyError` that says how to cure it. Does not know
what the rows mean to a sweep.

SQLite's own check sees a damaged tree of pages, not a flipped bit in a number. So every row
carries a checksum of its other columns. Triggers of the writer's connection keep it: no statement
can forget it, and they are no part of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from regmix.errors import StorageError, StudyError
from regmix.files import storage_errors, sync_directory

LEDGER_VERSION = 2
# A writer holds a reader up while it commits, and readers a writer, for milliseconds; on a network
# file system, or where a process stands still, for longer.
BUSY_SECONDS = 60.0
BACKUP_NAME = "ledger.backup.sqlite"
RECOVERIES = 5
_NEEDS_RECOVERY = ("SQLITE_READONLY", "SQLITE_CANTOPEN")

_META = "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
# table -> its columns; each has `xxh3` after them.
TABLES = {
    "stacks": {
        "name": "TEXT PRIMARY KEY",
        "job": "TEXT NOT NULL",
        "state": "TEXT NOT NULL",
        "seconds": "REAL",
        "tokens": "INTEGER",
        "reason": "TEXT",
    },
    "proxies": {
        "proxy": "INTEGER PRIMARY KEY",
        "stack": "TEXT REFERENCES stacks(name)",
        "state": "TEXT NOT NULL",
        "weights": "TEXT NOT NULL",
        "error": "TEXT",
        "attempts": "INTEGER NOT NULL DEFAULT 0",
    },
    "evaluations": {
        "proxy": "INTEGER NOT NULL REFERENCES proxies(proxy)",
        "step": "INTEGER NOT NULL",
        "losses": "TEXT NOT NULL",
    },
    "environments": {
        "environment": "INTEGER PRIMARY KEY",
        "content": "TEXT NOT NULL UNIQUE",
    },
    "attempts": {
        "stack": "TEXT NOT NULL",
        "number": "INTEGER NOT NULL",
        "state": "TEXT NOT NULL",
        "worker": "TEXT",
        "machine": "TEXT",
        "device": "TEXT",
        "environment": "INTEGER REFERENCES environments(environment)",
        "first_step": "INTEGER",
        "started": "TEXT",
        "ended": "TEXT",
        "seconds": "REAL",
        "reason": "TEXT",
    },
    "remarks": {
        "proxy": "INTEGER NOT NULL REFERENCES proxies(proxy)",
        "remark": "TEXT NOT NULL",
    },
}
_KEYS = {"evaluations": "proxy, step", "attempts": "stack, number"}


def _table_sql(name: str) -> str:
    columns = [f"{column} {kind}" for column, kind in TABLES[name].items()]
    keys = [f"PRIMARY KEY ({_KEYS[name]})"] if name in _KEYS else []
    return f"CREATE TABLE {name} ({', '.join([*columns, 'xxh3 TEXT', *keys])})"


_SCHEMA = {"meta": _META, **{name: _table_sql(name) for name in TABLES}}


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn what a damaged ledger raises when it is read into a `StudyError` with its cure."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if _code(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise StorageError(
                f"{path}: another process keeps the ledger busy",
                cure="Wait until it ends, then run the command again",
            ) from error
        if _code(error).startswith("SQLITE_IOERR"):
            raise StorageError(
                f"{path}: the ledger cannot be read ({error})",
                cure="The disk reports errors: see the system's log, and copy the study elsewhere",
            ) from error
        if _code(error).startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
            raise StorageError(
                f"{path}: the ledger cannot be opened ({error})",
                cure="Check the permissions of the file and of its folder",
            ) from error
        raise damaged(path, str(error)) from error
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error).splitlines()[0] if str(error) else "unreadable") from error


def _code(error: sqlite3.Error) -> str:
    # What Python's module finds itself, as text that is no UTF-8, has no code.
    return str(getattr(error, "sqlite_errorname", ""))


def damaged(path: Path, why: str) -> StudyError:
    """Return the error of a ledger that must not be used, with what can be done about it."""
    if (path.parent / BACKUP_NAME).is_file() and path.name != BACKUP_NAME:
        cure = (
            f"Put its copy in its place (in {path.parent}: cp {BACKUP_NAME} {path.name}; rm -f "
            f"{path.name}-journal), then run the command again: what was trained since the copy is "
            "taken from stacks/, and nothing is lost"
        )
    else:
        cure = (
            f"Restore {path.name} from a copy of the study. Without one, keep losses.csv elsewhere "
            f"(it has all losses so far), remove {path.name}, losses.csv and steps/, and run the "
            "command again: all proxies are then trained again, to the same bits"
        )
    return StudyError(f"{path}: the ledger is damaged ({why})", cure=cure)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Return a connection to a ledger that is made, or checked and brought up to date."""
    with reading_errors(path):
        db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
    try:
        with reading_errors(path):
            db.execute("PRAGMA journal_mode=DELETE")
            db.execute("PRAGMA synchronous=FULL")
            # No page: it is new, or whoever made it was killed before the first transaction.
            is_new = db.execute("PRAGMA page_count").fetchone()[0] == 0
        with transaction(db, path):
            if is_new:
                _make_tables(db)
            else:
                with reading_errors(path):
                    _bring_up_to_date(db, path)
        _keep_checksums(db)
    except BaseException:
        db.close()
        raise
    return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Return a checked copy of a ledger in memory, of this version; the file is never written to.

    So readers keep a writer waiting for no longer than the copy takes. Where a writer was killed
    in the middle of a transaction, that is taken back in the copy.
    """
    with storage_errors(path):
        is_empty = path.stat().st_size == 0
    if is_empty:
        raise damaged(path, "the file is empty")
    with reading_errors(path):
        db = _copied(path)
        try:
            _bring_up_to_date(db, path)
        except BaseException:
            db.close()
            raise
    return db


def copy_ledger(db: sqlite3.Connection, path: Path, copy: Path) -> None:
    """Write a checked copy of the open ledger at `path`, whole, or leave the last copy as it is.

    Raises `StudyError` where the ledger is damaged, as a copy of that would be of no use, and
    `StorageError` where the copy cannot be written.
    """
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as target:
            target.execute("PRAGMA synchronous=FULL")
            with _writing_errors(copy, "the copy of the ledger"):
                db.backup(target)
            with reading_errors(path):
                _bring_up_to_date(target, path)
        with storage_errors(copy):
            os.replace(temporary, copy)
            sync_directory(copy.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Write all or nothing; `StorageError` where the disk or another process does not let it."""
    with _writing_errors(path, "the ledger"):
        try:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("COMMIT")
        except BaseException:
            # On a full disk SQLite has rolled back by itself.
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _writing_errors(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"{path}: {what} cannot be written ({error})",
            cure="Free some space, check the permissions, then run the command again",
        ) from error
    except sqlite3.DatabaseError as error:
        if _code(error).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise damaged(path, str(error)) from error
        raise


def check_rows(db: sqlite3.Connection, *names: str) -> None:
    """Raise `ValueError` where a row of these tables (or of any) is not what was written."""
    for name in names or TABLES:
        columns = ", ".join(TABLES[name])
        found = db.execute(
            f"SELECT rowid FROM {name} WHERE xxh3 IS NOT row_checksum({columns}) LIMIT 1"
        ).fetchone()
        if found is not None:
            raise ValueError(f"row {found[0]} of {name} does not match its checksum")


def _copied(path: Path) -> sqlite3.Connection:
    source = f"{path.absolute().as_uri()}?mode=ro"
    for _ in range(RECOVERIES):
        try:
            with contextlib.closing(_connect(source)) as db:
                # The lock first: a copy that finds none tries for ever.
                db.execute("BEGIN")
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                return _in_memory(db)
        except sqlite3.OperationalError as error:
            if not _code(error).startswith(_NEEDS_RECOVERY):
                raise
            refused = error
        # A writer was killed in a transaction. Its journal says how to take that back, for which
        # the file must be written; or the next writer is just doing it.
        try:
            return _recovered(path)
        except (OSError, sqlite3.Error):
            time.sleep(0.2)
    raise refused


def _recovered(path: Path) -> sqlite3.Connection:
    with tempfile.TemporaryDirectory(prefix="regmix-ledger-") as folder:
        copy = Path(folder) / path.name
        shutil.copyfile(path, copy)
        shutil.copyfile(f"{path}-journal", f"{copy}-journal")
        with contextlib.closing(_connect(copy.as_uri())) as db:
            _check_pages(db)
            return _in_memory(db)


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS)


def _in_memory(db: sqlite3.Connection) -> sqlite3.Connection:
    memory = sqlite3.connect(":memory:", isolation_level=None)
    db.backup(memory)
    return memory


def _bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    """Check every page and row, and turn the tables of older versions into those of this one."""
    db.create_function("row_checksum", -1, _row_checksum, deterministic=True)
    _check_pages(db)
    found = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    if found is None:
        raise ValueError("it does not say its version")
    version = int(found[0])
    if version > LEDGER_VERSION:
        raise StudyError(
            f"{path}: made by a newer version of regmix-fast (ledger format {version}, this one "
            f"reads up to {LEDGER_VERSION})",
            cure="Upgrade regmix-fast, or use the version that made it",
        )
    if version == 1:
        _upgrade_from_1(db)
    schema = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if dict(schema) != _SCHEMA:
        raise ValueError("its tables are not those of its version")
    check_rows(db)


def _check_pages(db: sqlite3.Connection) -> None:
    answer = db.execute("PRAGMA integrity_check").fetchone()[0]
    if answer != "ok":
        raise ValueError(answer.splitlines()[-1])


def _make_tables(db: sqlite3.Connection) -> None:
    for statement in _SCHEMA.values():
        db.execute(statement)
    db.execute("INSERT INTO meta VALUES ('version', ?)", [str(LEDGER_VERSION)])


def _upgrade_from_1(db: sqlite3.Connection) -> None:
    """Version 1 had a row for every loss, no attempts, no checksums, and remarks once needed."""
    stacks = db.execute("SELECT name, job, state, seconds, tokens FROM stacks ORDER BY rowid")
    proxies = db.execute("SELECT proxy, stack, state, weights, error FROM proxies")
    losses = db.execute("SELECT proxy, step, target, loss_nats FROM losses ORDER BY rowid")
    evaluations: dict[tuple[int, int], dict[str, float]] = {}
    for proxy, step, target, loss in losses:
        evaluations.setdefault((proxy, step), {})[target] = loss
    rows: dict[str, list[tuple[Any, ...]]] = {
        "stacks": [(*row, None) for row in stacks],
        "proxies": [(*row, 0) for row in proxies],
        "evaluations": [(*key, json.dumps(found)) for key, found in evaluations.items()],
    }
    old = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "remarks" in old:
        rows["remarks"] = db.execute("SELECT proxy, remark FROM remarks ORDER BY rowid").fetchall()
    for name in ("losses", "remarks", "proxies", "stacks", "meta"):
        db.execute(f"DROP TABLE IF EXISTS {name}")
    _make_tables(db)
    for name, content in rows.items():
        places = ", ".join("?" * (len(TABLES[name]) + 1))
        db.executemany(
            f"INSERT INTO {name} VALUES ({places})",
            [(*row, _row_checksum(*row)) for row in content],
        )


def _keep_checksums(db: sqlite3.Connection) -> None:
    db.create_function("row_checksum", -1, _row_checksum, deterministic=True)
    for name, columns in TABLES.items():
        values = ", ".join(f"NEW.{column}" for column in columns)
        for event in ("INSERT", f"UPDATE OF {', '.join(columns)}"):
            db.execute(
                f"CREATE TEMP TRIGGER {name}_{event.split()[0]} AFTER {event} ON main.{name} BEGIN "
                f"UPDATE {name} SET xxh3 = row_checksum({values}) WHERE rowid = NEW.rowid; END"
            )


def _row_checksum(*values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values).encode())
