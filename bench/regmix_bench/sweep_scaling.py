"""What a sweep costs beside its training, and what more workers and more proxies do to its time.

1. A small real sweep on this machine records how long proxies take, and worker processes to start.
2. `overhead`: sweeps of many proxies of 30 s each with simulated workers (simulated.py) and all the
   rest real: planning, scheduler, ledger, tables, one worker for each of 64 places. What the
   coordinator takes per proxy is measured, and what `status` takes on the largest ledger.
3. `scaling`: the same on 1, 16 and 64 workers, with the recorded proxies' spread around 30 s.
   Efficiency is the training's time over that of all workers; the coordinator's own is in it.
4. `growth`: wall time over number of proxies and workers: measured on this machine with one and two
   workers, and simulated with the recorded times, for the same sweeps and past them.

    python -m regmix_bench.sweep_scaling --out FOLDER --json FILE [--picture FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from regmix.data.packing.pack import pack
from regmix.data.shards import ShardSet
from regmix.model.optim import OptimConfig
from regmix.model.presets import make_shape
from regmix.study import Study, Training
from regmix.swarm import sweep
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.events import Done, Event, Started
from regmix.swarm.jobs import StackJob
from regmix.swarm.pace import Pace
from regmix.swarm.planning import SweepOptions
from regmix.swarm.tally import Tally
from regmix_bench.harness import Record, append, table
from regmix_bench.simulated import SimulatedExecutor

NUM_DOMAINS = 17
PROXY_SECONDS = 30.0
WORKERS = (1, 16, 64)
# Proxies of the overhead's sweeps, and members of a stack.
OVERHEAD = ((512, 1), (10_000, 1), (10_000, 16))
SCALING_PROXIES = 2048
GROWTH = (
    *((proxies, workers) for proxies in (16, 64, 256) for workers in (1, 2, 8)),
    *((proxies, 64) for proxies in (64, 256, 1024, 4096)),
)
# Sweeps that are trained here, and that are simulated too.
MEASURED = tuple((proxies, workers) for proxies in (8, 16, 32) for workers in (1, 2))
STEPS = 200

record = functools.partial(Record, suite="sweep")


def make_shards(folder: Path) -> ShardSet:
    """Pack a corpus of 17 domains of random words; what they say does not matter here."""
    corpus, shards = folder / "corpus", folder / "shards"
    if not (shards / "manifest.json").is_file():
        corpus.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(400)]
        for number in range(NUM_DOMAINS):
            lines = [
                json.dumps({"text": " ".join(draw.choices(words[number::3], k=120))})
                for _ in range(200)
            ]
            (corpus / f"domain{number:02d}-0.jsonl").write_text("\n".join(lines) + "\n")
        pack([corpus], shards, train_bpe=512, valid_fraction=0.1)
    return ShardSet.open(shards)


def make(folder: Path, shards: ShardSet, num_proxies: int) -> Study:
    """Draw a study of proxies that this machine trains in a few seconds."""
    training = Training(
        shape=make_shape("cpu-32", shards.vocab_size, 64),
        optim=OptimConfig(lr=3e-3, warmup_steps=10, total_steps=STEPS),
        batch_size=8,
        num_steps=STEPS,
    )
    return make_study(
        folder,
        shards,
        swarm=SwarmRequest(num=num_proxies),
        training=training,
        objective=dict.fromkeys(shards.domains("valid"), 1.0),
    )


class Recorded:
    """What a real sweep took: its wall time, each proxy, and a worker's start, in seconds."""

    def __init__(self, study: Study, num_workers: int) -> None:
        self.proxy_seconds: list[float] = []
        self.start_seconds = 0.0
        self._begun: dict[str, float] = {}
        self._from = time.monotonic()
        options = SweepOptions(num_workers=num_workers, stack_size=1)
        sweep.run_sweep(study, options, on_start=self._on_start, on_event=self._on_event)
        self.wall_seconds: float = time.monotonic() - self._from

    def _on_start(self, _cost: object, _tally: Tally) -> None:
        # The cost is measured on a few steps before; every sweep has that once.
        self._from = time.monotonic()

    def _on_event(self, event: Event, _tally: Tally) -> None:
        now = time.monotonic()
        if isinstance(event, Started):
            if not self._begun:
                self.start_seconds = now - self._from
            self._begun[event.job.name] = now
        elif isinstance(event, Done):
            self.proxy_seconds.append(now - self._begun[event.job.name])


class Simulated:
    """A simulated sweep: its wall time, its training's time, and its coordinator's own."""

    def __init__(
        self,
        study: Study,
        *,
        num_workers: int,
        stack_size: int,
        seconds_of: Callable[[StackJob], float],
        start_seconds: float = 0.0,
    ) -> None:
        self.training_seconds = 0.0
        self._seconds_of = seconds_of
        self._executor: SimulatedExecutor | None = None

        def make_executor(**options: Any) -> SimulatedExecutor:
            self._executor = SimulatedExecutor(
                num_places=num_workers,
                seconds_of=self._count,
                start_seconds=start_seconds,
                **{**options, "num_workers": num_workers},
            )
            return self._executor

        options = SweepOptions(
            num_workers=num_workers,
            stack_size=stack_size,
            make_executor=make_executor,
            is_remote=True,
        )
        started = time.perf_counter()

        def clock() -> float:
            # Tables and copies are written as often as they would be in the simulated time.
            return 0.0 if self._executor is None else self._executor.clock()

        with (
            mock.patch.object(sweep, "Pace", functools.partial(Pace, clock=clock)),
            # The speed of real training says nothing here, and would be measured for seconds.
            mock.patch("regmix.swarm.cost.measure_tokens_per_second", return_value=1e6),
        ):
            result = sweep.run_sweep(study, options)
        elapsed = time.perf_counter() - started
        assert self._executor is not None
        assert result.num_pending == result.num_failed == 0
        self.coordinator_seconds: float = elapsed - self._executor.idle_seconds
        waited = self._executor.clock() - elapsed + self._executor.idle_seconds
        self.wall_seconds: float = self.coordinator_seconds + waited

    def _count(self, job: StackJob) -> float:
        seconds = self._seconds_of(job)
        self.training_seconds += seconds
        return seconds


