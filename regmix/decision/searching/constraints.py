"""What a mixture must respect: bounds per domain, and how often a domain may be repeated.

Enters: bounds, tokens that exist, tokens of the run, epochs allowed, the largest weights of the
runs. Leaves: one lower and one upper bound per domain, or a `ConstraintError` that names what
clashes; mixtures moved within them. The guard over losses is not among them (`guard`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regmix.data.draws import check_bounds, scale_into_bounds
from regmix.decision.runs import resolve
from regmix.display import count
from regmix.errors import ConfigError, ConstraintError

# Why a weight is too large, where `observed` says so.
UNSEEN = "the largest weight of any run"

PerDomain = Mapping[str, float] | Sequence[float] | np.ndarray | float | None


@dataclass(frozen=True, eq=False)
class Constraints:
    """lower, upper [D]; the tokens [D] that exist and the run's, where epochs are limited.

    observed [D]: the largest weights of any run, where `upper` was lowered to them.
    """

    domains: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    available_tokens: np.ndarray | None = None
    budget_tokens: float | None = None
    max_epochs: float | None = None
    observed: np.ndarray | None = None

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

    def moved_inside(self, weights: np.ndarray) -> np.ndarray:
        """Return the mixtures [N, D] moved within the bounds; those that cannot be are left out."""
        outside = ~self.satisfied(weights)
        if not outside.any():
            return weights
        moved = weights.copy()
        # A trace in every domain lets the others take up what a bound cuts off.
        touched = np.where(weights > 0, weights, 1e-9)[outside]
        moved[outside] = _scaled(touched, self.lower, self.upper)
        return moved[self.satisfied(moved)]

    def within(self, observed: np.ndarray, own: np.ndarray) -> Constraints:
        """Return these with no weight above the largest observed [D], where that is feasible.

        own [D]: domains with an upper bound of their own, which keep it.
        """
        ceiling = np.where(own, self.upper, np.minimum(self.upper, observed))
        ceiling = np.maximum(ceiling, self.lower)
        if ceiling.sum() < 1:
            return self
        return replace(self, upper=ceiling, observed=observed)

    def outside(self, weights: np.ndarray, tolerance: float = 1e-9) -> list[str]:
        """Return what one mixture [D] breaks, in words: domain, weight, bound and its reason."""
        found = []
        for place, name in enumerate(self.domains):
            weight, low, high = weights[place], self.lower[place], self.upper[place]
            if weight > high + tolerance:
                reason = self._reason_above(place)
                found.append(f"{weight:.4g} of '{name}', at most {high:.4g} ({reason})")
            elif weight < low - tolerance:
                found.append(f"{weight:.4g} of '{name}', at least {low:.4g} (its lower bound)")
        return found

    def _reason_above(self, place: int) -> str:
        high = self.upper[place]
        if self.available_tokens is not None and self.budget_tokens and self.max_epochs:
            cap = self.max_epochs * self.available_tokens[place] / self.budget_tokens
            if high >= cap - 1e-12:
                return f"{self.max_epochs:g} epochs"
        if self.observed is not None and high >= self.observed[place] - 1e-12:
            return UNSEEN
        return "its upper bound"


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


def upper_is_own(upper: PerDomain, domains: Sequence[str]) -> np.ndarray:
    """Return [D]: whether `upper` speaks of the domain at all."""
    own = np.full(len(domains), upper is not None)
    if isinstance(upper, Mapping):
        named = {resolve(str(name), domains, "domain") for name in upper}
        own = np.array([name in named for name in domains])
    return own


def _scaled(weights: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Return clip(t * weights, lower, upper) with t per row such that each row sums to 1.

    As `scale_into_bounds`, which halves an interval 90 times; here 16 halvings come so near that
    the domains between their bounds are known, and t follows from them (0.3 s instead of 1.3 s
    for 100,000 rows of 17). Rows where they are not go the long way.
    """
    low, high = np.full(len(weights), -60.0), np.full(len(weights), 60.0)
    for _ in range(16):
        middle = 0.5 * (low + high)
        total = np.clip(weights * 2.0 ** middle[:, None], lower, upper).sum(1)
        low, high = np.where(total < 1, middle, low), np.where(total < 1, high, middle)
    factor = 2.0**high
    for _ in range(3):
        scaled = weights * factor[:, None]
        free = (scaled > lower) & (scaled < upper)
        rest = 1 - np.where(free, 0.0, np.clip(scaled, lower, upper)).sum(1)
        slope = np.where(free, weights, 0.0).sum(1)
        factor = np.divide(rest, slope, out=factor, where=(slope > 0) & (rest > 0))
    scaled = np.clip(weights * factor[:, None], lower, upper)
    missed = np.abs(scaled.sum(1) - 1) > 1e-12
    if missed.any():
        scaled[missed] = scale_into_bounds(weights[missed], lower, upper)
    return np.asarray(scaled)


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
