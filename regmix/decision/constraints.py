"""What a mixture must respect: bounds per domain, and how often a domain may be repeated.

Enters: bounds, tokens that exist, tokens of the run, epochs allowed. Leaves: one lower and one
upper bound per domain, or a `ConstraintError` that names what clashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regmix.data.draws import check_bounds
from regmix.decision.runs import resolve
from regmix.display import count
from regmix.errors import ConfigError, ConstraintError

PerDomain = Mapping[str, float] | Sequence[float] | np.ndarray | float | None


@dataclass(frozen=True, eq=False)
class Constraints:
    """lower, upper [D]; the tokens [D] that exist and the run's, where epochs are limited."""

    domains: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    available_tokens: np.ndarray | None = None
    budget_tokens: float | None = None
    max_epochs: float | None = None

    def satisfied(self, weights: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
        """Return [N]: which mixtures [N, D] respect the bounds."""
        low = (weights >= self.lower - tolerance).all(1)
        high = (weights <= self.upper + tolerance).all(1)
        return np.logical_and(low, high)

    def epochs(self, weights: np.ndarray) -> dict[str, float] | None:
        """Return how often the run reads each domain, or None where token counts are unknown."""
        if self.available_tokens is None or self.budget_tokens is None:
            return None
        passes = weights * self.budget_tokens / self.available_tokens
        return dict(zip(self.domains, passes.tolist(), strict=True))


def make_constraints(
    domains: Sequence[str],
    *,
    lower: PerDomain = None,
    upper: PerDomain = None,
    available_tokens: PerDomain = None,
    budget_tokens: float | None = None,
    max_epochs: float | None = 4,
) -> Constraints:
    """Return the constraints; `max_epochs` counts only with both token counts.

    Infinitely many epochs are no limit, as None. A single number as bound holds for every domain.
    Raises `ConstraintError` where no mixture can respect them all.
    """
    if max_epochs == math.inf:
        max_epochs = None
    names = tuple(domains)
    low = _per_domain(lower, names, 0.0, "lower bound")
    high = np.minimum(_per_domain(upper, names, 1.0, "upper bound"), 1.0)
    if (available_tokens is None) != (budget_tokens is None):
        raise ConfigError(
            "epochs need both token counts: those that exist and those of the run",
            cure="Give available_tokens and budget_tokens (--tokens), or neither",
        )
    if available_tokens is None or budget_tokens is None:
        check_bounds(low, high, names)
        return Constraints(names, low, high)
    tokens = _per_domain(available_tokens, names, math.nan, "available tokens")
    for name, number in zip(names, tokens, strict=True):
        if not number > 0:
            raise ConstraintError(
                f"available tokens of '{name}': {number:g}", cure="Give a number above 0"
            )
    if not (budget_tokens > 0 and (max_epochs is None or max_epochs > 0)):
        raise ConstraintError(
            f"a run of {budget_tokens:g} tokens at up to {max_epochs} epochs",
            cure="Give numbers above 0",
        )
    check_bounds(low, high, names)
    if max_epochs is not None:
        cap = max_epochs * tokens / budget_tokens
        _check_epochs(names, low, high, cap, tokens, budget_tokens, max_epochs)
        high = np.minimum(high, cap)
    return Constraints(names, low, high, tokens, float(budget_tokens), max_epochs)


def _check_epochs(
    names: tuple[str, ...],
    low: np.ndarray,
    high: np.ndarray,
    cap: np.ndarray,
    tokens: np.ndarray,
    budget: float,
    max_epochs: float,
) -> None:
    for name, bound, limit, number in zip(names, low, cap, tokens, strict=True):
        if bound > limit:
            raise ConstraintError(
                f"'{name}' must be at least {bound:.4g} by its lower bound, but {max_epochs:g} "
                f"epochs of its {count(number)} tokens are {limit:.4g} of {count(budget)} tokens",
                cure="Lower its lower bound, allow more epochs or spend fewer tokens",
            )
    reachable = np.minimum(high, cap).sum()
    if reachable < 1 - 1e-9:
        bounded = [n for n, h, c in zip(names, high, cap, strict=True) if h < min(c, 1.0)]
        also = f" with the upper bounds of {', '.join(bounded)}" if bounded else ""
        cure = f"Allow {math.ceil(max_epochs / reachable)} epochs or more, or spend fewer tokens"
        raise ConstraintError(
            f"{max_epochs:g} epochs of the {count(tokens.sum())} available tokens{also} fill only "
            f"{reachable:.0%} of a run of {count(budget)} tokens",
            cure=cure + (", or raise those bounds" if bounded else ""),
        )


def _per_domain(
    values: PerDomain, domains: tuple[str, ...], default: float, kind: str
) -> np.ndarray:
    if values is None:
        return np.full(len(domains), default)
    if isinstance(values, Mapping):
        array = np.full(len(domains), default)
        for name, value in values.items():
            array[domains.index(resolve(name, domains, "domain"))] = float(value)
        return array
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0:
        return np.full(len(domains), float(array))
    if array.shape != (len(domains),):
        raise ConfigError(
            f"{kind}: {array.size} values for {len(domains)} domains", cure="Give one per domain"
        )
    return array
