"""`tokens.toml`: which files of other programs make up a corpus.

Enters: a TOML file, or a folder in a plain layout. Leaves: a `Description`: the tokenizer, its
separator, and files by split and domain. Opens the start of files only to tell their format.

    version = 1
    tokenizer = "tokenizer.json"      # relative to this file, or absolute
    separator = "<|endoftext|>"

    [splits.train.pile_cc]
    format = "litpkds"                # litpkds, megatron, npy or raw
    files = ["train_pile_cc_*.bin"]   # globs; sorted by name within each
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regmix.config import as_table, build, read_toml
from regmix.data.foreign import litpkds, megatron
from regmix.data.foreign.token_file import read_start
from regmix.errors import ConfigError, RegmixError, ShardError, nearest

DESCRIPTION = "tokens.toml"
TOKENIZER = "tokenizer.json"
FORMATS = ("litpkds", "megatron", "npy", "raw")
SPLITS = ("train", "valid")
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdoc|>", "</s>", "<eos>", "[SEP]")
DOMAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid"}
_PREFIX = re.compile(r"(train|valid|val|validation)[_-](.+)")
_MEGATRON_END = re.compile(r"_(text|content|input_ids)(_document|_sentence)?$|_document$")
_PART_END = re.compile(r"-[0-9_]+$")
_LIMIT = 100_000  # files that are looked at to describe a folder


@dataclass(frozen=True, kw_only=True)
class Files:
    """format: of the files; files: globs, relative to the description or absolute.

    dtype: type of the ids, for raw files only; header_bytes: what stands before them there.
    """

    format: str
    files: tuple[str, ...]
    dtype: str | None = None
    header_bytes: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"unknown format '{self.format}' ({nearest(self.format, FORMATS)})",
                cure="Name one of them",
            )
        if not self.files:
            raise ConfigError("'files' is empty", cure="Name at least one file")
        raw = self.format == "raw"
        if raw != (self.dtype is not None) or (self.header_bytes and not raw):
            raise ConfigError(
                "'dtype' and 'header_bytes' belong to raw files, and raw files need 'dtype'",
                cure='Write dtype = "uint16" for raw files, and neither for other formats',
            )
        if self.header_bytes < 0:
            raise ConfigError(f"header_bytes is {self.header_bytes}", cure="Give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Description:
    """tokenizer: path of its tokenizer.json; separator: the token that ends a document.

    splits: split -> domain -> files.
    """

    tokenizer: str
    separator: str
    splits: dict[str, dict[str, Files]] = field(default_factory=dict)
    version: int = 1

    def __post_init__(self) -> None:
        if self.version != 1:
            raise ConfigError(
                f"version {self.version!r}, this regmix-fast reads 1", cure="Install a newer one"
            )
        for split, domains in self.splits.items():
            if split not in SPLITS:
                raise ConfigError(
                    f"unknown split '{split}' ({nearest(split, SPLITS)})",
                    cure="Name it train or valid",
                )
            for domain in domains:
                if not DOMAIN.fullmatch(domain):
                    raise ConfigError(
                        f"'{domain}' is no name of a domain",
                        cure="Use letters, digits, '_', '.' and '-', at most 100",
                    )
        if not any(self.splits.values()):
            raise ConfigError("no domain is described", cure="Add [splits.train.NAME]")


def read_description(path: Path) -> Description:
    """Read a `tokens.toml`; `ConfigError` names the setting that is wrong."""
    table = read_toml(path)
    try:
        return build(Description, table, where=str(path))
    except ConfigError as error:
        if error.what.startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error.what}", cure=error.cure) from error


def render(description: Description) -> str:
    """Return a description as the text of its file."""
    import tomli_w

    table = as_table(description)
    splits: dict[str, Any] = {}
    for split, domains in description.splits.items():
        splits[split] = {}
        for domain, files in domains.items():
            entry = as_table(files)
            if not files.header_bytes:
                del entry["header_bytes"]
            splits[split][domain] = entry
    table["splits"] = splits
    order = ("version", "tokenizer", "separator", "splits")
    return tomli_w.dumps({key: table[key] for key in order})


def paths_of(files: Files, folder: Path) -> list[Path]:
    """Return the files of a domain, each once, in the order of the globs and of their names.

    Raises `ShardError` where a glob matches nothing, or a numbered chunk is missing in a row.
    """
    found: list[Path] = []
    for pattern in files.files:
        if not glob.has_magic(pattern):
            found.append(folder / pattern)
            continue
        matches = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        if not matches:
            raise ShardError(
                f"{folder / pattern}: no such files", cure="Correct the pattern in the description"
            )
        gap = litpkds.missing_chunk(matches) if files.format == "litpkds" else None
        if gap is not None:
            raise ShardError(
                f"{folder / gap}: the file is missing, later ones of its row are there",
                cure="Restore it; or list the files by name, and its tokens are left out",
            )
        found += [folder / match for match in matches]
    return list(dict.fromkeys(found))


def describe(folder: Path) -> Description | None:
    """Return the description of a folder in a plain layout; None where no file is known.

    Plain are the reference's names (`train_<domain>_0000000000.bin`), Megatron's pairs
    (`<domain>_text_document.bin` and `.idx`) and `<domain>.npy`, in the folder or in `train/` and
    `valid/` under it. Raises `ShardError` for a `.bin` beside them that says nothing of itself.
    """
    known: dict[tuple[str, str, str], list[str]] = {}
    unknown: list[Path] = []
    entries = _candidates(folder)
    numbered = _have_process_numbers(path.name for path in entries)
    for path in entries:
        kind = _format_of(path)
        if kind is None:
            unknown.append(path)
            continue
        split, domain, pattern = _place(path, folder, kind, numbered)
        known.setdefault((split, domain, kind), []).append(pattern)
    if not known and not unknown:
        return None
    if unknown:
        raise ShardError(
            f"{unknown[0]}: neither LITPKDS nor one of a Megatron pair, so its type is not known",
            cure=f'Write {folder / DESCRIPTION}, with its domain, format = "raw" and its dtype; '
            "or move the file away",
        )
    splits: dict[str, dict[str, Files]] = {}
    for (split, domain, kind), patterns in sorted(known.items()):
        if domain in splits.setdefault(split, {}):
            raise ShardError(
                f"{folder}: domain '{domain}' has files of two formats in {split}",
                cure=f"Write {folder / DESCRIPTION}, with one format for each domain",
            )
        splits[split][domain] = Files(format=kind, files=tuple(dict.fromkeys(patterns)))
    return Description(tokenizer=TOKENIZER, separator=_separator(folder / TOKENIZER), splits=splits)


def _candidates(folder: Path) -> list[Path]:
    folders = [folder, *(folder / name for name in _FOLDERS)]
    found = [
        path
        for place in folders
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.suffix in (".bin", ".npy")
    ]
    if len(found) > _LIMIT:
        raise ShardError(
            f"{folder}: {len(found):,} files are too many to look into each",
            cure=f"Write {folder / DESCRIPTION}",
        )
    return found


def _format_of(path: Path) -> str | None:
    if path.suffix == ".npy":
        return "npy"
    if megatron.index_path(path).exists():
        return "megatron"
    try:
        start = read_start(path, len(litpkds.MAGIC))
    except RegmixError:
        return None
    # A chunk whose header is gone is still one by its name: its reader says what is wrong with it.
    return "litpkds" if start == litpkds.MAGIC or litpkds.split_name(path.name) else None


def _have_process_numbers(names: Iterable[str]) -> bool:
    """Return whether every chunk's name has the number of a process before that of the chunk."""
    parts = [parts for name in names if (parts := litpkds.split_name(name)) is not None]
    return bool(parts) and all(re.search(r"._\d+$", prefix) for prefix, _ in parts)


