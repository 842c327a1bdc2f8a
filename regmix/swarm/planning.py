"""The plan of a sweep: which proxies are trained together, and where.

Enters: a study's mixtures and schedules, and what its ledger holds already. Leaves: jobs, with all
that their results depend on. Stores and trains nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from regmix.data.mixtures import Mixture, MixtureTable, read_index_table
from regmix.data.schedules import ScheduleTable, mean_between
from regmix.data.shards import ShardSet
from regmix.errors import StudyError
from regmix.provenance import available_cores
from regmix.study import Study, Training
from regmix.swarm.devices import place_like
from regmix.swarm.executors import Executor, stack_jobs
from regmix.swarm.gpus import Gpu
from regmix.swarm.jobs import CHECKPOINT_SECONDS, Member, MemberSegment, StackJob
from regmix.swarm.ledger_reading import LedgerReader

# Members of a stack on a CPU: past 16 nothing more is gained (bench/results, suite `stack`).
LARGEST_STACK = 16


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """num_workers: processes, None for one a core; threads: of each, for stacks not yet planned.

    gpus: where stacks not yet planned are trained, one worker each; none for the CPU.
    stack_size: proxies trained together; micro_batch: sequences of each that a GPU takes at a time;
    None to choose.
    checkpoint_seconds: time between two checkpoints of a stack; it changes no result.
    make_executor: makes what trains the stacks, called as `LocalExecutor` is; None for that one.
    is_remote: whether workers are on other machines, so that this one's memory does not limit them.
    only: indices of the proxies to train now, the others stay as they are; None for all.
    retry_failed: train also those again, from step 0, that were trained without finite losses.
    """

    num_workers: int | None = None
    threads: int = 1
    stack_size: int | None = None
    micro_batch: int | None = None
    gpus: tuple[Gpu, ...] = ()
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    make_executor: Callable[..., Executor] | None = None
    is_remote: bool = False
    only: frozenset[int] | None = None
    retry_failed: bool = False

    @property
    def workers(self) -> int:
        """Processes to use on this machine for stacks of the CPU."""
        return self.num_workers or max(1, available_cores() // self.threads)

    @property
    def places(self) -> int:
        """Stacks not yet planned that are trained at the same time."""
        return len(self.gpus) or self.workers


def plan_stacks(
    study: Study,
    ledger: LedgerReader,
    table: MixtureTable,
    shards: ShardSet,
    options: SweepOptions,
    first: int | None = None,
) -> list[StackJob]:
    """Return new stacks with the mixtures that no stack of the ledger holds, where they are asked.

    A mixture that stands in the table before is a replicate: it gets seeds of its own.
    first: number of the first new stack, None for the next one that the ledger has not.
    """
    refuse_other_pools(study, ledger)
    known = {row.index: row.weights for row in ledger.proxies()}
    unplanned = _unplanned(ledger, options)
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
        if index not in known or index in unplanned:
            members.append(study_member(study, str(index), mixture, replicate))
        elif known[index] != mixture:
            raise StudyError(
                f"{study.mixtures_path}: mixture {index} is not the one its proxy was trained on",
                cure="Restore the row, or give the new mixture an index of its own",
            )
    members += scheduled_members(study, ledger, unplanned)
    if options.only is not None:
        members = [member for member in members if int(member.name) in options.only]
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
    jobs = []
    start = ledger.next_stack_number() if first is None else first
    for number, stack in enumerate(stacks, start=start):
        name = f"stack-{number:04d}"
        proxies = stack_job(study, name, tuple(stack), study.config.proxy, options.threads)
        proxies = dataclasses.replace(proxies, pools=study.config.pools)
        if placement is not None:
            proxies = dataclasses.replace(proxies, device="cuda", micro_batch=placement.micro_batch)
        jobs.append(proxies)
    return jobs


def _unplanned(ledger: LedgerReader, options: SweepOptions) -> frozenset[int]:
    """Return proxies that were taken out before a stack held them, and are named now."""
    if options.only is None or not options.retry_failed:
        return frozenset()
    return frozenset(
        row.index for row in ledger.proxies() if row.stack is None and row.index in options.only
    )


def all_indices(study: Study) -> set[int]:
    """Return the indices of a study's proxies, planned or not."""
    indices = set(read_index_table(study.mixtures_path)[1])
    if study.schedules_path.is_file():
        indices |= set(read_index_table(study.schedules_path, unique=False)[1])
    return indices


def refuse_unknown(study: Study, indices: Collection[int]) -> dict[int, dict[str, float]]:
    """Return the weights of every proxy of a study; `StudyError` where an index is none's."""
    table = MixtureTable.read_csv(study.mixtures_path)
    weights = {index: dict(table.mixture(row)) for row, index in enumerate(table.indices)}
    if study.schedules_path.is_file():
        scheduled = ScheduleTable.read_csv(study.schedules_path)
        for position, index in enumerate(scheduled.indices):
            segments = scheduled.named(position)
            member = scheduled_member(study, str(index), segments, study.config.proxy.num_steps)
            weights[index] = member.weights
    for index in sorted(indices):
        if index not in weights:
            raise StudyError(
                f"{study.path}: no proxy {index}",
                cure=f"Name some of {min(weights)} to {max(weights)}, as mixtures.csv has them",
            )
    return weights


def scheduled_members(
    study: Study, ledger: LedgerReader, unplanned: Collection[int] = ()
) -> list[Member]:
    """Return the proxies of `schedules.csv` that no stack of the ledger holds.

    unplanned: of those that were taken out before that, the ones to return all the same.
    """
    if not study.schedules_path.is_file():
        return []
    out = {row.index for row in ledger.proxies() if row.stack is None} - set(unplanned)
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
        if index in out:
            continue
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


def refuse_other_pools(study: Study, ledger: LedgerReader) -> None:
    """Raise `StudyError` where a stack of the ledger was planned with other pools."""
    for table in ledger.job_tables():
        if table.get("pools") != study.config.pools:
            raise StudyError(
                f"{study.path / 'study.toml'}: its pools are not those that the proxies of "
                f"'{table['name']}' read: their losses would not compare",
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


def located(study: Study, job: StackJob) -> StackJob:
    """Return a stored job with the paths that it has now: the study may have been moved."""
    located = stack_job(study, job.name, job.members, job.training, job.threads)
    return dataclasses.replace(
        located, pools=job.pools, device=job.device, micro_batch=job.micro_batch
    )
