"""Token files of other programs, read wherever packed shards are.

Enters: a folder or a `tokens.toml` (description.py). Leaves: a `ShardSet` over the files in place.
Sizes and headers are checked at open; on the first touch of a domain every id must be below the
vocabulary. These formats hold no checksums, so a bit that flips into another valid id is found
only against checksums that `regmix-fast verify --record` has written beside the description.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regmix.data.blocks import check_once, load
from regmix.data.foreign.checksums import FileSums, ends_digest, read_checksums, write_checksums
from regmix.data.foreign.counting import Counted, block_digests, count_tokens
from regmix.data.foreign.description import (
    DESCRIPTION,
    Description,
    Files,
    describe,
    paths_of,
    read_description,
)
from regmix.data.foreign.entry import ForeignFile
from regmix.data.foreign.litpkds import read_litpkds
from regmix.data.foreign.megatron import read_megatron
from regmix.data.foreign.raw_tokens import read_npy, read_raw
from regmix.data.foreign.token_bytes import token_byte_lengths
from regmix.data.foreign.token_file import TokenFile, TokenFileError
from regmix.data.manifest import VERSION, Manifest, ShardStats, TokenizerRecord
from regmix.data.shards import ShardSet
from regmix.data.stored_file import Damage, StoredFile, file_problem, size_of
from regmix.data.tokenizer import Tokenizer, load_tokenizer
from regmix.errors import ShardError

FOREIGN_FORMAT = "token files of another program"
_WINDOW_BYTES = 4096
_WINDOWS = 4096  # over the whole corpus, but at least the first and the last of every file


def find_foreign(path: Path) -> ShardSet | None:
    """Return the token files that `path` describes or holds; None where it holds none known."""
    if path.suffix == ".toml" and path.is_file():
        return ForeignSet(path, path.parent, read_description(path))
    if (path / DESCRIPTION).is_file():
        return ForeignSet(path, path, read_description(path / DESCRIPTION))
    if path.is_dir() and (description := describe(path)) is not None:
        return ForeignSet(path, path, description)
    return None


class ForeignStats(ShardStats):
    """Counts of a domain; those that take a pass over the tokens are taken when asked for."""

    def __init__(self, tokens: int, measure: Callable[[], Counted]) -> None:
        for field in dataclasses.fields(ShardStats):
            if field.default is not dataclasses.MISSING:
                object.__setattr__(self, field.name, field.default)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "_measure", measure)

    @property
    def documents(self) -> int:
        """Stretches of tokens between separators, or what Megatron's index says."""
        return len(self._counted.offsets)

    @property
    def utf8_bytes(self) -> int | None:
        """Bytes of text, where the tokenizer spells it byte for byte; else None."""
        return self._counted.utf8_bytes

    @functools.cached_property
    def _counted(self) -> Counted:
        measured: Counted = self.__dict__["_measure"]()
        return measured


