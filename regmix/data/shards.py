"""Token shards on disk, read: the floor every sampler stands on.

`ShardSet.open` checks the manifest, and the size, header, footer and final checksum of every file,
so a truncated file is found at once; `arrays` checks every block of a domain the first time a
process touches it, `lazy_arrays` leaves each to the sampler that first reads from it: either way a
flipped bit is found before it is trained on.

Enters: a folder written by packing/pack.py (the layout of a file is in writer.py), or token files
of another program (foreign/). Leaves: read-only memory maps and counts. Does not cut sequences:
their length belongs to a run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from regmix.data.block_checks import BlockCheck, map_lazily
from regmix.data.blocks import OnBytes, check_ends, check_once, find_damage, load, map_tokens
from regmix.data.manifest import (
    COPY_MARKER,
    MANIFEST,
    MANIFEST_FORMAT,
    VERSION,
    Manifest,
    ShardFile,
    ShardStats,
    SourceFile,
    TokenizerRecord,
    dtype_for,
    read_manifest,
    write_manifest,
)
from regmix.data.stored_file import Damage, StoredFile, size_of
from regmix.data.writer import (
    BLOCK_BYTES,
    DTYPES,
    HEADER_BYTES,
    MAGIC,
    DomainWriter,
    ShardWriter,
    file_bytes,
    header_bytes,
)
from regmix.errors import RegmixError, ShardError, nearest
from regmix.files import checksum, storage_errors

__all__ = [
    "MANIFEST",
    "MANIFEST_FORMAT",
    "VERSION",
    "DomainWriter",
    "Manifest",
    "ShardFile",
    "ShardSet",
    "ShardStats",
    "ShardWriter",
    "SourceFile",
    "TokenizerRecord",
    "dtype_for",
    "read_manifest",
    "write_manifest",
]


class PackedFile:
    """One file that `pack` wrote, with what its manifest says of it; a `StoredFile`."""

    def __init__(
        self,
        path: Path,
        split: str,
        domain: str,
        *,
        manifest: Manifest,
        record: ShardFile,
        cure: str,
    ) -> None:
        self.path, self.split, self.domain, self.cure = path, split, domain, cure
        self.dtype = DTYPES[manifest.dtype]
        self.start, self.tokens, self.stamp = HEADER_BYTES, record.tokens, record.checksum
        self.offsets = self.digests = np.empty(0, np.uint64)
        self._record, self._vocab_size = record, manifest.tokenizer.vocab_size
        self._header = header_bytes(
            manifest, split, domain, tokens=record.tokens, largest_id=record.largest_id
        )

    def ends_problem(self) -> str | None:
        """See `StoredFile.ends_problem`."""
        record = self._record
        size = size_of(self.path)
        if isinstance(size, str):
            return size
        expected = file_bytes(record.tokens, record.documents, self.dtype.itemsize)
        if not size == expected == record.bytes:
            return f"{size} bytes where {record.bytes} were written: cut short or changed"
        with open(self.path, "rb") as stream:
            header = stream.read(HEADER_BYTES)
            stream.seek(-8, os.SEEK_END)
            total = stream.read()
        if header != self._header:
            if not header.startswith(MAGIC):
                return "not a token shard: damaged or replaced"
            return "its header does not fit the manifest: damaged or replaced"
        if total[::-1].hex() != record.checksum:
            return "its checksum does not fit the manifest: damaged or replaced"
        if record.largest_id >= self._vocab_size:
            return f"token id {record.largest_id} is outside the vocabulary of {self._vocab_size}"
        return None

    def load(self) -> str | None:
        """See `StoredFile.load`: reads and checks the footer."""
        record = self._record
        start = HEADER_BYTES + record.tokens * self.dtype.itemsize
        with open(self.path, "rb") as stream:
            stream.seek(start)
            content = stream.read(record.bytes - start)
        digest = xxhash.xxh3_64(self._header)
        digest.update(memoryview(content)[:-8])
        if digest.hexdigest() != record.checksum:
            return "the footer is damaged"
        words = np.frombuffer(content, "<u8")
        blocks = len(words) - record.documents - 1
        self.digests, self.offsets = words[:blocks], words[blocks:-1]
        return None

    def block_problem(self, number: int, block: memoryview) -> str | None:
        """See `StoredFile.block_problem`."""
        if xxhash.xxh3_64_intdigest(block) == self.digests[number]:
            return None
        return (
            f"block {number} of {len(self.digests)} is damaged "
            f"(1 MiB from byte {HEADER_BYTES + number * BLOCK_BYTES})"
        )


class ShardSet:
    """The tokens of one corpus by split and domain, for reading; made by `ShardSet.open`."""

    # Every file and its state as it was opened.
    _opened: Sequence[tuple[StoredFile, os.stat_result]] = ()

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.checksum = digest
        self.dtype = manifest.dtype
        self.vocab_size = manifest.tokenizer.vocab_size
        self.separator_id = manifest.tokenizer.separator_id
        self.tokenizer_hash = manifest.tokenizer.xxh3
        self.tokenizer_path = path / manifest.tokenizer.file
        self._files: dict[tuple[str, str], tuple[StoredFile, ...]] = {}

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a folder of shards; `ShardError` where a file is missing, cut or does not belong.

        A folder without a manifest may hold token files of another program: see foreign/.
        """
        shards = cls.read(path)
        if early := shards.early_damage():
            raise early[0].error()
        files = shards.every_file()
        check_ends(files)
        with storage_errors(path):
            shards._opened = [(file, os.stat(file.path)) for file in files]
        return shards

    def refuse_changes(self) -> None:
        """Raise `ShardError` where a file was written to since these shards were opened.

        Maps show what is written into their file, checked or not. A file that was replaced or
        removed leaves them whole. Costs a stat of each file.
        """
        for file, opened in self._opened:
            try:
                now = os.stat(file.path)
            except OSError:
                continue
            is_same = (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
            if is_same and (now.st_size, now.st_mtime_ns) != (opened.st_size, opened.st_mtime_ns):
                raise ShardError(
                    f"{file.path}: written to while it was read",
                    cure="Let no other program write there, then run the same command again: the "
                    "corpus is checked anew, and what was trained since the last checkpoint is not "
                    "kept",
                )

    @classmethod
    def read(cls, path: Path | str) -> ShardSet:
        """Read what says which files there are, and check none of them: for `damage`."""
        path = Path(path)
        if not (path / MANIFEST).exists():
            from regmix.data.foreign.token_set import find_foreign

            if (foreign := find_foreign(path)) is not None:
                return foreign
        return cls(path, *read_manifest(path))

    def _cure(self) -> str:
        if (self.path / COPY_MARKER).is_file():
            return f"Remove {self.path}: it is a copy, and is made again"
        return f"Pack the corpus again: regmix-fast pack CORPUS --out {self.path} --force"

    def early_damage(self) -> list[Damage]:
        """Return what is wrong apart from the files of tokens: the tokenizer, a path."""
        damage = []
        try:
            path = self._inside(self.manifest.tokenizer.file)
            what = size_of(path)
            if isinstance(what, int):
                what = ""
                if checksum(path) != self.tokenizer_hash:
                    what = "not the tokenizer that made these shards, its checksum differs"
            else:
                what = f"the shards' tokenizer is missing: {what}"
            cure = f"Put the original {path.name} back, or pack the corpus again with --force"
            damage = [Damage(path=str(path), what=what, cure=cure)] if what else []
        except RegmixError as error:
            damage.append(Damage(path=str(self.path / MANIFEST), what=error.what, cure=error.cure))
        return damage

    def _inside(self, name: str) -> Path:
        path = self.path / name
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError, ValueError):  # a loop of links; a zero byte
            inside = False
        if not inside:
            raise ShardError(
                f"{self.path / MANIFEST}: the path {name!r} leaves the folder",
                cure="Do not use this corpus: it was made by hand",
            )
        return path

    def files(self, split: str, domain: str) -> tuple[StoredFile, ...]:
        """Return a domain's files in order, as blocks.py checks and maps them."""
        key = (split, domain)
        if key not in self._files:
            self._files[key] = tuple(self._stored_files(split, domain))
        return self._files[key]

    def _stored_files(self, split: str, domain: str) -> Sequence[StoredFile]:
        return [
            PackedFile(
                self._inside(record.path),
                split,
                domain,
                manifest=self.manifest,
                record=record,
                cure=self._cure(),
            )
            for record in self.stats(split, domain).files
        ]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, sorted: normally `("train", "valid")`."""
        return tuple(sorted(self.manifest.splits))

    def domains(self, split: str) -> tuple[str, ...]:
        """Return the domains of a split, sorted; none where the corpus has no such split."""
        return tuple(sorted(self.manifest.splits.get(split, {})))

    def stats(self, split: str, domain: str) -> ShardStats:
        """Return what a domain holds; `ShardError` names the nearest domain where it is unknown."""
        known = self.manifest.splits.get(split, {})
        if domain not in known:
            raise ShardError(
                f"{self.path}: no domain '{domain}' in split '{split}' ({nearest(domain, known)})",
                cure="Correct the name, or pack a corpus that holds it",
            )
        return known[domain]

    def bytes_per_token(self, split: str, domain: str) -> float | None:
        """Return UTF-8 bytes of text per token, every separator counted as a token without bytes.

        So bits per byte of a domain are its mean loss over all tokens / (ln 2 x this). None where
        the bytes cannot be known, which happens with token files of other programs only.
        """
        stats = self.stats(split, domain)
        if stats.utf8_bytes is None or stats.tokens == 0:
            return None
        return stats.utf8_bytes / stats.tokens

    def arrays(self, split: str, domain: str, verify: bool = True) -> tuple[np.ndarray, ...]:
        """Return a domain's tokens: one 1-D read-only memory map a file, in order.

        The first call in a process checks every block of these files (`ShardError` where a bit
        changed), unless `verify` is False; so does a later one where a file changed on disk.
        """
        files = self.files(split, domain)
        if verify:
            check_once(files)
        return tuple(map_tokens(file, checked=verify) for file in files)

    def lazy_arrays(
        self, split: str, domain: str
    ) -> tuple[tuple[np.ndarray, BlockCheck | None], ...]:
        """Return what `arrays` does, each with what must check its blocks before they are read.

        None where nothing is left to check: a file that this process has checked before, or one
        that stores no checksums and so is checked here.
        """
        files = self.files(split, domain)
        check_once([file for file in files if file.digests is None])
        return tuple(map_lazily(file) for file in files)

    def document_offsets(self, split: str, domain: str) -> np.ndarray:
        """Return the first token of each document (uint64), counted over the domain's files."""
        parts, before = [np.empty(0, np.uint64)], 0
        for file in self.files(split, domain):
            load(file)
            parts.append(file.offsets + np.uint64(before))
            before += file.tokens
        return np.concatenate(parts)

    def token_bytes(self, split: str, domain: str) -> int:
        """Return the bytes that a domain's tokens take on disk."""
        return self.stats(split, domain).tokens * DTYPES[self.dtype].itemsize

    def every_file(self) -> list[StoredFile]:
        """Return the files of all domains, split by split."""
        return [f for s in self.splits for d in self.domains(s) for f in self.files(s, d)]

    def damage(
        self, *, threads: int | None = None, on_bytes: OnBytes | None = None
    ) -> list[Damage]:
        """Check every block of every file now; return all that is wrong."""
        return self.early_damage() + find_damage(
            self.every_file(), threads=threads, on_bytes=on_bytes
        )

    def verify(self) -> int:
        """Check every block of every file now, checked before or not; return the bytes read.

        Raises `ShardError` for the first damage; `damage` returns all of it.
        """
        if found := self.damage():
            raise found[0].error()
        return sum(file.path.stat().st_size for file in self.every_file())
