"""Packing domain by domain: read, encode, write, and note what is finished.

Enters: a `PackJob` and its sources. Leaves: shard files, and in the job's manifest what they hold.
A finished domain has a note in the folder `.packing`, so a stopped run goes on with the next one.
Does not write the manifest.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import xxhash

from regmix.config import build
from regmix.data.batches import encode_batches, leave_out_tokenless, read_batches
from regmix.data.corpus import NUM_EXAMPLES, Source, Tally
from regmix.data.manifest import Manifest, ShardStats, SourceFile
from regmix.data.tokenizer import Tokenizer
from regmix.data.writer import DomainWriter
from regmix.errors import ConfigError, CorpusError, StorageError
from regmix.files import checksum, read_json, write_json

NOTES_FOLDER = ".packing"

# Called with (source bytes read, domain, tokens written).
OnProgress = Callable[[int, str, int], None]


def describe(source: Source) -> SourceFile:
    """Return what the manifest says of a source; reads the whole file for its hash."""
    return SourceFile(
        path=source.name,
        domain=source.domain,
        split=source.side,
        bytes=source.num_bytes,
        xxh3=checksum(source.path),
    )


@dataclass(frozen=True, kw_only=True)
class DomainNote:
    """What is kept of a finished domain until the manifest is written."""

    key: str
    stats: dict[str, ShardStats]
    examples: tuple[str, ...] = ()


@dataclass
class PackJob:
    """What packing every domain needs, and how far it is."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    fraction: float | None
    text_field: str
    strict: bool
    workers: int
    on_progress: OnProgress
    read_bytes: int = 0  # of domains that are finished
    tokens: int = 0
    resumed: list[str] = field(default_factory=list)


def pack_domains(job: PackJob, files: tuple[Source, ...]) -> tuple[str, ...]:
    """Pack every domain that is not finished; return the first malformed records."""
    examples: list[str] = []
    splits: dict[str, dict[str, ShardStats]] = {}
    sources: list[SourceFile] = []
    pool = ThreadPoolExecutor(job.workers, thread_name_prefix="encode")
    try:
        for domain in sorted({source.domain for source in files}):
            own = [source for source in files if source.domain == domain]
            records = [describe(source) for source in own]
            note = _pack_domain(job, domain, own, records, pool)
            sources += records
            examples += note.examples
            for side, stats in note.stats.items():
                splits.setdefault(side, {})[domain] = stats
                job.tokens += stats.tokens
            job.read_bytes += sum(source.num_bytes for source in own)
    finally:
        pool.shutdown(cancel_futures=True)
    job.manifest = replace(job.manifest, splits=splits, sources=tuple(sources))
    return tuple(examples[:NUM_EXAMPLES])


def _pack_domain(
    job: PackJob,
    domain: str,
    files: list[Source],
    records: list[SourceFile],
    pool: ThreadPoolExecutor,
) -> DomainNote:
    """Write one domain's shards, or return the note of the run that did."""
    identity = [job.manifest.settings, asdict(job.manifest.tokenizer), *map(asdict, records)]
    key = xxhash.xxh3_64_hexdigest(json.dumps(identity).encode())
    path = job.folder / NOTES_FOLDER / f"{domain}.json"
    note = _finished(job.folder, path, key)
    if note is not None:
        job.resumed.append(domain)
        return note
    tallies = {source.side or "train": Tally() for source in files}
    with contextlib.ExitStack() as stack:
        writers: dict[str, DomainWriter] = {}
        batches = read_batches(
            files,
            tallies,
            valid_fraction=job.fraction,
            text_field=job.text_field,
            strict=job.strict,
        )
        for batch, ids, lengths in encode_batches(batches, job.tokenizer, pool, job.workers):
            tally = tallies.get(batch.side) or tallies["train"]
            ids, lengths, utf8_bytes = leave_out_tokenless(
                batch, ids, lengths, tally, domain=domain, strict=job.strict
            )
            if len(lengths) == 0:
                continue
            if batch.side not in writers:
                writers[batch.side] = stack.enter_context(
                    DomainWriter(job.folder, job.manifest, batch.side, domain)
                )
            writers[batch.side].write(ids, lengths, utf8_bytes)
            read = sum(tally.num_bytes for tally in tallies.values())
            written = sum(writer.tokens for writer in writers.values())
            job.on_progress(job.read_bytes + read, domain, job.tokens + written)
        _check_sides(job, domain, files, tallies, writers)
    stats = {}
    for side in sorted(writers):
        tally = tallies.get(side, Tally())
        stats[side] = writers[side].stats(malformed=tally.malformed, empty=tally.empty)
    examples = [example for tally in tallies.values() for example in tally.examples]
    note = DomainNote(key=key, stats=stats, examples=tuple(examples[:NUM_EXAMPLES]))
    write_json(path, asdict(note))
    return note


def _finished(folder: Path, path: Path, key: str) -> DomainNote | None:
    """Return the note of a finished domain if it is of the same work and its files are there."""
    try:
        note = build(DomainNote, read_json(path), where=str(path))
    except (StorageError, ConfigError, AttributeError):
        return None
    files = [file for stats in note.stats.values() for file in stats.files]
    there = all(
        (folder / file.path).is_file() and (folder / file.path).stat().st_size == file.bytes
        for file in files
    )
    return note if note.key == key and there else None


def _check_sides(
    job: PackJob,
    domain: str,
    files: list[Source],
    tallies: dict[str, Tally],
    writers: dict[str, DomainWriter],
) -> None:
    wanted = set(tallies) if job.fraction is None else {"train"}
    if job.fraction:
        wanted.add("valid")
    for side in sorted(wanted - set(writers)):
        left_out = sum(tally.malformed + tally.empty for tally in tallies.values())
        examples = [example for tally in tallies.values() for example in tally.examples]
        shown = f"; first: {examples[0]}" if examples else ""
        if writers and job.fraction is not None:
            raise CorpusError(
                f"domain '{domain}': too few documents, none fell to the {side} side",
                cure="Give it more documents, or change --valid-fraction",
            )
        raise CorpusError(
            f"domain '{domain}' has no documents to {side} on: "
            f"{len(files)} files, {left_out} records left out{shown}",
            cure="Correct its files (--text-field names the field), or leave the domain out",
        )
