"""Checksums of another program's token files: what their formats lack.

Enters: files that were found whole. Leaves: `<name>.checksums.json` beside the description, with
the xxh3_64 of every 1 MiB block of ids and of what surrounds the ids; read back, checked against
its own checksum. Compares nothing: token_set.py does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from regmix.config import as_table, build
from regmix.data.foreign.token_file import TokenFile
from regmix.data.stored_file import size_of
from regmix.errors import ConfigError, ShardError, StorageError
from regmix.files import read_text, write_text

CHECKSUMS_FORMAT = "regmix-fast checksums of token files"
_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class FileSums:
    """domain: `<split>/<domain>`; bytes: of the file; tokens: ids that are read.

    ends: xxh3_64 of what surrounds the ids and of the index; blocks: those of the blocks, joined.
    """

    domain: str
    bytes: int
    tokens: int
    ends: str
    blocks: str

    def block(self, number: int) -> str:
        """Return the xxh3_64 of a block, empty where it has none."""
        return self.blocks[number * _DIGITS : (number + 1) * _DIGITS]

    @property
    def digest(self) -> str:
        """What these checksums are known by."""
        return xxhash.xxh3_64_hexdigest(f"{self.ends}{self.blocks}".encode())


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """files: name of each file, relative to the description where it lies below it."""

    format: str
    version: int
    files: dict[str, FileSums]


def checksums_path(path: Path) -> Path:
    """Return where the checksums of a folder or of a description lie."""
    if path.suffix == ".toml":
        return path.with_name(f"{path.stem}.checksums.json")
    return path / "tokens.checksums.json"


def ends_digest(layout: TokenFile) -> str:
    """Return the xxh3_64 of the bytes before and after the ids, and of the index."""
    digest = xxhash.xxh3_64()
    with open(layout.path, "rb") as stream:
        digest.update(stream.read(layout.start))
        stream.seek(layout.start + layout.tokens * layout.dtype.itemsize)
        while part := stream.read(1 << 20):
            digest.update(part)
    if layout.index is not None:
        with open(layout.index, "rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


def read_checksums(path: Path) -> Checksums | None:
    """Return the checksums beside a description, None where there are none."""
    path = checksums_path(path)
    if not os.path.lexists(path):
        return None
    cure = f"Restore {path.name}; or delete it, and its files are no longer compared with it"
    what = size_of(path)
    if isinstance(what, str):
        raise ShardError(f"{path}: {what}", cure=cure)
    try:
        table = json.loads(read_text(path))
        digest = table.pop("checksum")
        if xxhash.xxh3_64_hexdigest(_render(table).encode()) != digest:
            raise ShardError(f"{path}: its checksum does not fit: changed or damaged", cure=cure)
        sums = build(Checksums, table, where=str(path))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path}: damaged ({error!r})", cure=cure) from error
    except (ConfigError, StorageError) as error:
        raise ShardError(error.what, cure=cure) from error
    if (sums.format, sums.version) != (CHECKSUMS_FORMAT, 1):
        raise ShardError(f"{path}: of another make or version", cure=cure)
    return sums


def write_checksums(path: Path, files: Mapping[str, FileSums]) -> Path:
    """Write the checksums of a folder or of a description; return where."""
    table = {
        "format": CHECKSUMS_FORMAT,
        "version": 1,
        "files": {name: as_table(sums) for name, sums in sorted(files.items())},
    }
    digest = xxhash.xxh3_64_hexdigest(_render(table).encode())
    target = checksums_path(path)
    write_text(target, _render({**table, "checksum": digest}))
    return target


def _render(table: Mapping[str, object]) -> str:
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"
