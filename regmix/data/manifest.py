"""The manifest of a corpus of shards: what files there are, what they hold and what made them.

Enters: a folder. Leaves: a `Manifest`, checked against its own checksum, or `manifest.json`,
written whole. Reads no shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from regmix.config import build
from regmix.errors import ConfigError, ShardError, StorageError
from regmix.files import read_text, write_text

VERSION = 1
MANIFEST = "manifest.json"
COPY_MARKER = "verified.json"  # beside it in a copy that a cache holds, once that was checked
MANIFEST_FORMAT = "regmix-fast shards"
DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
LONGEST_DOMAIN_NAME = 100
_BY_HAND = "Do not use this corpus: its manifest was made by hand"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One file of a domain, as the manifest records it."""

    path: str  # relative to the folder of the manifest
    bytes: int
    tokens: int
    documents: int
    largest_id: int
    checksum: str  # xxh3_64 of header and footer; the footer holds those of the blocks


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What one domain of one split holds."""

    documents: int
    tokens: int  # separators included: one after every document
    utf8_bytes: int | None  # of the text, separators excluded; None where it cannot be known
    malformed: int = 0  # records left out: not readable
    empty: int = 0  # documents left out because they hold no text
    too_long: int = 0  # above the limit
    no_token: int = 0  # the tokenizer finds no token in them
    duplicate: int = 0  # equal to a document that is packed
    files: tuple[ShardFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer that made the tokens: a file beside the manifest."""

    file: str
    xxh3: str
    vocab_size: int  # largest id + 1
    separator: str
    separator_id: int


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of documents that went into the shards; `path` is relative to the input folder."""

    path: str
    domain: str
    split: str | None = None  # None where documents are split by their hash
    bytes: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` says, its own checksum aside."""

    format: str
    version: int
    dtype: str
    tokenizer: TokenizerRecord
    settings: dict[str, str] = field(default_factory=dict)
    splits: dict[str, dict[str, ShardStats]] = field(default_factory=dict)
    sources: tuple[SourceFile, ...] = ()


def dtype_for(vocab_size: int) -> str:
    """Return the narrowest token type for a vocabulary: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _render(table: Mapping[str, Any]) -> str:
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Return dataclasses as plain tables, in the order of their fields."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write `manifest.json` and return its checksum, which is the corpus' checksum."""
    table = _plain(manifest)
    digest = xxhash.xxh3_64_hexdigest(_render(table).encode())
    write_text(folder / MANIFEST, _render({**table, "checksum": digest}))
    return digest


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Return the manifest of a folder and its checksum; `ShardError` if one bit of it changed."""
    path = folder / MANIFEST
    cure = f"Pack the corpus again: regmix-fast pack CORPUS --out {folder} --force"
    if folder.is_file():
        raise ShardError(
            f"{folder}: a file, not a folder of shards",
            cure="Name its folder, or the tokens.toml that describes it",
        )
    if not path.is_file():
        raise ShardError(
            f"{folder}: no {MANIFEST}, so no shards here",
            cure=f"Name a folder of shards, or make one: regmix-fast pack CORPUS --out {folder}",
        )
    try:
        text = read_text(path)
        table = json.loads(text)
        if table["format"] != MANIFEST_FORMAT:
            raise ShardError(f"{path}: not a manifest of shards", cure="Name a folder of shards")
        if table["version"] > VERSION:
            raise ShardError(
                f"{path}: format version {table['version']}, this version reads up to {VERSION}",
                cure="Install a newer regmix-fast",
            )
        digest = table.pop("checksum")
        whole = _render({**table, "checksum": digest}) == text
        if not whole or xxhash.xxh3_64_hexdigest(_render(table).encode()) != digest:
            raise ShardError(f"{path}: its checksum does not fit: changed or damaged", cure=cure)
        manifest = build(Manifest, table, where=str(path))
        _check_names(manifest, path)
        if manifest.dtype != dtype_for(manifest.tokenizer.vocab_size):
            raise ShardError(f"{path}: unknown token type '{manifest.dtype}'", cure=cure)
        return manifest, digest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path}: damaged ({error!r})", cure=cure) from error
    except (ConfigError, StorageError) as error:
        raise ShardError(error.what, cure=cure) from error


def _check_names(manifest: Manifest, path: Path) -> None:
    """Raise `ShardError` for a name that is no domain's, and for a path that leaves the folder."""
    for split, domains in manifest.splits.items():
        for domain in (split, *domains):
            if not DOMAIN_NAME.fullmatch(domain) or len(domain) > LONGEST_DOMAIN_NAME:
                raise ShardError(f"{path}: {domain!r} cannot name a domain", cure=_BY_HAND)
        for domain, stats in domains.items():
            sums = [sum(f.tokens for f in stats.files), sum(f.documents for f in stats.files)]
            if sums != [stats.tokens, stats.documents] or min(*sums, stats.utf8_bytes or 0) < 0:
                raise ShardError(
                    f"{path}: the files of '{domain}' do not hold what is said of it", cure=_BY_HAND
                )
    files = [file.path for d in manifest.splits.values() for s in d.values() for file in s.files]
    for name in (manifest.tokenizer.file, *files):
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not name.isprintable():
            raise ShardError(f"{path}: the path {name!r} leaves the folder", cure=_BY_HAND)
