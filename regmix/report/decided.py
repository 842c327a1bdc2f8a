"""What `optimize` decided and how sure it was, as `optimum.json` holds it.

Enters: that file (older ones lack intervals, action, guard). Leaves: `Decided`, whose parts are
None or empty where the file lacks them, or the error that names what cannot be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.config import finite
from regmix.large.comparison import damaged, read_table
from regmix.report.estimates import (
    Estimate,
    Interval,
    entries,
    estimate,
    interval,
    number,
    table,
    tables_in,
)

# What a prior is called that is not the corpus as it is.
GIVEN_PRIOR = "given prior"
# A guard with less room than this is said to bind: no loss is measured so finely.
_BINDS_NATS = 5e-4
_SAME_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class GuardRow:
    """A target's predicted loss at the guard's reference and at the optimum, in nats."""

    target: str
    reference: float
    optimum: float
    tolerance: float

    @property
    def binds(self) -> bool:
        """Whether the optimum uses all that the guard tolerates."""
        return self.optimum - self.reference > self.tolerance - _BINDS_NATS


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The optimum's decision; gains and losses in nats, intervals of 90%.

    baseline: what the verdict is about; loss_nats: the optimum's;
    limits: domain -> bounds on its weight; bound: domain ->
    the limit that its weight is at, in words; feasible: whether a baseline respects the limits.
    """

    baseline: str | None
    action: str | None
    more_proxies: int | None
    gains: dict[str, Estimate]
    better: dict[str, float]
    feasible: dict[str, bool]
    intervals: dict[str, Interval]
    loss_nats: float | None
    loss_interval: Interval | None
    shortfall_nats: float | None
    noise_nats: float | None
    limits: dict[str, Interval]
    bound: dict[str, str]
    kl: float | None
    divergence_nats: float | None
    guard_name: str | None
    guard: tuple[GuardRow, ...]


def read_optimum(path: Path, prior: Mapping[str, float]) -> dict[str, Any]:
    """Read `optimum.json`; `StudyError` where its weights or tables cannot be used."""
    found = read_table(path, "domains", "weights")
    domains, weights = found["domains"], found["weights"]
    if not isinstance(domains, list) or not isinstance(weights, list):
        raise damaged(path, "domains and weights are not lists")
    if len(domains) != len(weights):
        raise damaged(path, f"{len(domains)} domains and {len(weights)} weights")
    if not all(isinstance(domain, str) for domain in domains) or len({*domains}) < len(domains):
        raise damaged(path, "a domain is no name, or there twice")
    if not all(finite(weight) and 0 <= weight <= 1 + _SAME_WEIGHT for weight in weights):
        raise damaged(path, "a weight is not a number from 0 to 1")
    for key in ("gain_nats", "baselines", "predicted", "epochs", "better", "guard", "bounds"):
        table(found.get(key), path, key)
    baselines = table(found.get("baselines"), path, "baselines")
    tables_in(baselines, path, "baselines")
    for entry in baselines.values():
        given = (entry or {}).get("weights")
        if given is not None and not (isinstance(given, list) and all(map(finite, given))):
            raise damaged(path, "the weights of a baseline are no list of numbers")
    if not finite(found.get("budget_tokens") or 0):
        raise damaged(path, "'budget_tokens' is not a number")
    if not isinstance(found.get("at_edge") or [], list):
        raise damaged(path, "'at_edge' is not a list")
    return _with_natural(found, prior)


def _with_natural(found: dict[str, Any], prior: Mapping[str, float]) -> dict[str, Any]:
    """Return an optimum whose baseline "natural" is so called only where it is the corpus as is.

    `optimize --prior FILE` gives it other weights.
    """
    weights = ((found.get("baselines") or {}).get("natural") or {}).get("weights")
    natural = [prior.get(domain, 0.0) for domain in found["domains"]]
    if weights is None or (
        len(weights) == len(natural) and np.allclose(weights, natural, rtol=0, atol=1e-6)
    ):
        return found
    renamed = dict(found)
    for key in ("gain_nats", "gain_intervals_nats", "better", "baselines"):
        entries_of = found.get(key) or {}
        renamed[key] = {
            (GIVEN_PRIOR if name == "natural" else name): entry
            for name, entry in entries_of.items()
        }
    if found.get("baseline") == "natural":
        renamed["baseline"] = GIVEN_PRIOR
    if (found.get("guard") or {}).get("name") == "natural":
        renamed["guard"] = {**found["guard"], "name": GIVEN_PRIOR}
    verdict = str(found.get("verdict") or "").replace("'natural'", "the given prior")
    return {**renamed, "verdict": verdict}


