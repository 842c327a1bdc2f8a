"""Token shards on disk, read: the floor every sampler stands on.

`ShardSet.open` checks the manifest, and the size, header and final checksum of every file, so a
truncated file is found at once; `arrays` checks every block of a domain the first time a process
touches it, so a flipped bit is found before it is trained on.

Enters: a folder written by pack.py (the layout of a file is in writer.py). Leaves: read-only
memory maps and counts. Does not cut sequences: their length belongs to a run.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import xxhash

from regmix.data.manifest import (
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
from regmix.errors import ShardError, nearest
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

# Files whose blocks this process has checked already: (path, checksum, modification time).
_CHECKED: set[tuple[str, str, int]] = set()
_CHECKED_LOCK = threading.Lock()


class ShardSet:
    """The packed corpus in one folder, for reading; made by `ShardSet.open`."""

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.checksum = digest
        self.dtype = manifest.dtype
        self.vocab_size = manifest.tokenizer.vocab_size
        self.separator_id = manifest.tokenizer.separator_id
        self.tokenizer_hash = manifest.tokenizer.xxh3
        self.tokenizer_path = path / manifest.tokenizer.file

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a folder of shards; `ShardError` where a file is missing, cut or does not belong."""
        path = Path(path)
        shards = cls(path, *read_manifest(path))
        shards._check_tokenizer()
        for split, domains in shards.manifest.splits.items():
            for domain, stats in domains.items():
                for file in stats.files:
                    shards._check_ends(split, domain, file)
        return shards

    def _cure(self) -> str:
        return f"Pack the corpus again: regmix-fast pack CORPUS --out {self.path} --force"

    def _check_tokenizer(self) -> None:
        path = self._inside(self.manifest.tokenizer.file)
        if not path.is_file():
            raise ShardError(f"{path}: the shards' tokenizer is missing", cure=self._cure())
        if checksum(path) != self.tokenizer_hash:
            raise ShardError(
                f"{path}: not the tokenizer that made these shards, its checksum differs",
                cure=f"Put the original {path.name} back, or pack the corpus again with --force",
            )

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise ShardError(
                f"{self.path / MANIFEST}: the path '{name}' leaves the folder",
                cure="Do not use this corpus: its manifest was made by hand",
            )
        return path

    def _check_ends(self, split: str, domain: str, file: ShardFile) -> None:
        """Check what costs no read of the tokens: size, header, final checksum."""
        path = self._inside(file.path)
        where = f"{path} (domain '{domain}', {split})"
        if not path.is_file():
            raise ShardError(f"{where}: the file is missing", cure=self._cure())
        expected = file_bytes(file.tokens, file.documents, DTYPES[self.dtype].itemsize)
        with storage_errors(path), open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if not size == expected == file.bytes:
                raise ShardError(
                    f"{where}: {size} bytes where {file.bytes} were written: cut short or changed",
                    cure=self._cure(),
                )
            header = stream.read(HEADER_BYTES)
            stream.seek(-8, os.SEEK_END)
            total = stream.read()
        wanted = header_bytes(
            self.manifest, split, domain, tokens=file.tokens, largest_id=file.largest_id
        )
        if header != wanted:
            kind = "its header does not fit the manifest"
            if not header.startswith(MAGIC):
                kind = "not a token shard"
            raise ShardError(f"{where}: {kind}: damaged or replaced", cure=self._cure())
        if total[::-1].hex() != file.checksum:
            raise ShardError(
                f"{where}: its checksum does not fit the manifest: damaged or replaced",
                cure=self._cure(),
            )
        if file.largest_id >= self.vocab_size:
            raise ShardError(
                f"{where}: token id {file.largest_id} is outside the vocabulary "
                f"of {self.vocab_size}",
                cure=self._cure(),
            )

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

    def bytes_per_token(self, split: str, domain: str) -> float:
        """Return UTF-8 bytes of text per token, every separator counted as a token without bytes.

        So bits per byte of a domain are its mean loss over all tokens / (ln 2 x this).
        """
        stats = self.stats(split, domain)
        return stats.utf8_bytes / stats.tokens

    def arrays(self, split: str, domain: str, verify: bool = True) -> tuple[np.ndarray, ...]:
        """Return a domain's tokens: one 1-D read-only memory map a file, in order.

        The first call in a process checks every block of these files (`ShardError` where a bit
        changed), unless `verify` is False.
        """
        files = self.stats(split, domain).files
        if verify:
            for file in files:
                self._check_blocks(split, domain, file)
        return tuple(self._map(file) for file in files)

    def document_offsets(self, split: str, domain: str) -> np.ndarray:
        """Return the first token of each document (uint64), counted over the domain's files."""
        parts, before = [], 0
        for file in self.stats(split, domain).files:
            self._check_blocks(split, domain, file)
            _, offsets = self._footer(file)
            parts.append(offsets + np.uint64(before))
            before += file.tokens
        return np.concatenate(parts)

    def verify(self) -> int:
        """Check every block of every file now, checked before or not; return the bytes read."""
        total = 0
        for split in self.splits:
            for domain in self.domains(split):
                for file in self.stats(split, domain).files:
                    self._check_ends(split, domain, file)
                    self._check_blocks(split, domain, file, again=True)
                    total += file.bytes
        return total

    def _map(self, file: ShardFile) -> np.ndarray:
        path = self.path / file.path
        with storage_errors(path):
            return np.memmap(
                path, DTYPES[self.dtype], mode="r", offset=HEADER_BYTES, shape=(file.tokens,)
            )

    def _footer(self, file: ShardFile) -> tuple[np.ndarray, np.ndarray]:
        """Return (xxh3_64 of each block, first token of each document)."""
        start = HEADER_BYTES + file.tokens * DTYPES[self.dtype].itemsize
        path = self.path / file.path
        with storage_errors(path), open(path, "rb") as stream:
            stream.seek(start)
            words = np.frombuffer(stream.read(file.bytes - start), "<u8")
        blocks = len(words) - file.documents - 1
        return words[:blocks], words[blocks:-1]

    def _check_blocks(
        self, split: str, domain: str, file: ShardFile, *, again: bool = False
    ) -> None:
        path = self.path / file.path
        with storage_errors(path):
            key = (str(path.resolve()), file.checksum, path.stat().st_mtime_ns)
        with _CHECKED_LOCK:
            if key in _CHECKED and not again:
                return
        where = f"{path} (domain '{domain}', {split})"
        blocks, offsets = self._footer(file)
        header = header_bytes(
            self.manifest, split, domain, tokens=file.tokens, largest_id=file.largest_id
        )
        digest = xxhash.xxh3_64(header)
        digest.update(blocks.tobytes() + offsets.tobytes())
        if digest.hexdigest() != file.checksum:
            raise ShardError(f"{where}: the footer is damaged", cure=self._cure())
        with storage_errors(path), open(path, "rb") as stream:
            stream.seek(HEADER_BYTES)
            left = file.tokens * DTYPES[self.dtype].itemsize
            for number, wanted in enumerate(blocks.tolist()):
                block = stream.read(min(BLOCK_BYTES, left))
                left -= len(block)
                if xxhash.xxh3_64_intdigest(block) != wanted:
                    raise ShardError(
                        f"{where}: block {number} of {len(blocks)} is damaged "
                        f"(1 MiB from byte {HEADER_BYTES + number * BLOCK_BYTES})",
                        cure=self._cure(),
                    )
        with _CHECKED_LOCK:
            _CHECKED.add(key)
