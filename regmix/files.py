"""Files that appear whole or not at all.

Enters: a path and its content. Leaves: the file, fsynced and renamed into place, or a
`StorageError` that names the path and the cure. Does not know what is inside a file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from regmix.errors import StorageError

_CURES = {
    errno.ENOSPC: "Free some space on that disk, or name a folder on another one",
    errno.EDQUOT: "Your quota is used up: free some space, or name a folder elsewhere",
    errno.EACCES: "Check the permissions of that path, or name one that you may write",
    errno.EPERM: "Check the permissions of that path, or name one that you may write",
    errno.EROFS: "That file system is read-only: name a folder on another one",
    errno.ENOENT: "Check the path",
    errno.ENOTDIR: "A part of that path is a file: name another folder",
    errno.EISDIR: "That path is a folder: name a file",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or name a folder elsewhere",
    errno.EIO: "The disk reports errors: see the system's log, and move the data to another disk",
    errno.ESTALE: "The file server lost that file: mount it again, then run the command again",
    errno.EXDEV: "Both must lie on one file system: replace the link by a folder",
}


def cure_of_reason(reason: str) -> str | None:
    """Return the cure of an error of the disk or the permissions, by its text; None for others."""
    of_the_disk = (code for code in _CURES if code != errno.ENOENT)
    return next((_CURES[code] for code in of_the_disk if os.strerror(code) == reason), None)


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn an `OSError` about `path` into a `StorageError` that says how to cure it."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        cure = _CURES.get(error.errno or 0, "Check the disk and the path")
        raise StorageError(f"{path}: {reason}", cure=cure) from error


@contextlib.contextmanager
def atomic_open(path: Path | str, mode: str = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open a temporary neighbour of `path` that replaces it, fsynced, when the block ends well."""
    path = Path(path)
    # Machines that share a file system may have the same process id.
    owner = f"{platform.node()[:40]}-{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{owner}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
            with open(temporary, mode, **options) as stream:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
            if durable:
                sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_open(path, "w") as stream:
        stream.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text file; `StorageError` where it is missing, unreadable or not UTF-8."""
    with storage_errors(path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(
            f"{path}: not UTF-8 text (byte {error.start})", cure="Convert the file to UTF-8"
        ) from error


def read_json(path: Path | str) -> Any:
    """Read a JSON file; `StorageError` where it is missing or malformed."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{path}: not valid JSON ({error})", cure="Restore the file, or write it again"
        ) from error


def read_table(path: Path | str, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has `keys`; `StorageError` where it is none or lacks one."""
    table = read_json(path)
    missing = [key for key in keys if not isinstance(table, dict) or key not in table]
    if not isinstance(table, dict) or missing:
        why = f"no '{missing[0]}' in it" if missing else "not a table"
        raise StorageError(
            f"{path}: {why}", cure="Restore the file, or run the command that made it"
        )
    return table


def checksum(path: Path | str) -> str:
    """Return the xxh3_64 of a file as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with storage_errors(path), open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: Path | str) -> int:
    """Return the free bytes of the disk that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
