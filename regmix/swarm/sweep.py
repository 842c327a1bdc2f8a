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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regmix.data.mixtures import MixtureTable
from regmix.data.sampling.sampler import ORDER_VERSION
from regmix.errors import RegmixError, StorageError, StudyError
from regmix.files import storage_errors, write_json
from regmix.lease import read_lease
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
from regmix.swarm.executors import Executor, LocalExecutor
from regmix.swarm.export import export
from regmix.swarm.jobs import RESULT_FILE, StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.pace import Pace
from regmix.swarm.planning import (
    LARGEST_STACK,
    SweepOptions,
    all_indices,
    plan_stacks,
    scheduled_member,
    scheduled_members,
    stack_job,
    study_member,
)
from regmix.swarm.progress import ProgressFile
from regmix.swarm.selection import select
from regmix.swarm.shrinking import replace_stack
from regmix.swarm.stop_request import StopWatch
from regmix.swarm.tally import Tally

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
PROGRESS_SECONDS = 1.0


@dataclass
class SweepResult:
    """What a sweep has: numbers of proxies, and what failed as (name, why).

    num_failed: of those that were asked for, trained without finite losses; num_pending: their
    stack could not be trained.
    remarks: what happened on the way that a person should know, as of a GPU that was lost.
    num_cancelled: taken out by the user; num_left: to be trained, but not what was asked for.
    """

    num_done: int
    num_failed: int
    num_pending: int
    trained_now: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    num_cancelled: int = 0
    num_left: int = 0


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
            selection = select(study, ledger, options)
            books = _Books(study, ledger)
            refuse_without_gpus(selection.jobs, options.gpus)
            first = ledger.next_stack_number() + len(selection.again)
            planned = plan_stacks(study, ledger, table, shards, options, first)
            jobs = selection.jobs + planned
            if jobs:
                cost = estimate(
                    jobs,
                    shards,
                    num_workers=options.workers,
                    gpus=options.gpus,
                    is_remote=options.is_remote,
                )
                stored = ledger.stacks() if planned else []
                about = device_remarks(stored, selection.jobs, planned, options.gpus)
                tally = Tally(jobs, num_gpus=len(options.gpus))
                on_start(dataclasses.replace(cost, remarks=(*cost.remarks, *about)), tally)
                selection.store(ledger)
                ledger.add_stacks(planned)
                books.keep_copy()
                with books.open(tally):
                    executor = _executor(study, options, jobs, descriptor)
                    executor.run(
                        jobs,
                        lambda event: books.enter(event, on_event),
                        lambda job: replace_stack(ledger, job),
                    )
            return _result(study, ledger, options, jobs, books)


def _executor(
    study: Study, options: SweepOptions, jobs: Sequence[StackJob], descriptor: int
) -> Executor:
    make_executor = options.make_executor or LocalExecutor
    return make_executor(
        num_workers=options.workers,
        threads=jobs[0].threads,
        logs=study.logs_path,
        inherited=descriptor,
        checkpoint_seconds=options.checkpoint_seconds,
        gpus=[gpu.id for gpu in options.gpus],
    )


class _Books:
    """Enters what happens into the ledger, and keeps tables, copy and progress up to date."""

    def __init__(self, study: Study, ledger: Ledger) -> None:
        self.study, self.ledger = study, ledger
        self.remarks: list[str] = []
        # Folders of stacks that are done, but not yet in the copy.
        unfinished = {row.name for row in ledger.stack_rows() if row.state != "done"}
        self._settled = leftovers(
            study.stacks_path, "stack-*", keep=lambda path: path.name in unfinished
        )
        if self._settled:
            self.keep_copy()

    @contextlib.contextmanager
    def open(self, tally: Tally) -> Iterator[None]:
        """Keep the books of one run; at its end, however it comes, everything is written."""
        lease = read_lease(self.study.lease_path)
        token = lease.token if lease else ""
        self._tally = tally
        self._progress = ProgressFile(self.study.progress_path, token, tally)
        self._paces = {
            "tables": Pace(lambda: export(self.study, self.ledger)),
            "copy": Pace(self.keep_copy, least_seconds=BACKUP_SECONDS),
            "progress": Pace(self._progress.write, least_seconds=PROGRESS_SECONDS),
        }
        try:
            with StopWatch(self.study.stop_path, token) as self._watch:
                # From here on others can see the sweep, and ask it to stop.
                self._progress.write()
                yield
        except (KeyboardInterrupt, RegmixError):
            # What ended the sweep is what the user must know, not what could not be written then.
            with contextlib.suppress(RegmixError):
                if self._paces["tables"].is_wanted:
                    self._paces["tables"].now()
                self.keep_copy()
            raise
        finally:
            self._progress.remove()
        self.keep_copy()

    def enter(self, event: Event, on_event: Callable[[Event, Tally], None]) -> None:
        """Store one event, and show it. What it speaks of is on disk."""
        self._watch.raise_if_asked()
        self._tally.add(event)
        self._store(event)
        self._progress.add(event)
        self._paces["progress"].is_wanted = True
        for pace in self._paces.values():
            pace.tick()
        on_event(event, self._tally)

    def _store(self, event: Event) -> None:
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
                self._paces["tables"].is_wanted = self._paces["copy"].is_wanted = True
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

    def keep_copy(self) -> None:
        """Copy the ledger; then the folders of the stacks that it has as done can go."""
        self.ledger.copy_to(self.study.ledger_copy_path)
        for folder in self._settled:
            shutil.rmtree(folder, ignore_errors=True)
        self._settled = []


def _result(
    study: Study, ledger: Ledger, options: SweepOptions, jobs: Sequence[StackJob], books: _Books
) -> SweepResult:
    """Write the tables, and return what the study now has."""
    untrained = [(r.name, r.reason or "") for r in ledger.stack_rows() if r.state == "failed"]
    try:
        export(study, ledger)
        record_speed(study, ledger, options)
    except StorageError as error:
        if not untrained:
            raise
        name, why = untrained[0]
        raise StorageError(
            f"{len(untrained)} stacks could not be trained (the first, {name}: {why}); then "
            f"{error.what}",
            cure=error.cure,
        ) from error
    rows, trained = ledger.proxies(), ledger.trained_stacks()
    failed = [row for row in rows if row.state == "failed" and row.stack in trained]
    ended = {row.index for row in failed}
    waiting = [
        row.index
        for row in rows
        if row.state not in ("done", "cancelled") and row.index not in ended
    ]
    asked = options.only
    unplanned = all_indices(study).difference(row.index for row in rows)
    num_pending = sum(asked is None or index in asked for index in waiting)
    return SweepResult(
        num_done=sum(row.state == "done" for row in rows),
        num_failed=sum(asked is None or row.index in asked for row in failed),
        num_pending=num_pending,
        trained_now=sum(len(job.members) for job in jobs),
        failures=untrained + [(f"proxy {row.index}", row.error or "") for row in failed],
        remarks=books.remarks,
        num_cancelled=sum(row.state == "cancelled" for row in rows),
        num_left=len(waiting) - num_pending + len(unplanned),
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
