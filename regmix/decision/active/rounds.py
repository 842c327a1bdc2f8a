"""Rounds of a study: propose mixtures from the proxies so far, train them, and again.

Enters: a study, how many rounds of how many mixtures, a function that trains what is pending.
Leaves: a study with these rounds, each in `rounds.json` and in `mixtures.csv`. Trains nothing
itself.

A round is stored in `rounds.json` with all its mixtures before `mixtures.csv` gets them, and both
before any of them is trained. Killed in between, the next run adds what is stored; it never
proposes a round again. So the rounds that a study has say where to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.config import build
from regmix.data.mixtures import MixtureTable
from regmix.decision.active.acquisition import find_rule
from regmix.decision.active.outlook import check_enough_to_look
from regmix.decision.active.proposals import ProposalRequest, Proposals, propose
from regmix.errors import StudyError
from regmix.files import read_table, write_json
from regmix.study import Study
from regmix.swarm.sweep import SweepResult

ROUNDS_VERSION = 1
FILE = "rounds.json"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A stored round; number counts from 1, indices name its rows of `mixtures.csv`."""

    number: int
    rule: str
    seed: int
    objective: str
    num_runs: int
    num_explored: int
    best_nats: float
    expected_nats: tuple[float, ...]
    sd_nats: tuple[float, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _StoredRound(Round):
    """A round as the file has it: also its domains [D] and weights [N][D]."""

    domains: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(self.expected_nats), len(self.sd_nats), len(self.indices)}
        if lengths != {len(self.weights)} or not self.weights:
            raise StudyError(
                f"round {self.number} has {len(self.weights)} mixtures and other numbers of "
                "indices or predictions",
                cure="Restore rounds.json, or remove the round",
            )


def read_rounds(study: Study) -> tuple[Round, ...]:
    """Return the rounds of a study in order, none where it has no `rounds.json`."""
    return tuple(_round(entry, _path(study)) for entry in _entries(study))


def add_round(study: Study, request: ProposalRequest) -> Round:
    """Propose mixtures, store them as the next round and append them to the study's mixtures.

    Raises what `propose` raises.
    """
    with study.lock():
        _append_stored(study)
        entries = _entries(study)
        proposed = propose(study, request)
        entries.append(_entry(len(entries) + 1, request, proposed))
        write_json(_path(study), {"version": ROUNDS_VERSION, "rounds": entries})
        _append_stored(study)
    return _round(entries[-1], _path(study))


def train_in_rounds(
    study: Study,
    num_rounds: int,
    request: ProposalRequest,
    *,
    train: Callable[[], SweepResult],
    on_round: Callable[[Round], None] = lambda _: None,
) -> SweepResult:
    """Train what is pending, then propose and train until the study has `num_rounds` rounds.

    train: trains all that is pending; request: of each round. Ends early where a proxy could not
    be trained, so that the next run proposes from the same runs. Raises what `propose` raises.
    """
    with study.lock():
        _append_stored(study)
    num_made = len(_entries(study))
    table = MixtureTable.read_csv(study.mixtures_path)
    if num_made < num_rounds:
        check_enough_to_look(len(table), len(table.domains))
    result = train()
    for _ in range(num_made, num_rounds):
        if result.num_pending:
            break
        on_round(add_round(study, request))
        before = result.trained_now
        result = train()
        result.trained_now += before
    return result


def _append_stored(study: Study) -> None:
    """Append the last stored round to `mixtures.csv` where a kill came in between."""
    entries = _entries(study)
    if not entries:
        return
    last = build(_StoredRound, entries[-1], where=str(_path(study)))
    table = MixtureTable.read_csv(study.mixtures_path)
    if set(last.domains) != set(table.domains) or any(
        len(row) != len(last.domains) for row in last.weights
    ):
        raise StudyError(
            f"{_path(study)}: round {last.number} is not of the domains of mixtures.csv",
            cure="Restore the file, or remove the round",
        )
    stored = MixtureTable(last.domains, last.indices, np.array(last.weights, dtype=np.float64))
    present = [index for index in stored.indices if index in table.indices]
    if not present:
        table.extended(stored).write_csv(study.mixtures_path)
        return
    columns = [table.domains.index(name) for name in stored.domains]
    for row, index in enumerate(stored.indices):
        if index not in present or not np.array_equal(
            table.weights[table.indices.index(index)][columns], stored.weights[row]
        ):
            raise StudyError(
                f"{study.mixtures_path}: mixture {index} is not that of round {last.number} in "
                f"{_path(study).name}",
                cure=f"Restore the row, or remove the round from {_path(study)}",
            )


def _path(study: Study) -> Path:
    return study.path / FILE


def _entries(study: Study) -> list[dict[str, Any]]:
    if not _path(study).is_file():
        return []
    table = read_table(_path(study), "version", "rounds")
    if table["version"] != ROUNDS_VERSION:
        raise StudyError(
            f"{_path(study)}: made by another version of regmix-fast (format "
            f"{table['version']!r}, this one reads {ROUNDS_VERSION})",
            cure="Use the version of regmix-fast that made it",
        )
    entries = table["rounds"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise StudyError(f"{_path(study)}: 'rounds' is no list of rounds", cure="Restore the file")
    return list(entries)


def _entry(number: int, request: ProposalRequest, proposed: Proposals) -> dict[str, Any]:
    return {
        "number": number,
        "rule": request.rule,
        "seed": request.seed,
        "objective": proposed.objective,
        "num_runs": proposed.num_runs,
        "num_explored": proposed.num_explored,
        "best_nats": proposed.best_nats,
        "expected_nats": list(proposed.expected_nats),
        "sd_nats": list(proposed.sd_nats),
        "indices": list(proposed.table.indices),
        "domains": list(proposed.table.domains),
        "weights": proposed.table.weights.tolist(),
    }


def _round(entry: dict[str, Any], path: Path) -> Round:
    stored = build(_StoredRound, entry, where=str(path))
    return Round(**{name: getattr(stored, name) for name in Round.__dataclass_fields__})


def told(made: Round) -> Iterable[str]:
    """Return in words what a round is, by which rule it was chosen, and what is expected of it."""
    guided = len(made.indices) - made.num_explored
    yield (
        f"Round {made.number}: mixtures {made.indices[0]} to {made.indices[-1]}, proposed from "
        f"{made.num_runs} proxies"
    )
    if made.num_explored:
        yield f"  {made.num_explored} drawn at random, so that predictions stay right elsewhere"
    if guided:
        expected = made.expected_nats[made.num_explored :]
        lowest = min(range(len(expected)), key=expected.__getitem__)
        sd = made.sd_nats[made.num_explored + lowest]
        yield f"  {guided} by '{made.rule}': {find_rule(made.rule).why}"
        yield (
            f"  expected of these, {made.objective}: {min(expected):.4f} (± {sd:.4f}) to "
            f"{max(expected):.4f} nats; the best proxy so far has {made.best_nats:.4f} nats"
        )