def read_decided(found: Mapping[str, Any], path: Path) -> Decided:
    """Return the decision of an optimum that was read from `path`."""
    key = "gain_intervals_nats"
    sure = entries(found.get(key), path, key, interval)
    gains = {
        name: Estimate(float(gain), *sure.get(name, (None, None)))
        for name, gain in table(found.get("gain_nats"), path, "gain_nats").items()
        if finite(gain)
    }
    better = table(found.get("better"), path, "better")
    baselines = table(found.get("baselines"), path, "baselines")
    limits = entries(found.get("bounds"), path, "bounds", interval)
    loss_interval = found.get("objective_interval_nats")
    more = found.get("more_proxies")
    guard = table(found.get("guard"), path, "guard")
    return Decided(
        baseline=None if found.get("baseline") is None else str(found["baseline"]),
        action=None if found.get("action") is None else str(found["action"]),
        more_proxies=int(more) if finite(more) else None,
        gains=gains,
        better={name: float(share) for name, share in better.items() if finite(share)},
        feasible={
            name: entry["feasible"]
            for name, entry in baselines.items()
            if isinstance(entry, dict) and isinstance(entry.get("feasible"), bool)
        },
        intervals=entries(found.get("intervals"), path, "intervals", interval),
        loss_nats=number(table(found.get("predicted"), path, "predicted").get("objective")),
        loss_interval=None
        if loss_interval is None
        else interval(loss_interval, path, "objective_interval_nats"),
        shortfall_nats=number(found.get("shortfall_nats")),
        noise_nats=number(found.get("noise_nats")),
        limits=limits,
        bound=_bound(found, limits),
        kl=number(found.get("kl")),
        divergence_nats=number(found.get("divergence_nats")),
        guard_name=str(guard["name"]) if "name" in guard else None,
        guard=_guard_rows(found, guard, path),
    )


def _bound(found: Mapping[str, Any], limits: Mapping[str, Interval]) -> dict[str, str]:
    """Return domain -> the limit that its weight is at."""
    epochs, most = found.get("epochs") or {}, number(found.get("max_epochs"))
    edge = found.get("at_edge") or []
    at: dict[str, str] = {}
    for domain, weight in zip(found["domains"], found["weights"], strict=True):
        low, high = limits.get(domain, (0.0, 1.0))
        passes = number(epochs.get(domain))
        if weight >= high - _SAME_WEIGHT and high < 1:
            is_epochs = most is not None and passes is not None and passes >= most * (1 - 1e-6)
            at[domain] = f"{most:g} epochs of its tokens" if is_epochs else "its upper bound"
        elif domain in edge:
            at[domain] = "the largest weight of any run"
        elif weight <= low + _SAME_WEIGHT and low > 0:
            at[domain] = "its lower bound"
    return at


def _guard_rows(
    found: Mapping[str, Any], guard: Mapping[str, Any], path: Path
) -> tuple[GuardRow, ...]:
    changes = entries(guard.get("changes_nats"), path, "changes_nats", estimate)
    predicted = table((found.get("predicted") or {}).get("targets"), path, "targets")
    tolerance = number(guard.get("tolerance_nats"))
    if tolerance is None:
        return ()
    return tuple(
        GuardRow(
            target=target,
            reference=float(predicted[target]) - change.mean,
            optimum=float(predicted[target]),
            tolerance=tolerance,
        )
        for target, change in changes.items()
        if finite(predicted.get(target))
    )
