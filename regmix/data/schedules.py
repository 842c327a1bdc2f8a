"""Schedules: a run whose mixture changes at given shares of its steps.

Enters: shares and mixtures, YAML files with a section `segments`, the table of the swarm's
schedules. Leaves: the first step and the mixture of every segment, as the sampler takes them, and
the mixture over the whole run. Deals no sequence and chooses no mixture.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.mixtures import (
    PREFIX,
    Mixture,
    is_count,
    mixture_of,
    read_index_table,
    write_mixture_yaml,
)
from regmix.data.strict_yaml import read_yaml
from regmix.errors import MixtureError
from regmix.files import atomic_open

_FIRST_STEP = "first_step"
# Proxies that follow a schedule are numbered from here: no swarm has as many mixtures.
FIRST_INDEX = 1_000_001


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a run with one mixture; share: of the run's tokens."""

    share: float
    mixture: Mixture


@dataclass(frozen=True)
class Schedule:
    """Mixtures one after the other, shares of the run that sum to 1.

    Raises `MixtureError` for shares that are no shares or mixtures of different domains.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        shares = [segment.share for segment in self.segments]
        if not shares or not all(share > 0 for share in shares):
            raise MixtureError(f"schedule: shares {shares}", cure="Give each segment one above 0")
        if abs(math.fsum(shares) - 1) > 1e-6:
            raise MixtureError(
                f"schedule: the shares of its segments sum to {math.fsum(shares):.6g}, not 1",
                cure="Give the share of the run's tokens that each segment takes",
            )
        for segment in self.segments[1:]:
            if segment.mixture.domains != self.domains:
                raise MixtureError(
                    "schedule: its segments name different domains",
                    cure="Name every domain in every segment, with weight 0 where it is not read",
                )

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return self.segments[0].mixture.domains

    @property
    def mean(self) -> Mixture:
        """The mixture over the whole run: the fraction of its tokens from each domain."""
        weights = np.stack([segment.mixture.array(self.domains) for segment in self.segments])
        shares = np.array([segment.share for segment in self.segments])
        return Mixture(
            dict(zip(self.domains, (shares @ weights / shares.sum()).tolist(), strict=True))
        )

    def at_steps(self, num_steps: int) -> list[tuple[int, Mixture]]:
        """Return each segment's first step and mixture: bounds at the nearest whole step.

        Raises `MixtureError` where a segment would have no step.
        """
        bounds = np.cumsum([0.0, *(segment.share for segment in self.segments)])
        firsts = [round(num_steps * bound) for bound in bounds[:-1].tolist()]
        for number, (first, following) in enumerate(
            zip(firsts, [*firsts[1:], num_steps], strict=True), start=1
        ):
            if following <= first:
                raise MixtureError(
                    f"segment {number} of {len(firsts)} has {self.segments[number - 1].share:.2%} "
                    f"of a run of {num_steps} steps: less than one step",
                    cure="Train for more steps, or use fewer segments",
                )
        return [(first, one.mixture) for first, one in zip(firsts, self.segments, strict=True)]


def read_schedule_yaml(path: Path | str) -> Schedule | None:
    """Read the section `segments` of a mixture's file; None where it has none."""
    content = read_yaml(path)
    listed = content.get("segments") if isinstance(content, dict) else None
    if listed is None:
        return None
    if not isinstance(listed, list) or not listed:
        raise MixtureError(
            f"{path}: 'segments' is no list", cure="Write a list of {share: s, train: {...}}"
        )
    segments = []
    for number, entry in enumerate(listed, start=1):
        where = f"{path}, segment {number}"
        share = entry.get("share") if isinstance(entry, dict) else None
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise MixtureError(
                f"{where}: its share is {_told(share)!r}",
                cure="Give the share of the run's tokens: a number above 0, at most 1",
            )
        segments.append(Segment(share=float(share), mixture=mixture_of(entry, where=where)))
    return Schedule(tuple(segments))


def _told(share: Any) -> str:
    """Return a share in few characters: a few bytes of YAML can stand for gigabytes of list."""
    plain = share is None or isinstance(share, str | float)
    if plain or (isinstance(share, int) and abs(share) < 10**18):
        return str(share)[:40]
    return f"of type {type(share).__name__}"


