"""Packing a large, dirty corpus in bounded memory, with books that balance.

Enters: a folder to work in (about 5 GB for 2 GB of text). Leaves: records of speed and memory,
and an error where a count differs from what was generated. The corpus has every format, a document
of 100 MB, one above the limit, malformed lines, other encodings and empty documents. It is packed
by the command line in a process of its own while the memory of the whole process tree is sampled.
What each domain must hold is counted apart: documents and reasons while generating, tokens with
`tokenizers` from the few distinct texts that the corpus repeats.

    python -m regmix_bench.pack_large --out FOLDER --json FILE
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regmix_bench import harness

NUM_TEXTS = 400  # distinct documents of a domain, 1 to 12 kB each
LONG_BYTES = 100_000_000
ABOVE_BYTES = 140_000_000
REASONS = ("malformed", "empty", "too_long", "no_token", "duplicate")
SAMPLE_SECONDS = 0.05
VOCABULARY = r"""
    the of and to in is that for it as was with be by on not he his but at are this have from or
    had an they which one you were all her she there would their we him been has when who will no
    more if out so up said what its about than into them can only other time new some could these
    two may first then do any like my now over such our man me even most made after also did many
    Straße naïve café Москва время 東京 日本語 한국어 Ελλάδα مرحبا עולם
    😀 1994 3.14 0x7f don't it's
    (see §4) #include <stdio.h> == != -> => :: \alpha \frac{1}{2} https://example.org/a?b=c
