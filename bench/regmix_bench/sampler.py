"""The sampler against other loaders and against the machine, side by side in one run.

Enters: a folder for the data (made once, 6 GB at full size). Leaves: records,
the table of targets beside what was achieved, and a picture. The work: 17 domains with the Pile's
prior, 1.5 GB of tokens in the page cache, batches of 16 x 2049 delivered in one process. Every
contender is a process of its own; rounds visit them in turn and ratios are medians over rounds.

    python -m regmix_bench.sampler --json results.jsonl --picture results.png
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from regmix.files import free_bytes
from regmix_bench import harness, sampler_order
from regmix_bench.harness import Record
from regmix_bench.peer_imports import with_versions
from regmix_bench.sampler_damage import damage_records
from regmix_bench.sampler_data import SEQ_LEN, Corpus, make_corpus
from regmix_bench.sampler_peers import PEERS
from regmix_bench.sampler_worker import Contender, Worker

SUITE = "sampler"
RESUME_STEP = 6250  # 100,000 sequences: as far as a loader that replays can be taken here

COPY = Contender(kind="copy", system="memcpy, 1 thread")
GATHERS = tuple(
    Contender(kind="gather", system="gather of known ids", dtype=dtype, workers=threads)
    for dtype in ("int32", "int64")
    for threads in (1, 2)
)
BATCH_CALL = Contender(kind="ours", system="regmix, batch()")
OURS = (
    BATCH_CALL,
    Contender(kind="ours", system="regmix, batch(), new arrays", reuse=False),
    Contender(kind="ours", system="regmix, batch(), Numba", backend="numba"),
    Contender(kind="ours", system="regmix, batch(), NumPy", backend="numpy"),
)
RINGS = tuple(
    Contender(kind="ring", system="regmix, ring", dtype=dtype, workers=threads)
    for dtype in ("int32", "int64")
    for threads in (1, 2)
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much to measure."""

    num_bytes: int = 1_500_000_000
    rounds: int = 5
    seconds: float = 1.0
    error_sequences: int = 100_000
    starts: int = 5
    resume_steps: tuple[int, ...] = (RESUME_STEP, 1_000_000)
    peer_resume_step: int = RESUME_STEP
    prefix_mixtures: int = 12
    prefix_sequences: int = 20_000
    many: tuple[int, ...] = (1000, 2000, 5000, 10_000)
    many_domains: tuple[int, ...] = sampler_order.GRID_DOMAINS
    damages: int = 100
    workers: tuple[int, ...] | None = None
    """DataLoader workers to try for every peer, where not its own list."""


QUICK = Effort(
    num_bytes=24_000_000,
    rounds=1,
    seconds=0.1,
    error_sequences=1600,
    starts=1,
    resume_steps=(10, 1000),
    peer_resume_step=10,
    prefix_mixtures=1,
    prefix_sequences=300,
    many=(2, 4),
    many_domains=(10, 20),
    damages=5,
    workers=(0,),
)


