"""Histories: the trainings of proxies, cut into segments.

Enters: a study with losses along the way, and the number of segments. Leaves: each proxy's mixture
in every segment and its losses after it. Fits nothing.

Legend: K proxies, N segments, D domains, M targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from regmix.data.mixtures import MixtureTable
from regmix.data.schedules import ScheduleTable, bounds_of, mean_between
from regmix.decision.schedules.trajectories import Trajectories
from regmix.errors import ConfigError, LossTableError
from regmix.study import Study

# (first step, mixture [D]) one after the other.
_Segments = tuple[tuple[int, np.ndarray], ...]


@dataclass(frozen=True, eq=False)
class Histories:
    """weights [K, N, D]: each proxy's mixture in each segment; losses [K, N, M]: after each.

    bounds [N]: the steps that end the segments; num_changed: proxies whose mixture is not the
    same in all of them; num_mixed: proxies whose mixture changes inside one.
    """

    indices: tuple[int, ...]
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    bounds: tuple[int, ...]
    weights: np.ndarray
    losses: np.ndarray
    num_mixed: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shares(self) -> np.ndarray:
        """The share [N] of the run that each segment takes."""
        return np.diff([0, *self.bounds]) / self.bounds[-1]

    @property
    def num_changed(self) -> int:
        """Proxies whose mixture is not the same in all segments."""
        return int((np.ptp(self.weights, axis=1).max(1) > 1e-9).sum())


def read_histories(
    study: Study, trajectories: Trajectories, num_segments: int
) -> tuple[Histories, tuple[str, ...]]:
    """Cut the proxies' trainings into segments; returns them and what a reader should know.

    The bounds are the evaluated steps nearest to equal parts. Raises `ConfigError` where there
    are too few evaluations for so many segments.
    """
    steps = trajectories.steps
    if num_segments < 2 or len(steps) < num_segments:
        raise ConfigError(
            f"{num_segments} segments, and the proxies were evaluated at {len(steps)} steps that "
            f"all of them have",
            cure="Give 2 segments or more, and draw a study with that many evaluations: "
            "mixtures --schedules 32 --segments N, or --eval-every STEPS",
        )
    wanted = bounds_of(num_segments, steps[-1])
    bounds = tuple(_nearest(steps, at) for at in wanted)
    if len(set(bounds)) < num_segments:
        raise ConfigError(
            f"the proxies were evaluated at the steps {', '.join(map(str, steps))}: these do not "
            f"cut their training into {num_segments} segments",
            cure="Ask for fewer segments, or draw a study with --eval-every",
        )
    remarks = []
    if list(bounds) != wanted:
        remarks.append(
            f"The segments end at the proxies' steps {', '.join(map(str, bounds))}, where they "
            "were evaluated"
        )
    domains, followed = _followed(study, trajectories)
    cuts = list(pairwise((0, *bounds)))
    inside = [
        any(first < begin < last for begin, _ in segments for first, last in cuts)
        for segments in followed
    ]
    places = [steps.index(step) for step in bounds]
    histories = Histories(
        indices=trajectories.indices,
        domains=domains,
        targets=trajectories.targets,
        bounds=bounds,
        weights=np.array([[mean_between(s, *cut) for cut in cuts] for s in followed]),
        losses=trajectories.losses[:, places],
        num_mixed=sum(inside),
    )
    return histories, tuple(remarks)


def _nearest(steps: tuple[int, ...], wanted: int) -> int:
    return min(steps, key=lambda step: abs(step - wanted))


def _followed(study: Study, trajectories: Trajectories) -> tuple[tuple[str, ...], list[_Segments]]:
    """Return the domains, and what each proxy with a trajectory was trained on."""
    table = MixtureTable.read_csv(study.mixtures_path)
    followed: dict[int, _Segments] = {
        i: ((0, table.weights[row]),) for row, i in enumerate(table.indices)
    }
    if study.schedules_path.is_file():
        changing = ScheduleTable.read_csv(study.schedules_path)
        if set(changing.domains) != set(table.domains):
            raise LossTableError(
                f"{study.schedules_path}: its domains are not those of {study.mixtures_path.name}",
                cure="Restore mixtures.csv and schedules.csv",
            )
        columns = [changing.domains.index(name) for name in table.domains]
        for index, segments in zip(changing.indices, changing.segments, strict=True):
            followed[index] = tuple((first, weights[columns]) for first, weights in segments)
    strangers = [index for index in trajectories.indices if index not in followed]
    if strangers:
        raise LossTableError(
            f"{study.trajectories_path}: proxy {strangers[0]} has no mixture and no schedule",
            cure="Restore mixtures.csv and schedules.csv",
        )
    return table.domains, [followed[index] for index in trajectories.indices]