def spread(recorded: Sequence[float], mean: float | None = None) -> Callable[[StackJob], float]:
    """Return a stack's seconds: recorded ones drawn for its proxies, scaled to a mean if given."""
    scale = 1.0 if mean is None else mean / statistics.fmean(recorded)

    def seconds_of(job: StackJob) -> float:
        # The same proxy takes the same time in every simulated sweep.
        return sum(scale * random.Random(int(m.name)).choice(recorded) for m in job.members)

    return seconds_of


def measure_overhead(folder: Path, shards: ShardSet, recorded: Recorded) -> list[Record]:
    """Return what the coordinator takes per proxy, and `status` on the largest ledgers."""
    records = []
    for num_proxies, stack_size in OVERHEAD:
        study = make(folder / f"overhead-{num_proxies}-{stack_size}", shards, num_proxies)
        run = Simulated(
            study,
            num_workers=64,
            stack_size=stack_size,
            seconds_of=spread(recorded.proxy_seconds, PROXY_SECONDS),
        )
        case = f"{num_proxies} proxies in stacks of {stack_size}, 64 workers"
        per_proxy = run.coordinator_seconds / num_proxies
        records.append(
            record(
                case=case,
                metric="coordinator per proxy",
                value=1e3 * per_proxy,
                unit="ms",
                ceiling=f"a proxy of {PROXY_SECONDS:.0f} s",
                ratio_to_ceiling=per_proxy / PROXY_SECONDS,
            )
        )
        seconds = [status_seconds(study) for _ in range(5)]
        records.append(
            record(case=case, metric="status", value=statistics.median(seconds), unit="s")
        )
    return records


def status_seconds(study: Study) -> float:
    """Return how long `regmix-fast status` takes, process and all."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "regmix.cli", "status", str(study.path)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure_scaling(folder: Path, shards: ShardSet, recorded: Recorded) -> list[Record]:
    """Return the efficiency of 1 to 64 workers."""
    records = []
    for workers in WORKERS:
        study = make(folder / f"scaling-{workers}", shards, SCALING_PROXIES)
        run = Simulated(
            study,
            num_workers=workers,
            stack_size=1,
            seconds_of=spread(recorded.proxy_seconds, PROXY_SECONDS),
            start_seconds=recorded.start_seconds,
        )
        records.append(
            record(
                case=f"{SCALING_PROXIES} proxies of {PROXY_SECONDS:.0f} s, {workers} workers",
                metric="efficiency",
                value=run.training_seconds / (workers * run.wall_seconds),
                unit="of the workers' time",
            )
        )
    return records


def measure_growth(folder: Path, shards: ShardSet) -> list[Record]:
    """Return wall times over proxies and workers, measured and simulated."""
    records: list[Record] = []
    recorded: dict[int, Recorded] = {}
    for proxies, workers in MEASURED:
        study = make(folder / f"measured-{proxies}-{workers}", shards, proxies)
        recorded[workers] = Recorded(study, workers)
        seconds = recorded[workers].wall_seconds
        records.append(growth(proxies, workers, "measured", seconds))
    for proxies, workers in sorted({*MEASURED, *GROWTH}):
        # Two workers on two cores slow each other down; other machines have a core for each.
        source = recorded[2 if (proxies, workers) in MEASURED and workers == 2 else 1]
        study = make(folder / f"growth-{proxies}-{workers}", shards, proxies)
        run = Simulated(
            study,
            num_workers=workers,
            stack_size=1,
            seconds_of=spread(source.proxy_seconds),
            start_seconds=source.start_seconds,
        )
        records.append(growth(proxies, workers, "simulated", run.wall_seconds))
    return records


def growth(proxies: int, workers: int, how: str, seconds: float) -> Record:
    """Return the record of one sweep's wall time."""
    case = f"{proxies} proxies, {workers} workers"
    return record(case=case, metric=f"wall time, {how}", value=seconds, unit="s")


def main() -> None:
    """Measure all, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    shards = make_shards(options.out)
    recorded = Recorded(make(options.out / "recorded", shards, 32), 1)
    records = [
        record(
            case="a proxy of the recorded sweep",
            metric=metric,
            value=value,
            unit="s",
        )
        for metric, value in (
            ("mean", statistics.fmean(recorded.proxy_seconds)),
            ("longest", max(recorded.proxy_seconds)),
            ("shortest", min(recorded.proxy_seconds)),
            ("start of a worker", recorded.start_seconds),
        )
    ]
    records += measure_overhead(options.out, shards, recorded)
    records += measure_scaling(options.out, shards, recorded)
    records += measure_growth(options.out, shards)
    print(table(records))
    if options.json:
        append(options.json, records)
    if options.picture:
        from regmix_bench.sweep_chart import draw

        draw(records, options.picture)


if __name__ == "__main__":
    main()