@dataclass
class Measured:
    """What the contenders' processes said."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    contenders: dict[str, Contender] = field(default_factory=dict)
    starts: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    resumes: dict[str, float] = field(default_factory=dict)


def say(words: str) -> None:
    """Tell how far the run is."""
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def make_peers(corpus: Corpus, names: Iterable[str]) -> list[str]:
    """Write the data of every peer that is here, each in a process; return their names."""
    there = []
    for name in names:
        say(f"data of {name}")
        call = "import sys; from regmix_bench import sampler; sampler.make_peer(*sys.argv[1:])"
        words = [sys.executable, "-c", call, name, str(corpus.folder), str(corpus.num_tokens)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            say(f"left out: {name} ({last})")
        else:
            there.append(name)
    return there


def make_peer(name: str, folder: str, num_tokens: str) -> None:
    """Write the data of one peer; exits with its reason where it is not installed."""
    peer = PEERS[name](Corpus(folder=Path(folder), num_tokens=int(num_tokens)))
    missing = peer.missing()
    if missing:
        raise SystemExit(missing)
    peer.make()


def contenders(peers: list[str], effort: Effort) -> list[Contender]:
    """Return all that is measured, in the order of a round."""
    found = [COPY, *GATHERS, *OURS, *RINGS]
    for name in peers:
        for workers in effort.workers or PEERS[name].workers:
            found.append(Contender(kind="peer", system=name, workers=workers))
    return found


def run(corpus: Corpus, peers: list[str], effort: Effort) -> Measured:
    """Start every contender, then measure them in rounds."""
    measured = Measured()
    workers: list[Worker] = []
    try:
        for contender in contenders(peers, effort):
            worker = Worker(contender, corpus)
            workers.append(worker)
            if worker.error:
                say(f"left out: {contender.name} ({worker.error})")
                workers.pop().close()
                continue
            _first_questions(worker, measured, effort)
        for number in range(effort.rounds):
            say(f"round {number + 1} of {effort.rounds}")
            for worker in workers:
                rate = worker.ask("measure", effort.seconds)
                measured.rates[worker.contender.name].append(rate)
    finally:
        for worker in workers:
            worker.close()
    return measured


def _first_questions(worker: Worker, measured: Measured, effort: Effort) -> None:
    """Ask what depends on the first batches, and warm the contender up."""
    contender = worker.contender
    name, peer = contender.name, contender.kind == "peer"
    measured.contenders[name], measured.rates[name] = contender, []
    measured.starts[name] = worker.start
    if contender == BATCH_CALL or (peer and contender.workers == 0):
        measured.errors[name] = worker.ask("errors", effort.error_sequences)
    if peer and contender.workers == 0:
        measured.resumes[name] = worker.ask("resume", effort.peer_resume_step)
    warm = worker.ask("measure", effort.seconds)
    say(f"{name}: {warm:,.4g} {contender.unit}")


def speed_records(measured: Measured) -> list[Record]:
    """Return every contender's speed, and the ratios of ours to all peers and ceilings."""

    def record(name: str, **against: object) -> Record:
        return Record(
            suite=SUITE,
            case=name,
            metric="speed",
            value=statistics.median(measured.rates[name]),
            unit=measured.contenders[name].unit,
            **against,  # type: ignore[arg-type]
        )

    def ratio(own: str, other: str) -> float:
        pairs = zip(measured.rates[own], measured.rates[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    kinds = {name: contender.kind for name, contender in measured.contenders.items()}
    records = [record(name) for name in kinds]
    for name in (name for name, kind in kinds.items() if kind in ("ours", "ring")):
        for other in (other for other, kind in kinds.items() if kind == "peer"):
            records.append(record(name, peer=other, ratio_to_peer=ratio(name, other)))
        ours = measured.contenders[name]
        for other, gather in measured.contenders.items():
            same = gather.dtype == ours.dtype and gather.workers == max(1, ours.workers)
            if gather.kind == "gather" and same:
                value = ratio(name, other)
                records.append(record(name, ceiling=other, ratio_to_ceiling=value))
    for name, kind in kinds.items():
        if kind == "gather":  # uint16 in, 4 or 8 bytes out, for each token
            dtype = measured.contenders[name].dtype
            moved = (SEQ_LEN + 1) * (2 + (4 if dtype == "int32" else 8)) / 1e9
            rate = statistics.median(measured.rates[name]) * moved
            metric = "bytes read and written"
            records.append(Record(suite=SUITE, case=name, metric=metric, value=rate, unit="GB/s"))
    return records


def other_records(measured: Measured, effort: Effort) -> list[Record]:
    """Return the peers' starts, resumes and weight errors, and our weight error beside them."""
    records = []
    for name, start in measured.starts.items():
        if measured.contenders[name].kind != "peer":
            continue
        for metric, key in (
            ("start-up: open, first batch", "first_batch_seconds"),
            ("start-up, whole process", "process_seconds"),
        ):
            value = 1000 * start[key]
            records.append(Record(suite=SUITE, case=name, metric=metric, value=value, unit="ms"))
    for name, seconds in measured.resumes.items():
        metric = f"resume at step {effort.peer_resume_step:,}: restore, first batch"
        value = 1000 * seconds
        records.append(Record(suite=SUITE, case=name, metric=metric, value=value, unit="ms"))
    for name, errors in measured.errors.items():
        for num, error in errors:
            metric = f"worst weight error after {num:,} sequences"
            records.append(Record(suite=SUITE, case=name, metric=metric, value=error, unit=""))
    return records


def measure_all(folder: Path, effort: Effort, peers: Iterable[str]) -> list[Record]:
    """Make the data and measure everything."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus.json").is_file() and free_bytes(folder) < 5 * effort.num_bytes:
        raise SystemExit(
            f"{folder}: needs {5 * effort.num_bytes / 1e9:.1f} GB; name a --data FOLDER"
        )
    corpus = make_corpus(folder, effort.num_bytes)
    there = make_peers(corpus, peers)
    measured = run(corpus, there, effort)
    records = speed_records(measured) + other_records(measured, effort)
    say("starts and resumes")
    records += sampler_order.start_records(corpus, effort.starts)
    records += sampler_order.resume_records(corpus, effort.resume_steps, effort.starts)
    say("weight error of every prefix")
    records += sampler_order.error_records(
        mixtures=effort.prefix_mixtures, num_sequences=effort.prefix_sequences
    )
    say("many mixtures")
    records += sampler_order.many_records(corpus, list(effort.many), effort.many_domains)
    say("cold reads")
    records += sampler_order.cold_records(corpus)
    say("damage")
    return records + damage_records(folder / "damage", effort.damages)


def _is_trace(record: Record, effort: Effort) -> bool:
    """Return whether a record is a point of the picture's curves only."""
    marks = (f"after {effort.error_sequences:,} ", "after 10,000 ")
    return "weight error after" in record.metric and not any(m in record.metric for m in marks)


def main() -> None:
    """Measure, print the tables, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    parser.add_argument("--picture", metavar="FILE", help="draw the records into FILE (PNG)")
    parser.add_argument("--data", metavar="FOLDER", help="keep the data here for the next run")
    parser.add_argument("--quick", action="store_true", help="24 MB and moments: a test of itself")
    parser.add_argument("--rounds", type=int, help="interleaved rounds of a second per contender")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="only this peer")
    parser.add_argument("--no-peers", action="store_true", help="none of the other loaders")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else Effort()
    if arguments.rounds:
        effort = replace(effort, rounds=arguments.rounds)
    peers = [] if arguments.no_peers else arguments.peer or list(PEERS)
    with tempfile.TemporaryDirectory(prefix="regmix-bench-") as temporary:
        folder = Path(arguments.data or temporary)
        records = measure_all(folder, effort, peers)
    from regmix_bench import targets

    print(harness.table(record for record in records if not _is_trace(record, effort)))
    print()
    print(targets.table(records))
    if arguments.json:
        harness.append(arguments.json, with_versions(records))
    if arguments.picture:
        from regmix_bench import chart

        chart.draw(records, Path(arguments.picture))


if __name__ == "__main__":
    main()
