"""The sweep: every proxy of a study trained once, whatever happens in between.

1. The mixtures that no stack holds yet are packed into stacks; the cost is shown; the ledger
   stores each stack with all that its result depends on, before its first step.
2. The stacks that are not trained go to the executor. What a stack's numbers depend on (device,
   micro-batch, threads) is read from the ledger, whatever the command says.
3. A trained stack's training losses are moved to `steps/`, then its losses enter the ledger,
   then its folder goes. Killed at any instant, the next run goes on from there.
4. `losses.csv` is written from the ledger after every stack, and `trajectories.csv` where
   proxies are evaluated along the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regmix.data.mixtures import Mixture, MixtureTable
from regmix.data.sampling.sampler import ORDER_VERSION
from regmix.data.schedules import ScheduleTable, mean_between
from regmix.data.shards import ShardSet
from regmix.errors import StudyError
from regmix.files import storage_errors, write_json
from regmix.provenance import available_cores, environment_record
from regmix.study import Study, Training
from regmix.swarm.cost import Cost, estimate
from regmix.swarm.devices import device_remarks, place_like, refuse_without_gpus
from regmix.swarm.engine import CHECKPOINT_SECONDS, Member, MemberSegment, StackJob
from regmix.swarm.events import Done, Event, Failed, Replaced, Retired
from regmix.swarm.executors import LocalExecutor, stack_jobs
from regmix.swarm.gpus import Gpu
from regmix.swarm.ledger import Ledger
from regmix.swarm.shrinking import replace_stack
from regmix.swarm.tally import Tally

# Members of a stack on a CPU: past 16 nothing more is gained (bench/results, suite `stack`).
LARGEST_STACK = 16


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """num_workers: processes, None for one a core; threads: of each, for stacks not yet planned.

    gpus: where stacks not yet planned are trained, one worker each; none for the CPU.
    stack_size: proxies trained together; micro_batch: sequences of each that a GPU takes at a time;
    None to choose.
    checkpoint_seconds: time between two checkpoints of a stack; it changes no result.
    """

    num_workers: int | None = None
    threads: int = 1
    stack_size: int | None = None
    micro_batch: int | None = None
    gpus: tuple[Gpu, ...] = ()
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    @property
    def workers(self) -> int:
        """Processes to use on this machine for stacks of the CPU."""
        return self.num_workers or max(1, available_cores() // self.threads)

    @property
    def places(self) -> int:
        """Stacks not yet planned that are trained at the same time."""
        return len(self.gpus) or self.workers


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
    with study.lock() as descriptor, Ledger(study.ledger_path) as ledger:
        pending = {job.name for job in ledger.pending_stacks()}
        remove_leftovers(study.stacks_path, "stack-*", keep=lambda path: path.name in pending)
        waiting = [_located(study, job) for job in ledger.pending_stacks()]
        refuse_without_gpus(waiting, options.gpus)
        planned = plan_stacks(study, ledger, table, shards, options)
        jobs = waiting + planned
        trained = sum(len(job.members) for job in jobs)
        failures: list[tuple[str, str]] = []
        happened: list[str] = []
        if jobs:
            cost = estimate(jobs, shards, num_workers=options.workers, gpus=options.gpus)
            about = device_remarks(ledger.stacks(), waiting, planned, options.gpus)
            tally = Tally(jobs, num_gpus=len(options.gpus))
            on_start(dataclasses.replace(cost, remarks=(*cost.remarks, *about)), tally)
            ledger.add_stacks(planned)

            def handle(event: Event) -> None:
                tally.add(event)
                if isinstance(event, Done):
                    collect(study, ledger, event)
                elif isinstance(event, Failed):
                    failures.append((event.job.name, f"{event.what}. {event.cure}"))
                elif isinstance(event, Replaced):
                    happened.append(event.remark)
                elif isinstance(event, Retired):
                    happened.append(str(event))
                on_event(event, tally)

            executor = LocalExecutor(
                num_workers=options.workers,
                threads=jobs[0].threads,
                logs=study.logs_path,
                inherited=descriptor,
                checkpoint_seconds=options.checkpoint_seconds,
                gpus=[gpu.id for gpu in options.gpus],
            )
            executor.run(jobs, handle, lambda job: replace_stack(ledger, job))
        export(study, ledger)
        rows = ledger.proxies()
        failures += [(f"proxy {r.index}", r.error or "") for r in rows if r.state == "failed"]
        record_speed(study, ledger, options)
        num_failed = sum(row.state == "failed" for row in rows)
        num_done = sum(row.state == "done" for row in rows)
        num_pending = len(rows) - num_done - num_failed
        return SweepResult(num_done, num_failed, num_pending, trained, failures, happened)


def plan_stacks(
    study: Study,
    ledger: Ledger,
    table: MixtureTable,
    shards: ShardSet,
    options: SweepOptions,
) -> list[StackJob]:
    """Return new stacks with the mixtures that no stack of the ledger holds.

    A mixture that stands in the table before is a replicate: it gets seeds of its own.
    """
    refuse_other_pools(study, ledger)
    known = {row.index: row.weights for row in ledger.proxies()}
    available = set(shards.domains("train"))
    members = []
    times_seen: Counter[bytes] = Counter()
    for position, index in enumerate(table.indices):
        mixture = dict(table.mixture(position))
        row = table.weights[position].tobytes()
        replicate = times_seen[row]
        times_seen[row] += 1
        if unknown := sorted(set(mixture) - available):
            raise StudyError(
                f"{study.mixtures_path}: domain '{unknown[0]}' is not in the corpus {shards.path}",
                cure="Remove its column, or pack a corpus that has it",
            )
        if index not in known:
            members.append(study_member(study, str(index), mixture, replicate))
        elif known[index] != mixture:
            raise StudyError(
                f"{study.mixtures_path}: mixture {index} is not the one its proxy was trained on",
                cure="Restore the row, or give the new mixture an index of its own",
            )
    members += scheduled_members(study, ledger)
    placement = None
    if options.gpus and members:
        placement = place_like(
            ledger.stacks(),
            study.config.proxy,
            options.gpus,
            num_proxies=len(members),
            stack_size=options.stack_size,
            micro_batch=options.micro_batch,
        )
    stacks = stack_jobs(
        members,
        num_workers=options.places,
        stack_size=options.stack_size,
        largest=placement.stack_size if placement else LARGEST_STACK,
    )
    first = ledger.num_stacks()
    jobs = []
    for number, stack in enumerate(stacks, start=first):
        name = f"stack-{number:04d}"
        proxies = stack_job(study, name, tuple(stack), study.config.proxy, options.threads)
        proxies = dataclasses.replace(proxies, pools=study.config.pools)
        if placement is not None:
            proxies = dataclasses.replace(proxies, device="cuda", micro_batch=placement.micro_batch)
        jobs.append(proxies)
    return jobs


def scheduled_members(study: Study, ledger: Ledger) -> list[Member]:
    """Return the proxies of `schedules.csv` that no stack of the ledger holds."""
    if not study.schedules_path.is_file():
        return []
    known = {member.name: member for job in ledger.stacks() for member in job.members}
    table = ScheduleTable.read_csv(study.schedules_path)
    members = []
    for position, index in enumerate(table.indices):
        segments = table.named(position)
        if segments[-1][0] >= study.config.proxy.num_steps:
            raise StudyError(
                f"{study.schedules_path}: a segment of proxy {index} begins at step "
                f"{segments[-1][0]}, and proxies have {study.config.proxy.num_steps} steps",
                cure="Restore the row",
            )
        member = scheduled_member(study, str(index), segments, study.config.proxy.num_steps)
        if member.name not in known:
            members.append(member)
        elif known[member.name] != member:
            raise StudyError(
                f"{study.schedules_path}: schedule {index} is not the one its proxy was trained on",
                cure="Restore the rows",
            )
    return members


def scheduled_member(
    study: Study,
    name: str,
    segments: Sequence[tuple[int, Mixture]],
    num_steps: int,
    replicate: int = 0,
) -> Member:
    """Return a model of the study that follows a schedule of (first step, mixture) pairs."""
    domains = segments[0][1].domains
    arrays = [(first, mixture.array(domains)) for first, mixture in segments]
    mean = mean_between(arrays, 0, num_steps).tolist()
    member = study_member(study, name, dict(zip(domains, mean, strict=True)), replicate)
    dealt = [MemberSegment(first_step=f, weights=dict(mixture)) for f, mixture in segments]
    return dataclasses.replace(member, segments=tuple(dealt))


def refuse_other_pools(study: Study, ledger: Ledger) -> None:
    """Raise `StudyError` where a stack of the ledger was planned with other pools."""
    for job in ledger.stacks():
        if job.pools != study.config.pools:
            raise StudyError(
                f"{study.path / 'study.toml'}: its pools are not those that the proxies of "
                f"'{job.name}' read: their losses would not compare",
                cure="Restore target_tokens and pools, or draw a new study with --target-tokens",
            )


def study_member(study: Study, name: str, weights: dict[str, float], replicate: int = 0) -> Member:
    """Return a model of the study: replicate 0 has the study's seeds, others their own."""
    return Member(
        name=name,
        weights=weights,
        data_seed=study.config.data_seed + replicate,
        init_seed=study.config.init_seed + replicate,
    )


