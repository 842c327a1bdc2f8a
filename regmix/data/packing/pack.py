"""A corpus of documents becomes token shards.

1. List the files, give each a domain and a side, and say what it will cost.
2. Load the tokenizer, or train a byte-level BPE on a bounded sample, even over the domains.
3. Encode every file on all cores and put the documents into shards (run.py). A file that is
   encoded is kept, so a stopped run goes on with the next one.
4. Write the manifest last: without it the folder is not a corpus. With `force` all this happens in
   a folder inside, which then takes the place of the corpus that was there (replacement.py).

Enters: files of documents. Leaves: a folder that `ShardSet` opens, the same bytes whatever the
number of workers and the engine, and a report that counts all that was left out. Loses no token of
a document.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from regmix.data.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    VERSION,
    Manifest,
    ShardStats,
    SourceFile,
    TokenizerRecord,
    dtype_for,
    write_manifest,
)
from regmix.data.packing.assembly import NOTES_FOLDER
from regmix.data.packing.corpus import (
    Source,
    Tally,
    choose_sides,
    find_sources,
    read_documents,
    side_of,
)
from regmix.data.packing.engines import CHOICES
from regmix.data.packing.plan import PackPlan, check_space, make_plan
from regmix.data.packing.replacement import (
    DROPPED,
    PACKING,
    REPLACEMENT,
    TOKENIZER,
    heal,
    is_half_done,
    put_in_place,
    remove_others,
)
from regmix.data.packing.report import PackReport, make_report
from regmix.data.packing.run import (
    LOCK,
    OnProgress,
    PackJob,
    PackResult,
    choice_version,
    run,
    sole_packer,
    write_dropped,
)
from regmix.data.shards import ShardSet
from regmix.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, own_parallelism
from regmix.data.tokenizer import train_bpe as train_bpe_on
from regmix.errors import ConfigError, CorpusError, ShardError, StorageError, nearest
from regmix.files import checksum, storage_errors, write_json, write_text

SAMPLE_BYTES = 20_000_000  # text a BPE is trained on
DEFAULT_BPE = 8192
LONGEST_WORD = 100_000  # letters: training takes the square of that, so such texts do not join
DEFAULT_MAX_DOCUMENT_MB = 128
LARGEST_DOCUMENT_MB = 2000  # bytes of a text are counted in 32 bits
# Settings that older manifests do not have, as they were then.
ADDED_SETTINGS = {"dedup": "false", "max_document_mb": str(DEFAULT_MAX_DOCUMENT_MB)}


def pack(
    inputs: Iterable[Path | str],
    out: Path | str,
    *,
    tokenizer: Path | str | None = None,
    train_bpe: int | None = None,
    separator: str | None = None,
    valid_fraction: float | None = None,
    domain_by: str = "prefix",
    domains: Mapping[str, str] | None = None,
    text_field: str = "text",
    strict: bool = False,
    dedup: bool = False,
    max_document_mb: int = DEFAULT_MAX_DOCUMENT_MB,
    engine: str = "auto",
    force: bool = False,
    workers: int | None = None,
    on_plan: Callable[[PackPlan], None] | None = None,
    on_progress: OnProgress | None = None,
    on_message: Callable[[str], None] | None = None,
) -> PackReport:
    """Pack files and folders of documents into the folder `out`.

    The tokenizer is a `tokenizer.json`, or a BPE of `train_bpe` tokens trained here (8192 where
    neither is given). A folder that holds the same corpus packed with the same settings is left
    as it is; another corpus is replaced only with `force`, when the new one is complete beside it.
    Raises `CorpusError` for a domain without documents, `TokenizerError`, `ShardError` and
    `StorageError` as their names say.
    """
    started = time.monotonic()
    folder = Path(out)
    _check_options(tokenizer, train_bpe, engine, max_document_mb)
    found = find_sources(inputs, domain_by=domain_by, domains=domains, exclude=folder)
    files, fraction = choose_sides(found.files, valid_fraction)
    plan = make_plan(files, found.ignored, folder, fraction, dedup=dedup)
    if on_plan is not None:
        on_plan(plan)
    loaded = load_tokenizer(tokenizer, separator=separator) if tokenizer is not None else None
    vocab_size = DEFAULT_BPE if train_bpe is None else train_bpe
    settings = {
        "tokenizer": f"bpe {vocab_size}" if loaded is None else loaded.hash,
        "separator": separator or SEPARATOR,
        "valid_fraction": "by folder" if fraction is None else repr(fraction),
        "text_field": text_field,
        "strict": str(strict).lower(),
        "dedup": str(dedup).lower(),
        "max_document_mb": str(max_document_mb),
    }
    there = (folder / MANIFEST).exists()
    if there:
        healed = _healed(folder)
        if not force or healed:
            return _complete(folder, settings, files, plan, started)
    options = _Options(
        train_bpe=vocab_size,
        separator=separator,
        text_field=text_field,
        strict=strict,
        dedup=dedup,
        max_bytes=max_document_mb * 1_000_000,
        engine=engine,
        workers=workers,
        on_progress=on_progress or (lambda done, domain, tokens: None),
        on_message=on_message or (lambda words: None),
    )
    # The corpus that is there stays usable until the one that replaces it is complete.
    workplace = folder / REPLACEMENT if there else folder
    check_space(workplace, plan)
    resumed = 0
    with sole_packer(folder):
        if not there and (folder / MANIFEST).exists():  # another process was first
            return _complete(folder, settings, files, plan, started)
        if not (there and _is_complete(workplace, settings, files)):
            resumed = _pack_into(workplace, files, fraction, loaded, settings, options)
        if workplace != folder:
            put_in_place(folder)
        shards = ShardSet.open(folder)
    return make_report(shards, plan, started, resumed=resumed)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `pack` was asked for, once it is checked."""

    train_bpe: int
    separator: str | None
    text_field: str
    strict: bool
    dedup: bool
    max_bytes: int
    engine: str
    workers: int | None
    on_progress: OnProgress
    on_message: Callable[[str], None]


