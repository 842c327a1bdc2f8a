"""Shards that are damaged: cut, flipped, missing or unreadable, before a sweep and under it.

Enters: a stage. Leaves: rows. Damage before the sweep must be refused by name. Under it, a worker
may die of a cut file (SIGBUS), and the next one must name it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from regmix_bench.faults.disks import refuse_without_loop_devices
from regmix_bench.faults.fault import REFUSED, SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import WORKER, Rule
from regmix_bench.faults.stage import Case, FaultError, Stage

FILES = ("train/animals-0.tokens", "train/numbers-0.tokens", "valid/animals-0.tokens")
Damage = Callable[[Path, random.Random], None]


def cut(path: Path, draw: random.Random) -> None:
    """Truncate a file."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def remove(path: Path, _draw: random.Random) -> None:
    """Delete a file."""
    path.unlink()


def damaged_before(stage: Stage, draw: random.Random, *, damage: Damage) -> Row:
    """Damage one file after another before the sweep starts: each is refused by name."""
    case = stage.case(f"shards-{damage.__name__}-before")
    sees = ""
    for name in FILES:
        path = case.shards / name
        content, state = path.read_bytes(), path.stat()
        damage(path, draw)
        before = case.snapshot()
        sees = case.refused(case.start(), path.name)
        if name.startswith("train/"):
            # A block is read after the ledger was opened, which leaves the writer's token there.
            case.refuse_changes(before, without=frozenset({"ledger.sqlite"}))
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return Row(injected=len(FILES), sees=sees, outcome=REFUSED, proof=case.ends_well())


def cut_under_a_sweep(stage: Stage, _draw: random.Random) -> Row:
    """Truncate a shard that workers have mapped: SIGBUS, and the next worker names the file."""
    case = stage.case("shard-cut-under-a-sweep")
    path = case.shards / FILES[0]
    content = path.read_bytes()
    case.disturb(Rule(role=WORKER, at="step", match="@50@", do="cut", value=(str(path), 5000)))
    sees = case.refused(case.start(), path.name, "stack-0000")
    path.write_bytes(content)
    return Row(injected=case.struck("cut"), sees=sees, outcome=REFUSED, proof=case.ends_well())


def changed_under_a_sweep(stage: Stage, draw: random.Random) -> Row:
    """Write other tokens into a shard that workers have mapped and checked."""
    case = stage.case("shard-changed-under-a-sweep")
    path = case.shards / FILES[0]
    content = path.read_bytes()
    run = case.start()
    case.in_the_middle(run)
    with open(path, "r+b") as stream:
        # Tokens as good as those before, so that nothing but the check can notice.
        stream.seek(4096)
        stream.write(content[24_576:45_056] + content[4096:24_576])
    sees = case.refused(run, path.name)
    with open(path, "r+b") as stream:
        stream.write(content)
    return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


def removed_under_a_sweep(stage: Stage, _draw: random.Random) -> Row:
    """Delete a shard that workers have mapped: they keep what they have opened."""
    case = stage.case("shard-removed-under-a-sweep")
    path = case.shards / FILES[0]
    content = path.read_bytes()
    case.disturb(Rule(role=WORKER, at="step", match="@50@", do="remove", value=str(path)))
    ended = case.start().wait()
    sees = "nothing: what is mapped stays"
    if ended.code != 0:
        sees = case.brief(ended.reasons)
        if path.name not in sees or "Traceback" in ended.err:
            raise FaultError(f"{case.folder}: the message does not name the file\n{ended.err}")
    path.write_bytes(content)
    return Row(
        injected=case.struck("remove"),
        sees=sees,
        outcome=SAME_BITS if ended.code == 0 else REFUSED,
        proof=case.ends_well(),
    )


def read_errors_at_open(stage: Stage, _draw: random.Random) -> Row:
    """A worker meets EIO where it opens a shard that its coordinator could read."""
    case = stage.case("shard-eio-in-a-worker")
    rule = Rule(
        role=WORKER, at="read", match=r"animals-0\.tokens", do="error", value=errno.EIO, times=4
    )
    case.disturb(rule)
    sees = case.refused(case.start(), "animals-0.tokens", "Input/output error")
    return Row(injected=case.struck("error"), sees=sees, outcome=REFUSED, proof=case.ends_well())


def blocks_lost(stage: Stage, _draw: random.Random) -> Row:
    """The corpus lies on a device that has lost its last blocks: the kernel answers EIO."""
    case = stage.case("shards-on-a-device-that-lost-blocks")
    with _losing_device(case) as lose:
        lose(True)
        sees = case.refused(case.start(), ".tokens", "Input/output error")
        lose(False)
        return Row(injected=1, sees=sees, outcome=REFUSED, proof=case.ends_well())


@contextlib.contextmanager
def _losing_device(case: Case) -> Iterator[Callable[[bool], None]]:
    """Move a case's shards to an ext4 image whose file can be cut, and made whole again."""
    image, whole, aside = (case.folder / name for name in ("image", "whole", "shards.aside"))
    case.shards.rename(aside)
    case.shards.mkdir()
    with open(image, "wb") as stream:
        stream.truncate(8 << 20)
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)])
    run(["mount", "-o", "loop", str(image), str(case.shards)])
    # The last file that is written lies behind all others, and behind the tables of the device.
    last = aside / FILES[-1]
    shutil.copytree(aside, case.shards, dirs_exist_ok=True, ignore=lambda *_: [last.name])
    for path in sorted(aside.rglob(last.name), key=lambda path: path == last):
        shutil.copy2(path, case.shards / path.relative_to(aside))
    run(["umount", str(case.shards)])
    shutil.copy(image, whole)
    page = last.read_bytes()[8192:12288]

    def lose(is_lost: bool) -> None:
        if is_lost:
            os.truncate(image, whole.read_bytes().index(page))
        else:
            with open(image, "r+b") as stream:
                stream.write(whole.read_bytes())
        # What the system still has in memory would hide it.
        with open(case.shards / FILES[-1], "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    run(["mount", "-o", "loop,ro", str(image), str(case.shards)])
    try:
        yield lose
    finally:
        run(["umount", "-l", str(case.shards)])


FAULTS = (
    Fault(
        name="shard with a flipped bit, before the sweep",
        inject=functools.partial(damaged_before, damage=flip),
    ),
    Fault(
        name="shard cut short, before the sweep",
        inject=functools.partial(damaged_before, damage=cut),
    ),
    Fault(
        name="shard missing, before the sweep",
        inject=functools.partial(damaged_before, damage=remove),
    ),
    Fault(name="shard cut under the sweep (SIGBUS)", inject=cut_under_a_sweep, is_fast=True),
    Fault(name="shard overwritten under the sweep", inject=changed_under_a_sweep),
    Fault(name="shard deleted under the sweep", inject=removed_under_a_sweep),
    Fault(name="read error (EIO) where a worker opens a shard", inject=read_errors_at_open),
    Fault(
        name="read errors (EIO) of a device that lost blocks",
        inject=blocks_lost,
        needs=refuse_without_loop_devices,
    ),
)