def schedule_section(schedule: Schedule) -> list[dict[str, Any]]:
    """Return the section `segments` of a schedule, as `read_schedule_yaml` reads it."""
    return [
        {
            "share": segment.share,
            "train": {PREFIX + name: weight for name, weight in segment.mixture.items()},
        }
        for segment in schedule.segments
    ]


def write_schedule_yaml(
    path: Path | str, schedule: Schedule, *, sections: Mapping[str, Any] | None = None
) -> None:
    """Write a schedule in the format of RegMix: `train` is its mixture over the whole run."""
    told = {"segments": schedule_section(schedule), **(sections or {})}
    write_mixture_yaml(path, schedule.mean, sections=told)


@dataclass(frozen=True, eq=False)
class ScheduleTable:
    """The schedules of a swarm: of proxy indices[k], segments[k] = (first step, mixture [D])."""

    domains: tuple[str, ...]
    indices: tuple[int, ...]
    segments: tuple[tuple[tuple[int, np.ndarray], ...], ...]

    def __len__(self) -> int:
        return len(self.indices)

    def named(self, position: int) -> list[tuple[int, Mixture]]:
        """Return one proxy's segments, for the sampler."""
        return [
            (first, Mixture(dict(zip(self.domains, weights.tolist(), strict=True))))
            for first, weights in self.segments[position]
        ]

    def mean_between(self, position: int, first: int, last: int) -> np.ndarray:
        """Return one proxy's mixture [D] over the steps `first` to `last` - 1."""
        return mean_between(self.segments[position], first, last)

    @classmethod
    def read_csv(cls, path: Path | str) -> ScheduleTable:
        """Read `index,first_step,train_<domain>,...`: a row a segment, in order."""
        header, indices, rows = read_index_table(path, unique=False)
        names = tuple(name.removeprefix(PREFIX) for name in header if name != _FIRST_STEP)
        if len(names) != len(header) - 1 or any(
            name != _FIRST_STEP and not name.startswith(PREFIX) for name in header
        ):
            raise MixtureError(
                f"{path}: its columns are not index, {_FIRST_STEP} and train_<domain>",
                cure="Restore the file: `mixtures --schedules` wrote it",
            )
        place = header.index(_FIRST_STEP)
        found: dict[int, list[tuple[int, np.ndarray]]] = {}
        for number, (index, cells) in enumerate(zip(indices, rows, strict=True), start=1):
            where = f"{path}, row {number} (index {index})"
            segments = found.setdefault(index, [])
            first = cells[place].strip()
            if not is_count(first) or (int(first) != 0 and not segments):
                raise MixtureError(
                    f"{where}: first step {first!r}", cure="A schedule's segments begin at step 0"
                )
            if segments and int(first) <= segments[-1][0]:
                raise MixtureError(
                    f"{where}: its segments are not in order", cure="Order them by first step"
                )
            weights = dict(zip(names, cells[:place] + cells[place + 1 :], strict=True))
            mixture = Mixture(weights, where=where)  # type: ignore[arg-type]
            segments.append((int(first), mixture.array(names)))
        return cls(names, tuple(found), tuple(tuple(segments) for segments in found.values()))

    def write_csv(self, path: Path | str) -> None:
        """Write the table, atomically; reading it gives the same bits."""
        with atomic_open(path, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["index", _FIRST_STEP, *(PREFIX + name for name in self.domains)])
            for index, segments in zip(self.indices, self.segments, strict=True):
                for first, weights in segments:
                    writer.writerow([index, first, *(repr(w) for w in weights.tolist())])


def mean_between(segments: Sequence[tuple[int, np.ndarray]], first: int, last: int) -> np.ndarray:
    """Return the mixture [D] over the steps `first` to `last` - 1 of segments (first step, [D])."""
    total = np.zeros(len(segments[0][1]))
    for number, (begin, weights) in enumerate(segments):
        end = segments[number + 1][0] if number + 1 < len(segments) else last
        total += max(0, min(end, last) - max(begin, first)) * weights
    return total / (last - first)


def bounds_of(num_segments: int, num_steps: int) -> list[int]:
    """Return the steps that end the segments of a run cut into equal parts; the last is its end."""
    if not 1 <= num_segments <= num_steps:
        raise MixtureError(
            f"{num_segments} segments of a run of {num_steps} steps",
            cure=f"Give a number from 2 to {num_steps}",
        )
    return [round(num_steps * (i + 1) / num_segments) for i in range(num_segments)]
