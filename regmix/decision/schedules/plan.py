"""Schedules: a mixture per segment of the run, chosen by the proxies' transitions.

Enters: histories of proxies, an objective, constraints. Leaves: a `SegmentPlan`: the schedule of
the lowest predicted final objective, the best constant mixture on the same surface, the gain of
the one over the other with its interval, and a plain verdict. Fits are in `transitions`.

Every bound holds in every segment, and the limit on epochs over the whole run. A constant mixture
is a schedule too, so the predicted gain is never below 0: what counts is whether its interval is.
Legend: K proxies, N segments, D domains, M targets, C schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from regmix.data.mixtures import Mixture
from regmix.data.schedules import Schedule, Segment
from regmix.decision.objective import Objective
from regmix.decision.schedules.histories import Histories
from regmix.decision.schedules.search import ScheduleSearch
from regmix.decision.schedules.transitions import calibrated_chain
from regmix.decision.searching.constraints import Constraints
from regmix.decision.uncertainty import Interval
from regmix.decision.validation import spearman
from regmix.errors import LossTableError

NUM_DRAWS = 400
FEWEST_PROXIES = 16
# Proxies with a change on the way, below which no schedule is believed.
FEWEST_CHANGED = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentPlan:
    """schedule: a mixture per segment; bounds [N]: steps of a proxy that end them.

    constant [D]: the best mixture for the whole run on the same surface. loss, constant_loss:
    predicted final objective; gain: of the schedule over the constant, with its 90% interval;
    better: share of draws in which it gains. rmse_nats, spearman: of final objectives predicted
    from schedules alone, held out. epochs: over the whole run. believed: whether to follow it.
    """

    schedule: Schedule
    bounds: tuple[int, ...]
    constant: Mixture
    loss: float
    constant_loss: float
    gain: Interval
    better: float
    rmse_nats: float
    spearman: float | None
    epochs: dict[str, float] | None
    num_proxies: int
    num_changed: int
    believed: bool
    verdict: str
    remarks: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return what `optimum.json` holds under `schedule`."""
        return {
            "segments": [
                {"share": segment.share, "weights": dict(segment.mixture)}
                for segment in self.schedule.segments
            ],
            "mean": dict(self.schedule.mean),
            "constant": dict(self.constant),
            "predicted": {"schedule": self.loss, "constant": self.constant_loss},
            "gain_nats": asdict(self.gain),
            "better": self.better,
            "held_out": {"rmse_nats": self.rmse_nats, "spearman": self.spearman},
            "epochs": self.epochs,
            "proxies": {"all": self.num_proxies, "changed": self.num_changed},
            "proxy_steps": list(self.bounds),
            "believed": self.believed,
            "verdict": self.verdict,
            "remarks": list(self.remarks),
        }


def plan_segments(
    histories: Histories,
    objective: Objective,
    *,
    bounds: Constraints,
    whole: Constraints,
    extrapolate: bool = False,
    seed: int = 0,
    remarks: Sequence[str] = (),
    on_progress: Callable[[int], None] = lambda _done: None,
) -> SegmentPlan:
    """Return the best schedule for the objective, beside the best constant mixture.

    bounds: what every segment's mixture respects; whole: what the mixture over the run does, the
    limit on epochs. No domain gets more in a segment than any proxy gave it there, unless
    `extrapolate`. Raises `LossTableError` for too few proxies, `ConstraintError` where no
    schedule within the bounds is found.
    """
    if len(histories) < FEWEST_PROXIES:
        raise LossTableError(
            f"{len(histories)} proxies with losses along the way",
            cure=f"Train at least {FEWEST_PROXIES}; for schedules half of them should change "
            "their mixture: mixtures --schedules 32",
        )
    held_out = calibrated_chain(histories, objective.columns, seed, on_progress)
    chain = held_out.chain
    search = ScheduleSearch(chain, histories, objective, bounds, whole, extrapolate)
    schedule, constant = search.best(seed)
    pair = np.stack([schedule, np.tile(constant, (len(schedule), 1))])
    loss, constant_loss = objective.value(chain.losses(pair)).tolist()
    drawn = chain.draws(pair, NUM_DRAWS, seed)
    gains = np.stack([objective.value(surface) for surface in drawn]) @ np.array([-1.0, 1.0])
    gain = Interval.of(gains)
    true = objective.of_all(histories.losses[:, -1])
    predicted = objective.value(held_out.final)
    believed = gain.low > 0 and histories.num_changed >= FEWEST_CHANGED
    return SegmentPlan(
        schedule=_named(histories, schedule),
        bounds=histories.bounds,
        constant=Mixture(dict(zip(histories.domains, constant.tolist(), strict=True))),
        loss=loss,
        constant_loss=constant_loss,
        gain=gain,
        better=float((gains > 0).mean()),
        rmse_nats=float(np.sqrt(np.mean((predicted - true) ** 2))),
        spearman=spearman(true, predicted),
        epochs=whole.epochs(histories.shares @ schedule),
        num_proxies=len(histories),
        num_changed=histories.num_changed,
        believed=believed,
        verdict=_verdict(histories, constant_loss - loss, gain, believed),
        remarks=(*remarks, *_limits(histories)),
    )


def _named(histories: Histories, weights: np.ndarray) -> Schedule:
    mixtures = [Mixture(dict(zip(histories.domains, w.tolist(), strict=True))) for w in weights]
    pairs = zip(histories.shares.tolist(), mixtures, strict=True)
    return Schedule(tuple(Segment(share=share, mixture=mixture) for share, mixture in pairs))


def _verdict(histories: Histories, gain_nats: float, gain: Interval, believed: bool) -> str:
    told = f"{gain_nats:.4f} nats (90% interval {gain.low:.4f} to {gain.high:.4f})"
    if believed:
        return f"use the schedule: predicted {told} below the best constant mixture"
    if histories.num_changed < FEWEST_CHANGED:
        return (
            f"a constant mixture is as good as these proxies can tell: {histories.num_changed} of "
            f"them changed their mixture on the way, so a predicted gain of {told} is a guess"
        )
    return f"a constant mixture is as good: a predicted gain of {told} is not significant"


def _limits(histories: Histories) -> list[str]:
    found = []
    if histories.num_changed < FEWEST_CHANGED:
        found.append(
            "Proxies that keep one mixture show each state only under the mixture that led to it; "
            "for schedules draw proxies that change it: mixtures --schedules 32 --segments "
            f"{len(histories.bounds)}"
        )
    if histories.num_mixed:
        found.append(
            f"{histories.num_mixed} proxies change their mixture inside a segment: the mean of "
            "its parts stands for it"
        )
    return found
