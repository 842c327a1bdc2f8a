"""A corpus of documents becomes token shards.

1. List the files, give each a domain and a side, and say what it will cost.
2. Load the tokenizer, or train a byte-level BPE on a bounded sample, even over the domains.
3. Domain by domain: read, encode in batches on all cores, write every document and a separator.
   A finished domain is noted, so a stopped run goes on with the next one.
4. Write the manifest last: without it the folder is not a corpus. With `force` all this happens in
   a folder inside, whose content then takes the place of the corpus that was there.

Enters: files of documents. Leaves: a folder that `ShardSet` opens, the same bytes whatever the
number of workers, and a report that counts all that was left out. Loses no token of a document.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from regmix.data.corpus import (
    Source,
    Tally,
    choose_sides,
    find_sources,
    read_documents,
    side_of,
)
from regmix.data.domains import NOTES_FOLDER, OnProgress, PackJob, describe, pack_domains
from regmix.data.manifest import (
    MANIFEST,
    MANIFEST_FORMAT,
    VERSION,
    Manifest,
    ShardStats,
    TokenizerRecord,
    dtype_for,
    write_manifest,
)
from regmix.data.shards import ShardSet
from regmix.data.tokenizer import SEPARATOR, Tokenizer, load_tokenizer, own_parallelism
from regmix.data.tokenizer import train_bpe as train_bpe_on
from regmix.display import size
from regmix.errors import ConfigError, CorpusError, ShardError, StorageError
from regmix.files import free_bytes, storage_errors, sync_directory, write_text

SAMPLE_BYTES = 20_000_000  # text a BPE is trained on
DEFAULT_BPE = 8192
TOKENIZER = "tokenizer.json"
REPLACEMENT = ".replacement"  # folder in which --force packs
# Text per byte on disk, and text per token, for the estimate before anything is known.
EXPANSION = {"": 1.0, ".gz": 3.3, ".zst": 4.2}
PARQUET_EXPANSION = 3.0
BYTES_PER_TOKEN = 2.5


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What packing will read and write, before it starts; both estimates are rough."""

    num_files: int
    domains: tuple[str, ...]
    source_bytes: int
    text_bytes: int  # estimated
    disk_bytes: int  # estimated
    free_bytes: int
    valid_fraction: float | None  # None where folders decide
    ignored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What `pack` did."""

    path: str
    checksum: str
    already_complete: bool
    resumed_domains: tuple[str, ...]  # finished by an earlier run that was stopped
    tokenizer: TokenizerRecord
    dtype: str
    splits: Mapping[str, Mapping[str, ShardStats]]
    malformed_examples: tuple[str, ...]
    ignored: tuple[str, ...]
    source_bytes: int
    disk_bytes: int
    seconds: float

    def as_table(self) -> dict[str, object]:
        """Return the report as plain values for JSON."""
        return asdict(self)


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
    force: bool = False,
    workers: int | None = None,
    on_plan: Callable[[PackPlan], None] | None = None,
    on_progress: OnProgress | None = None,
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
    if tokenizer is not None and train_bpe is not None:
        raise ConfigError("a tokenizer both loaded and trained", cure="Give one of the two")
    found = find_sources(inputs, domain_by=domain_by, domains=domains, exclude=folder)
    files, fraction = choose_sides(found.files, valid_fraction)
    plan = _plan(files, found.ignored, folder, fraction)
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
    }
    if (folder / MANIFEST).exists() and not force:
        return _complete(folder, settings, files, plan, started)
    # The corpus that is there stays usable until the one that replaces it is complete.
    workplace = folder / REPLACEMENT if (folder / MANIFEST).exists() else folder
    _prepare(workplace, plan)
    report = on_progress or (lambda done, domain, tokens: None)
    if loaded is None:
        sample = _sample(files, fraction, text_field, strict, report)
        loaded = train_bpe_on(sample, vocab_size, separator=separator)
    write_text(workplace / TOKENIZER, loaded.text)
    job = PackJob(
        folder=workplace,
        manifest=_empty_manifest(loaded, settings),
        tokenizer=loaded,
        fraction=fraction,
        text_field=text_field,
        strict=strict,
        workers=workers or _num_cores(),
        on_progress=report,
    )
    with own_parallelism():
        examples = pack_domains(job, files)
    shards = _finish(job)
    if workplace != folder:
        shards = _replace(folder, workplace)
    return _report(shards, plan, started, examples=examples, resumed=tuple(job.resumed))


def _num_cores() -> int:
    """Return the cores this process may use; the machine's where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _plan(
    files: tuple[Source, ...], ignored: tuple[str, ...], folder: Path, fraction: float | None
) -> PackPlan:
    text = sum(
        source.num_bytes
        * (PARQUET_EXPANSION if source.format == "parquet" else EXPANSION[source.compression])
        for source in files
    )
    return PackPlan(
        num_files=len(files),
        domains=tuple(sorted({source.domain for source in files})),
        source_bytes=sum(source.num_bytes for source in files),
        text_bytes=int(text),
        disk_bytes=int(text / BYTES_PER_TOKEN * 2),
        free_bytes=free_bytes(folder),
        valid_fraction=fraction,
        ignored=ignored,
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


def _complete(
    folder: Path,
    settings: dict[str, str],
    files: tuple[Source, ...],
    plan: PackPlan,
    started: float,
) -> PackReport:
    """Report the corpus that is there, or say why it is another one."""
    shards = ShardSet.open(folder)
    before = shards.manifest.settings
    differences = [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if not differences:
        # Files of two input folders may share a name, so they are compared as multisets.
        now = Counter(describe(source) for source in files)
        then = Counter(shards.manifest.sources)
        changed = sorted({source.path for source in (now - then) + (then - now)})
        differences = [f"the source file {name} differs" for name in changed]
    if differences:
        raise ShardError(
            f"{folder}: holds a corpus packed otherwise ({differences[0]})",
            cure="Name another folder, or replace that corpus with --force",
        )
    return _report(shards, plan, started, already_complete=True)


def _prepare(folder: Path, plan: PackPlan) -> None:
    """Make the folder, without the half files of a killed run."""
    if plan.disk_bytes > plan.free_bytes:
        raise StorageError(
            f"{folder}: the shards take about {size(plan.disk_bytes)} and "
            f"{size(plan.free_bytes)} are free",
            cure="Free some space on that disk, or name a folder on another one",
        )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for side in ("train", "valid"):
            for temporary in (folder / side).glob(".*.tokens.*.tmp"):
                temporary.unlink(missing_ok=True)


def _sample(
    files: tuple[Source, ...],
    fraction: float | None,
    text_field: str,
    strict: bool,
    on_progress: OnProgress,
) -> Iterator[str]:
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
        on_progress(0, "(training the tokenizer)", 0)
        left = SAMPLE_BYTES // num_domains // num_files[source.domain]
        for text, utf8 in read_documents(source, Tally(), text_field=text_field, strict=strict):
            if fraction is not None and side_of(utf8, fraction) == "valid":
                continue
            yield text[:left]
            left -= len(utf8)
            if left <= 0:
                break


def _finish(job: PackJob) -> ShardSet:
    """Write the manifest, open what was written, and remove what no longer belongs to it."""
    write_manifest(job.folder, job.manifest)
    shards = ShardSet.open(job.folder)
    kept = {
        job.folder / file.path
        for domains in job.manifest.splits.values()
        for stats in domains.values()
        for file in stats.files
    }
    with storage_errors(job.folder):
        for side in ("train", "valid"):
            for path in (job.folder / side).glob("*.tokens"):
                if path not in kept:
                    path.unlink()
        for leftover in (NOTES_FOLDER, REPLACEMENT):
            shutil.rmtree(job.folder / leftover, ignore_errors=True)
    return shards


def _replace(folder: Path, new: Path) -> ShardSet:
    """Put the complete corpus `new` in the place of the one in `folder`, the manifest last."""
    with storage_errors(folder):
        (folder / MANIFEST).unlink()
        for side in ("train", "valid"):
            for path in (folder / side).glob("*.tokens"):
                path.unlink()
            for path in (new / side).glob("*.tokens"):
                (folder / side).mkdir(exist_ok=True)
                os.replace(path, folder / side / path.name)
        for name in (TOKENIZER, MANIFEST):
            os.replace(new / name, folder / name)
        sync_directory(folder)
        shutil.rmtree(new)
    return ShardSet.open(folder)


def _report(
    shards: ShardSet,
    plan: PackPlan,
    started: float,
    *,
    already_complete: bool = False,
    examples: tuple[str, ...] = (),
    resumed: tuple[str, ...] = (),
) -> PackReport:
    splits = shards.manifest.splits
    files = [f for domains in splits.values() for s in domains.values() for f in s.files]
    return PackReport(
        path=str(shards.path),
        checksum=shards.checksum,
        already_complete=already_complete,
        resumed_domains=resumed,
        tokenizer=shards.manifest.tokenizer,
        dtype=shards.dtype,
        splits=splits,
        malformed_examples=examples,
        ignored=plan.ignored,
        source_bytes=plan.source_bytes,
        disk_bytes=sum(file.bytes for file in files),
        seconds=time.monotonic() - started,
    )