def _pack_into(
    folder: Path,
    files: tuple[Source, ...],
    fraction: float | None,
    tokenizer: Tokenizer | None,
    settings: dict[str, str],
    options: _Options,
) -> int:
    """Pack everything into a folder that is no corpus yet; return the files done before."""
    if tokenizer is None:
        sample = _sample(files, fraction, options)
        tokenizer = train_bpe_on(sample, options.train_bpe, separator=options.separator)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TOKENIZER, tokenizer.text)
    job = PackJob(
        folder=folder,
        manifest=_empty_manifest(tokenizer, settings),
        tokenizer=tokenizer,
        files=files,
        valid_fraction=fraction,
        text_field=options.text_field,
        strict=options.strict,
        max_bytes=options.max_bytes,
        dedup=options.dedup,
        engine=options.engine,
        workers=options.workers,
        on_progress=options.on_progress,
        on_message=options.on_message,
    )
    with own_parallelism():
        result = run(job)
    _finish(job, result)
    return result.resumed_files


def _check_options(
    tokenizer: Path | str | None, train_bpe: int | None, engine: str, max_document_mb: int
) -> None:
    if tokenizer is not None and train_bpe is not None:
        raise ConfigError("a tokenizer both loaded and trained", cure="Give one of the two")
    if engine not in CHOICES:
        raise ConfigError(
            f"unknown engine '{engine}' ({nearest(engine, CHOICES)})",
            cure="Use auto, fast or tokenizers",
        )
    if not 1 <= max_document_mb <= LARGEST_DOCUMENT_MB:
        raise ConfigError(
            f"a limit of {max_document_mb} MB for a document",
            cure=f"Use 1 to {LARGEST_DOCUMENT_MB}",
        )


def _empty_manifest(tokenizer: Tokenizer, settings: dict[str, str]) -> Manifest:
    return Manifest(
        format=MANIFEST_FORMAT,
        version=VERSION,
        dtype=dtype_for(tokenizer.vocab_size),
        tokenizer=TokenizerRecord(
            file=TOKENIZER,
            xxh3=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            separator=tokenizer.separator,
            separator_id=tokenizer.separator_id,
        ),
        settings=settings,
    )