"""
WORDS = VOCABULARY.split()


@dataclass
class Expected:
    """What a domain must hold once it is packed."""

    uses: Counter[str] = field(default_factory=Counter)  # text -> times
    long_paragraphs: list[tuple[str, int]] = field(default_factory=list)  # paragraph, repeats
    dropped: Counter[str] = field(default_factory=Counter)
    records: int = 0

    def use(self, text: str) -> None:
        """Note a document."""
        self.uses[text] += 1
        self.records += 1

    def drop(self, reason: str) -> None:
        """Note a record that must be left out."""
        self.dropped[reason] += 1
        self.records += 1


def texts(seed: str) -> list[str]:
    """Return the distinct documents of a domain."""
    draw = random.Random(seed)
    made = []
    for number in range(NUM_TEXTS):
        sentences = [
            " ".join(draw.choices(WORDS, k=draw.randint(4, 24))) + draw.choice((".", "?", "!\n"))
            for _ in range(draw.randint(12, 150))
        ]
        made.append(f"{seed} {number}: " + draw.choice((" ", "\n", "  ")).join(sentences))
    return made


def line(text: str, *, ending: bytes = b"\n", ascii_only: bool = False) -> bytes:
    """Return a document as a line of JSON."""
    return json.dumps({"text": text, "id": 7}, ensure_ascii=ascii_only).encode() + ending


DIRT: tuple[tuple[bytes, str], ...] = (
    (b"{not json\n", "malformed"),
    (b'{"title": "no text"}\n', "malformed"),
    (b'{"text": null}\n', "malformed"),
    (b'{"text": "caf\xe9 in Latin-1"}\n', "malformed"),
    (b'{"text": "half a pair \\ud83d"}\n', "malformed"),
    ("\ufeff{}\n".encode(), "malformed"),
    ('{"text": "sixteen"}'.encode("utf-16-le") + b"\n", "malformed"),
    (b'["text"]\r\n', "malformed"),
    (b'{"text": ""}\n', "empty"),
    (b'{"text": " \\n\\t "}\r\n', "empty"),
)
KEPT_ODDITIES = (
    "a NUL \x00 inside",
    "windows\r\nlines\r\n",
    "\ufeffmark in a text",
    "e\u0301 apart",
)


def dirty_lines(seed: str, num_bytes: int, expected: Expected) -> Iterator[bytes]:
    """Yield lines of about `num_bytes`, one in fifty of them dirt, and blank ones."""
    draw = random.Random(f"lines {seed}")
    pool = texts(seed)
    encoded = {text: (line(text), line(text, ending=b"\r\n", ascii_only=True)) for text in pool}
    size = 0
    while size < num_bytes:
        kind = draw.random()
        if kind < 0.01:
            raw, reason = draw.choice(DIRT)
            expected.drop(reason)
        elif kind < 0.015:
            raw = draw.choice((b"\n", b"  \r\n"))
        elif kind < 0.02:
            text = draw.choice(KEPT_ODDITIES)
            raw = line(text)
            expected.use(text)
        else:
            text = draw.choice(pool)
            raw = encoded[text][draw.random() < 0.1]
            expected.use(text)
        size += len(raw)
        yield raw


def paragraph(seed: str) -> str:
    """Return a paragraph of about 1 MB that begins with a letter and ends with a sign."""
    draw = random.Random(f"paragraph {seed}")
    parts, size = ["Begin"], 0
    while size < 1_000_000:
        parts.append(draw.choice(WORDS))
        size += len(parts[-1].encode()) + 1
    return " ".join([*parts, "end."])


def long_text(seed: str, num_bytes: int, expected: Expected) -> str:
    """Return a document of paragraphs, each ended by a newline that is a token of its own."""
    text = paragraph(seed)
    repeats = num_bytes // len(text.encode())
    expected.long_paragraphs.append((text, repeats))
    expected.records += 1
    return (text + "\n") * repeats


def generate(root: Path, num_bytes: int) -> dict[str, Expected]:
    """Write the corpus; return what each domain must hold."""
    import zstandard

    root.mkdir(parents=True)
    domains = {name: Expected() for name in ("big", "code", "notes", "table", "web")}
    for number in range(4):
        with zstandard.open(root / f"web-{number}.jsonl.zst", "wb") as stream:
            for raw in dirty_lines(f"web {number}", num_bytes * 8 // 100, domains["web"]):
                stream.write(raw)
    with open(root / "big-0.jsonl", "wb") as plain:
        for half in range(2):
            for raw in dirty_lines(f"big {half}", num_bytes * 18 // 100, domains["big"]):
                plain.write(raw)
            if half == 0:
                plain.write(line(long_text("big", LONG_BYTES, domains["big"])))
                plain.write(b'{"text": "' + b"x" * ABOVE_BYTES + b'"}\n')
                domains["big"].drop("too_long")
    with gzip.open(root / "code-0.jsonl.gz", "wb", compresslevel=3) as zipped:
        for raw in dirty_lines("code", num_bytes * 12 // 100, domains["code"]):
            zipped.write(raw)
    _write_table(root / "table-0.parquet", num_bytes * 12 // 100, domains["table"])
    _write_notes(root, num_bytes * 4 // 100, domains["notes"])
    return domains


def _write_table(path: Path, num_bytes: int, expected: Expected) -> None:
    import pyarrow
    import pyarrow.parquet

    draw, pool, size = random.Random("table"), texts("table"), 0
    schema = pyarrow.schema([("text", pyarrow.string()), ("url", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while size < num_bytes:
            rows: list[str | None] = [draw.choice(pool) for _ in range(5000)]
            for text in rows:
                expected.use(str(text))
                size += len(str(text).encode())
            rows += [None, ""]
            expected.drop("malformed")
            expected.drop("empty")
            writer.write_table(pyarrow.table({"text": rows, "url": ["x"] * len(rows)}, schema))


def _write_notes(root: Path, num_bytes: int, expected: Expected) -> None:
    draw, pool, size, number = random.Random("notes"), texts("notes"), 0, 0
    while size < num_bytes:
        text = draw.choice(pool)
        expected.use(text)
        (root / f"notes-{number}.txt").write_bytes(text.encode())
        size, number = size + len(text.encode()) * 40, number + 1
    (root / "notes-long.txt").write_bytes(long_text("notes", LONG_BYTES, expected).encode())
    for name, raw, reason in (
        ("latin", "déjà vu\n".encode("latin-1") * 50, "malformed"),
        ("sixteen", "UTF-16 text\n".encode("utf-16"), "malformed"),
        ("unmarked", b"\n".join([b"UTF-16"] * 9).decode().encode("utf-16-le"), "malformed"),
        ("blank", b" \r\n\t\n", "empty"),
    ):
        (root / f"notes-{name}.txt").write_bytes(raw)
        expected.drop(reason)


@dataclass
class Usage:
    """What a process tree used."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    pss_bytes: int = 0  # largest sum at one instant; pages that are shared count once
    peak_rss_bytes: int = 0  # sum over processes of the peak of each


