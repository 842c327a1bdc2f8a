"""The surrogate: what stands in for training when a mixture is judged.

Enters: runs (weights and losses) and a regressor's name. Leaves: a `Surrogate` that predicts the
losses of any mixture, with its held-out error and the reason for its choice. Searches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regmix.data.mixtures import PREFIX, MixtureTable
from regmix.decision.regressors.interface import Model
from regmix.decision.regressors.registry import check_enough_runs, make_regressor
from regmix.decision.runs import HIGHEST_LOSS_NATS, TARGET_PREFIX, TARGET_SUFFIX
from regmix.decision.validation import Score, fold_of_runs, held_out_predictions, score
from regmix.errors import LossTableError

# Cross-validation sees the proxies' scale only; laws carry over better to larger models (Olmix,
# arXiv 2602.12237), so `auto` never leaves less than a quarter to the power law.
TREE_SHARES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Member:
    """A fitted regressor's part in the blend; scale [M] is its own held-out error in nats."""

    name: str
    share: float
    model: Model
    scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicted losses of mixtures: `predict(weights [N, D]) -> (mean [N, M], std [N, M])`.

    held_out [K, M]: each run's prediction by models that had not seen it. scores: its error per
    target; member_scores: the same of each regressor considered. reason: why these members.
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
    scores: tuple[Score, ...]
    member_scores: dict[str, tuple[Score, ...]]

    def mean(self, weights: Any) -> np.ndarray:
        """Return the predicted losses [N, M]."""
        x = self._matrix(weights)
        return sum_of([member.share * member.model.mean(x) for member in self.members])

    def predict(self, weights: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation [N, M], in nats, at the proxies' scale.

        The deviation is the held-out error, scaled up where the members are far from their runs.
        """
        x = self._matrix(weights)
        pairs = [(member, *member.model.predict(x)) for member in self.members]
        mean = sum_of([member.share * predicted for member, predicted, _ in pairs])
        growth = sum_of(
            [member.share * std / np.maximum(member.scale, 1e-12) for member, _, std in pairs]
        )
        return mean, growth * np.array([entry.rmse_nats for entry in self.scores])

    def select(self, columns: Sequence[int]) -> tuple[Member, ...]:
        """Return the members for these targets only."""
        return tuple(
            Member(m.name, m.share, m.model.select(columns), m.scale[list(columns)])
            for m in self.members
        )

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
        return values


def sum_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of arrays of one shape, in order (the same bits every time)."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def named_matrix(values: Any) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return a data frame or an array as float64 [N, C], and its columns' names if it has any."""
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
    matrix = np.array(values, dtype=np.float64)
    if matrix.ndim == 1:
        matrix = matrix[None]
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
    `auto` blends LightGBM and the power law as cross-validation supports it, at least a quarter
    power law. Raises `MixtureError`, `LossTableError` and `ConfigError`.
    """
    x, found_domains = named_matrix(weights)
    y, found_targets = named_matrix(losses)
    domain_names = tuple(domains or found_domains or map(str, range(x.shape[1])))
    target_names = tuple(targets or found_targets or map(str, range(y.shape[1])))
    x = np.array(MixtureTable(domain_names, tuple(range(len(x))), x).weights)
    _check_losses(y, len(x), target_names)
    names, why = _candidates(regressor, seed, *x.shape)
    held_out: dict[str, np.ndarray] = {}
    for name in names:
        candidate = make_regressor(name, seed)
        check_enough_runs(candidate, *x.shape)
        held_out[name] = held_out_predictions(candidate, x, y, seed=seed)
    if len(names) == 2:
        shares, blended, why = _blend(y, held_out, seed)
    else:
        shares, blended = {names[0]: 1.0}, held_out[names[0]]
    members = []
    for name, share in shares.items():
        scale = np.sqrt(((held_out[name] - y) ** 2).mean(0))
        members.append(Member(name, share, make_regressor(name, seed).fit(x, y, scale), scale))
    return Surrogate(
        domains=domain_names,
        targets=target_names,
        regressor=regressor,
        seed=seed,
        members=tuple(members),
        reason=why,
        weights=x,
        losses=y,
        held_out=blended,
        scores=_scores(target_names, y, blended),
        member_scores={name: _scores(target_names, y, held_out[name]) for name in names},
    )


def _scores(targets: Sequence[str], true: np.ndarray, predicted: np.ndarray) -> tuple[Score, ...]:
    return tuple(score(name, true[:, j], predicted[:, j]) for j, name in enumerate(targets))


def _check_losses(losses: np.ndarray, num_runs: int, targets: Sequence[str]) -> None:
    if losses.shape != (num_runs, len(targets)):
        raise LossTableError(
            f"losses of shape {losses.shape} for {num_runs} runs and {len(targets)} targets",
            cure="Give one row per run and one column per target",
        )
    bad = np.argwhere(~((losses > 0) & (losses <= HIGHEST_LOSS_NATS)))
    if len(bad):
        row, column = (int(place) for place in bad[0])
        raise LossTableError(
            f"losses, row {row}, target '{targets[column]}': {losses[row, column]} nats",
            cure="Leave out runs without finite losses above 0 (read_runs does and names them)",
        )
    for column, name in enumerate(targets):
        if np.ptp(losses[:, column]) == 0:
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
        for name in ("lightgbm", "powerlaw")
        if num_runs >= make_regressor(name, seed).fewest_runs(num_domains)
    )
    if not enough:
        return ("linear",), f"{num_runs} runs are too few for anything but a linear fit"
    return enough, f"{num_runs} runs are enough for '{enough[0]}' alone"


def _blend(
    losses: np.ndarray, held_out: dict[str, np.ndarray], seed: int
) -> tuple[dict[str, float], np.ndarray, str]:
    """Choose the trees' share; the blended predictions use shares chosen without each run's fold.

    So the error that is reported includes the choice.
    """
    trees, law = held_out["lightgbm"], held_out["powerlaw"]
    # Targets count alike: errors are taken relative to each target's own spread.
    spread = losses.var(0)
    error = np.stack(
        [((s * trees + (1 - s) * law - losses) ** 2 / spread).mean(1) for s in TREE_SHARES]
    )
    folds = fold_of_runs(len(losses), seed)
    blended = np.empty_like(losses)
    for fold in range(int(folds.max()) + 1):
        inside = folds == fold
        best = TREE_SHARES[int(error[:, ~inside].mean(1).argmin())]
        blended[inside] = best * trees[inside] + (1 - best) * law[inside]
    share = TREE_SHARES[int(error.mean(1).argmin())]
    shares = {n: s for n, s in (("lightgbm", share), ("powerlaw", 1 - share)) if s > 0}
    alone = [np.sqrt(float(((p - losses) ** 2 / spread).mean())) for p in (trees, law)]
    relative = np.sqrt(float(error.mean(1).min()))
    why = (
        f"cross-validation on {len(losses)} runs: error relative to the spread of the losses "
        f"{alone[0]:.3f} lightgbm, {alone[1]:.3f} powerlaw, {relative:.3f} with a share of "
        f"{share:.0%} lightgbm (up to {TREE_SHARES[-1]:.0%}: laws carry over better to larger "
        "models)"
    )
    return shares, blended, why