def _differences(
    shards: ShardSet, settings: dict[str, str], files: tuple[Source, ...]
) -> list[str]:
    """Return in words how a corpus was packed otherwise, or from other files."""
    before = ADDED_SETTINGS | shards.manifest.settings
    differences = [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if differences:
        return differences
    # Files of two input folders may share a name, so they are compared as multisets.
    now = Counter(_describe(source) for source in files)
    then = Counter(shards.manifest.sources)
    changed = sorted({source.path for source in (now - then) + (then - now)})
    return [f"the source file {name} differs" for name in changed]


def _describe(source: Source) -> SourceFile:
    """Return what the manifest says of a source; reads the whole file for its hash."""
    return SourceFile(
        path=source.name,
        domain=source.domain,
        split=source.side,
        bytes=source.num_bytes,
        xxh3=checksum(source.path),
    )


def _healed(folder: Path) -> bool:
    """End a replacement that was stopped half way, unless another process is at it."""
    if not is_half_done(folder):
        return False
    with sole_packer(folder):
        return heal(folder)


def _is_complete(folder: Path, settings: dict[str, str], files: tuple[Source, ...]) -> bool:
    """Return whether a replacement is complete that was stopped before it was put in place."""
    try:
        return not _differences(ShardSet.open(folder), settings, files)
    except ShardError:
        return False


def _complete(
    folder: Path,
    settings: dict[str, str],
    files: tuple[Source, ...],
    plan: PackPlan,
    started: float,
) -> PackReport:
    """Report the corpus that is there, or say why it is another one."""
    shards = ShardSet.open(folder)
    differences = _differences(shards, settings, files)
    if differences:
        raise ShardError(
            f"{folder}: holds a corpus packed otherwise ({differences[0]})",
            cure="Name another folder, or replace that corpus with --force",
        )
    # A run that was killed after its last step leaves its notes; one that is under way keeps them.
    if (folder / NOTES_FOLDER).exists() or (folder / LOCK).exists():
        with contextlib.suppress(StorageError), sole_packer(folder):
            shutil.rmtree(folder / NOTES_FOLDER, ignore_errors=True)
    return make_report(shards, plan, started, already_complete=True)


def _sample(files: tuple[Source, ...], fraction: float | None, options: _Options) -> Iterator[str]:
    """Yield the first training documents of every file, as much text of each domain."""
    training = [source for source in files if source.side != "valid"]
    if not training:
        raise CorpusError(
            "no training documents to train a tokenizer on, validation only",
            cure="Name a tokenizer, or the training documents too",
        )
    num_domains = len({source.domain for source in training})
    num_files = Counter(source.domain for source in training)
    for source in training:
        options.on_progress(0, "(training the tokenizer)", 0)
        left = SAMPLE_BYTES // num_domains // num_files[source.domain]
        for text, utf8 in _readable(source, options):
            if fraction is not None and side_of(utf8, fraction) == "valid":
                continue
            if max(map(len, text.split())) > LONGEST_WORD:
                continue
            yield text[:left]
            left -= len(utf8)
            if left <= 0:
                break


def _readable(source: Source, options: _Options) -> Iterator[tuple[str, bytes]]:
    return read_documents(
        source,
        Tally(),
        text_field=options.text_field,
        strict=options.strict,
        max_bytes=options.max_bytes,
    )


def _finish(job: PackJob, result: PackResult) -> None:
    """Write what belongs beside the shards, the manifest last, and remove the notes."""
    splits: dict[str, dict[str, ShardStats]] = {}
    for group in result.groups:
        for side, stats in (group.note.stats if group.note else {}).items():
            splits.setdefault(side, {})[group.domain] = stats
    books = iter(result.books)
    sources = {
        id(task.source): SourceFile(
            path=task.source.name,
            domain=task.source.domain,
            split=task.source.side,
            bytes=unit.bytes,
            xxh3=unit.xxh3,
        )
        for group in result.groups
        for task, unit in zip(group.tasks, books, strict=False)
    }
    manifest = replace(
        job.manifest,
        splits=splits,
        sources=tuple(sources[id(source)] for source in job.files),
    )
    write_dropped(job.folder, result.groups, job.folder / DROPPED)
    write_json(
        job.folder / PACKING,
        {
            "records": sum(unit.records for unit in result.books),
            "engine": result.engine.name,
            "engine_version": result.engine.version,
            "engine_reason": result.engine.reason,
            "tokenizers_version": choice_version("tokenizers"),
            "verified_documents": sum(unit.verified_documents for unit in result.books),
            "verified_bytes": sum(unit.verified_bytes for unit in result.books),
            "dropped_examples": list(result.examples),
        },
    )
    write_manifest(job.folder, manifest)
    ShardSet.open(job.folder)
    remove_others(job.folder, manifest)
    with storage_errors(job.folder):
        for leftover in (NOTES_FOLDER, REPLACEMENT):
            shutil.rmtree(job.folder / leftover, ignore_errors=True)
