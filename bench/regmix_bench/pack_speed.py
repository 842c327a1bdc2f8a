"""Packing text into shards against other ways to prepare it: text per second and core, memory.

Enters: a corpus of `.jsonl.zst` files, a tokenizer. Leaves: records, and the table of targets. Our
side is the command `regmix-fast pack` on all of the corpus; the other ways encode a sample of its
documents, every n-th of each file, since they are tens of times slower. Seconds leave out imports
on both sides. One worker is one process tree held to one core.

    python -m regmix_bench.pack_speed --corpus CORPUS --tokenizer tokenizer.json --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix_bench import harness
from regmix_bench.harness import Record
from regmix_bench.pack_peers import texts
from regmix_bench.peer_imports import with_versions

SUITE = "pack"
LIMIT_SECONDS = 120  # of one run
NAMES = {
    "regmix": "regmix pack",
    "script": "reference script",
    "encode_batch": "tokenizers encode_batch, nothing written",
    "litdata": "litdata optimize",
    "mosaic": "mosaicml-streaming MDSWriter",
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to pack and its number of workers."""

    kind: str
    workers: int

    @property
    def name(self) -> str:
        """Name in the records."""
        word = "worker" if self.kind == "regmix" else "process"
        plural = {"worker": "s", "process": "es"}[word] * (self.workers > 1)
        return f"{NAMES[self.kind]}, {self.workers} {word}{plural}"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A folder of `.jsonl.zst`, and the bytes of text in it."""

    folder: Path
    utf8_bytes: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run took."""

    seconds: float
    peak_bytes: int


def write_texts(folder: Path, name: str, documents: Iterator[str]) -> int:
    """Write documents as one file of compressed JSON lines; return the bytes of text."""
    import zstandard

    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    compressor = zstandard.ZstdCompressor(level=6)
    with (
        (folder / f"{name}.jsonl.zst").open("wb") as raw,
        compressor.stream_writer(raw, closefd=False) as packed,
    ):
        for text in documents:
            total += len(text.encode())
            packed.write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
    return total


def prepare(corpus: Path, folder: Path, *, megabytes: float, copies: int) -> tuple[Texts, Texts]:
    """Return (all documents, every n-th of them): files of one name a domain."""
    files = sorted((corpus / "train").glob("*.jsonl.zst")) or sorted(corpus.glob("*.jsonl.zst"))
    if not files:
        raise SystemExit(f"{corpus}: no .jsonl.zst files in it or in its folder train")
    lists = {path.name.removesuffix(".jsonl.zst"): list(texts(path)) for path in files}
    num_bytes = sum(len(text.encode()) for documents in lists.values() for text in documents)
    stride = max(1, round(num_bytes / (megabytes * 1e6)))
    whole = sample = 0
    for name, documents in lists.items():
        whole += write_texts(folder / "all", name, iter(documents * copies))
        sample += write_texts(folder / "sample", name, iter(documents[::stride]))
    return (
        Texts(folder=folder / "all", utf8_bytes=whole),
        Texts(folder=folder / "sample", utf8_bytes=sample),
    )


def train_tokenizer(sample: Texts, path: Path) -> Path:
    """Train a small byte-level BPE, where no tokenizer is given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (text for file in sorted(sample.folder.iterdir()) for text in texts(file))
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path))
    return path


def tree_bytes(root: int) -> int:
    """Return the resident memory of a process and all below it; shared pages count for each."""
    total, left = 0, [root]
    while left:
        pid = left.pop()
        try:
            words = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
            total += int(words[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{pid}/task").iterdir():
                left += map(int, (task / "children").read_text(encoding="ascii").split())
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile
    return total


def run_command(command: list[str], cores: set[int]) -> tuple[str, int]:
    """Run a command on these cores; return its stdout and its tree's peak memory."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        start_new_session=True,
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()[0], f"not done after {LIMIT_SECONDS} s"
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError((errors.strip().splitlines() or ["it gave no reason"])[-1])
    return output, peak


