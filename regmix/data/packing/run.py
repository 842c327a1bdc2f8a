"""One run of packing: encode what is not encoded, then put it into shards, group by group.

The folder `.packing` holds what a stopped run leaves to the next: `run.json` (which work, with
which engine), a unit for each source that is encoded, a note for each group that is in the shards.
A source that is done is never done again, unless the settings, the engine or the file changed.

Where the fast engine differs from `tokenizers` all that is thrown away and encoded by
`tokenizers`, so that no corpus is made by both.

Enters: a `PackJob`. Leaves: shard files and a `PackResult`. Writes no manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from regmix.data.manifest import Manifest
from regmix.data.packing.assembly import (
    NOTES_FOLDER,
    NUM_EXAMPLES,
    Assembler,
    Group,
    GroupNote,
    dropped_path,
    finished_note,
    has_units,
    is_of,
    make_groups,
)
from regmix.data.packing.encoder import EncoderSettings
from regmix.data.packing.encoder_pool import InlineEncoders, ProcessEncoders
from regmix.data.packing.engines import FAST, REFERENCE, Choice, choose_engine
from regmix.data.packing.lanes import DiffersIn, Lanes, Task
from regmix.data.packing.sources import Source
from regmix.data.packing.units import Books, read_books
from regmix.data.tokenizer import Tokenizer
from regmix.errors import StorageError, TokenizerError
from regmix.files import atomic_open, read_table, storage_errors, write_json
from regmix.provenance import available_cores

RUN = "run.json"
LOCK = ".pack.lock"
UNIT_VERSION = 1
# Less is encoded in this process: starting others takes half a second.
INLINE_BYTES = 8 << 20
POLL_SECONDS = 0.1

# Called with (source bytes read, domain, tokens encoded).
OnProgress = Callable[[int, str, int], None]


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """What packing needs; `manifest` has no splits yet."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    files: tuple[Source, ...]
    valid_fraction: float | None
    text_field: str
    strict: bool
    max_bytes: int
    dedup: bool
    engine: str
    workers: int | None
    on_progress: OnProgress
    on_message: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What a run did: the groups with their notes, and the engine."""

    groups: tuple[Group, ...]
    engine: Choice
    resumed_files: int

    @property
    def notes(self) -> list[GroupNote]:
        """The notes of all groups, in the order of packing."""
        return [group.note for group in self.groups if group.note is not None]

    @property
    def books(self) -> list[Books]:
        """The books of all sources."""
        return [books for note in self.notes for books in note.books]

    @property
    def examples(self) -> tuple[str, ...]:
        """The first records that were left out."""
        return tuple(words for note in self.notes for words in note.examples)[:NUM_EXAMPLES]


def run(job: PackJob) -> PackResult:
    """Encode and assemble everything; errors as `pack` raises them."""
    key = _key(job)
    choice = _begin(job, key)
    try:
        return _run(job, key, choice)
    except DiffersIn as error:
        if job.engine == "fast":
            raise TokenizerError(
                f"{error.args[0]}: {FAST} must not be used with this tokenizer",
                cure="Pack with --engine auto or --engine tokenizers",
            ) from error
        words = f"{FAST} {error.args[0]}"
        job.on_message(f"{words}. The whole corpus is packed with {REFERENCE} instead")
        choice = choose_engine(job.tokenizer, REFERENCE)
        choice = Choice(choice.name, choice.version, words)
        _start_over(job.folder, key, choice)
        return _run(job, key, choice)


def _key(job: PackJob) -> str:
    identity = [UNIT_VERSION, job.manifest.settings, asdict(job.manifest.tokenizer)]
    return xxhash.xxh3_64_hexdigest(json.dumps(identity).encode())


def _begin(job: PackJob, key: str) -> Choice:
    """Choose the engine, and throw away what another work or engine left behind."""
    path = job.folder / NOTES_FOLDER / RUN
    before = None
    with contextlib.suppress(StorageError, TypeError):
        table = read_table(path, "key", "engine")
        before = table["key"], Choice(**table["engine"])
    choice = choose_engine(job.tokenizer, job.engine)
    if before == (key, choice):
        return choice
    if before is not None and job.engine == "auto":
        same = before[0] == key and before[1].version == choice_version(REFERENCE)
        if same and before[1].name == REFERENCE:
            return before[1]  # the fast engine was found to differ on this corpus
    _start_over(job.folder, key, choice)
    return choice


def choice_version(name: str) -> str:
    """Return the version of a library that encodes."""
    import importlib.metadata

    return importlib.metadata.version(name)


def _start_over(folder: Path, key: str, choice: Choice) -> None:
    with storage_errors(folder):
        shutil.rmtree(folder / NOTES_FOLDER, ignore_errors=True)
        (folder / NOTES_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTES_FOLDER / RUN, {"key": key, "engine": asdict(choice)})


def _run(job: PackJob, key: str, choice: Choice) -> PackResult:
    groups = make_groups(job.folder, job.files)
    tasks: list[Task] = []
    resumed = done_bytes = 0
    settled = True
    for group in groups:
        group.key = key
        group.note = finished_note(job.folder, group) if settled else None
        if job.dedup:
            # What is a duplicate depends on the groups before, whose hashes are in their units.
            settled = group.note is not None and has_units(group)
            group.note = group.note if settled else None
        for task in group.tasks:
            books = None if group.note else read_books(task.unit)
            if group.note or (books is not None and is_of(books, task.source)):
                resumed += 1
                done_bytes += task.source.num_bytes
            else:
                tasks.append(task)
    _remove_remainders(job.folder, groups)
    assembler = Assembler(
        job.folder, job.manifest, valid_fraction=job.valid_fraction, dedup=job.dedup
    )
    places = {id(task): place for place, task in enumerate(tasks)}
    with _lanes(job, choice, tasks) as lanes:
        for group in groups:
            if group.note is not None:
                assembler.skip(group)
                continue
            for task in group.tasks:
                place = places.get(id(task))
                while lanes and place is not None and not lanes.wait(place, POLL_SECONDS):
                    job.on_progress(done_bytes + lanes.read_bytes, group.domain, lanes.tokens)
            assembler.assemble(group)
            read, tokens = (lanes.read_bytes, lanes.tokens) if lanes else (0, assembler.tokens)
            job.on_progress(done_bytes + read, group.domain, tokens)
    return PackResult(groups=tuple(groups), engine=choice, resumed_files=resumed)


def _remove_remainders(folder: Path, groups: list[Group]) -> None:
    """Remove half files of a killed run, and units of files that are gone."""
    named = {task.unit.name for group in groups for task in group.tasks}
    with storage_errors(folder):
        for path in (folder / NOTES_FOLDER).glob("*"):
            if path.suffix == ".tmp" or (path.suffix == ".unit" and path.name not in named):
                path.unlink()
        for side in ("train", "valid"):
            for path in (folder / side).glob(".*.tokens.*.tmp"):
                path.unlink()


@contextlib.contextmanager
def _lanes(job: PackJob, choice: Choice, tasks: list[Task]) -> Iterator[Lanes | None]:
    if not tasks:
        yield None
        return
    workers = job.workers or available_cores()
    tokenizer = job.tokenizer
    settings = EncoderSettings(
        tokenizer=tokenizer.text,
        separator=tokenizer.separator,
        where=tokenizer.where,
        engine=choice.name,
        text_field=job.text_field,
        valid_fraction=job.valid_fraction,
        max_bytes=job.max_bytes,
        hashes=job.dedup,
    )
    small = sum(task.source.num_bytes for task in tasks) < INLINE_BYTES
    encoders: InlineEncoders | ProcessEncoders
    if workers == 1 or (job.workers is None and small):
        workers = 1
        encoders = InlineEncoders(settings)
    else:
        encoders = ProcessEncoders(settings, workers)
    lanes = Lanes(
        tasks,
        encoders,
        # A decompressor keeps about four encoders busy.
        num_lanes=1 if workers == 1 else max(2, workers // 3),
        num_workers=workers,
        text_field=job.text_field,
        max_bytes=job.max_bytes,
        strict=job.strict,
    )
    with lanes:
        yield lanes


def write_dropped(folder: Path, groups: tuple[Group, ...], path: Path) -> None:
    """Write the list of dropped records of all groups, or none where nothing was dropped."""
    with storage_errors(folder):
        lists = [dropped_path(folder, group) for group in groups]
        if not any(part.stat().st_size for part in lists):
            path.unlink(missing_ok=True)
            return
        with atomic_open(path) as stream:
            for part in lists:
                with open(part, "rb") as rows:
                    shutil.copyfileobj(rows, stream)


@contextlib.contextmanager
def sole_packer(folder: Path) -> Iterator[None]:
    """Hold a folder for packing; `StorageError` where another process packs into it."""
    path = folder / LOCK
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
        # Its owner may have removed the file between the opening and the lock.
        while not _is_at(descriptor, path):
            os.close(descriptor)
            descriptor = _locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise StorageError(
            f"{path.parent}: another process packs into it (process {owner or '?'})",
            cure="Wait until it ends, or name another folder",
        ) from None
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
