"""Domains whose ratios are frozen, as one virtual domain: weights between the two spaces.

Enters: domains, and the ratios of some of them among themselves. Leaves: weights over [kept, free
domains...] for weights over all domains, and the other way round; bounds likewise. Draws nothing
and fits nothing.

A study that is extended by a domain need not find the others' ratios again (Olmix, arXiv
2602.12237). All its mixtures then lie in a space of few dimensions, where a regression must live:
frozen domains are multiples of one another, and length scales of such columns mean nothing.

Shapes: D domains, G = 1 + free domains, N mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regmix.errors import ConstraintError, MixtureError, nearest

# The virtual domain. A packed domain cannot have this name.
KEPT = "(kept)"
# A frozen domain's weight may differ by this much from its share of the kept weight.
RATIO_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Groups:
    """`ratios` of the frozen domains among themselves, summing to 1, in a study over `domains`.

    Raises `MixtureError` for ratios that are none or name an unknown domain.
    """

    domains: tuple[str, ...]
    ratios: dict[str, float]

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            if name not in self.domains:
                raise MixtureError(
                    f"frozen ratios: unknown domain '{name}' ({nearest(name, self.domains)})",
                    cure="Name domains of the study",
                )
            if not 0 <= ratio <= 1:
                raise MixtureError(
                    f"frozen ratios: {ratio!r} of '{name}' is not within 0 and 1",
                    cure="Correct the ratio",
                )
        if KEPT in self.domains:
            raise MixtureError(f"a domain may not be called '{KEPT}'", cure="Rename it")
        total = math.fsum(self.ratios.values())
        if abs(total - 1) > 1e-9:
            raise MixtureError(
                f"frozen ratios sum to {total:.9g}, not 1", cure="Divide them by their sum"
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The domains whose ratios are frozen, in the order of `domains`."""
        return tuple(name for name in self.domains if name in self.ratios)

    @property
    def free(self) -> tuple[str, ...]:
        """The other domains."""
        return tuple(name for name in self.domains if name not in self.ratios)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the short space: the virtual domain, then the free ones."""
        return (KEPT, *self.free)

    def totals(self, weights: np.ndarray) -> np.ndarray:
        """Return [N, G]: the frozen domains' weights added up, whatever their ratios are."""
        weights = np.asarray(weights, dtype=np.float64)
        kept = weights[:, self._places(self.frozen)].sum(1, keepdims=True)
        return np.hstack([kept, weights[:, self._places(self.free)]])

    def representable(self, weights: np.ndarray) -> np.ndarray:
        """Return [N]: which mixtures [N, D] have the frozen ratios."""
        return self._deviations(np.asarray(weights, dtype=np.float64)).max(1) <= RATIO_TOLERANCE

    def reduce(self, weights: np.ndarray, labels: Sequence[object] | None = None) -> np.ndarray:
        """Return mixtures [N, D] as [N, G]; `labels` [N] name them in errors, else their numbers.

        Raises `MixtureError` for a mixture that does not have the frozen ratios.
        """
        weights = np.asarray(weights, dtype=np.float64)
        deviations = self._deviations(weights)
        broken = np.argwhere(deviations > RATIO_TOLERANCE)
        if len(broken):
            row = int(broken[0, 0])
            column = int(deviations[row].argmax())
            name, label = self.frozen[column], row if labels is None else labels[row]
            kept = float(self.totals(weights)[row, 0])
            raise MixtureError(
                f"mixture {label}: '{name}' has {weights[row, self.domains.index(name)]:.6g}, and "
                f"by its frozen ratio it has {self.ratios[name] * kept:.6g} of {kept:.6g}",
                cure="Give the frozen domains their ratios, or draw a study in which they are free",
            )
        return self.totals(weights)

    def expand(self, weights: np.ndarray) -> np.ndarray:
        """Return mixtures [N, G] over all domains, [N, D]."""
        weights = np.asarray(weights, dtype=np.float64)
        whole = np.empty((len(weights), len(self.domains)))
        whole[:, self._places(self.frozen)] = weights[:, :1] * self._ratios()
        whole[:, self._places(self.free)] = weights[:, 1:]
        return whole

    def reduce_lower(self, bounds: Mapping[str, float]) -> dict[str, float]:
        """Return lower bounds by domain as those of the short space.

        The kept weight must reach the bound of every frozen domain: the largest of bound / ratio.
        """
        reduced = {name: bound for name, bound in bounds.items() if name not in self.ratios}
        for name, bound in bounds.items():
            ratio = self.ratios.get(name)
            if ratio is None or bound <= 0:
                continue
            if bound > ratio:
                raise ConstraintError(
                    f"'{name}' must be at least {bound:.4g}, and with the frozen ratios it is at "
                    f"most {ratio:.4g} of any mixture",
                    cure="Lower its lower bound, or draw a study in which it is free",
                )
            reduced[KEPT] = max(reduced.get(KEPT, 0.0), bound / ratio)
        return reduced

    def reduce_upper(self, bounds: Mapping[str, float]) -> dict[str, float]:
        """Return upper bounds by domain as those of the short space: the smallest bound / ratio."""
        reduced = {name: bound for name, bound in bounds.items() if name not in self.ratios}
        for name, bound in bounds.items():
            if self.ratios.get(name, 0.0) > 0:
                reduced[KEPT] = min(reduced.get(KEPT, 1.0), bound / self.ratios[name])
        return reduced

    def reduce_tokens(self, tokens: Mapping[str, float]) -> dict[str, float]:
        """Return the tokens that exist, by domain, as those of the short space.

        The virtual domain has as many as can be read before a frozen one is passed over once: the
        smallest of tokens / ratio.
        """
        reduced = {name: float(tokens[name]) for name in self.free}
        reduced[KEPT] = min(tokens[name] / ratio for name, ratio in self.ratios.items() if ratio)
        return reduced

    def _deviations(self, weights: np.ndarray) -> np.ndarray:
        parts = weights[:, self._places(self.frozen)]
        return np.abs(parts - parts.sum(1, keepdims=True) * self._ratios())

    def _ratios(self) -> np.ndarray:
        return np.array([self.ratios[name] for name in self.frozen])

    def _places(self, names: Sequence[str]) -> list[int]:
        return [self.domains.index(name) for name in names]


def find_groups(weights: np.ndarray, domains: Sequence[str]) -> Groups | None:
    """Return the largest group of domains with one ratio in all mixtures [N, D], None without any.

    For tables that come without a study. A domain that fewer than half of the mixtures have belongs
    to no group: few mixtures show no ratio.
    """
    weights = np.asarray(weights, dtype=np.float64)
    seen = (weights > 0).sum(0) >= max(3.0, len(weights) / 2)
    best: list[int] = []
    for first in np.flatnonzero(seen).tolist():
        alike = []
        for other in np.flatnonzero(seen).tolist():
            pair = weights[:, [first, other]]
            shares = pair.sum(0) / pair.sum()
            error = np.abs(pair - pair.sum(1, keepdims=True) * shares).max()
            if error <= RATIO_TOLERANCE:
                alike.append(other)
        if len(alike) > max(len(best), 1):
            best = alike
    if not best:
        return None
    shares = weights[:, best].sum(0) / weights[:, best].sum()
    shares[shares.argmax()] += 1 - math.fsum(shares)
    return Groups(tuple(domains), {domains[i]: float(s) for i, s in zip(best, shares, strict=True)})
