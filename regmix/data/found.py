"""A corpus from text that is on this machine anyway, for the demo: nothing is downloaded.

Domains: `python` (standard library sources without their docstrings), `cpp` (headers that come
with Python, NumPy and torch), `docs` (docstrings and pydoc topics), `legal` (licence files),
`readme` (descriptions of installed packages), `maths` (problems generated here).

Enters: a folder and a seed. Leaves: `<domain>-0.jsonl` files and counts, the same bytes each time
on one machine. A domain with too little text is left out and named. Packs nothing.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import xxhash

from regmix.data.problems import problem_documents
from regmix.files import atomic_open, storage_errors

MAX_BYTES_PER_DOMAIN = 3_000_000
MIN_BYTES_PER_DOMAIN = 60_000
MIN_CHARACTERS = 200
MAX_CHARACTERS = 20_000
MAX_FILE_BYTES = 1_000_000
LICENCE_NAME = re.compile(r"(licen[cs]e|copying|copyright|notice)", re.IGNORECASE)
# Not prose or code that a person wrote: tests, tables, and one small generated header an operator.
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "dist-packages", "lib2to3", "pydoc_data"}
SKIPPED_HEADERS = "ATen/ops/"


@dataclass(frozen=True, kw_only=True)
class FoundDomain:
    """What was found for one domain; `reason` says why it was left out, else it is None."""

    documents: int
    utf8_bytes: int
    duplicates: int  # pieces that stood in the corpus already
    too_short: int  # pieces under 200 characters
    path: Path | None
    reason: str | None = None


def collect(
    out: Path | str, *, max_bytes_per_domain: int = MAX_BYTES_PER_DOMAIN, seed: int = 0
) -> dict[str, FoundDomain]:
    """Write one file of JSON lines per domain into `out` and return what they hold.

    Documents are 200 to 20,000 characters long; longer texts are cut at line ends. No text stands
    twice in the corpus, case and white space aside. `seed` chooses among more text than asked for.
    """
    folder = Path(out)
    seen: set[bytes] = set()
    found = {}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for domain in sorted(DOMAINS):
        texts = DOMAINS[domain](Random(f"{domain} {seed}"))
        found[domain] = _write(folder / f"{domain}-0.jsonl", texts, max_bytes_per_domain, seen)
    return found


def _write(path: Path, texts: Iterator[str], max_bytes: int, seen: set[bytes]) -> FoundDomain:
    lines: list[str] = []
    total = duplicates = too_short = 0
    for piece in (piece for text in texts for piece in _pieces(text)):
        key = xxhash.xxh3_128_digest(" ".join(piece.lower().split()).encode())
        if len(piece) < MIN_CHARACTERS:
            too_short += 1
        elif key in seen:
            duplicates += 1
        else:
            size = len(piece.encode())
            if total + size > max_bytes:
                break
            seen.add(key)
            total += size
            lines.append(json.dumps({"text": piece}, ensure_ascii=False))
    if total < min(MIN_BYTES_PER_DOMAIN, max_bytes // 2):
        reason = f"only {total / 1000:.0f} kB of text found on this machine"
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return FoundDomain(
            documents=0,
            utf8_bytes=0,
            duplicates=duplicates,
            too_short=too_short,
            path=None,
            reason=reason,
        )
    with atomic_open(path, "w") as stream:
        stream.writelines(line + "\n" for line in lines)
    return FoundDomain(
        documents=len(lines),
        utf8_bytes=total,
        duplicates=duplicates,
        too_short=too_short,
        path=path,
    )


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `MAX_CHARACTERS`, at an empty line or a line end."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, from a badly decoded description
        return
    if "\0" in text:
        return
    while len(text) > MAX_CHARACTERS:
        cut = text.rfind("\n\n", MAX_CHARACTERS // 2, MAX_CHARACTERS)
        cut = cut if cut > 0 else text.rfind("\n", MAX_CHARACTERS // 2, MAX_CHARACTERS)
        cut = cut if cut > 0 else MAX_CHARACTERS
        yield text[:cut].strip("\n")
        text = text[cut:]
    yield text.strip("\n")


def _read(path: Path) -> str | None:
    """Return a text file, or None where it is not one of a reasonable size."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _files(draw: Random, folders: list[Path], pattern: str) -> Iterator[tuple[Path, str]]:
    """Yield (path, text) of matching files below the folders, in an order drawn by the seed."""
    paths = sorted({path for folder in folders for path in folder.rglob(pattern)})
    draw.shuffle(paths)
    for path in paths:
        text = _read(path)
        if text is not None:
            yield path, text


def _package(name: str) -> Path | None:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _python_sources(draw: Random, folders: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path, source in _files(draw, folders, "*.py"):
        root = next(folder for folder in folders if path.is_relative_to(folder))
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield source, ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, ast.Expr, bool]]:
    """Yield (name of the owner, the docstring's statement, whether the body holds nothing else)."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        # Definitions are statements: walking expressions too would take ten times as long.
        for branch in ("handlers", "finalbody", "orelse", "body"):
            waiting.extend(reversed(getattr(node, branch, ())))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield getattr(node, "name", ""), first, len(node.body) == 1


def _python(draw: Random) -> Iterator[str]:
    for source, tree in _python_sources(draw, [Path(sysconfig.get_path("stdlib"))]):
        original = source.split("\n")
        lines: list[str | None] = list(original)
        for _, docstring, alone in _docstrings(tree):
            first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
            if original[first].encode()[: docstring.col_offset].strip():
                continue  # on the line of its def
            lines[first:last] = [None] * (last - first)
            if alone:
                lines[first] = " " * docstring.col_offset + "pass"
        yield "\n".join(line for line in lines if line is not None)


def _docs(draw: Random) -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    folders = [Path(sysconfig.get_path("stdlib")), _package("numpy"), _package("scipy")]
    for _, tree in _python_sources(draw, [folder for folder in folders if folder is not None]):
        entries = []
        for name, docstring, _ in _docstrings(tree):
            text = ast.literal_eval(docstring.value).strip()
            entries.append(f"{name}\n\n{text}" if name else text)
        yield "\n\n".join(entries)


def _cpp(draw: Random) -> Iterator[str]:
    folders = [Path(sysconfig.get_path("include"))]
    for name, inside in (("numpy", "_core/include"), ("torch", "include")):
        package = _package(name)
        if package is not None:
            folders.append(package / inside)
    for path, text in _files(draw, folders, "*.h"):
        if SKIPPED_HEADERS not in path.as_posix():
            yield text


def _legal(draw: Random) -> Iterator[str]:
    paths = set(Path("/usr/share/common-licenses").glob("*"))
    paths.update(Path("/usr/share/doc").glob("*/copyright"))
    paths.update(Path(sysconfig.get_path("stdlib")).glob("LICENSE*"))
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for metadata in Path(folder).glob("*.dist-info"):
            paths.update(path for path in metadata.rglob("*") if LICENCE_NAME.search(path.name))
    ordered = sorted(path for path in paths if path.is_file())
    draw.shuffle(ordered)
    for path in ordered:
        text = _read(path)
        if text is not None:
            yield text


def _readme(draw: Random) -> Iterator[str]:
    texts = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata.json
        texts[f"{metadata['name']} {metadata['version']}"] = str(metadata.get("description", ""))
    names = sorted(texts)
    draw.shuffle(names)
    yield from (texts[name] for name in names)


DOMAINS: dict[str, Callable[[Random], Iterator[str]]] = {
    "cpp": _cpp,
    "docs": _docs,
    "legal": _legal,
    "maths": problem_documents,
    "python": _python,
    "readme": _readme,
}
