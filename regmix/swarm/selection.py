"""Which of a study's proxies a sweep trains: all that wait, some of them, or failed ones again.

Enters: what a ledger holds, and what the user named. Leaves: the stacks to train, and what must be
stored for that first: stacks that are parted, failed proxies in new stacks. Trains nothing.

A stack that holds proxies which were named and others is parted as one that ran out of memory is
(`shrinking.py`): no number of a proxy depends on its neighbours, so both parts go on from its
checkpoint. Killed in between, nothing is lost: checkpoints of the parts first, then the ledger,
then the old folder goes.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regmix.errors import StudyError
from regmix.study import Study
from regmix.swarm.executors import stack_jobs
from regmix.swarm.jobs import RESULT_FILE, Member, StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.ledger_reading import LedgerReader, ProxyRow
from regmix.swarm.planning import SweepOptions, located, refuse_unknown
from regmix.swarm.resuming import split_checkpoint


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is trained, and what has to be stored before.

    waiting: stacks that the ledger has, or parts of them. parted: (stack, its parts). again: new
    stacks of proxies that failed. revived: stacks that were taken out and are trained after all.
    """

    waiting: tuple[StackJob, ...]
    parted: tuple[tuple[StackJob, tuple[StackJob, StackJob]], ...] = ()
    again: tuple[StackJob, ...] = ()
    revived: tuple[StackJob, ...] = ()

    @property
    def jobs(self) -> list[StackJob]:
        """All stacks to train."""
        return [*self.waiting, *self.revived, *self.again]

    def store(self, ledger: Ledger) -> None:
        """Store what is not yet as it should be."""
        for job, parts in self.parted:
            part_stack(ledger, job, parts)
        ledger.queue((*self.waiting, *self.revived))
        ledger.try_again(self.again)


def select(study: Study, ledger: LedgerReader, options: SweepOptions) -> Selection:
    """Return what a sweep trains of the proxies that the ledger has.

    Raises `StudyError` where the user named one that there is not, or that is not trained unless
    asked for expressly.
    """
    rows, only = ledger.proxies(), options.only
    if only is not None:
        refuse_unknown(study, only)
        if not options.retry_failed:
            _refuse_out_of_turn(study, ledger, rows, only)
    waiting, parted = _chosen(_located(study, ledger.pending_stacks()), only)
    revived: list[StackJob] = []
    again: list[StackJob] = []
    if options.retry_failed:
        if only is not None:
            revived, more = _chosen(_located(study, ledger.cancelled_stacks()), only)
            parted += more
        again = _again(study, ledger, rows, options)
    return Selection(
        waiting=tuple(waiting), parted=tuple(parted), again=tuple(again), revived=tuple(revived)
    )


def cancel_proxies(study: Study, ledger: Ledger, indices: Collection[int]) -> int:
    """Take proxies out of a study's sweeps; returns how many were not out before.

    `StudyError` where one is trained, or is none of the study's.
    """
    weights = refuse_unknown(study, indices)
    rows = {row.index: row for row in ledger.proxies()}
    trained = ledger.trained_stacks()
    for index in sorted(indices):
        row = rows.get(index)
        if row is not None and row.stack in trained:
            raise StudyError(
                f"{study.path}: proxy {index} is trained already ({row.state})",
                cure="Leave it out of --only",
            )
    inside, parted = _chosen(_located(study, ledger.pending_stacks()), indices)
    for job, parts in parted:
        part_stack(ledger, job, parts)
    unplanned = {index: weights[index] for index in indices if index not in rows}
    ledger.cancel(inside, unplanned)
    return sum(len(job.members) for job in inside) + len(unplanned)


def part_stack(ledger: Ledger, job: StackJob, parts: Sequence[StackJob]) -> None:
    """Store parts in the place of a stack, with what was trained so far."""
    split_checkpoint(job, parts)
    ledger.replace_stack(job, parts)
    shutil.rmtree(job.folder, ignore_errors=True)


def _located(study: Study, jobs: Iterable[StackJob]) -> list[StackJob]:
    return [located(study, job) for job in jobs]


def _chosen(
    jobs: Sequence[StackJob], only: Collection[int] | None
) -> tuple[list[StackJob], list[tuple[StackJob, tuple[StackJob, StackJob]]]]:
    """Return the stacks, or parts, that hold the named proxies and no other; and what to part."""
    if only is None:
        return list(jobs), []
    chosen, parted = [], []
    for job in jobs:
        inside = tuple(member for member in job.members if int(member.name) in only)
        others = tuple(member for member in job.members if int(member.name) not in only)
        if inside and others:
            if (Path(job.folder) / RESULT_FILE).is_file():
                raise StudyError(
                    f"{job.folder}: it is trained, and its losses are not yet in the ledger",
                    cure="Run regmix-fast proxies once without --only: it takes them over",
                )
            parts = tuple(
                dataclasses.replace(
                    job,
                    members=members,
                    name=f"{job.name}-{number}",
                    folder=str(Path(job.folder).parent / f"{job.name}-{number}"),
                )
                for number, members in enumerate((inside, others))
            )
            parted.append((job, (parts[0], parts[1])))
            chosen.append(parts[0])
        elif inside:
            chosen.append(job)
    return chosen, parted


def _again(
    study: Study, ledger: LedgerReader, rows: Sequence[ProxyRow], options: SweepOptions
) -> list[StackJob]:
    """Return new stacks of the proxies that were trained without finite losses, as they were."""
    trained = ledger.trained_stacks()
    failed = {
        row.index: row.stack
        for row in rows
        if row.state == "failed"
        and row.stack in trained
        and (options.only is None or row.index in options.only)
    }
    if not failed:
        return []
    # What their numbers depend on stays: stacks are made only of proxies that were trained alike.
    alike: list[tuple[StackJob, list[Member]]] = []
    largest = 1
    for job in _located(study, ledger.stacks()):
        chosen = [m for m in job.members if failed.get(int(m.name)) == job.name]
        if chosen:
            largest = max(largest, len(job.members))
            kind = dataclasses.replace(job, name="alike", folder="", members=())
            for known, members in alike:
                if known == kind:
                    members += chosen
                    break
            else:
                alike.append((kind, chosen))
    jobs: list[StackJob] = []
    number = ledger.next_stack_number()
    for kind, members in alike:
        stacks = stack_jobs(
            members, num_workers=options.places, stack_size=options.stack_size, largest=largest
        )
        for stack in stacks:
            name = f"stack-{number:04d}"
            folder = str(study.stacks_path / name)
            jobs.append(dataclasses.replace(kind, name=name, folder=folder, members=tuple(stack)))
            number += 1
    return jobs


def _refuse_out_of_turn(
    study: Study, ledger: LedgerReader, rows: Sequence[ProxyRow], only: Collection[int]
) -> None:
    trained = ledger.trained_stacks()
    for row in rows:
        has_failed = row.state == "failed" and row.stack in trained
        if row.index in only and (has_failed or row.state == "cancelled"):
            raise StudyError(
                f"{study.path}: proxy {row.index} "
                + (f"failed ({row.error})" if has_failed else "was taken out of the sweep"),
                cure="Add --retry-failed to train it, or leave it out of --only",
            )
