"""The surrogate: what stands in for training when a mixture is judged.

Enters: runs (weights and losses) and a regressor's name. Leaves: a `Surrogate` that predicts the
losses of any mixture, with its held-out error, how wide its intervals must be, and the reason for
its choice. Searches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regmix.data.mixtures import PREFIX, SUM_TOLERANCE, MixtureTable
from regmix.decision.blend import LAW, SMOOTH, choose, sum_of
from regmix.decision.calibration import coverage, widening
from regmix.decision.regressors.interface import Model
from regmix.decision.regressors.registry import check_enough_runs, make_regressor
from regmix.decision.runs import HIGHEST_LOSS_NATS, TARGET_PREFIX, TARGET_SUFFIX
from regmix.decision.validation import HeldOut, Score, fold_of_mixtures, hold_out, scores
from regmix.errors import LossTableError, MixtureError


@dataclass(frozen=True, eq=False)
class Member:
    """A fitted regressor's part in the blend; widening [M] scales its standard deviations."""

    name: str
    share: float
    model: Model
    widening: np.ndarray


def blended_mean(members: Sequence[Member], weights: np.ndarray) -> np.ndarray:
    """Return the losses [N, M] that members predict together of weights [N, D]."""
    return sum_of([member.share * member.model.mean(weights) for member in members])


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicted losses of mixtures: `predict(weights [N, D]) -> (mean [N, M], std [N, M])`.

    held_out, held_out_sd [K, M]: each run's prediction by models that had not seen it, and its
    standard deviation; how: in words. scores: its error per target; member_scores: the same of
    each regressor considered. widening [M]: what makes 90% intervals hold 90% of held-out losses;
    coverage [M]: what they hold of runs that did not set it; process_widening [M]: the same as
    widening for the deviations of the Gaussian process alone around the blend's predictions, None
    without one. reason: why these members.
    """

    domains: tuple[str, ...]
    targets: tuple[str, ...]
    regressor: str
    seed: int
    members: tuple[Member, ...]
    reason: str
    weights: np.ndarray
    losses: np.ndarray
    held_out: np.ndarray
    held_out_sd: np.ndarray
    how: str
    scores: tuple[Score, ...]
    member_scores: dict[str, tuple[Score, ...]]
    widening: np.ndarray
    coverage: np.ndarray
    process_widening: np.ndarray | None

    def mean(self, weights: Any) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        return blended_mean(self.members, self._matrix(weights))

    def predict(self, weights: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M] of a new run, in nats, at the proxies' scale.

        The deviations are those of the members, together as wide as their held-out errors ask.
        """
        x = self._matrix(weights)
        pairs = [(member, *member.model.predict(x)) for member in self.members]
        mean = sum_of([member.share * predicted for member, predicted, _ in pairs])
        sd = sum_of([member.share * member.widening * sd for member, _, sd in pairs])
        return mean, sd * self.widening

    def select(self, columns: Sequence[int]) -> tuple[Member, ...]:
        """Return the members for these targets only."""
        return tuple(
            Member(m.name, m.share, m.model.select(columns), m.widening[list(columns)])
            for m in self.members
        )

    def member(self, name: str) -> Member | None:
        """Return the member of this name, None where there is none."""
        return next((member for member in self.members if member.name == name), None)

    def _matrix(self, weights: Any) -> np.ndarray:
        values, names = named_matrix(weights)
        if names is not None and names != self.domains:
            missing = [name for name in self.domains if name not in names]
            if missing or len(names) != len(self.domains):
                raise LossTableError(
                    f"mixtures over {len(names)} domains for a surrogate of "
                    f"{len(self.domains)}" + (f", without '{missing[0]}'" if missing else ""),
                    cure="Use the domains that the surrogate was fitted on",
                )
            values = values[:, [names.index(name) for name in self.domains]]
        if values.shape[1] != len(self.domains):
            raise LossTableError(
                f"mixtures of {values.shape[1]} weights for a surrogate of {len(self.domains)} "
                "domains",
                cure="Give weights [N, D] in the order of its domains",
            )
        wrong = ~(np.abs(values.sum(1) - 1) <= SUM_TOLERANCE) | (values < 0).any(1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise MixtureError(
                f"mixture {row}: weights from {values[row].min():g}, summing to "
                f"{values[row].sum():g}",
                cure=f"Give weights of 0 or more that sum to 1 within {SUM_TOLERANCE:g}",
            )
        return values


def named_matrix(
    values: Any, *, vector_is_row: bool = True
) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return a data frame or an array as float64 [N, C], and its columns' names if it has any.

    vector_is_row: one dimension is one row (a mixture), otherwise one column (a target).
    """
    columns = getattr(values, "columns", None)
    names = None
    if columns is not None:
        kept = [str(name) for name in columns if str(name) != "index"]
        if len(kept) < len(columns):
            values = values[[name for name in columns if str(name) != "index"]]
        names = tuple(
            name.removeprefix(PREFIX).removeprefix(TARGET_PREFIX).removesuffix(TARGET_SUFFIX)
            for name in kept
        )
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LossTableError(
            f"an array that is not of numbers ({error})", cure="Give numbers, one row per run"
        ) from error
    if matrix.ndim == 1:
        matrix = matrix[None] if vector_is_row else matrix[:, None]
    if matrix.ndim != 2:
        raise LossTableError(
            f"an array of shape {matrix.shape}", cure="Give two dimensions: one row per run"
        )
    return matrix, names


def fit(
    weights: Any,
    losses: Any,
    *,
    regressor: str = "auto",
    seed: int = 0,
    domains: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> Surrogate:
    """Fit losses [K, M] on weights [K, D] (arrays or data frames), target by target.

    Names come from the columns, from `domains` and `targets`, or are the columns' numbers.
    `auto` blends the Gaussian process and the power law, at least a quarter power law. Raises
    `MixtureError`, `LossTableError` and `ConfigError`.
    """
    x, found_domains = named_matrix(weights)
    y, found_targets = named_matrix(losses, vector_is_row=False)
    domain_names = tuple(domains or found_domains or map(str, range(x.shape[1])))
    target_names = tuple(targets or found_targets or map(str, range(y.shape[1])))
    x = np.array(MixtureTable(domain_names, tuple(range(len(x))), x).weights)
    _check_losses(y, len(x), target_names)
    names, why = _candidates(regressor, seed, *x.shape)
    models: dict[str, Model] = {}
    unseen: dict[str, HeldOut] = {}
    factors: dict[str, np.ndarray] = {}
    for name in names:
        candidate = make_regressor(name, seed)
        check_enough_runs(candidate, *x.shape)
        models[name] = candidate.fit(x, y)
        unseen[name] = hold_out(candidate, models[name], x, y, seed=seed)
        factors[name] = widening(y, unseen[name].mean, unseen[name].sd)
    folds = fold_of_mixtures(x, seed)
    first = unseen[names[0]]
    mean, sd = first.mean, first.sd * factors[names[0]]
    shares = {names[0]: 1.0}
    if len(names) == 2:
        means = {name: unseen[name].mean for name in names}
        sds = {name: unseen[name].sd * factors[name] for name in names}
        choice = choose(y, means, sds, folds)
        shares, mean, sd, why = choice.shares, choice.mean, choice.sd, choice.why
    return Surrogate(
        domains=domain_names,
        targets=target_names,
        regressor=regressor,
        seed=seed,
        members=tuple(Member(n, share, models[n], factors[n]) for n, share in shares.items()),
        reason=why,
        weights=x,
        losses=y,
        held_out=mean,
        held_out_sd=sd * widening(y, mean, sd),
        how=first.how,
        scores=scores(target_names, y, mean),
        member_scores={name: scores(target_names, y, unseen[name].mean) for name in names},
        widening=widening(y, mean, sd),
        coverage=coverage(y, mean, sd, folds),
        process_widening=widening(y, mean, unseen[SMOOTH].sd) if SMOOTH in unseen else None,
    )


def _check_losses(losses: np.ndarray, num_runs: int, targets: Sequence[str]) -> None:
    if losses.shape != (num_runs, len(targets)):
        raise LossTableError(
            f"losses of shape {losses.shape} for {num_runs} runs and {len(targets)} targets",
            cure="Give one row per run and one column per target",
        )
    if not targets:
        raise LossTableError("losses of no target", cure="Give one column per target")
    if twice := sorted({name for name in targets if list(targets).count(name) > 1}):
        raise LossTableError(f"target '{twice[0]}' is there twice", cure="Remove one of them")
    bad = np.argwhere(~((losses > 0) & (losses <= HIGHEST_LOSS_NATS)))
    if len(bad):
        row, column = (int(place) for place in bad[0])
        raise LossTableError(
            f"losses, row {row}, target '{targets[column]}': {losses[row, column]} nats",
            cure="Leave out runs without finite losses above 0 (read_runs does and names them)",
        )
    for column, name in enumerate(targets):
        if num_runs > 1 and np.ptp(losses[:, column]) == 0:
            raise LossTableError(
                f"target '{name}': all {num_runs} runs have the same loss",
                cure="Check the losses, or leave the target out",
            )


def _candidates(
    regressor: str, seed: int, num_runs: int, num_domains: int
) -> tuple[tuple[str, ...], str]:
    if regressor != "auto":
        return (regressor,), f"'{regressor}' was asked for"
    enough = tuple(
        name
        for name in (SMOOTH, LAW)
        if num_runs >= make_regressor(name, seed).fewest_runs(num_domains)
    )
    if not enough:
        return ("linear",), f"{num_runs} runs are too few for anything but a linear fit"
    return enough, f"{num_runs} runs are enough for '{enough[0]}' alone"
