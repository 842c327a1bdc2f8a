"""Units to shards: the documents of a domain put in their order into its files.

The order is: validation files first, then by domain, side and name of the file. With
deduplication the first document of that order stays, so a document that is validation text
anywhere is not trained on.

Enters: finished units. Leaves: shard files, the list of dropped records, and a note of each group
that is done, so that a stopped run goes on with the next. Writes no manifest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import xxhash

from regmix.config import build
from regmix.data.manifest import Manifest, ShardStats
from regmix.data.packing.documents import DUPLICATE, REASONS, TRAIN, VALID
from regmix.data.packing.encoder import MAX_LISTED, SideTokens
from regmix.data.packing.lanes import Task
from regmix.data.packing.sources import Source
from regmix.data.packing.units import Books, DroppedFrame, TokensFrame, read_books, read_frames
from regmix.data.writer import DomainWriter
from regmix.errors import ConfigError, CorpusError, StorageError
from regmix.files import atomic_open, checksum, read_json, write_json

if TYPE_CHECKING:
    from regmix.data.packing.dedup import SeenDocuments

NOTES_FOLDER = ".packing"
NUM_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class GroupNote:
    """What is kept of a group that is in the shards until the manifest is written."""

    key: str
    stats: dict[str, ShardStats]
    books: tuple[Books, ...]  # of its sources, in their order
    examples: tuple[str, ...] = ()


@dataclass
class Group:
    """Sources whose documents go to one domain, and to one side of it where folders decide."""

    domain: str
    side: str | None
    tasks: list[Task]
    key: str = ""  # of settings, and of the groups before it where they have a say
    note: GroupNote | None = None

    @property
    def name(self) -> str:
        """The name of its files in the folder of notes."""
        return f"{self.domain}.{self.side or 'split'}"


def make_groups(folder: Path, files: Sequence[Source]) -> list[Group]:
    """Return the groups in the order of packing; each source has its place for a unit."""
    met: dict[tuple[str, str, str], int] = {}
    groups: dict[tuple[bool, str, str], Group] = {}
    for source in files:
        side = source.side or ""
        name = (source.domain, side, source.name)
        met[name] = met.get(name, 0) + 1
        # Two input folders may hold files of one name.
        stem = xxhash.xxh3_64_hexdigest(json.dumps([*name, met[name]]).encode())
        task = Task(source, folder / NOTES_FOLDER / f"{stem}.unit")
        key = (side != VALID, source.domain, side)
        groups.setdefault(key, Group(source.domain, source.side, [])).tasks.append(task)
    return [groups[key] for key in sorted(groups)]


def is_of(books: Books, source: Source) -> bool:
    """Return whether a source is still the file that the books are about.

    Size and time of change decide; where only the time differs, the content does.
    """
    status = source.path.stat()
    if books.name != source.name or books.bytes != status.st_size:
        return False
    return books.mtime_ns == status.st_mtime_ns or books.xxh3 == checksum(source.path)


def finished_note(folder: Path, group: Group) -> GroupNote | None:
    """Return the note of a group that is in the shards already, if it is of the same work."""
    try:
        note = build(GroupNote, read_json(_note_path(folder, group)), where=group.name)
        files = [file for stats in note.stats.values() for file in stats.files]
        there = all((folder / file.path).stat().st_size == file.bytes for file in files)
        same = len(note.books) == len(group.tasks) and all(
            is_of(books, task.source) for books, task in zip(note.books, group.tasks, strict=True)
        )
    except (StorageError, ConfigError, AttributeError, OSError):
        return None
    return note if note.key == group.key and there and same else None


def has_units(group: Group) -> bool:
    """Return whether the units that a finished group was made of are still there."""
    books = group.note.books if group.note else ()
    return [read_books(task.unit) for task in group.tasks] == list(books)


def _note_path(folder: Path, group: Group) -> Path:
    return folder / NOTES_FOLDER / f"{group.name}.json"


def dropped_path(folder: Path, group: Group) -> Path:
    """Return the place of a group's list of dropped records while packing."""
    return folder / NOTES_FOLDER / f"{group.name}.dropped"


@dataclass
class _Counts:
    """What became of the records of one side of a group."""

    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    listed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))