def measure(command: list[str]) -> tuple[Usage, str]:
    """Run a command while sampling its process tree; return the usage and its output."""
    usage, peaks = Usage(), dict[int, int]()
    started = time.monotonic()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        total = 0
        for pid in _tree(process.pid):
            pss, peak = _memory(pid)
            total += pss
            peaks[pid] = max(peaks.get(pid, 0), peak)
        usage.pss_bytes = max(usage.pss_bytes, total)
        time.sleep(SAMPLE_SECONDS)
    output = process.stdout.read() if process.stdout else ""
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    usage.seconds = time.monotonic() - started
    children = (after.children_user, after.children_system)
    usage.cpu_seconds = sum(children) - before.children_user - before.children_system
    usage.peak_rss_bytes = sum(peaks.values())
    return usage, output


def _tree(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue  # it has ended
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
    return tree


def _memory(pid: int) -> tuple[int, int]:
    """Return (proportional set size, peak resident size) in bytes; 0 where it has ended."""
    try:
        pss = _field(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
        return pss, _field(Path(f"/proc/{pid}/status"), "VmHWM:")
    except (OSError, StopIteration):
        return 0, 0


def _field(path: Path, name: str) -> int:
    lines = path.read_text().splitlines()
    return int(next(row for row in lines if row.startswith(name)).split()[1]) * 1024


def check(domains: dict[str, Expected], report: dict[str, Any], tokenizer: Path) -> int:
    """Compare the report with what was generated; return the UTF-8 bytes packed."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True

    def length(text: str) -> int:
        return len(library.encode(text, add_special_tokens=False).ids)

    total = records = 0
    for name, expected in domains.items():
        utf8 = sum(len(text.encode()) * times for text, times in expected.uses.items())
        tokens = sum((length(text) + 1) * times for text, times in expected.uses.items())
        for text, repeats in expected.long_paragraphs:
            # The newline is a word of its own, whatever letter follows it.
            tokens += (length(text) + length("\n")) * repeats + 1
            utf8 += len(text.encode() + b"\n") * repeats
        documents = sum(expected.uses.values()) + len(expected.long_paragraphs)
        wanted = {"documents": documents, "tokens": tokens, "utf8_bytes": utf8}
        wanted |= {reason: expected.dropped[reason] for reason in REASONS}
        parts = [split[name] for split in report["splits"].values() if name in split]
        found = {key: sum(part[key] for part in parts) for key in wanted}
        if found != wanted:
            raise RuntimeError(f"domain {name}: generated {wanted}, packed {found}")
        if expected.records != documents + expected.dropped.total():
            raise RuntimeError(f"domain {name}: the generator's own books do not balance")
        total, records = total + utf8, records + expected.records
    if report["records"] != records:
        raise RuntimeError(f"{records} records generated, {report['records']} read")
    return total


def main() -> None:
    """Generate, pack, check, print the records; with --json, append them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to work in")
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the text")
    parser.add_argument("--workers", type=int, default=2, help="encoding processes")
    parser.add_argument("--tokenizer", help="tokenizer.json; otherwise a BPE is trained")
    parser.add_argument("--keep", action="store_true", help="leave the folder's content")
    arguments = parser.parse_args()
    root = Path(arguments.out)
    print("generating", file=sys.stderr, flush=True)
    domains = generate(root / "corpus", int(arguments.gigabytes * 1e9))
    command = [sys.executable, "-m", "regmix.cli", "pack", str(root / "corpus")]
    command += ["--out", str(root / "shards"), "--workers", str(arguments.workers), "--json"]
    command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
    usage, output = measure(command)
    report = json.loads(output)
    print("checking", file=sys.stderr, flush=True)
    text_bytes = check(domains, report, root / "shards" / "tokenizer.json")
    case = f"{arguments.gigabytes:g} GB, {arguments.workers} workers, {report['engine']}"
    values = (
        ("text packed", text_bytes / 1e6, "MB"),
        ("speed", text_bytes / 1e6 / usage.seconds, "MB/s of text"),
        ("speed per core", text_bytes / 1e6 / usage.cpu_seconds, "MB/s of text"),
        ("memory of all processes at once (PSS)", usage.pss_bytes / 1e6, "MB"),
        ("sum of the processes' peaks (RSS)", usage.peak_rss_bytes / 1e6, "MB"),
        ("records read", report["records"], "records, all accounted for"),
        ("text compared with tokenizers", report["verified_bytes"] / 1e6, "MB"),
    )
    records = [
        harness.Record(suite="pack_large", case=case, metric=metric, value=value, unit=unit)
        for metric, value, unit in values
    ]
    print(harness.table(records))
    if arguments.json:
        harness.append(arguments.json, records)
    if not arguments.keep:
        for name in ("corpus", "shards"):
            shutil.rmtree(root / name)


if __name__ == "__main__":
    main()
