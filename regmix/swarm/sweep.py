"""The sweep: every proxy of a study trained once, whatever happens in between.

1. The mixtures that no stack holds yet are packed into stacks (`planning.py`); the cost is shown;
   the ledger stores each stack with all that its result depends on, before its first step.
2. The stacks that are not trained go to the executor. What a stack's numbers depend on (device,
   micro-batch, threads) is read from the ledger, whatever the command says. Every attempt of a
   worker is stored when it begins and when it ends.
3. A trained stack's training losses are moved to `steps/`, then its losses enter the ledger, then
   its folder goes, but for its result: that stays until a copy of the ledger has it too. Killed at
   any instant, the next run goes on from there.
4. `losses.csv` is written from the ledger while the sweep runs, and `trajectories.csv` where
   proxies are evaluated along the way. `progress.json` says what runs now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regmix.data.mixtures import MixtureTable
from regmix.data.sampling.sampler import ORDER_VERSION
from regmix.errors import RegmixError, StudyError
from regmix.files import storage_errors, write_json
from regmix.provenance import environment_record
from regmix.study import Study
from regmix.swarm.cost import Cost, estimate
from regmix.swarm.devices import device_remarks, refuse_without_gpus
from regmix.swarm.events import (
    Done,
    Event,
    Failed,
    Joined,
    Left,
    Replaced,
    Requeued,
    Retired,
    Started,
    Stopped,
)
from regmix.swarm.executors import LocalExecutor
from regmix.swarm.export import export
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.pace import Pace
from regmix.swarm.planning import (
    LARGEST_STACK,
    SweepOptions,
    located,
    plan_stacks,
    scheduled_member,
    scheduled_members,
    stack_job,
    study_member,
)
from regmix.swarm.shrinking import replace_stack
from regmix.swarm.tally import Tally
from regmix.swarm.worker import RESULT_FILE

__all__ = [
    "LARGEST_STACK",
    "SweepOptions",
    "SweepResult",
    "Tally",
    "collect",
    "plan_stacks",
    "record_speed",
    "remove_leftovers",
    "run_sweep",
    "scheduled_member",
    "scheduled_members",
    "stack_job",
    "study_member",
]

BACKUP_SECONDS = 60.0


@dataclass
class SweepResult:
    """What a sweep has: numbers of proxies, and what failed as (name, why).

    num_failed: trained without finite losses; num_pending: their stack could not be trained.
    remarks: what happened on the way that a person should know, as of a GPU that was lost.
    """

    num_done: int
    num_failed: int
    num_pending: int
    trained_now: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def run_sweep(
    study: Study,
    options: SweepOptions,
    *,
    on_start: Callable[[Cost, Tally], None] = lambda _cost, _tally: None,
    on_event: Callable[[Event, Tally], None] = lambda _event, _tally: None,
) -> SweepResult:
    """Train every proxy that is not trained; returns what the study then has.

    `on_start` is called with the cost before anything is stored; what it raises ends the sweep.
    """
    shards = study.open_shards()
    table = MixtureTable.read_csv(study.mixtures_path)
    with study.lock() as descriptor:
        refuse_lost_ledger(study)
        with Ledger(study.ledger_path) as ledger:
            waiting = [located(study, job) for job in ledger.pending_stacks()]
            books = _Books(study, ledger, keep={job.name for job in waiting})
            refuse_without_gpus(waiting, options.gpus)
            planned = plan_stacks(study, ledger, table, shards, options)
            jobs = waiting + planned
            if jobs:
                cost = estimate(jobs, shards, num_workers=options.workers, gpus=options.gpus)
                stored = ledger.stacks() if planned else []
                about = device_remarks(stored, waiting, planned, options.gpus)
                tally = Tally(jobs, num_gpus=len(options.gpus))
                on_start(dataclasses.replace(cost, remarks=(*cost.remarks, *about)), tally)
                ledger.add_stacks(planned)
                ledger.queue(waiting)
                books.keep_copy()

                def handle(event: Event) -> None:
                    tally.add(event)
                    books.enter(event)
                    on_event(event, tally)

                make_executor = options.make_executor or LocalExecutor
                executor = make_executor(
                    num_workers=options.workers,
                    threads=jobs[0].threads,
                    logs=study.logs_path,
                    inherited=descriptor,
                    checkpoint_seconds=options.checkpoint_seconds,
                    gpus=[gpu.id for gpu in options.gpus],
                )
                with books:
                    executor.run(jobs, handle, lambda job: replace_stack(ledger, job))
            export(study, ledger)
            record_speed(study, ledger, options)
            return _result(ledger, jobs, books)


class _Books:
    """Enters what happens into the ledger, and keeps the tables and the copy up to date."""

    def __init__(self, study: Study, ledger: Ledger, *, keep: set[str]) -> None:
        self.study, self.ledger = study, ledger
        self.remarks: list[str] = []
        # Folders of stacks that are done, but not yet in the copy.
        self._settled = leftovers(study.stacks_path, "stack-*", keep=lambda p: p.name in keep)
        self._tables = Pace(lambda: export(study, ledger))
        self._copy = Pace(self.keep_copy, least_seconds=BACKUP_SECONDS)
        if self._settled:
            self.keep_copy()

    def enter(self, event: Event) -> None:
        """Store one event. What it speaks of is on disk."""
        ledger = self.ledger
        match event:
            case Started():
                ledger.begin_attempt(
                    event.job,
                    worker=event.worker,
                    machine=event.machine,
                    device=event.device,
                    step=event.step,
                    environment=event.environment,
                )
            case Done():
                collect(self.study, ledger, event)
                self._settled.append(Path(event.job.folder))
                self._tables.want()
                self._copy.want()
            case Failed():
                ledger.fail_stack(event.job, f"{event.what}. {event.cure}.")
            case Requeued():
                ledger.break_off_attempt(event.job, event.outcome, event.why)
            case Stopped():
                # Everything is being stopped: a full disk must not keep the others from it. What
                # is not stored here is found to be lost by the next run.
                with contextlib.suppress(RegmixError):
                    ledger.break_off_attempt(event.job, "stopped")
            case Replaced():
                self.remarks.append(event.remark)
                self.keep_copy()
            case Retired() | Joined() | Left():
                self.remarks.append(str(event))
        self._tables.tick()
        self._copy.tick()

    def keep_copy(self) -> None:
        """Copy the ledger; then the folders of the stacks that it has as done can go."""
        self.ledger.copy_to(self.study.ledger_copy_path)
        for folder in self._settled:
            shutil.rmtree(folder, ignore_errors=True)
        self._settled = []

    def __enter__(self) -> _Books:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.keep_copy()
        elif issubclass(kind, KeyboardInterrupt | RegmixError):
            # What ended the sweep is what the user must know, not what could not be written then.
            with contextlib.suppress(RegmixError):
                if self._tables.is_wanted:
                    self._tables.now()
                self.keep_copy()


def _result(ledger: Ledger, jobs: Sequence[StackJob], books: _Books) -> SweepResult:
    failures = [
        (row.name, row.reason or "") for row in ledger.stack_rows() if row.state == "failed"
    ]
    rows = ledger.proxies()
    untrained = {name for name, _ in failures}
    failed = [row for row in rows if row.state == "failed" and row.stack not in untrained]
    failures += [(f"proxy {row.index}", row.error or "") for row in failed]
    num_done = sum(row.state == "done" for row in rows)
    return SweepResult(
        num_done=num_done,
        num_failed=len(failed),
        num_pending=len(rows) - num_done - len(failed),
        trained_now=sum(len(job.members) for job in jobs),
        failures=failures,
        remarks=books.remarks,
    )


def refuse_lost_ledger(study: Study) -> None:
    """Raise `StudyError` where proxies were trained but the ledger that knew them is gone."""
    path = study.ledger_path
    if path.is_file() and path.stat().st_size:
        return
    if not study.losses_path.is_file() and not any(study.steps_path.glob("*.npy")):
        return
    what = f"{path}: the ledger is {'empty' if path.exists() else 'missing'}, and proxies of this "
    if study.ledger_copy_path.is_file():
        cure = f"Put its copy in its place: cp {study.ledger_copy_path} {path}"
    else:
        cure = (
            "Restore it from a copy of the study; or remove losses.csv and steps/ as well, to "
            "train all proxies again"
        )
    raise StudyError(f"{what}study were trained", cure=cure)


def collect(study: Study, ledger: Ledger, event: Done) -> None:
    """Take over a trained stack: its files first, then its rows; of its folder the result stays."""
    folder = Path(event.job.folder)
    with storage_errors(study.steps_path):
        study.steps_path.mkdir(exist_ok=True)
        for member in event.job.members:
            # Moved already where the last run was killed right after.
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / f"{member.name}.npy", study.steps_path / f"{member.name}.npy")
    ledger.finish_stack(event.job, event.result)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name != RESULT_FILE:
            with contextlib.suppress(OSError):
                path.unlink()


def leftovers(stacks: Path, pattern: str, *, keep: Callable[[Path], bool]) -> list[Path]:
    """Return the folders of stacks that are done: a run was killed before it removed them.

    pattern: the folders' names, `stack-*` for proxies and `train-*` for large models; keep:
    whether a folder's stack is still to be trained or collected.
    """
    return [path for path in sorted(stacks.glob(pattern)) if path.is_dir() and not keep(path)]


def remove_leftovers(stacks: Path, pattern: str, *, keep: Callable[[Path], bool]) -> None:
    """Remove what `leftovers` finds."""
    for folder in leftovers(stacks, pattern, keep=keep):
        shutil.rmtree(folder, ignore_errors=True)


def record_speed(study: Study, ledger: Ledger, options: SweepOptions) -> None:
    """Write `sweep.json`: tokens per second of one worker and of all, the GPUs, the machine."""
    seconds, tokens = ledger.totals()
    per_worker = tokens / seconds if seconds else 0.0
    write_json(
        study.path / "sweep.json",
        {
            "num_proxies": len(ledger.proxies()),
            "workers": options.places,
            "gpus": [gpu.name for gpu in options.gpus],
            "threads": options.threads,
            "worker_seconds": seconds,
            "tokens": tokens,
            "tokens_per_second_per_worker": per_worker,
            "tokens_per_second": per_worker * options.places,
            "order_version": ORDER_VERSION,
            "environment": environment_record(),
        },
    )
