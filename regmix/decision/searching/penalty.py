"""The price of leaving the prior: lambda * KL(p || prior), added to what is minimised.

Enters: a strength in nats, a prior, bounds. Leaves: a `Penalty` with its value and slope, or a
`ConstraintError` that names a domain that the prior lacks. Olmix (arXiv 2602.12237) uses 0.05.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.searching.constraints import Constraints
from regmix.errors import ConfigError, ConstraintError

# p log p and its slope are taken at this weight below it: 0 and minus infinity at 0.
_FLATTEST = 1e-12


def divergence(weights: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Return KL(p || prior) [N] in nats of weights [N, D]; infinite where the prior lacks p."""
    held = weights > 0
    ratio = np.divide(weights, prior, out=np.full(weights.shape, np.inf), where=prior > 0)
    terms = np.where(held, weights * np.log(np.where(held, ratio, 1.0)), 0.0)
    return np.asarray(terms.sum(1))


@dataclass(frozen=True, eq=False)
class Penalty:
    """strength: nats of loss that a nat of divergence costs; prior [D]."""

    strength: float
    prior: np.ndarray

    def value(self, weights: np.ndarray) -> np.ndarray:
        """Return the penalty [N], in nats, of weights [N, D]."""
        return self.strength * divergence(weights, self.prior)

    def slope(self, weights: np.ndarray) -> np.ndarray:
        """Return its derivatives [D] at one mixture [D]; 0 for domains that the prior lacks."""
        known = self.prior > 0
        logs = np.log(np.maximum(weights, _FLATTEST) / np.where(known, self.prior, 1.0))
        return np.where(known, self.strength * (logs + 1), 0.0)


def make_penalty(kl: float, prior: np.ndarray | None, limits: Constraints) -> Penalty | None:
    """Return the penalty, None for a strength of 0.

    Raises `ConfigError` for a strength that is none or where no prior was given, and
    `ConstraintError` where the prior lacks a domain that may get weight.
    """
    if not (np.isfinite(kl) and kl >= 0):
        raise ConfigError(
            f"kl is {kl:g}", cure="Give a strength of 0 nats or more, for example 0.05"
        )
    if kl == 0:
        return None
    if prior is None:
        raise ConfigError(
            f"a KL penalty of {kl:g} needs a prior to stay near",
            cure="Give one (--prior natural.yaml, or uniform), or leave the penalty out",
        )
    for name, share, high in zip(limits.domains, prior, limits.upper, strict=True):
        if share == 0 and high > 0:
            raise ConstraintError(
                f"the KL penalty allows '{name}' no weight, since the prior has none of it, but "
                f"its upper bound is {high:.4g}",
                cure=f"Exclude it (--upper {name}=0), or give a prior that has some of it",
            )
    return Penalty(float(kl), prior)
