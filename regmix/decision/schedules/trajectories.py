"""Trajectories: the validation losses of proxies at steps along their training.

Enters: `trajectories.csv` of a study whose proxies were evaluated on the way. Leaves: the losses
[K, S, M] at the steps that every proxy has, and how early a training could have ended and still
ranked the mixtures. Trains nothing; schedules are chosen in `segments`.

Legend: K proxies, S steps, M targets, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.mixtures import is_count, read_index_table
from regmix.decision.objective import Objective
from regmix.decision.regressors.registry import make_regressor
from regmix.decision.runs import TARGET_PREFIX, TARGET_SUFFIX, DroppedRun, Runs
from regmix.decision.validation import fold_of_runs, spearman
from regmix.errors import LossTableError, MixtureError, StudyError
from regmix.study import Study

# A surrogate on early losses may rank held-out runs this much worse and still be enough.
TOLERANCE = 0.01
# Runs of each fold whose final losses teach the map from early losses to final ones.
FULL_RUNS = 8
_FOLDS = 5
_MOST_STEPS = 8
_STEP = "step"


@dataclass(frozen=True, eq=False)
class Trajectories:
    """losses [K, S, M] in nats per token of proxies `indices` after `steps` steps.

    dropped: proxies without all of these losses, which are left out.
    """

    indices: tuple[int, ...]
    steps: tuple[int, ...]
    losses: np.ndarray
    targets: tuple[str, ...]
    dropped: tuple[DroppedRun, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def of(self, indices: Sequence[int]) -> Trajectories:
        """Return those of these proxies, in this order; they must all be there."""
        rows = [self.indices.index(index) for index in indices]
        return Trajectories(tuple(indices), self.steps, self.losses[rows], self.targets)

    def select(self, targets: Sequence[str]) -> Trajectories:
        """Return those of these targets, in this order."""
        columns = [self.targets.index(target) for target in targets]
        losses = self.losses[:, :, columns]
        return Trajectories(self.indices, self.steps, losses, tuple(targets), self.dropped)


def read_trajectories(study: Study) -> Trajectories:
    """Read the trajectories of a study's finished proxies.

    Steps that not every proxy was evaluated at are left out: the study may have got its segments
    later. Raises `StudyError` where the study has no trajectories.
    """
    path = study.trajectories_path
    if not path.is_file():
        raise StudyError(
            f"{study.path} keeps no losses along the way",
            cure="Draw a study whose proxies are evaluated on the way: mixtures --eval-every STEPS",
        )
    return read_trajectory_table(path)


def read_trajectory_table(path: Path) -> Trajectories:
    """Read `index,step,metric/<target>_val_loss,...`; `LossTableError` where it is not that."""
    try:
        header, indices, rows = read_index_table(path, unique=False)
    except MixtureError as error:
        raise LossTableError(error.what, cure=error.cure) from error
    names = [name for name in header if name != _STEP]
    bad = [n for n in names if not (n.startswith(TARGET_PREFIX) and n.endswith(TARGET_SUFFIX))]
    if bad or len(names) == len(header) or not names:
        raise LossTableError(
            f"{path}: its columns are not index, {_STEP} and metric/<target>_val_loss",
            cure="Have it written again: regmix-fast proxies",
        )
    place = header.index(_STEP)
    by_proxy: dict[int, dict[int, list[float]]] = {}
    for number, (index, cells) in enumerate(zip(indices, rows, strict=True), start=1):
        where = f"{path}, row {number} (index {index})"
        step = cells[place].strip()
        if not is_count(step) or int(step) in by_proxy.get(index, {}):
            raise LossTableError(
                f"{where}: step {step!r} is no number, or there twice",
                cure="Have the table written again: regmix-fast proxies",
            )
        losses = [_loss(cell, where) for cell in cells[:place] + cells[place + 1 :]]
        by_proxy.setdefault(index, {})[int(step)] = losses
    return _joined(by_proxy, tuple(_target(name) for name in names))


def _joined(by_proxy: dict[int, dict[int, list[float]]], targets: tuple[str, ...]) -> Trajectories:
    steps = tuple(sorted(set.intersection(*(set(found) for found in by_proxy.values()))))
    kept, dropped = [], []
    for index, found in sorted(by_proxy.items()):
        missing = [step for step in steps if not np.isfinite(found[step]).all()]
        if missing:
            dropped.append(DroppedRun(index, f"no finite losses at step {missing[0]}"))
        else:
            kept.append(index)
    losses = np.array([[by_proxy[index][step] for step in steps] for index in kept])
    shape = (len(kept), len(steps), len(targets))
    return Trajectories(tuple(kept), steps, losses.reshape(shape), targets, tuple(dropped))


def _target(column: str) -> str:
    return column.removeprefix(TARGET_PREFIX).removesuffix(TARGET_SUFFIX)


def _loss(cell: str, where: str) -> float:
    try:
        value = float(cell) if cell.strip() else math.nan
    except ValueError:
        raise LossTableError(f"{where}: {cell!r} is not a number", cure="Correct it") from None
    if value <= 0:
        raise LossTableError(
            f"{where}: a loss of {value:g} nats", cure="Give losses per token in nats, above 0"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class EarlyPoint:
    """What the losses at `step` tell of the final ones.

    rank: Spearman between the objective at the step and at the end, over the same runs.
    spearman: between the final objective of held-out runs and the prediction of a surrogate
        fitted to the other runs' losses at the step; mapped: the same after a line from early to
        final losses of each target, from a few full runs, with rmse_nats against final losses.
    """

    step: int
    share: float
    rank: float | None
    spearman: float | None
    mapped: float | None
    rmse_nats: float


@dataclass(frozen=True, kw_only=True)
class EarlyEnough:
    """points: by step, the last is the full training; enough: the earliest that will do.

    It and every later step rank held-out runs within `tolerance` of the full training; None where
    only the full training does.
    """

    points: tuple[EarlyPoint, ...]
    enough: EarlyPoint | None
    tolerance: float
    num_runs: int
    full_runs: int
    verdict: str

    def record(self) -> dict[str, Any]:
        """Return what `fit.json` holds under `early`."""
        return asdict(self)


def early_enough(
    trajectories: Trajectories,
    runs: Runs,
    objective: Objective,
    *,
    tolerance: float = TOLERANCE,
    full_runs: int = FULL_RUNS,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> EarlyEnough | None:
    """Say how early the proxies' training could have ended, None where it cannot be said.

    The runs must have trajectories; a run without is not used. At most 8 steps are judged, and
    the surrogate is a Gaussian process, or linear where the runs are few. What a shorter training
    would have ended at is not quite an early loss of a longer one, whose learning rate is still
    high: the ranks are what carries over.
    """
    known = [index for index in runs.indices if index in trajectories.indices]
    if len(known) < 2 * _FOLDS or len(trajectories.steps) < 2:
        return None
    rows = [runs.indices.index(index) for index in known]
    weights = np.asarray(runs.weights)[rows]
    own = [runs.targets[column] for column in objective.columns]
    losses = trajectories.of(known).select(own).losses
    places = _spread(len(trajectories.steps))
    folds = fold_of_runs(len(known), seed, _FOLDS)
    final = objective.value(losses[:, -1])
    points = []
    for done, place in enumerate(places, start=1):
        early = losses[:, place]
        plain, mapped = _held_out(weights, early, losses[:, -1], folds, full_runs, seed)
        ranked, told = objective.value(plain), objective.value(mapped)
        points.append(
            EarlyPoint(
                step=trajectories.steps[place],
                share=trajectories.steps[place] / trajectories.steps[-1],
                rank=spearman(final, objective.value(early)),
                spearman=spearman(final, ranked),
                mapped=spearman(final, told),
                rmse_nats=float(np.sqrt(np.mean((told - final) ** 2))),
            )
        )
        on_progress(done)
    enough = _earliest(points, tolerance)
    return EarlyEnough(
        points=tuple(points),
        enough=enough,
        tolerance=tolerance,
        num_runs=len(known),
        full_runs=full_runs,
        verdict=_verdict(enough, points[-1], tolerance),
    )


def num_judged(trajectories: Trajectories) -> int:
    """Return how many steps `early_enough` will judge."""
    return len(_spread(len(trajectories.steps)))


def best_spearman(point: EarlyPoint) -> float | None:
    """Return the better of the ranks with and without the line from early to final losses."""
    known = [value for value in (point.spearman, point.mapped) if value is not None]
    return max(known, default=None)


def _spread(num_steps: int) -> list[int]:
    """Return the places of at most 8 steps, evenly spread, the last among them."""
    number = min(num_steps, _MOST_STEPS)
    return sorted({round((i + 1) * num_steps / number) - 1 for i in range(number)})


def _held_out(
    weights: np.ndarray,
    early: np.ndarray,
    final: np.ndarray,
    folds: np.ndarray,
    full_runs: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return held-out predictions [K, M] from early losses [K, M]: as they are, and mapped."""
    num_runs, num_domains = weights.shape
    plain, mapped = np.empty_like(early), np.empty_like(early)
    smallest = num_runs - int(np.bincount(folds).max())
    smooth = make_regressor("gp", seed)
    enough = smallest >= smooth.fewest_runs(num_domains)
    regressor = smooth if enough else make_regressor("linear", seed)
    for fold in range(int(folds.max()) + 1):
        inside = np.flatnonzero(folds != fold)
        outside = folds == fold
        plain[outside] = regressor.fit(weights[inside], early[inside]).mean(weights[outside])
        taught = np.random.default_rng([seed, fold]).permutation(inside)[:full_runs]
        for target in range(early.shape[1]):
            slope, offset = _line(early[taught, target], final[taught, target])
            mapped[outside, target] = slope * plain[outside, target] + offset
    return plain, mapped


