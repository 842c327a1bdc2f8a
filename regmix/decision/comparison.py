"""The optimum beside the baselines: predicted losses, gains and how sure they are.

Enters: a surrogate, an optimum's weights, baselines. Leaves: one `Compared` for each. Searches
nothing, and gives no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from regmix.decision.baselines import Baseline
from regmix.decision.searching.constraints import Constraints
from regmix.decision.searching.guard import SLACK_NATS
from regmix.decision.searching.predictor import Predictor
from regmix.decision.surrogate import Surrogate
from regmix.decision.uncertainty import Interval, Sureness


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A baseline beside the optimum: predicted objective, and the optimum's gain over it, in nats.

    gain_interval: the gain with its 90% interval; better: share of the surfaces that the runs leave
    possible on which the optimum is better; feasible: whether the baseline respects the
    constraints and the guard.
    """

    name: str
    weights: dict[str, float]
    loss: float
    gain: float
    gain_interval: Interval
    better: float
    feasible: bool


def compare(
    model: Surrogate,
    predictor: Predictor,
    limits: Constraints,
    loss: float,
    baselines: Sequence[Baseline],
    sure: Sureness,
) -> tuple[Compared, ...]:
    """Return every baseline beside an optimum of this predicted objective [nats]."""
    rows = np.stack([entry.weights for entry in baselines])
    losses = model.mean(rows)
    values = predictor.objective.of_all(losses).tolist()
    feasible = limits.satisfied(rows)
    if predictor.guard is not None:
        feasible &= predictor.guard.excess(losses) <= SLACK_NATS
    return tuple(
        Compared(
            name=entry.name,
            weights=dict(zip(model.domains, entry.weights.tolist(), strict=True)),
            loss=value,
            gain=value - loss,
            gain_interval=interval.around(value - loss),
            better=better,
            feasible=bool(within),
        )
        for entry, value, within, interval, better in zip(
            baselines, values, feasible, sure.gains, sure.better, strict=True
        )
    )