class Assembler:
    """Puts groups into shards, one after another in their order."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, valid_fraction: float | None, dedup: bool
    ) -> None:
        self._folder, self._manifest, self._fraction = folder, manifest, valid_fraction
        self._seen: SeenDocuments | None = None
        self.tokens = 0
        if dedup:
            from regmix.data.packing.dedup import SeenDocuments

            self._seen = SeenDocuments()

    def skip(self, group: Group) -> None:
        """Take a group as it is that an earlier run put into the shards."""
        assert group.note is not None
        self.tokens += sum(stats.tokens for stats in group.note.stats.values())
        if self._seen is not None:
            for task in group.tasks:
                for frame in read_frames(task.unit):
                    if isinstance(frame, TokensFrame):
                        self._seen.add(frame.tokens.hashes)

    def assemble(self, group: Group) -> None:
        """Write a group whose units are there, and its note; `CorpusError` where it is empty."""
        counts = {side: _Counts() for side in (TRAIN, VALID)}
        books, examples = [], list[str]()
        with contextlib.ExitStack() as stack:
            listing = stack.enter_context(atomic_open(dropped_path(self._folder, group), "w"))
            writers: dict[str, DomainWriter] = {}
            for task in group.tasks:
                unit = read_books(task.unit)
                if unit is None:
                    raise StorageError(
                        f"{task.unit}: gone while packing", cure="Run the same command again"
                    )
                books.append(unit)
                for side, reasons in unit.dropped.items():
                    for reason, number in reasons.items():
                        counts[side].dropped[reason] += number
                for row in self._frames(group, task, writers, counts, stack):
                    _list(listing, group, task.source, row, counts, examples)
            self._check(group, writers, counts, examples)
        stats = {
            side: writers[side].stats(dropped=counts[side].dropped) for side in sorted(writers)
        }
        _balance(group, books, stats, counts)
        group.note = GroupNote(
            key=group.key, stats=stats, books=tuple(books), examples=tuple(examples)
        )
        write_json(_note_path(self._folder, group), asdict(group.note))
        if self._seen is None:
            for task in group.tasks:
                task.unit.unlink()

    def _frames(
        self,
        group: Group,
        task: Task,
        writers: dict[str, DomainWriter],
        counts: dict[str, _Counts],
        stack: contextlib.ExitStack,
    ) -> Iterator[tuple[int, str, str, str]]:
        """Write the documents of a unit; yield the records that are left out."""
        for frame in read_frames(task.unit):
            if isinstance(frame, DroppedFrame):
                yield from frame.rows
                continue
            tokens = frame.tokens
            if self._seen is not None:
                fresh = self._seen.add(tokens.hashes)
                again = tokens.numbers[~fresh].tolist()
                counts[frame.side].dropped[DUPLICATE] += len(again)
                for number in again:
                    yield frame.first_line + number, frame.side, DUPLICATE, "packed before"
                tokens = _chosen(tokens, fresh)
            if len(tokens.lengths) == 0:
                continue
            if frame.side not in writers:
                writers[frame.side] = stack.enter_context(
                    DomainWriter(self._folder, self._manifest, frame.side, group.domain)
                )
            writers[frame.side].write(tokens.ids, tokens.lengths, tokens.utf8)
            self.tokens += len(tokens.ids)

    def _check(
        self,
        group: Group,
        writers: dict[str, DomainWriter],
        counts: dict[str, _Counts],
        examples: list[str],
    ) -> None:
        wanted = {group.side or TRAIN}
        if self._fraction:
            wanted.add(VALID)
        for side in sorted(wanted - set(writers)):
            if writers and group.side is None:
                raise CorpusError(
                    f"domain '{group.domain}': too few documents, none fell to the {side} side",
                    cure="Give it more documents, or change --valid-fraction",
                )
            left_out = sum(sum(count.dropped.values()) for count in counts.values())
            shown = f"; first: {examples[0]}" if examples else ""
            raise CorpusError(
                f"domain '{group.domain}' has no documents to {side} on: "
                f"{len(group.tasks)} files, {left_out} records left out{shown}",
                cure="Correct its files (--text-field names the field), or leave the domain out",
            )


def _chosen(tokens: SideTokens, kept: np.ndarray) -> SideTokens:
    if kept.all():
        return tokens
    return SideTokens(
        tokens.ids[np.repeat(kept, tokens.lengths)],
        tokens.lengths[kept],
        tokens.numbers[kept],
        tokens.utf8[kept],
        tokens.hashes[kept],
    )


def _list(
    listing: IO[Any],
    group: Group,
    source: Source,
    row: tuple[int, str, str, str],
    counts: dict[str, _Counts],
    examples: list[str],
) -> None:
    """Write a record that is left out to the list, where there is room."""
    line, side, reason, words = row
    if len(examples) < NUM_EXAMPLES and reason != "empty":
        examples.append(f"{source.path}, line {line}: {words}")
    counts[side].listed[reason] += 1
    if counts[side].listed[reason] <= MAX_LISTED:
        record = {
            "file": source.name,
            "line": line,
            "domain": group.domain,
            "split": side,
            "reason": reason,
            "words": words,
        }
        listing.write(json.dumps(record, ensure_ascii=False) + "\n")


def _balance(
    group: Group,
    books: Sequence[Books],
    stats: dict[str, ShardStats],
    counts: dict[str, _Counts],
) -> None:
    """Raise where records are unaccounted for, which is a defect of this package."""
    read = sum(unit.records for unit in books)
    packed = sum(part.documents for part in stats.values())
    dropped = sum(sum(count.dropped.values()) for count in counts.values())
    if read != packed + dropped:
        raise RuntimeError(
            f"domain '{group.domain}': {read} records read, {packed} packed, {dropped} left out: "
            "the books do not balance"
        )