def run_way(way: Way, corpus: Texts, tokenizer: Path, out: Path) -> Outcome:
    """Pack once into a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cores = sorted(os.sched_getaffinity(0))
    if way.kind == "regmix":
        words = [sys.executable, "-m", "regmix.cli", "pack", str(corpus.folder)]
        words += ["--out", str(out / "shards"), "--tokenizer", str(tokenizer)]
        words += ["--workers", str(way.workers), "--json"]
    else:
        words = [sys.executable, "-m", "regmix_bench.pack_peers", way.kind, str(corpus.folder)]
        words += [str(tokenizer), str(out), str(way.workers)]
    output, peak = run_command(words, set(cores[-way.workers :]))
    answer: dict[str, Any] = json.loads(output[output.index("{") : output.rindex("}") + 1])
    return Outcome(seconds=float(answer["seconds"]), peak_bytes=peak)


def identical(shards: Path, sample: Texts, tokenizer: Path) -> float:
    """Return the share of the sample's documents whose ids the shards hold as `tokenizers` has it.

    Documents are compared by the hash of their ids, so their order does not matter.
    """
    import numpy as np
    import xxhash
    from tokenizers import Tokenizer

    from regmix.data.shards import ShardSet

    packed, held = ShardSet.open(shards), set()
    for split in packed.splits:
        for domain in packed.domains(split):
            tokens = np.concatenate([np.asarray(a) for a in packed.arrays(split, domain)])
            starts = packed.document_offsets(split, domain).astype(np.int64)
            for start, stop in zip(starts, np.r_[starts[1:], len(tokens)], strict=True):
                ids = tokens[start : stop - 1].astype(np.uint32)  # the last is the separator
                held.add(xxhash.xxh3_64_intdigest(ids.tobytes()))
    reference, found, num = Tokenizer.from_file(str(tokenizer)), 0, 0
    for file in sorted(sample.folder.iterdir()):
        for text in texts(file):
            encoded = reference.encode(text, add_special_tokens=False).ids
            found += xxhash.xxh3_64_intdigest(np.array(encoded, np.uint32).tobytes()) in held
            num += 1
    return found / num


def run_rounds(
    ways: list[Way], whole: Texts, sample: Texts, tokenizer: Path, folder: Path, rounds: int
) -> dict[Way, list[Outcome]]:
    """Visit the ways in turn; a way that cannot run here is named and left out."""
    outcomes: dict[Way, list[Outcome]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(outcomes):
            corpus = whole if way.kind == "regmix" else sample
            try:
                outcome = run_way(way, corpus, tokenizer, folder / f"{way.kind}-{way.workers}")
            except RuntimeError as error:
                print(f"left out: {way.name} ({error})", file=sys.stderr, flush=True)
                del outcomes[way]
                continue
            outcomes[way].append(outcome)
            speed = corpus.utf8_bytes / 1e6 / outcome.seconds
            print(
                f"{time.strftime('%H:%M:%S')} round {number + 1}: {way.name}: {speed:.2f} MB/s",
                file=sys.stderr,
                flush=True,
            )
    return outcomes


def make_records(outcomes: dict[Way, list[Outcome]], whole: Texts, sample: Texts) -> list[Record]:
    """Return speed per core, ratios of ours to each way with as many workers, and memory."""
    records = []

    def megabytes(way: Way) -> float:
        return (whole if way.kind == "regmix" else sample).utf8_bytes / 1e6

    def speed(way: Way, **against: Any) -> Record:
        values = [megabytes(way) / run.seconds / way.workers for run in outcomes[way]]
        return Record(
            suite=SUITE,
            case=way.name,
            metric="text per core",
            value=statistics.median(values),
            unit="MB/s",
            **against,
        )

    for way, runs in outcomes.items():
        records.append(speed(way))
        peak = max(run.peak_bytes for run in runs) / 1e9
        records.append(
            Record(suite=SUITE, case=way.name, metric="peak memory", value=peak, unit="GB")
        )
    for ours in (way for way in outcomes if way.kind == "regmix"):
        for other in (way for way in outcomes if way.kind != "regmix"):
            if other.workers == ours.workers:
                ratio = statistics.median(
                    (megabytes(ours) / mine.seconds) / (megabytes(other) / theirs.seconds)
                    for mine, theirs in zip(outcomes[ours], outcomes[other], strict=True)
                )
                records.append(speed(ours, peer=other.name, ratio_to_peer=ratio))
    return records


def large_file_record(whole: Texts, tokenizer: Path, folder: Path, gigabytes: float) -> Record:
    """Pack one file of many GB of text on two workers, and return the peak memory."""
    parts = [path.read_bytes() for path in sorted(whole.folder.iterdir())]
    one = folder / "large"
    one.mkdir(exist_ok=True)
    copies = max(1, round(gigabytes * 1e9 / whole.utf8_bytes))
    with (one / "all-0.jsonl.zst").open("wb") as stream:
        for _ in range(copies):
            for part in parts:  # frames of one stream
                stream.write(part)
    size = copies * whole.utf8_bytes
    workers = min(2, len(os.sched_getaffinity(0)))
    way = Way(kind="regmix", workers=workers)
    outcome = run_way(way, Texts(folder=one, utf8_bytes=size), tokenizer, folder / "large-out")
    print(f"one file: {size / 1e6 / outcome.seconds:.1f} MB/s", file=sys.stderr, flush=True)
    return Record(
        suite=SUITE,
        case=f"{way.name}, one file of {size / 1e9:.1f} GB of text",
        metric="peak memory",
        value=outcome.peak_bytes / 1e9,
        unit="GB",
    )


def measure_all(arguments: argparse.Namespace, folder: Path) -> list[Record]:
    """Prepare the texts and measure everything."""
    megabytes = arguments.sample_mb
    whole, sample = prepare(
        Path(arguments.corpus), folder, megabytes=megabytes, copies=arguments.copies
    )
    if arguments.tokenizer:
        tokenizer = Path(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer(sample, folder / "tokenizer.json")
    kinds = arguments.way or list(NAMES)
    numbers = [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    ways = [Way(kind=kind, workers=workers) for workers in numbers for kind in kinds]
    outcomes = run_rounds(ways, whole, sample, tokenizer, folder / "out", arguments.rounds)
    records = make_records(outcomes, whole, sample)
    ours = next((way for way in outcomes if way.kind == "regmix"), None)
    if ours:
        share = identical(
            folder / "out" / f"{ours.kind}-{ours.workers}" / "shards", sample, tokenizer
        )
        records.append(
            Record(
                suite=SUITE,
                case=f"{ours.name}, {sample.utf8_bytes / 1e6:.0f} MB of its documents",
                metric="documents with identical ids",
                value=share,
                unit="",
            )
        )
        if arguments.large_gb:
            records.append(large_file_record(whole, tokenizer, folder, arguments.large_gb))
    return records


def main() -> None:
    """Measure, print the tables, write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="folder of .jsonl.zst, or of train/")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json; else a BPE is trained")
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--copies", type=int, default=1, help="times our side reads the corpus")
    parser.add_argument("--sample-mb", type=float, default=8.0, help="text for the other ways")
    parser.add_argument("--large-gb", type=float, default=2.0, help="text in one file; 0: none")
    parser.add_argument("--way", action="append", choices=list(NAMES), help="only this way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regmix-bench-") as temporary:
        records = measure_all(arguments, Path(temporary))
    from regmix_bench import targets

    print(harness.table(records))
    print()
    print(targets.table(records))
    if arguments.json:
        harness.append(arguments.json, with_versions(records))


if __name__ == "__main__":
    main()
