"""How far the proxies of a study are: what `status` shows.

Enters: a study, perhaps one that a sweep writes to now, on this machine or another one. Leaves: a
plain record. Writes nothing and imports no torch, so that it answers at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regmix.data.mixtures import read_index_table
from regmix.errors import RegmixError
from regmix.files import read_table
from regmix.lease import Lease, is_held, read_lease
from regmix.study import Study
from regmix.swarm.ledger_reading import AttemptRow, LedgerReader, ProxyRow, StackRow
from regmix.swarm.progress import SweepProgress, read_progress

STATES = ("done", "running", "retried", "pending", "failed", "cancelled")
# Attempts that ended like this were broken off, and the stack went on elsewhere or later.
BROKEN_OFF = ("died", "hung", "preempted", "lost", "failed", "replaced", "stopped")


@dataclass(frozen=True, kw_only=True)
class SweepState:
    """What a study's proxies are at, and what a person should know of them.

    counts: state -> proxies. failures: (proxy, why) of those trained without finite losses.
    untrained: (stack, proxies in it, why and what to do) of stacks that could not be trained.
    broken_off: (outcome, why, how often, where last) of attempts. progress: what a sweep said last
    of itself; None where it ended. is_running: whether its process lives; None where only time
    can tell, on another machine. holder: whose process that is; renewals: how often it has said so,
    a number that grows while it lives. expected_seconds: to the end, at
    the speed of the last sweep or of the one that runs; None where nothing is known. problem: what
    is wrong with the study's ledger, or how the last sweep ended.
    """

    num_proxies: int
    counts: dict[str, int]
    failures: list[tuple[int, str]]
    untrained: list[tuple[str, list[int], str]]
    broken_off: list[tuple[str, str, int, str]]
    remarks: list[tuple[int, str]]
    num_attempts: int
    progress: SweepProgress | None
    is_running: bool | None
    holder: str | None
    renewals: int | None
    expected_seconds: float | None
    problem: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the state as plain tables, for JSON."""
        table = asdict(self)
        table["proxies"] = table.pop("counts")
        return table


def read_state(study: Study) -> SweepState:
    """Return how far a study's proxies are; `StudyError` where its ledger cannot be read."""
    indices = set(read_index_table(study.mixtures_path)[1])
    if study.schedules_path.is_file():
        indices |= set(read_index_table(study.schedules_path, unique=False)[1])
    progress, is_running, holder = _sweep_of(study)
    known = _read_ledger(study)
    states = {row.index: row.state for row in known.proxies}
    counts = Counter(dict.fromkeys(STATES, 0))
    counts.update(states.get(index, "pending") for index in indices)
    problem = known.problem
    if is_running is False and counts["running"]:
        # The next sweep finds them so and says the same in the ledger, which is not written here.
        problem = "the last sweep was killed; what it left running goes on with the next one"
        counts["retried"] += counts.pop("running")
        counts["running"] = 0
    untrained = {row.name: row.reason or "" for row in known.stacks if row.state == "failed"}
    members: dict[str, list[int]] = {name: [] for name in untrained}
    failures = []
    for row in known.proxies:
        if row.stack in members:
            members[row.stack].append(row.index)
        elif row.state == "failed":
            failures.append((row.index, row.error or "for an unknown reason"))
    num_left = len(indices) - counts["done"] - counts["cancelled"] - len(failures)
    return SweepState(
        num_proxies=len(indices),
        counts=dict(counts),
        failures=failures,
        untrained=[(name, members[name], why) for name, why in untrained.items()],
        broken_off=_broken_off(known.attempts),
        remarks=known.remarks,
        num_attempts=len(known.attempts),
        progress=progress,
        is_running=is_running,
        holder=None if holder is None else str(holder),
        renewals=None if holder is None else holder.counter,
        expected_seconds=_expected_seconds(study, progress, num_left),
        problem=problem,
    )


@dataclass(frozen=True, kw_only=True)
class _Known:
    proxies: list[ProxyRow]
    stacks: list[StackRow]
    attempts: list[AttemptRow]
    remarks: list[tuple[int, str]]
    problem: str | None = None


def _read_ledger(study: Study) -> _Known:
    path = study.ledger_path
    if path.is_file() and path.stat().st_size:
        with LedgerReader.read(path) as ledger:
            return _Known(
                proxies=ledger.proxies(),
                stacks=ledger.stack_rows(),
                attempts=ledger.attempts(),
                remarks=ledger.remarks(),
            )
    problem = None
    if study.losses_path.is_file():
        problem = f"{path.name} is missing or empty, though losses.csv is there: restore it"
    return _Known(proxies=[], stacks=[], attempts=[], remarks=[], problem=problem)


def _sweep_of(study: Study) -> tuple[SweepProgress | None, bool | None, Lease | None]:
    """Return what a sweep says of itself, whether it runs, and the lease that it holds."""
    progress, holder = read_progress(study.progress_path), read_lease(study.lease_path)
    if progress is None or holder is None or holder.token != progress.token:
        return None, False, None
    is_running = is_held(study.lock_path, study.lease_path)
    if is_running is False:
        return None, False, None
    return progress, is_running, holder


def _broken_off(attempts: Sequence[AttemptRow]) -> list[tuple[str, str, int, str]]:
    """Return (outcome, why, how often, where last), most frequent first."""
    times: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], str] = {}
    for attempt in attempts:
        if attempt.state in BROKEN_OFF:
            kind = attempt.state, attempt.reason or ""
            times[kind] += 1
            places[kind] = f"{attempt.worker} on {attempt.machine}"
    return [(*kind, number, places[kind]) for kind, number in times.most_common()]


def _expected_seconds(study: Study, progress: SweepProgress | None, num_left: int) -> float | None:
    """Return how long the proxies that are left take: as the sweep says, or as the last one was."""
    if progress is not None:
        return progress.expected_seconds
    if not num_left:
        return 0.0
    try:
        speed = float(
            read_table(study.path / "sweep.json", "tokens_per_second")["tokens_per_second"]
        )
    except (RegmixError, TypeError, ValueError):
        return None
    return num_left * study.config.proxy.tokens / speed if speed > 0 else None
