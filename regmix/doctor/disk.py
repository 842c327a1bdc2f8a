"""What a folder's disk can do: kind, space, writing, locks, and how fast it reads.

Enters: a folder. Leaves: `FolderFacts`. Nothing stays behind: the file that is tried has no name
where the system can do without. Judges nothing: `storage` does.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

NETWORK = (
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs"),
    *("afs", "orangefs", "pvfs2", "panfs", "wekafs", "9p", "virtiofs"),
)
LOCAL_FUSE = ("fuseblk", "fuse.fuse-overlayfs", "fuse.lxcfs")
MEMORY = ("tmpfs", "ramfs")
CHUNK_BYTES = 4 << 20
PROBE_BYTES = 32 << 20
SMALLEST_PROBE_BYTES = 8 << 20
SPARE_BYTES = 1 << 30  # below this much free space, nothing is written to be timed
PROBE_SECONDS = 1.0
SEARCH_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Mount:
    """Where a file system is mounted, of which kind and with which options."""

    point: str
    kind: str
    options: tuple[str, ...]

    @property
    def is_network(self) -> bool:
        """Whether other machines may write to it."""
        fuse = self.kind.startswith("fuse") and self.kind not in LOCAL_FUSE
        return self.kind in NETWORK or fuse

    @property
    def is_memory(self) -> bool:
        """Whether it is lost at the next start."""
        return self.kind in MEMORY


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Bytes read in seconds; cached: whether they may have come from memory; source: of what."""

    num_bytes: int
    seconds: float
    cached: bool
    source: str

    @property
    def bytes_per_second(self) -> float:
        """The rate."""
        return self.num_bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came of writing a file: why it failed, why locks failed, how far the clocks differ.

    skew_seconds: the file system's clock less this machine's.
    """

    error: str = ""
    lock_error: str = ""
    skew_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FolderFacts:
    """A folder: its role, what was asked for, and what is there (the nearest that exists).

    free_files is None where the file system does not count them; trial is None where the folder
    is only read.
    """

    role: str
    asked: str
    path: str
    mount: Mount
    free_bytes: int
    total_bytes: int
    free_files: int | None
    trial: Trial | None
    speed: Speed | None

    @property
    def exists(self) -> bool:
        """Whether the folder itself is there."""
        return self.asked == self.path


def look_at(folder: Path, role: str, *, writes: bool = True, timed: bool = True) -> FolderFacts:
    """Return the facts of a folder, or of the nearest one above that exists.

    writes: whether the work writes there; timed: whether to read some of it against the clock.
    """
    asked = folder.absolute()
    path = asked
    while not path.is_dir() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    free = status.f_bavail * status.f_frsize
    mount = mount_of(path, _mounts())
    trial = try_writing(path) if writes else None
    may_write = trial is not None and not trial.error and free >= SPARE_BYTES
    speed = None
    if timed and path == asked:
        speed = read_speed(path, may_write=may_write, in_memory=mount.is_memory)
    return FolderFacts(
        role=role,
        asked=str(asked),
        path=str(path),
        mount=mount,
        free_bytes=free,
        total_bytes=status.f_blocks * status.f_frsize,
        free_files=status.f_favail if status.f_files else None,
        trial=trial,
        speed=speed,
    )


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text()
    except OSError:
        return ""


def mount_of(path: Path, mountinfo: str) -> Mount:
    """Return the mount that holds `path`, from the text of /proc/self/mountinfo."""
    best = Mount(point="/", kind="unknown", options=())
    real = path.resolve()
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        words, source = fields.split(), rest.split()
        if len(words) < 6 or not source:
            continue
        point = words[4].replace("\\040", " ")
        # Later lines are mounted over earlier ones.
        if real.is_relative_to(point) and len(point) >= len(best.point):
            best = Mount(point=point, kind=source[0], options=tuple(words[5].split(",")))
    return best


def try_writing(path: Path) -> Trial:
    """Write, lock and stamp a file that is gone at the end."""
    try:
        with tempfile.TemporaryFile(dir=path, prefix=".doctor-") as stream:
            before = time.time()
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
            after, stamp = time.time(), os.fstat(stream.fileno()).st_mtime
            # A stamp between the two is right; the kernel's is up to 10 ms old.
            skew = min(stamp - before, 0.0) or max(stamp - after, 0.0)
            return Trial(lock_error=_try_locking(stream), skew_seconds=skew)
    except OSError as error:
        return Trial(error=os.strerror(error.errno) if error.errno else str(error))


def _try_locking(stream: IO[bytes]) -> str:
    # The study's lock is flock's, SQLite's are lockf's.
    for lock in (fcntl.flock, fcntl.lockf):
        try:
            lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock(stream, fcntl.LOCK_UN)
        except OSError as error:
            return f"{lock.__name__}: {os.strerror(error.errno) if error.errno else error}"
    return ""


def read_speed(path: Path, *, may_write: bool, in_memory: bool = False) -> Speed | None:
    """Return how fast the folder's largest file is read, or one written for that; None for none.

    At most 32 MB or a second of it; past the page cache where the file system allows.
    """
    file = largest_file(path)
    with contextlib.suppress(OSError):
        if file is not None:
            with open(file, "rb", buffering=0) as stream:
                return _timed(stream.fileno(), file.name, in_memory)
        if may_write:
            with tempfile.TemporaryFile(dir=path, prefix=".doctor-", buffering=0) as stream:
                _fill(stream.fileno())
                return _timed(stream.fileno(), "a new file", in_memory)
    return None


def largest_file(path: Path) -> Path | None:
    """Return the largest file of those found in half a second that is worth timing."""
    best, best_bytes = None, SMALLEST_PROBE_BYTES - 1
    deadline = time.monotonic() + SEARCH_SECONDS
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(OSError):
                status = file.lstat()
                # Not a link, and no hole that costs nothing to read.
                if file.is_symlink() or status.st_blocks * 512 < status.st_size // 2:
                    continue
                if status.st_size > best_bytes and os.access(file, os.R_OK):
                    best, best_bytes = file, status.st_size
            if time.monotonic() > deadline:
                return best
    return best


def _fill(descriptor: int) -> None:
    # Random bytes: a file system that compresses would not store zeros.
    content, written = os.urandom(CHUNK_BYTES), 0
    deadline = time.monotonic() + PROBE_SECONDS
    while written < PROBE_BYTES and time.monotonic() < deadline:
        written += os.write(descriptor, content)
        os.fsync(descriptor)


def _timed(descriptor: int, source: str, in_memory: bool) -> Speed:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    try:
        if not direct:
            raise OSError
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct)
        num_bytes, seconds = _read(descriptor)
        cached = in_memory
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        num_bytes, seconds = _read(descriptor)
        cached = True
    return Speed(num_bytes=num_bytes, seconds=seconds, cached=cached, source=source)


def _read(descriptor: int) -> tuple[int, float]:
    done, started = 0, time.perf_counter()
    with mmap.mmap(-1, CHUNK_BYTES) as buffer:  # reads past the cache want an aligned buffer
        while done < PROBE_BYTES and time.perf_counter() - started < PROBE_SECONDS:
            got = os.preadv(descriptor, [buffer], done)
            done += got
            if got < CHUNK_BYTES:
                break
    return done, time.perf_counter() - started