def stack_job(
    study: Study, name: str, members: tuple[Member, ...], training: Training, threads: int
) -> StackJob:
    """Return the job of one stack of a study's models, which read all there is of each domain."""
    return StackJob(
        name=name,
        members=members,
        training=training,
        targets=study.config.targets,
        shards=str(study.shards_path),
        shards_checksum=study.config.shards_checksum,
        folder=str(study.stacks_path / name),
        threads=threads,
    )


def _located(study: Study, job: StackJob) -> StackJob:
    # The study may have been moved since the stack was planned.
    located = stack_job(study, job.name, job.members, job.training, job.threads)
    return dataclasses.replace(
        located, pools=job.pools, device=job.device, micro_batch=job.micro_batch
    )


def collect(study: Study, ledger: Ledger, event: Done) -> None:
    """Take over a trained stack: its files first, then its rows, then its folder goes."""
    folder = Path(event.job.folder)
    with storage_errors(study.steps_path):
        study.steps_path.mkdir(exist_ok=True)
        for member in event.job.members:
            # Moved already where the last run was killed right after.
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder / f"{member.name}.npy", study.steps_path / f"{member.name}.npy")
    ledger.finish_stack(event.job, event.result)
    export(study, ledger)
    shutil.rmtree(folder, ignore_errors=True)


def export(study: Study, ledger: Ledger) -> None:
    """Write what the ledger knows as tables: `losses.csv` and `trajectories.csv`.

    Proxies that follow a schedule are in the latter only: no one mixture gave their losses.
    """
    training, targets = study.config.proxy, study.config.targets
    scheduled: frozenset[int] = frozenset()
    if study.schedules_path.is_file():
        scheduled = frozenset(ScheduleTable.read_csv(study.schedules_path).indices)
    ledger.export_losses(study.losses_path, targets, without=scheduled)
    if training.eval_every is not None or training.eval_steps is not None:
        ledger.export_trajectories(study.trajectories_path, targets)


def remove_leftovers(stacks: Path, pattern: str, *, keep: Callable[[Path], bool]) -> None:
    """Remove the folders of stacks that are done: a run was killed before it removed them.

    pattern: the folders' names, `stack-*` for proxies and `train-*` for large models; keep:
    whether a folder's stack is still to be trained or collected.
    """
    for folder in sorted(stacks.glob(pattern)):
        if folder.is_dir() and not keep(folder):
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
