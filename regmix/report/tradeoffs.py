"""The trade-offs between targets, as `optimize` wrote them beside the optimum.

Enters: `optimum-tradeoffs.json` and the optimum's weights. Leaves: `Traded`, or None where the
file is absent or speaks of another optimum. Predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.large.comparison import damaged, read_table
from regmix.report.estimates import Estimate, entries, estimate

_SAME_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True)
class Traded:
    """Predicted losses [N, 1 + M] of allowed mixtures [N, D], the objective's first, in nats.

    named: name -> (weights [D], losses [1 + M]), the optimum first; payoff: target -> what its
    own best mixture changes against the optimum, by target, the objective under None. num_judged
    mixtures were predicted, num_allowed of them keep the guard.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    weights: np.ndarray
    losses: np.ndarray
    named: dict[str, tuple[np.ndarray, np.ndarray]]
    payoff: dict[str, dict[str | None, Estimate]]
    num_judged: int
    num_allowed: int


def read_traded(path: Path, optimum: Mapping[str, float]) -> Traded | None:
    """Read the trade-offs; None where they were counted from another mixture than the optimum."""
    found = read_table(path, "domains", "targets", "mixtures", "points", "payoff")
    try:
        traded = _traded(found, path)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise damaged(path, f"no trade-offs to draw ({error!r})") from error
    reference = next(iter(traded.named.values()), None)
    if reference is None:
        raise damaged(path, "no mixture that costs are counted from")
    wanted = [optimum.get(domain, 0.0) for domain in traded.domains]
    same = set(optimum) <= set(traded.domains) and np.allclose(
        reference[0], wanted, rtol=0, atol=_SAME_WEIGHT
    )
    return traded if same else None


def _traded(found: Mapping[str, Any], path: Path) -> Traded:
    domains, targets = _names(found["domains"]), _names(found["targets"])
    points = found["points"]
    losses = _matrix(points["losses_nats"], len(targets))
    values = _matrix([[value] for value in points["objective_nats"]], 1)
    mixtures = dict(found["mixtures"])
    reference = str(found.get("reference", next(iter(mixtures), "")))
    order = sorted(mixtures, key=lambda name: name != reference)
    named = {
        name: (
            _matrix([mixtures[name]["weights"]], len(domains))[0],
            _matrix(
                [[mixtures[name]["objective_nats"], *mixtures[name]["losses_nats"]]],
                1 + len(targets),
            )[0],
        )
        for name in order
    }
    return Traded(
        domains=domains,
        targets=targets,
        weights=_matrix(points["weights"], len(domains)),
        losses=np.hstack([values, losses]),
        named=named,
        payoff={str(target): _payoff(row, path) for target, row in dict(found["payoff"]).items()},
        num_judged=int(found["num_judged"]),
        num_allowed=int(found["num_allowed"]),
    )


def _payoff(row: Mapping[str, Any], path: Path) -> dict[str | None, Estimate]:
    key = "objective_change_nats"
    found: dict[str | None, Estimate] = {None: estimate(row[key], path, key)}
    found.update(entries(row["change_nats"], path, "change_nats", estimate))
    return found


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


def _matrix(rows: Sequence[Any], width: int) -> np.ndarray:
    values = np.array(rows, dtype=np.float64).reshape(len(rows), width)
    if not np.isfinite(values).all():
        raise ValueError("a value is not a finite number")
    return values
