"""A node's own folder for stacks whose study it does not see: checkpoints, results, logs.

Enters: the names of stacks and parts of files. Leaves: parts of files, and a folder that goes with
the process that made it. What a killed process left is removed by the next one. Never leaves its
folder, and knows no Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from regmix.errors import StorageError
from regmix.files import storage_errors

# As the worker writes them: checkpoints, training losses, the result; and the worker's log.
_CHECKPOINT = re.compile(r"step-(\d{8})\.safetensors")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_FOLDER = "actor-"


def default_base() -> Path:
    """Return where scratch folders lie on this machine unless a person names another place."""
    return Path(tempfile.gettempdir()) / f"regmix-fast-{os.getuid()}"


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step-{step:08d}.safetensors"


class Scratch:
    """One process's folder below `base`; made at once, removed by `close`."""

    def __init__(self, base: Path) -> None:
        with storage_errors(base):
            base.mkdir(parents=True, exist_ok=True, mode=0o700)
            if base.stat().st_uid != os.getuid():
                raise StorageError(
                    f"{base}: belongs to another user", cure="Name another folder with --scratch"
                )
            _remove_abandoned(base)
            self.path = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=base))
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.logs = self.path / "logs"

    def stack(self, name: str) -> Path:
        """Return the folder of a stack."""
        return self.path / "stacks" / _checked(name)

    def keep_only(self, name: str) -> None:
        """Remove the folders of all stacks but one."""
        folder = self.path / "stacks"
        for other in folder.iterdir() if folder.is_dir() else ():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def newest_step(self, name: str) -> int | None:
        """Return the step of a stack's newest checkpoint; None where it has none."""
        folder = self.stack(name)
        found = [_CHECKPOINT.fullmatch(entry) for entry in _entries(folder)]
        return max((int(match[1]) for match in found if match), default=None)

    def files(self, name: str) -> dict[str, int]:
        """Return the files of a stack with their bytes."""
        folder, found = self.stack(name), {}
        for entry in _entries(folder):
            with contextlib.suppress(OSError):
                if _NAME.fullmatch(entry):
                    found[entry] = (folder / entry).stat().st_size
        return found

    def read(self, path: str, offset: int, length: int) -> bytes | None:
        """Return a part of a file, by its path below this folder; None where it has gone."""
        with storage_errors(path):
            try:
                with open(self._inside(path), "rb") as stream:
                    stream.seek(offset)
                    return stream.read(length)
            except FileNotFoundError:
                return None

    def write(self, path: str, offset: int, part: bytes, is_last: bool) -> None:
        """Write a part of a file; with its last part it gets its name."""
        target = self._inside(path)
        temporary = target.with_name(f".{target.name}.part")
        with storage_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "r+b" if offset else "wb") as stream:
                stream.seek(offset)
                stream.write(part)
            if is_last:
                os.replace(temporary, target)

    def _inside(self, path: str) -> Path:
        return self.path.joinpath(*(_checked(word) for word in path.split("/")))

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise StorageError(f"{name!r} is no name of a stack's file", cure="Rename the stack")
    return name


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _remove_abandoned(base: Path) -> None:
    """Remove the folders whose process is gone: it was killed before it could."""
    for folder in base.glob(f"{_FOLDER}*"):
        try:
            lock = os.open(folder / ".lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