def _place(path: Path, folder: Path, kind: str, numbered: bool) -> tuple[str, str, str]:
    """Return (split, domain, glob) of a file."""
    below = path.parent.relative_to(folder)
    stem, pattern = path.stem, path.name
    if kind == "litpkds" and (parts := litpkds.split_name(path.name)) is not None:
        stem = parts[0]
        pattern = f"{glob.escape(stem)}_{'?' * 10}.bin"
        if numbered:
            stem = stem[: stem.rindex("_")]
    elif kind == "megatron":
        stem = _MEGATRON_END.sub("", stem) or stem
    split = _FOLDERS.get(below.name)
    if split is None:
        match = _PREFIX.fullmatch(stem)
        split, stem = (_FOLDERS[match[1]], match[2]) if match else ("train", stem)
    domain = _PART_END.sub("", stem) or stem
    return split, domain, (below / pattern).as_posix()


def _separator(tokenizer: Path) -> str:
    """Return the first usual separator that a tokenizer has; the most usual where none is there."""
    import json

    try:
        # A pipe would be waited for; its reader names whatever is wrong with the file.
        content = tokenizer.read_bytes() if tokenizer.is_file() else b"{}"
        table: Mapping[str, Any] = json.loads(content)
        names = {token["content"] for token in table.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = set()
    return next((name for name in SEPARATORS if name in names), SEPARATORS[0])