def _line(early: np.ndarray, final: np.ndarray) -> tuple[float, float]:
    """Return slope and offset of the line from early to final losses, by least squares."""
    spread = float(np.var(early))
    if spread <= 0:
        return 0.0, float(final.mean())
    slope = float(((early - early.mean()) * (final - final.mean())).mean() / spread)
    return slope, float(final.mean() - slope * early.mean())


def _earliest(points: Sequence[EarlyPoint], tolerance: float) -> EarlyPoint | None:
    full = points[-1].spearman
    found = None
    for point in reversed(points[:-1]):
        reached = best_spearman(point)
        if full is None or reached is None or reached < full - tolerance:
            break
        found = point
    return found


def _verdict(enough: EarlyPoint | None, full: EarlyPoint, tolerance: float) -> str:
    if full.spearman is None:
        return "cannot be said: the surrogate does not rank the final losses at all"
    if enough is None:
        return (
            f"the whole training was needed: no earlier step ranks held-out runs within "
            f"{tolerance:g} of its Spearman of {full.spearman:.3f}"
        )
    reached = best_spearman(enough)
    return (
        f"{enough.share:.0%} of the tokens would have been enough: Spearman {reached:.3f} against "
        f"{full.spearman:.3f} (held-out runs, tolerance {tolerance:g})"
    )
