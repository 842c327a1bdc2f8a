"""The swarm's schedules: proxies whose mixture changes at the bounds of equal segments.

Enters: how many, of how many segments, and how mixtures are drawn. Leaves: a `ScheduleTable`, and
a training that is evaluated at the bounds. What proxies of one mixture each show of a change is
only what their own states show; these are seen in states that another mixture led to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regmix.data.schedules import FIRST_INDEX, ScheduleTable, bounds_of
from regmix.errors import ConfigError
from regmix.study import Training

if TYPE_CHECKING:
    from regmix.swarm.drawing import SwarmRequest


@dataclass(frozen=True, kw_only=True)
class ScheduleRequest:
    """num: proxies that follow a schedule; num_segments: equal parts of each run."""

    num: int
    num_segments: int

    def __post_init__(self) -> None:
        if self.num < 1 or self.num_segments < 2:
            raise ConfigError(
                f"{self.num} schedules of {self.num_segments} segments",
                cure="Ask for at least 1 schedule of at least 2 segments",
            )

    def trained(self, training: Training) -> Training:
        """Return the training with evaluations at the bounds, where schedules change."""
        inner = bounds_of(self.num_segments, training.num_steps)[:-1]
        steps = sorted({*inner, *(training.eval_steps or ())})
        return dataclasses.replace(training, eval_steps=tuple(steps))

    def draw(
        self, swarm: SwarmRequest, prior: Mapping[str, float], training: Training
    ) -> ScheduleTable:
        """Return schedules whose segments are drawn as the swarm's mixtures, in random pairs."""
        request = dataclasses.replace(swarm, num=self.num * self.num_segments, seed=swarm.seed + 1)
        drawn = request.draw(prior)
        order = np.random.default_rng([swarm.seed, self.num_segments]).permutation(len(drawn))
        firsts = [0, *bounds_of(self.num_segments, training.num_steps)[:-1]]
        rows = drawn.weights[order].reshape(self.num, self.num_segments, -1)
        return ScheduleTable(
            drawn.domains,
            tuple(range(FIRST_INDEX, FIRST_INDEX + self.num)),
            tuple(tuple(zip(firsts, segments, strict=True)) for segments in rows),
        )
