"""Which files a corpus consists of, and the domain and side of each.

A file's domain is its name up to its last `-`, its folder, or a named glob; a file in a folder
`train` or `valid` (`val`, `validation`) is of that side, every other file is split by the hash of
its documents.

Enters: files and folders. Leaves: sources in a fixed order, and the files that are none. Opens no
file.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from regmix.data.manifest import DOMAIN_NAME, LONGEST_DOMAIN_NAME
from regmix.errors import ConfigError, CorpusError
from regmix.files import storage_errors

FORMATS = {".jsonl": "lines", ".json": "lines", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SIDES = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid"}
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


def check_domain(name: str) -> str:
    """Return a domain's name; `CorpusError` where it could not name a file."""
    if not DOMAIN_NAME.fullmatch(name) or len(name) > LONGEST_DOMAIN_NAME:
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
                ignored.append(_printable(path.relative_to(root)))
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


def _printable(path: Path) -> str:
    return os.fsencode(path.as_posix()).decode(errors="backslashreplace")


def _source(
    path: Path, root: Path, domain_by: str, domains: Mapping[str, str] | None
) -> Source | None:
    stem, compression = path.name, ""
    if path.suffix in COMPRESSIONS:
        stem, compression = path.stem, path.suffix
    extension = Path(stem).suffix
    if extension not in FORMATS or (extension == ".parquet" and compression):
        return None
    if _printable(path) != path.as_posix():
        raise CorpusError(f"{_printable(path)}: its name is not UTF-8", cure="Rename it")
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