class ForeignSet(ShardSet):
    """The token files of one description, for reading; made by `ShardSet.open`."""

    def __init__(
        self, path: Path, folder: Path, description: Description, *, use_checksums: bool = True
    ) -> None:
        self.folder, self.description = folder, description
        self.tokenizer = _load_tokenizer(path, folder, description)
        self.byte_lengths, self.bytes_unknown = token_byte_lengths(
            self.tokenizer.text, self.tokenizer.separator
        )
        self.sums = read_checksums(path) if use_checksums else None
        self._problems: list[Damage] = []
        self._owners: dict[Path, tuple[str, str]] = {}
        self._by_domain: dict[tuple[str, str], list[StoredFile]] = {}
        for split, domains in sorted(description.splits.items()):
            for domain, files in sorted(domains.items()):
                self._by_domain[split, domain] = self._layouts(split, domain, files)
        self._note_lost_files()
        record = TokenizerRecord(
            file=str((folder / description.tokenizer).absolute()),
            xxh3=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            separator=self.tokenizer.separator,
            separator_id=self.tokenizer.separator_id,
        )
        widths = {file.dtype.itemsize for files in self._by_domain.values() for file in files}
        if len(widths) > 1:
            raise ShardError(
                f"{path}: ids of 2 and of 4 bytes in one corpus",
                cure="Write all files with the same type, or describe them as two corpora",
            )
        stats: dict[str, dict[str, ShardStats]] = {}
        for (split, domain), parts in self._by_domain.items():
            stats.setdefault(split, {})[domain] = ForeignStats(
                sum(part.tokens for part in parts), functools.partial(self._count, split, domain)
            )
        manifest = Manifest(
            format=FOREIGN_FORMAT,
            version=VERSION,
            dtype="uint32" if widths == {4} else "uint16",
            tokenizer=record,
            splits=stats,
        )
        super().__init__(path, manifest, "" if self._problems else self._identity())

    def _layouts(self, split: str, domain: str, files: Files) -> list[StoredFile]:
        found: list[StoredFile] = []
        try:
            paths = paths_of(files, self.folder)
        except ShardError as error:
            where, _, what = error.what.partition(": ")
            self._note(split, domain, where, what, error.cure)
            return found
        for path in paths:
            if (other := self._owners.setdefault(path.resolve(), (split, domain))) != (
                split,
                domain,
            ):
                what = f"described twice, also for domain '{other[1]}' in {other[0]}"
                self._note(split, domain, str(path), what, "Leave it out of one of them")
                continue
            try:
                layout = self._layout(path, files)
            except TokenFileError as error:
                self._note(split, domain, str(error.path), error.reason, error.cure)
                continue
            except OSError as error:
                self._note(split, domain, str(path), file_problem(error), "Check the file")
                continue
            sums = None
            if self.sums is not None:
                sums = self.sums.files.get(self.name_of(path))
                if sums is None:
                    what = "the file was not there when the checksums were recorded"
                    self._note(split, domain, str(path), what, self._record_again)
            found.append(
                ForeignFile(
                    layout,
                    split,
                    domain,
                    file_format=files.format,
                    vocab_size=self.tokenizer.vocab_size,
                    sums=sums,
                )
            )
        return found

    def _layout(self, path: Path, files: Files) -> TokenFile:
        if files.format == "litpkds":
            return read_litpkds(path, self.tokenizer.separator_id)
        if files.format == "megatron":
            return read_megatron(path if path.suffix == ".bin" else Path(f"{path}.bin"))
        if files.format == "npy":
            return read_npy(path)
        return read_raw(path, str(files.dtype), header_bytes=files.header_bytes)

    @property
    def _record_again(self) -> str:
        return f"Where the change was meant: regmix-fast verify {self.folder} --record"

    def _note(self, split: str, domain: str, path: str, what: str, cure: str) -> None:
        self._problems.append(Damage(split=split, domain=domain, path=path, what=what, cure=cure))

    def name_of(self, path: Path) -> str:
        """Return a file's name as checksums keep it: relative to the description's folder."""
        absolute, folder = path.absolute(), self.folder.absolute()
        inside = absolute.is_relative_to(folder)
        return absolute.relative_to(folder).as_posix() if inside else str(absolute)

    def _note_lost_files(self) -> None:
        if self.sums is None:
            return
        here = {self.name_of(f.path) for files in self._by_domain.values() for f in files}
        broken = {self.name_of(Path(problem.path)) for problem in self._problems}
        for name, sums in self.sums.files.items():
            if name not in here | broken:
                what = "recorded with the checksums, and now missing or not described"
                split, _, domain = sums.domain.partition("/")
                self._note(split, domain, str(self.folder / name), what, self._record_again)

    def _identity(self) -> str:
        """Return the corpus's checksum: tokenizer, layouts, headers, and windows of the tokens."""
        files = [file for parts in self._by_domain.values() for file in parts]
        per_file = max(2, _WINDOWS // max(1, len(files)))
        table: list[Any] = [self.tokenizer.hash, self.tokenizer.separator_id]
        for file in files:
            assert isinstance(file, ForeignFile)
            table.append(
                [
                    *(file.split, file.domain, file.path.name, file.layout.stored),
                    *(file.start, file.tokens, file.layout.bytes),
                    _windows(file.path, per_file),
                    _windows(file.layout.index, per_file) if file.layout.index else "",
                ]
            )
        return xxhash.xxh3_64_hexdigest(json.dumps(table).encode())

    def early_damage(self) -> list[Damage]:
        """Return the files that are missing, cut or malformed, so that they have no layout."""
        return self._problems

    def without_checksums(self) -> ForeignSet:
        """Return these files as they are now, whatever was recorded of them."""
        return ForeignSet(self.path, self.folder, self.description, use_checksums=False)

    @property
    def not_verified(self) -> str:
        """A sentence on what cannot be checked; empty where checksums were recorded."""
        if self.sums is not None:
            return ""
        return (
            "Not checked: these formats hold no checksums, so an id that changed into another "
            "valid id is not found. To find it from now on: "
            f"regmix-fast verify {self.path} --record"
        )

    def remarks(self) -> list[str]:
        """Return what a person should know of these files, a sentence each."""
        said = []
        padding = sum(f.layout.padding for f in self.every_file() if isinstance(f, ForeignFile))
        if padding:
            said.append(f"Padding: {padding:,} separators at the ends of chunks are not read")
        if self.byte_lengths is None:
            said.append(
                f"Bytes of text are unknown ({self.bytes_unknown}), so bits per byte are left out"
            )
        return [*said, self.not_verified] if self.not_verified else said

    def _stored_files(self, split: str, domain: str) -> Sequence[StoredFile]:
        self.stats(split, domain)  # an unknown name is an error that says so
        return self._by_domain[split, domain]

    def document_offsets(self, split: str, domain: str) -> np.ndarray:
        """Return the first token of each document: after separators, or as Megatron's index says.

        A text without separators is one document.
        """
        self.stats(split, domain)  # an unknown name is an error that says so
        return self._count(split, domain).offsets

    def _count(self, split: str, domain: str) -> Counted:
        files = self.files(split, domain)
        check_once(files)
        try:
            counted = count_tokens(files, self.tokenizer.separator_id, self.byte_lengths)
        except (OSError, IndexError) as error:
            where = f"{files[0].path} (domain '{domain}', {split})"
            raise ShardError(f"{where}: changed while it was read", cure=files[0].cure) from error
        if self.description.splits[split][domain].format == "megatron":
            return Counted(_domain_offsets(files), counted.utf8_bytes)
        return counted


def _load_tokenizer(path: Path, folder: Path, description: Description) -> Tokenizer:
    name = folder / description.tokenizer
    what = size_of(name)
    if isinstance(what, str):
        raise ShardError(
            f"{name}: the tokenizer of these token files is missing: {what}",
            cure="Copy the tokenizer.json that made them there, or name it in "
            f"{folder / DESCRIPTION}: see regmix-fast inspect {path} --describe",
        )
    return load_tokenizer(name, separator=description.separator)


def _windows(path: Path, num: int) -> str:
    """Return the xxh3_64 of `num` evenly spaced windows of a file, first and last included."""
    digest = xxhash.xxh3_64()
    try:
        with open(path, "rb") as stream:
            last = max(0, path.stat().st_size - _WINDOW_BYTES)
            for place in sorted({last * k // (num - 1) for k in range(num)}):
                stream.seek(place)
                digest.update(stream.read(_WINDOW_BYTES))
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}", cure="Check the file") from error
    return digest.hexdigest()


def _domain_offsets(files: Sequence[StoredFile]) -> np.ndarray:
    """Return the first token of each document as the indices of a domain's files say."""
    parts, before = [], 0
    for file in files:
        load(file)
        parts.append(file.offsets + np.uint64(before))
        before += file.tokens
    return np.concatenate(parts)


def record_checksums(shards: ForeignSet) -> Path:
    """Read every file and write its checksums beside the description; return where.

    Checksums that are there already are replaced. Whoever calls this has found the files whole.
    """
    files = shards.every_file()
    digests = block_digests(files)
    return write_checksums(
        shards.path,
        {
            shards.name_of(file.path): FileSums(
                domain=f"{file.split}/{file.domain}",
                bytes=file.layout.bytes,
                tokens=file.tokens,
                ends=ends_digest(file.layout),
                blocks=blocks,
            )
            for file, blocks in zip(files, digests, strict=True)
            if isinstance(file, ForeignFile)
        },
    )
