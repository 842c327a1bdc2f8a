"""Ledgers that are damaged, half written, empty or of another version.

Enters: a stage. Leaves: rows. Damage is done to the ledger of a sweep that was stopped when some
stacks were done and others half trained: there is something to lose. It must be refused, or be
harmless; never must anything else be read than what was written.
"""

from __future__ import annotations

import functools
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from regmix_bench.faults.fault import REFUSED, SAME_BITS, Fault, Row
from regmix_bench.faults.stage import Case, FaultError, Stage

PAGE_BYTES = 4096
BITS_BY_COMMAND, BITS_IN_PROCESS = 12, 600
Damage = Callable[[Path, random.Random], None]
# A writer that dies before its COMMIT, when SQLite has written pages of it over the file: a small
# cache makes it do that. What it writes is nonsense, which must never be read.
_HALF_WRITER = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("PRAGMA cache_spill = 1")
db.execute("BEGIN IMMEDIATE")
for table, column in (("stacks", "state"), ("proxies", "weights"), ("evaluations", "losses")):
    db.execute(f"UPDATE {table} SET {column} = ?", ["nonsense " * 500])
os.kill(os.getpid(), signal.SIGKILL)
"""


def _ledger(case: Case) -> Path:
    return case.study / "ledger.sqlite"


def zeroed_page(path: Path, draw: random.Random) -> None:
    """Put zeros over one page."""
    content = bytearray(path.read_bytes())
    page = draw.randrange(len(content) // PAGE_BYTES) * PAGE_BYTES
    content[page : page + PAGE_BYTES] = bytes(PAGE_BYTES)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """Leave only the first pages."""
    size = path.stat().st_size
    with open(path, "r+b") as stream:
        stream.truncate(draw.randrange(1, size // PAGE_BYTES) * PAGE_BYTES)


def emptied(path: Path, _draw: random.Random) -> None:
    """Leave no byte."""
    path.write_bytes(b"")


def replaced(path: Path, _draw: random.Random) -> None:
    """Put another file in its place."""
    path.write_text("no ledger\n" * 1000, encoding="utf-8")


def newer(path: Path, _draw: random.Random) -> None:
    """Say that a later version made it."""
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    database.close()


def damaged(stage: Stage, draw: random.Random, *, damage: Damage, word: str = "ledger") -> Row:
    """Damage the ledger: the sweep is refused, and goes on once it is restored."""
    case = stage.half_done(f"ledger-{damage.__name__}")
    path = _ledger(case)
    whole = path.read_bytes()
    damage(path, draw)
    before = case.snapshot()
    sees = case.refused(case.start(), "ledger.sqlite", word)
    case.refuse_changes(before)
    path.write_bytes(whole)
    return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


def copy_put_back(stage: Stage, draw: random.Random) -> Row:
    """Damage the ledger, and cure it as the message says: with the copy that lies beside it."""
    case = stage.half_done("ledger-copy-put-back")
    zeroed_page(_ledger(case), draw)
    sees = case.refused(case.start(), "ledger.backup.sqlite")
    shutil.copy(case.study / "ledger.backup.sqlite", _ledger(case))
    (case.study / "ledger.sqlite-journal").unlink(missing_ok=True)
    return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


def flipped_bits(stage: Stage, draw: random.Random) -> Row:
    """Flip one bit at a time, all over the ledger: refused, or read as it was written."""
    case = stage.half_done("ledger-flipped-bits")
    path = _ledger(case)
    whole = path.read_bytes()
    expected = what_is_read(path)
    refused = 0
    sees = ""
    for number in range(BITS_IN_PROCESS):
        content = bytearray(whole)
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        found = what_is_read(path)
        if found not in (None, expected):
            raise FaultError(f"{path}: bit {bit} of byte {place} changes what is read, unnoticed")
        refused += found is None
        if found is None and number < BITS_BY_COMMAND * 10 and not number % 10:
            sees = case.refused(case.start(), "ledger.sqlite")
        path.write_bytes(whole)
        (case.study / "ledger.sqlite-journal").unlink(missing_ok=True)
    outcome = f"{refused} refused, the others were never read; {SAME_BITS}"
    return Row(injected=BITS_IN_PROCESS, sees=sees, outcome=outcome, proof=case.ends_well())


def what_is_read(path: Path) -> object | None:
    """Return all that a sweep, a fit and a status read of a ledger; None where it is refused."""
    from regmix.errors import RegmixError
    from regmix.swarm.ledger import Ledger

    try:
        with Ledger.read(path) as ledger:
            jobs = [job.to_table() for job in ledger.stacks()]
            rows = (ledger.proxies(), ledger.stack_rows(), ledger.attempts(), ledger.totals())
            return (jobs, rows, ledger.final_losses(), ledger.remarks())
    except RegmixError:
        return None


def hot_journal(stage: Stage, _draw: random.Random, *, is_deleted: bool) -> Row:
    """Kill a writer in the middle of its transaction, with half of it in the file."""
    case = stage.half_done(f"ledger-hot-journal-{is_deleted}")
    path = _ledger(case)
    whole = path.read_bytes()
    subprocess.run([sys.executable, "-c", _HALF_WRITER, str(path)], check=False)
    journal = path.with_name("ledger.sqlite-journal")
    if path.read_bytes() == whole or not journal.is_file():
        raise FaultError(f"{path}: nothing was half written")
    if not is_deleted:
        sees = "nothing: what was half written is taken back"
        return Row(injected=1, sees=sees, outcome=SAME_BITS, proof=case.ends_well())
    journal.unlink()
    sees = case.refused(case.start(), "ledger.sqlite")
    path.write_bytes(whole)
    return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


FAULTS = (
    Fault(name="ledger with flipped bits", inject=flipped_bits),
    Fault(
        name="ledger with a zeroed page",
        inject=functools.partial(damaged, damage=zeroed_page),
    ),
    Fault(name="ledger cut short", inject=functools.partial(damaged, damage=cut)),
    Fault(name="ledger emptied", inject=functools.partial(damaged, damage=emptied)),
    Fault(name="another file as the ledger", inject=functools.partial(damaged, damage=replaced)),
    Fault(
        name="ledger of a newer version",
        inject=functools.partial(damaged, damage=newer, word="version"),
    ),
    Fault(name="damaged ledger, its copy put back", inject=copy_put_back),
    Fault(
        name="ledger's writer killed inside a transaction",
        inject=functools.partial(hot_journal, is_deleted=False),
    ),
    Fault(
        name="the same, and its journal deleted",
        inject=functools.partial(hot_journal, is_deleted=True),
    ),
)
