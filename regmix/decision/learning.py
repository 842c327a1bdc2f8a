"""The learning curve: how the held-out error falls with the number of proxies.

Enters: a fitted surrogate and an objective. Leaves: error and rank correlation at growing random
subsets of its runs, the power with which the error falls, and advice. Fits on subsets only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from regmix.decision.blend import sum_of
from regmix.decision.objective import Objective
from regmix.decision.regressors.registry import make_regressor
from regmix.decision.surrogate import Surrogate
from regmix.decision.validation import spearman

REPEATS = 4
# A curve is asked for its slope: past 256 runs it costs minutes and says no more.
_LARGEST_SUBSET = 256
_FEWEST_LEFT_OUT = 8


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Mean over repeats, on runs outside the subset: RMSE of the objective and its sd, Spearman."""

    num_runs: int
    rmse_nats: float
    rmse_sd_nats: float
    spearman: float | None


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """points: from few runs to all (the last by cross-validation or leave-one-out).

    exponent: of the fall of the error, error ~ runs ** -exponent; None with fewer than 3 points.
    """

    points: tuple[CurvePoint, ...]
    exponent: float | None
    advice: str

    def record(self) -> dict[str, Any]:
        """Return the curve as `fit.json` holds it."""
        return asdict(self)


def learning_curve(
    model: Surrogate,
    objective: Objective,
    *,
    sizes: Sequence[int] | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> LearningCurve:
    """Fit the surrogate's members to random subsets of its runs and judge them on the others.

    sizes: of the subsets; by default half-octaves from the fewest that the members can use to 80%
    of the runs, at most 256. `on_progress` gets the number of fits done.
    """
    num_runs = len(model.losses)
    columns = list(objective.columns)
    true = objective.of_all(model.losses)
    wanted = curve_sizes(model) if sizes is None else [k for k in sizes if k < num_runs]
    points, done = [], 0
    for size in wanted:
        errors, ranks = [], []
        for repeat in range(repeats):
            order = np.random.default_rng([seed, size, repeat]).permutation(num_runs)
            inside, outside = np.sort(order[:size]), order[size:]
            predicted = objective.value(_predict(model, columns, inside, outside))
            errors.append(float(np.sqrt(np.mean((predicted - true[outside]) ** 2))))
            ranks.append(spearman(true[outside], predicted))
            done += 1
            on_progress(done)
        known = [rank for rank in ranks if rank is not None]
        points.append(
            CurvePoint(
                num_runs=size,
                rmse_nats=float(np.mean(errors)),
                rmse_sd_nats=float(np.std(errors)),
                spearman=float(np.mean(known)) if known else None,
            )
        )
    held_out = objective.of_all(model.held_out)
    last = float(np.sqrt(np.mean((held_out - true) ** 2)))
    rank = spearman(true, held_out)
    points.append(CurvePoint(num_runs=num_runs, rmse_nats=last, rmse_sd_nats=0.0, spearman=rank))
    exponent = _exponent(points)
    return LearningCurve(
        points=tuple(points), exponent=exponent, advice=_advice(points[-1], exponent)
    )


def curve_sizes(model: Surrogate) -> list[int]:
    """Return the sizes of subsets that a learning curve is made of unless told otherwise."""
    num_runs, num_domains = model.weights.shape
    fewest = max(make_regressor(m.name, model.seed).fewest_runs(num_domains) for m in model.members)
    most = min(_LARGEST_SUBSET, int(0.8 * num_runs), num_runs - _FEWEST_LEFT_OUT)
    found: list[int] = []
    size = float(most)
    while size >= fewest and len(found) < 5:
        found.append(int(size))
        size /= 2**0.5 if num_runs < 100 else 2
    return sorted(found)


def _predict(
    model: Surrogate, columns: list[int], inside: np.ndarray, outside: np.ndarray
) -> np.ndarray:
    """Return the losses [N, M'] that the members, fitted to some runs, predict of the others."""
    parts = []
    for member in model.members:
        regressor = make_regressor(member.name, model.seed)
        part = regressor.fit(model.weights[inside], model.losses[inside][:, columns])
        parts.append(member.share * part.mean(model.weights[outside]))
    return sum_of(parts)


def _exponent(points: Sequence[CurvePoint]) -> float | None:
    if len(points) < 3:
        return None
    x = np.log([point.num_runs for point in points])
    y = np.log([max(point.rmse_nats, 1e-12) for point in points])
    return float(-np.polyfit(x, y, 1)[0])


def _advice(last: CurvePoint, exponent: float | None) -> str:
    if exponent is None:
        return f"{last.num_runs} runs are too few to say what more of them would bring"
    if exponent <= 0:
        return (
            f"the held-out error of {last.rmse_nats:.4f} nats has not fallen with the number of "
            "proxies: more of them may not help"
        )
    twice = last.rmse_nats * 2**-exponent
    return (
        f"twice as many proxies ({2 * last.num_runs}) would lower the held-out error from "
        f"{last.rmse_nats:.4f} to about {twice:.4f} nats"
    )
