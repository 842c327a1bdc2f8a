"""Who holds a folder: a lock for the processes of one machine, and a lease for all machines.

Enters: the paths of a lock and of its lease. Leaves: a descriptor that holds the lock, renewed as
long as it is held; or a `StudyError` that says who has it. Knows no study.

`flock` decides between processes that share a kernel, and goes with the last process that has the
descriptor, so a worker that outlives a killed coordinator still holds it. Where `flock` does not
reach, as on some network file systems, the lease does: a small file that its holder changes every
few seconds. Whoever waits for it measures on a clock of its own for how long it has not changed;
the clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regmix.errors import StudyError, printable
from regmix.files import atomic_open, storage_errors

RENEW_SECONDS = 5.0
# Six renewals; network file systems show a change after some seconds.
LEASE_SECONDS = 30.0
POLL_SECONDS = 0.1
_WIDTH = 512
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a lease file says: who has it, and how often it was renewed.

    token: new for each holding; boot: the kernel that the holder runs under.
    """

    token: str
    host: str
    pid: int
    boot: str
    counter: int

    @property
    def is_of_this_machine(self) -> bool:
        """Whether its holder shares this process's kernel, so that `flock` decides."""
        return self.boot == boot_id()

    def __str__(self) -> str:
        where = "" if self.is_of_this_machine else f" on {printable(self.host)}"
        return f"process {self.pid}{where}"


def boot_id() -> str:
    """Return what tells this running kernel from others; the host's name where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def read_lease(path: Path) -> Lease | None:
    """Return what a lease file says; None where there is none, or it makes no sense."""
    try:
        with open(path, "rb") as stream:
            table = json.loads(stream.read(_WIDTH))
        return Lease(
            token=str(table["token"]),
            host=str(table["host"]),
            pid=int(table["pid"]),
            boot=str(table["boot"]),
            counter=int(table["counter"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_held(lock: Path, lease: Path) -> bool | None:
    """Return whether a living process holds the lock; None where only time can tell.

    Nothing is written, so a folder that may only be read will do.
    """
    found = read_lease(lease)
    if found is not None and not found.is_of_this_machine:
        return None
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(
    lock: Path,
    lease: Path,
    *,
    patience_seconds: float,
    lease_seconds: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[int]:
    """Hold a lock and its lease; yields the lock's descriptor, which children may inherit.

    `StudyError` where another process keeps it longer than the patience. One whose lease stands
    still for `lease_seconds` has lost it.
    """
    with storage_errors(lock):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = clock() + patience_seconds
        while not _locked(descriptor, lock):
            if clock() > deadline:
                owner = read_lease(lease)
                pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise _in_use(lock.parent, str(owner) if owner else f"process {pid or '?'}")
            sleep(POLL_SECONDS)
        _wait_for_lease(lease, deadline, lease_seconds, clock, sleep)
        # For people; the lease says the same.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        with _renewed(lease):
            yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path) -> bool:
    with storage_errors(path):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _wait_for_lease(
    path: Path,
    deadline: float,
    lease_seconds: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    """Wait until nobody on another machine has the lease; `StudyError` where somebody keeps it."""
    found = read_lease(path)
    if found is None or found.is_of_this_machine:
        # On this machine the lock says that its holder is gone.
        return
    logger.warning(
        "%s: last written by %s; waiting up to %.0f s to see whether it still is",
        path.parent,
        found,
        lease_seconds,
    )
    is_renewed, since = False, clock()
    while clock() - since < lease_seconds:
        if is_renewed and clock() > deadline:
            raise _in_use(path.parent, str(found))
        sleep(POLL_SECONDS)
        now = read_lease(path)
        if now is None or now.is_of_this_machine:
            return
        if now != found:
            is_renewed, found, since = True, now, clock()


def _in_use(folder: Path, owner: str) -> StudyError:
    return StudyError(
        f"{folder} is in use by another command ({owner})", cure="Wait until it ends, or stop it"
    )


@contextlib.contextmanager
def _renewed(path: Path) -> Iterator[None]:
    """Take the lease, renew it in a thread, and remove it at the end if it is still this one's."""
    lease = Lease(
        token=secrets.token_hex(8),
        host=platform.node(),
        pid=os.getpid(),
        boot=boot_id(),
        counter=0,
    )
    # A new file: whoever held it before and wakes up again changes the old one, which nobody sees.
    with atomic_open(path, durable=False) as stream:
        stream.write(_text(lease, 0))
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, lease, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found = read_lease(path)
        if found is not None and found.token == lease.token:
            with contextlib.suppress(OSError):
                path.unlink()


def _renew(path: Path, lease: Lease, ended: threading.Event) -> None:
    counter = 0
    while not ended.wait(RENEW_SECONDS):
        counter += 1
        # A full disk does not take it away: the file keeps its size.
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                content = os.read(descriptor, _WIDTH)
                if lease.token.encode() not in content:
                    return
                os.pwrite(descriptor, _text(lease, counter), 0)
            finally:
                os.close(descriptor)


def _text(lease: Lease, counter: int) -> bytes:
    text = json.dumps({**vars(lease), "counter": counter})
    return (text.ljust(_WIDTH - 1) + "\n").encode()
