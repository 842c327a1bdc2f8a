"""Documents per domain, from the files people have.

1. `find_sources` lists the files of a corpus and gives each its domain (the file name up to its
   last `-`, its folder, or named globs) and its side: a file in a folder `train` or `valid`
   (`val`, `validation`) is of that side, every other file is split by the hash of its documents.
2. `read_documents` streams the texts of one file, counting in a `Tally` what it leaves out: lines
   that cannot be read, by file and line number, and documents without text.
3. `side_of` splits by hash, so exact duplicates stay on one side.

Enters: JSON lines, Parquet or plain text, compressed or not. Leaves: sources and texts. Does not
tokenize, clean or deduplicate. Lines that hold nothing are no documents and are not counted.
"""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from regmix.errors import ConfigError, CorpusError
from regmix.files import storage_errors

FORMATS = {".jsonl": "lines", ".json": "lines", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SIDES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid"}
DOMAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
CHUNK_BYTES = 1 << 16
# Fed to zstd at once: a block of 4 bytes can hold 128 KiB, so at most 32 MiB come out.
ZSTD_STEP_BYTES = 1 << 10
NUM_EXAMPLES = 20
DEFAULT_VALID_FRACTION = 0.03


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of documents."""

    path: Path
    name: str  # relative to the input folder, with forward slashes
    domain: str
    side: str | None  # "train", "valid", or None: by the hash of each document
    format: str  # "lines", "parquet" or "text"
    compression: str  # "", ".gz" or ".zst"
    num_bytes: int


@dataclass(frozen=True)
class Sources:
    """What `find_sources` found: files in order of (domain, side, name), and those it left."""

    files: tuple[Source, ...]
    ignored: tuple[str, ...]  # not documents, or matched by no --domain


@dataclass
class Tally:
    """What reading has met so far; `examples` are the first lines that could not be read."""

    num_bytes: int = 0  # of files as they lie on disk
    malformed: int = 0  # could not be read, or encoded to no token
    empty: int = 0
    examples: list[str] = field(default_factory=list)


def check_domain(name: str) -> str:
    """Return a domain's name; `CorpusError` where it could not name a file."""
    if not DOMAIN_NAME.fullmatch(name) or len(name) > 100:
        raise CorpusError(
            f"'{name}' cannot name a domain",
            cure="Use letters, digits and _ . - (at most 100, not starting with . or -)",
        )
    return name


def find_sources(
    inputs: Iterable[Path | str],
    *,
    domain_by: str = "prefix",
    domains: Mapping[str, str] | None = None,
    exclude: Path | str | None = None,
) -> Sources:
    """List the documents of files and folders; `domains` maps a domain's name to a glob.

    A glob is matched against the file's path below the input folder and against its name.
    `exclude` is a folder to pass over: the shards may be written inside the corpus.
    """
    inputs = list(inputs)
    passed_over = Path(exclude).resolve() if exclude is not None else None
    if domain_by not in ("prefix", "folder"):
        raise ConfigError(f"unknown rule '{domain_by}' for domains", cure="Use prefix or folder")
    for name in domains or {}:
        check_domain(name)
    files: dict[Path, Source] = {}
    ignored: list[str] = []
    for given in inputs:
        for path, root in _walk(Path(given)):
            if passed_over is not None and path.resolve().is_relative_to(passed_over):
                continue
            source = _source(path, root, domain_by, domains)
            if source is None:
                ignored.append(path.relative_to(root).as_posix())
            else:
                files.setdefault(path.resolve(), source)
    for name in domains or {}:
        if all(source.domain != name for source in files.values()):
            raise CorpusError(
                f"domain '{name}': no file of documents matches '{(domains or {})[name]}'",
                cure="Correct the glob of --domain",
            )
    if not files:
        raise CorpusError(
            f"no documents in {', '.join(str(given) for given in inputs)}",
            cure="Name files or folders of .jsonl, .json, .txt (each also .gz, .zst) or .parquet",
        )
    ordered = sorted(files.values(), key=lambda s: (s.domain, s.side or "", s.name, str(s.path)))
    return Sources(tuple(ordered), tuple(sorted(ignored)))


def _walk(given: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (file, folder its name is relative to); links are followed, each folder read once."""
    with storage_errors(given):
        if given.is_file():
            yield given, given.parent
            return
        if not given.is_dir():
            raise CorpusError(f"{given}: no such file or folder", cure="Check the path")
    # Linked folders come after all others, so a folder reached twice has its own name.
    tops, seen = [given], set[Path]()
    for top in tops:
        for here, below, names in os.walk(top, onerror=_refuse):
            folder = Path(here)
            real = folder.resolve()
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith("."))
            tops += [folder / name for name in below if (folder / name).is_symlink()]
            for path in (folder / name for name in sorted(names) if not name.startswith(".")):
                if path.is_file() or path.is_symlink():
                    yield path, given


def _refuse(error: OSError) -> None:
    with storage_errors(error.filename):
        raise error


def _source(
    path: Path, root: Path, domain_by: str, domains: Mapping[str, str] | None
) -> Source | None:
    stem, compression = path.name, ""
    if path.suffix in COMPRESSIONS:
        stem, compression = path.stem, path.suffix
    extension = Path(stem).suffix
    if extension not in FORMATS or (extension == ".parquet" and compression):
        return None
    name = path.relative_to(root).as_posix()
    folders = [root.resolve().name, *Path(name).parent.parts]
    if domains:
        matching = [
            domain
            for domain, glob in domains.items()
            if fnmatch.fnmatch(name, glob) or fnmatch.fnmatch(path.name, glob)
        ]
        if len(matching) > 1:
            raise CorpusError(
                f"{path}: belongs to the domains {' and '.join(sorted(matching))}",
                cure="Make the globs of --domain exclude each other",
            )
        if not matching:
            return None
        domain = matching[0]
    elif domain_by == "folder":
        domain = next((part for part in reversed(folders) if part not in SIDES), "")
    else:
        domain = Path(stem).stem
        domain = domain.rpartition("-")[0] or domain
    try:
        check_domain(domain)
    except CorpusError as error:
        raise CorpusError(
            f"{path}: {error.what}", cure="Rename it, or name the domain: --domain NAME=GLOB"
        ) from error
    with storage_errors(path):
        num_bytes = path.stat().st_size
    return Source(
        path=path,
        name=name,
        domain=domain,
        side=next((SIDES[part] for part in reversed(folders) if part in SIDES), None),
        format=FORMATS[extension],
        compression=compression,
        num_bytes=num_bytes,
    )


def choose_sides(
    files: Iterable[Source], valid_fraction: float | None
) -> tuple[tuple[Source, ...], float | None]:
    """Settle who is on which side: (files, the fraction to split by hash or None).

    Where there is a folder `valid`, folders decide, and files in neither are training data; else
    every document is split by its hash, `DEFAULT_VALID_FRACTION` of them to the validation side.
    """
    files = tuple(files)
    if any(source.side == "valid" for source in files):
        if valid_fraction is not None:
            raise CorpusError(
                "the corpus has a folder of validation documents, so --valid-fraction has no use",
                cure="Leave --valid-fraction out, or name the other files only",
            )
        return tuple(replace(source, side=source.side or "train") for source in files), None
    fraction = DEFAULT_VALID_FRACTION if valid_fraction is None else valid_fraction
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"a validation fraction of {fraction}", cure="Use at least 0 and less than 1"
        )
    return tuple(replace(source, side=None) for source in files), fraction


def side_of(utf8: bytes, valid_fraction: float) -> str:
    """Return "train" or "valid" for a document, by the hash of its text."""
    share = xxhash.xxh3_64_intdigest(utf8, seed=1) / 2**64
    return "valid" if share < valid_fraction else "train"


def read_documents(
    source: Source, tally: Tally, *, text_field: str = "text", strict: bool = False
) -> Iterator[tuple[str, bytes]]:
    """Yield (text, its UTF-8 bytes) of each document, in file order.

    Files are read and decompressed in bounded steps, but a line, a .txt file and 256 rows of
    Parquet (with the pages they lie in) are held whole, however long. With `strict` the first
    record that cannot be read raises `CorpusError`.
    """
    if source.format == "parquet":
        records = _parquet_records(source, tally, text_field)
    elif source.format == "text":
        records = _text_record(source, tally)
    else:
        records = _line_records(source, tally, text_field)
    for number, record in records:
        reason = ""
        if isinstance(record, _Malformed):
            reason = record.reason
        elif not record or record.isspace():
            tally.empty += 1
        else:
            try:
                utf8 = record.encode()
            except UnicodeEncodeError:
                reason = "half a surrogate pair: not valid Unicode"
            else:
                yield record, utf8
        if reason:
            what = f"{source.path}, line {number}: {reason}"
            if strict:
                raise CorpusError(what, cure="Correct the line, or pack without --strict")
            tally.malformed += 1
            if len(tally.examples) < NUM_EXAMPLES:
                tally.examples.append(what)


@dataclass(frozen=True)
class _Malformed:
    reason: str


def _line_records(
    source: Source, tally: Tally, text_field: str
) -> Iterator[tuple[int, str | _Malformed]]:
    for number, line in enumerate(_lines(_chunks(source, tally)), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield number, _parse(line, text_field)


def _parse(line: bytes, text_field: str) -> str | _Malformed:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Malformed(f"not UTF-8 (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return _Malformed(f"not JSON ({error})")
    if not isinstance(record, dict):
        return _Malformed(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        return _Malformed(f"no field '{text_field}'")
    return _checked_text(record[text_field], text_field)


def _checked_text(value: Any, text_field: str) -> str | _Malformed:
    if isinstance(value, str):
        return value
    kind = "empty (null)" if value is None else f"a {type(value).__name__}"
    return _Malformed(f"field '{text_field}' is {kind}, not a string")


def _text_record(source: Source, tally: Tally) -> Iterator[tuple[int, str | _Malformed]]:
    raw = b"".join(_chunks(source, tally)).removeprefix(b"\xef\xbb\xbf")
    try:
        yield 1, raw.decode()
    except UnicodeDecodeError as error:
        yield raw.count(b"\n", 0, error.start) + 1, _Malformed("not UTF-8")


def _parquet_records(
    source: Source, tally: Tally, text_field: str
) -> Iterator[tuple[int, str | _Malformed]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            if text_field not in file.schema_arrow.names:
                raise CorpusError(
                    f"{source.path}: no column '{text_field}' "
                    f"(columns: {', '.join(file.schema_arrow.names)})",
                    cure="Name the column with --text-field",
                )
            rows = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                tally.num_bytes += source.num_bytes * len(batch) // rows
                for value in batch.column(0):
                    number += 1
                    try:
                        yield number, _checked_text(value.as_py(), text_field)
                    except UnicodeDecodeError:
                        yield number, _Malformed("not UTF-8")
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(source, error) from error


def _damaged(source: Source, error: object) -> CorpusError:
    return CorpusError(
        f"{source.path} (domain '{source.domain}'): damaged or cut short ({error})",
        cure="Copy or download the file again",
    )


def _chunks(source: Source, tally: Tally) -> Iterator[bytes]:
    """Yield the file's bytes, decompressed; `CorpusError` where the compressed stream is cut."""
    with storage_errors(source.path), open(source.path, "rb") as stream:
        if source.compression == ".gz":
            decompressed = gzip.GzipFile(fileobj=stream)
            before = 0
            while True:
                try:
                    chunk = decompressed.read(CHUNK_BYTES)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise _damaged(source, error) from error
                tally.num_bytes += stream.tell() - before
                before = stream.tell()
                if not chunk:
                    return
                yield chunk
        zstd = _Zstandard(source) if source.compression == ".zst" else None
        while raw := stream.read(CHUNK_BYTES):
            tally.num_bytes += len(raw)
            if zstd:
                yield from zstd.decompress(raw)
            else:
                yield raw
        if zstd:
            zstd.finish()


class _Zstandard:
    """Decompress frame after frame; unlike the library's reader, notice a frame that is cut."""

    def __init__(self, source: Source) -> None:
        import zstandard

        self._source = source
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None

    def decompress(self, raw: bytes) -> Iterator[bytes]:
        for start in range(0, len(raw), ZSTD_STEP_BYTES):
            step = raw[start : start + ZSTD_STEP_BYTES]
            while step:
                self._frame = self._frame or self._new()
                try:
                    yield self._frame.decompress(step)
                except self._error as error:
                    raise _damaged(self._source, error) from error
                if not self._frame.eof:
                    break
                step, self._frame = self._frame.unused_data, None

    def finish(self) -> None:
        if self._frame is not None:
            raise _damaged(self._source, "the last zstd frame is incomplete")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        pieces = chunk.split(b"\n")
        rest.append(pieces[0])
        if len(pieces) > 1:
            yield b"".join(rest)
            yield from pieces[1:-1]
            rest = [pieces[-1]]
    if any(rest):
        yield b"".join(rest)
