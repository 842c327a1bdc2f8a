"""A corpus copied to a disk of the machine that reads it, once for all processes there.

Enters: a packed corpus, or its files as they are sent, and a folder for copies. Leaves: the path of
a whole copy, named by the corpus's checksum. A copy is made in a neighbour, every block of it is
checked, and only then it gets its name and its marker; what is half done or found damaged is made
again. Copies are not removed: a later run uses them. Reads no tokens, and plans nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from regmix.data.manifest import COPY_MARKER, MANIFEST, read_manifest
from regmix.data.shards import ShardSet
from regmix.display import size
from regmix.errors import RegmixError, ShardError, StorageError, StudyError
from regmix.files import free_bytes, storage_errors, sync_directory, write_json

# What a file system takes besides the files, and what others should find free.
_SPARE_BYTES = 64 << 20
_COPY_BYTES = 8 << 20
_PATIENCE_SECONDS = 0.2


def copy_path(cache: Path, digest: str) -> Path:
    """Return where a corpus of this checksum lies in a cache."""
    return cache / f"shards-{digest}"


def find_copy(cache: Path, digest: str) -> Path | None:
    """Return a whole copy of a corpus; None where there is none, or one that is damaged.

    Size, header and footer of every file are read; its blocks were checked when it was made, and
    are checked again by whoever reads tokens from them.
    """
    path = copy_path(cache, digest)
    if not (path / COPY_MARKER).is_file():
        return None
    try:
        return path if ShardSet.open(path).checksum == digest else None
    except RegmixError:
        return None


def doubt(copy: Path) -> None:
    """Have a copy made again by the next run: damage was found in it."""
    with contextlib.suppress(OSError):
        (copy / COPY_MARKER).unlink()


def corpus_files(shards: ShardSet) -> dict[str, int]:
    """Return the files of a packed corpus, relative to its folder, with their bytes.

    `StudyError` where these are token files of another program: nothing says which files of their
    folders belong to them, or whether a copy is what they were.
    """
    if not (shards.path / MANIFEST).is_file():
        raise StudyError(
            f"{shards.path}: token files of another program are not copied to other disks",
            cure="Keep them where every machine sees them and leave --shard-cache out, or pack "
            "the corpus with regmix-fast pack",
        )
    names = [MANIFEST, shards.manifest.tokenizer.file]
    for domains in shards.manifest.splits.values():
        names += [file.path for stats in domains.values() for file in stats.files]
    found = {}
    for name in dict.fromkeys(names):
        with storage_errors(shards.path / name):
            found[name] = (shards.path / name).stat().st_size
    return found


def copy_corpus(
    shards: ShardSet, cache: Path, on_bytes: Callable[[int, int], None] = lambda _done, _total: None
) -> Path:
    """Return a whole copy of a corpus in a cache, made now where there is none.

    One process of the machine copies, others wait for it. `on_bytes` gets the bytes copied, and of
    how many. Raises `StorageError` where the disk lacks room or a file cannot be read, and
    `ShardError` where the corpus itself is damaged.
    """
    if (found := find_copy(cache, shards.checksum)) is not None:
        return found
    files = corpus_files(shards)
    incoming = IncomingCorpus(cache, shards.checksum, files)
    while not incoming.begin():
        time.sleep(_PATIENCE_SECONDS)
    with incoming:
        if incoming.whole is not None:
            return incoming.whole
        done, total = 0, sum(files.values())
        for name in files:
            for offset, part in parts_of(shards.path / name):
                incoming.write(name, offset, part)
                done += len(part)
                on_bytes(done, total)
        return incoming.finish(shards)


def parts_of(path: Path, part_bytes: int = _COPY_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yield a file's content with the byte at which each part begins."""
    with storage_errors(path), open(path, "rb") as stream:
        offset = 0
        while part := stream.read(part_bytes):
            yield offset, part
            offset += len(part)


class IncomingCorpus:
    """A copy being made in a cache; one at a time on a machine, `begin` says whether it is ours.

    files: name -> bytes, as `corpus_files` gives them. Used as a context, it leaves nothing half
    done behind.
    """

    def __init__(self, cache: Path, digest: str, files: dict[str, int]) -> None:
        self._cache, self._digest, self._files = cache, digest, files
        self._target = copy_path(cache, digest)
        self._folder = cache / f".{self._target.name}.part"
        self._lock: int | None = None
        self.whole: Path | None = None

    def begin(self) -> bool:
        """Take the machine's turn; False where another process copies this corpus now.

        Then either `whole` is a copy that another one made, or an empty folder waits for `write`.
        """
        with storage_errors(self._cache):
            self._cache.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._cache / f".{self._target.name}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        try:
            self.whole = find_copy(self._cache, self._digest)
            if self.whole is None:
                self._make_room()
        except BaseException:
            self.close()
            raise
        return True

    def _make_room(self) -> None:
        # What lies there half done or damaged is of no more use, and its room is needed.
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.rmtree(self._target, ignore_errors=True)
        needed, free = sum(self._files.values()) + _SPARE_BYTES, free_bytes(self._cache)
        if needed > free:
            raise StorageError(
                f"{self._cache}: the copy of the corpus needs {size(needed)} and {size(free)} are "
                "free",
                cure="Free some space, name a --shard-cache on another disk, or leave it out",
            )
        with storage_errors(self._folder):
            self._folder.mkdir()

    def write(self, name: str, offset: int, part: bytes) -> None:
        """Write a part of a file; `ShardError` where its name leaves the folder."""
        if name not in self._files:
            raise ShardError(f"{name!r} is no file of this corpus", cure="Name the right corpus")
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ShardError(
                f"the path {name!r} leaves the folder",
                cure="Do not use this corpus: its manifest was made by hand",
            )
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "r+b" if offset else "wb") as stream:
                stream.seek(offset)
                stream.write(part)

    def finish(self, source: ShardSet | None = None) -> Path:
        """Check every block of the copy, give it its name, and return it.

        source: what was copied, to say whether it is the source that is damaged. Raises
        `ShardError` where a block is not what the corpus's manifest says.
        """
        self._check(source)
        for name in self._files:
            with storage_errors(self._folder / name):
                _sync(self._folder / name)
        write_json(self._folder / COPY_MARKER, {"checksum": self._digest, "files": self._files})
        with storage_errors(self._target):
            os.replace(self._folder, self._target)
            sync_directory(self._cache)
        self.whole = self._target
        return self._target

    def _check(self, source: ShardSet | None) -> None:
        try:
            digest = read_manifest(self._folder)[1]
            damage = ShardSet.read(self._folder).damage()
        except RegmixError as error:
            damage, digest, what = [], "", error.what
        else:
            what = damage[0].what if damage else "it is of another corpus"
        if not damage and digest == self._digest:
            return
        if source is not None and (at_source := source.damage()):
            raise at_source[0].error()
        raise ShardError(
            f"{self._target}: what was copied is damaged ({what})",
            cure="regmix-fast verify SHARDS checks the corpus itself; where that is whole, name "
            "a --shard-cache on another disk",
        )

    def close(self) -> None:
        """Let others have their turn; what is half done goes."""
        if self._lock is None:
            return
        if self.whole is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def __enter__(self) -> IncomingCorpus:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
