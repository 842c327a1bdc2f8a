"""What the sampler promises beyond speed: exact weights, short starts, many mixtures, cold data.

Enters: the corpus, or domains made up in memory. Leaves: records. Each measurement that speaks of
start-up, memory or cold pages runs in a fresh process of its own.

    python -m regmix_bench.sampler_order start FOLDER NUM_TOKENS
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from regmix_bench.harness import Record
from regmix_bench.sampler_data import (
    BATCH,
    SEQ_LEN,
    WEIGHTS,
    Corpus,
    drop_pages,
    share_in_memory,
)

SUITE = "sampler"
NUM_DOMAINS = (1, 2, 3, 5, 17, 64, 250, 1000)
GRID_DOMAINS = (125, 250, 500, 1000)
PLANNED_STEPS = 64
COLD_SECONDS = 4.0


class MadeUp:
    """Domains in memory that all share one array of tokens: nothing of them is read."""

    def __init__(self, num_domains: int, seq_len: int = 16) -> None:
        self._names = tuple(f"domain-{number:04d}" for number in range(num_domains))
        self._tokens = np.zeros(64 * seq_len + 1, np.uint16)

    def domains(self, split: str) -> tuple[str, ...]:
        """Return the names."""
        return self._names

    def arrays(self, split: str, domain: str) -> tuple[np.ndarray, ...]:
        """Return the tokens."""
        return (self._tokens,)


def draw_weights(num_domains: int, seed: int) -> dict[str, float]:
    """Return weights from flat to spiky: Dirichlet, its concentration drawn from 0.1 to 10."""
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.full(num_domains, 10 ** generator.uniform(-1, 1)))
    weights = np.maximum(weights, 1e-9)
    names = MadeUp(num_domains).domains("train")
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))


def worst_error(num_domains: int, seed: int, num_sequences: int) -> float:
    """Return the largest |dealt - asked| in sequences, over every domain and every prefix.

    Batches of one sequence: so each prefix of the dealing order is the end of a step.
    """
    from regmix.data.sampling.sampler import MixtureSampler

    weights = draw_weights(num_domains, seed)
    sampler = MixtureSampler(MadeUp(num_domains), weights, seq_len=16, batch_size=1, data_seed=seed)
    dealt = np.array([int(sampler.ids(step)[0][0]) for step in range(num_sequences)])
    total = sum(sampler.weights.values())
    worst = 0.0
    for place, domain in enumerate(sampler.domains):
        counts = np.cumsum(dealt == place)
        asked = np.arange(1, num_sequences + 1) * (sampler.weights[domain] / total)
        worst = max(worst, float(np.abs(counts - asked).max()))
    return worst


def error_records(*, mixtures: int, num_sequences: int) -> list[Record]:
    """Return the worst error of random weights, one record per number of domains."""
    records = []
    for num_domains in NUM_DOMAINS:
        num = max(200, num_sequences)
        count = max(1, mixtures // (1 + num_domains // 100))
        worst = max(worst_error(num_domains, seed, num) for seed in range(count))
        records.append(
            Record(
                suite=SUITE,
                case=f"{num_domains} domains, {count} random mixtures, {num} sequences of each",
                metric="worst weight error of any prefix",
                value=worst,
                unit="sequences",
            )
        )
    return records


def fresh(what: str, corpus: Corpus, *words: str) -> dict[str, float]:
    """Measure in a fresh process; adds `process_seconds`, from its start to its end."""
    command = [sys.executable, "-m", "regmix_bench.sampler_order", what]
    started = time.perf_counter()
    done = subprocess.run(
        [*command, str(corpus.folder), str(corpus.num_tokens), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[-500:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**answer, "process_seconds": time.perf_counter() - started}


def start(corpus: Corpus) -> dict[str, float]:
    """Open the shards, make the sampler, take the first batch."""
    from regmix_bench.sampler_ours import open_sampler

    for module in ("regmix.data.sampling.sampler", "regmix.data.shards"):
        importlib.import_module(module)

    started = time.perf_counter()
    open_sampler(corpus).batch(0)
    return {"seconds": time.perf_counter() - started}


def start_records(corpus: Corpus, repeats: int) -> list[Record]:
    """Return the time of a start, with and without the interpreter and the imports."""
    runs = [fresh("start", corpus) for _ in range(repeats)]
    empty = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import numpy"], check=True)
        empty.append(time.perf_counter() - started)

    def record(metric: str, values: list[float]) -> Record:
        return Record(
            suite=SUITE,
            case=f"{len(WEIGHTS)} domains, {corpus.num_tokens * 2 / 1e9:.2f} GB",
            metric=metric,
            value=1000 * statistics.median(values),
            unit="ms",
        )

    return [
        record("start-up: open, sampler, first batch", [run["seconds"] for run in runs]),
        record("start-up, whole process", [run["process_seconds"] for run in runs]),
        record("Python that imports NumPy and ends", empty),
    ]


def resume_records(corpus: Corpus, steps: tuple[int, ...], repeats: int) -> list[Record]:
    """Return the time from a checkpoint to the first batch, the shards being open."""
    from regmix_bench.sampler_ours import resume_seconds

    return [
        Record(
            suite=SUITE,
            case=f"step {step:,}",
            metric="resume: restore, first batch",
            value=1000 * statistics.median(resume_seconds(corpus, step) for _ in range(repeats)),
            unit="ms",
        )
        for step in steps
    ]


def many(num_domains: int, marks: list[int]) -> Iterator[tuple[int, float, float]]:
    """Make samplers, plan each and take its first batch; yield (number, seconds, MB) at `marks`."""
    from regmix.data.sampling.sampler import MixtureSampler

    shards = MadeUp(num_domains)
    mixtures = [draw_weights(num_domains, seed) for seed in range(50)]
    MixtureSampler(shards, mixtures[0], seq_len=16, batch_size=BATCH).batch(0)
    before = resident_mb()
    kept, started = [], time.perf_counter()
    for number in range(1, max(marks) + 1):
        weights = mixtures[number % len(mixtures)]
        sampler = MixtureSampler(shards, weights, seq_len=16, batch_size=BATCH, data_seed=number)
        sampler.plan(PLANNED_STEPS)
        sampler.batch(0)
        kept.append(sampler)
        if number in marks:
            yield number, time.perf_counter() - started, resident_mb() - before


def resident_mb() -> float:
    """Return what this process holds in memory, in MB."""
    words = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(words[1]) * resource.getpagesize() / 1e6


def many_records(corpus: Corpus, marks: list[int], grid: tuple[int, ...]) -> list[Record]:
    """Return time and memory over the number of mixtures, then over the number of domains."""
    cases = [(grid[-1], marks), *((num_domains, [min(marks)]) for num_domains in grid[:-1])]
    records, seconds = [], {}
    for num_domains, wanted in cases:
        words = ",".join(map(str, wanted))
        answer = fresh("many", corpus, str(num_domains), words)
        for mark in wanted:
            seconds[mark, num_domains] = answer[f"{mark}.seconds"]
            case = f"{mark:,} mixtures x {num_domains:,} domains, {PLANNED_STEPS} steps planned"
            for metric, key, unit in (
                ("plan and first batch", "seconds", "s"),
                ("memory of the samplers", "mb", "MB"),
            ):
                value = answer[f"{mark}.{key}"]
                records.append(
                    Record(suite=SUITE, case=case, metric=metric, value=value, unit=unit)
                )
    for words, points in (
        ("mixtures", [(mark, seconds[mark, grid[-1]]) for mark in marks]),
        ("domains", [(num, seconds[min(marks), num]) for num in grid]),
    ):
        numbers, times = (
            [math.log(value) for value in column] for column in zip(*points, strict=True)
        )
        slope = statistics.linear_regression(numbers, times).slope
        records.append(
            Record(
                suite=SUITE,
                case=f"{points[0][0]:,} to {points[-1][0]:,} {words}",
                metric="time grows as their number to the power of",
                value=slope,
                unit="",
            )
        )
    return records


def cold(corpus: Corpus, way: str) -> dict[str, float]:
    """Drop the pages of the shards, then read batches for some seconds."""
    from regmix.data.sampling.ring import BatchRing
    from regmix_bench.sampler_ours import open_sampler

    sampler = open_sampler(corpus)
    drop_pages(corpus.shards)
    left = share_in_memory(corpus.shards)
    num_steps, step, ahead = corpus.num_tokens // (SEQ_LEN * BATCH), 0, 0
    started = time.perf_counter()
    if way == "ring":
        with BatchRing(sampler, stop=num_steps, dtype=np.int32) as ring:
            for _ in ring:
                step += 1
                if time.perf_counter() - started > COLD_SECONDS:
                    break
            seconds, ahead = time.perf_counter() - started, ring.num_read_ahead
    else:
        while (seconds := time.perf_counter() - started) < COLD_SECONDS and step < num_steps:
            sampler.batch(step)
            step += 1
    return {"left": left, "rate": step * BATCH / seconds, "ahead": ahead}


def cold_records(corpus: Corpus) -> list[Record]:
    """Return the speed on data that is not in memory: page by page, and read ahead."""
    runs = {way: fresh("cold", corpus, way) for way in ("batch", "ring")}
    names = {"batch": "sampler, each batch waits", "ring": "ring, reads ahead"}
    records = []
    for way, run in runs.items():
        ratio = run["rate"] / runs["batch"]["rate"] if way == "ring" else None
        records.append(
            Record(
                suite=SUITE,
                case=f"{names[way]} ({run['ahead']:,.0f} steps asked ahead; "
                f"{100 * run['left']:.0f}% of the pages stayed in memory)",
                metric="cold sequences",
                value=run["rate"],
                unit="sequences/s",
                peer=None if ratio is None else names["batch"],
                ratio_to_peer=ratio,
            )
        )
    return records


def main() -> None:
    """Be one of the fresh processes."""
    what, folder, num_tokens, *words = sys.argv[1:]
    corpus = Corpus(folder=Path(folder), num_tokens=int(num_tokens))
    answer: dict[str, float] = {}
    if what == "many":
        marks = [int(word) for word in words[1].split(",")]
        for number, seconds, mb in many(int(words[0]), marks):
            answer[f"{number}.seconds"], answer[f"{number}.mb"] = seconds, mb
    else:
        measurements: dict[str, Callable[..., dict[str, Any]]] = {"start": start, "cold": cold}
        answer = measurements[what](corpus, *words)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
