"""The power law: loss as a power of effective data.

Enters: parameters and weights. Leaves: losses, derivatives, and exchange rates between domains.
Fitted by `laws`. Per target

    loss(p) = exp(c) + exp(a) * (exp(e) + sum_d exp(w_d) p_d) ** -exp(b),

so a token of domain d counts exp(w_d): convex in p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Columns of theta [B, 4 + D]: c, a, e, b, then w.
_C, _A, _E, _B, _W = 0, 1, 2, 3, 4


@dataclass(frozen=True, eq=False)
class _Terms:
    """Parts of the law for parameters theta [B, P] at mixtures x [N, D]."""

    floor: np.ndarray  # exp(c) [B, 1]
    rates: np.ndarray  # exp(w) [B, D]
    effective: np.ndarray  # exp(e) + x . exp(w) [B, N]
    power: np.ndarray  # exp(a) * effective ** -exp(b) [B, N]
    exponent: np.ndarray  # exp(b) [B, 1]
    offset: np.ndarray  # exp(e) [B, 1]

    @classmethod
    def at(cls, theta: np.ndarray, x: np.ndarray) -> _Terms:
        rates = np.exp(theta[:, _W:])
        offset, exponent = np.exp(theta[:, [_E]]), np.exp(theta[:, [_B]])
        effective = offset + rates @ x.T
        power = np.exp(theta[:, [_A]] - exponent * np.log(effective))
        return cls(np.exp(theta[:, [_C]]), rates, effective, power, exponent, offset)


@dataclass(frozen=True)
class PowerLaw:
    """The power law of effective data."""

    name: str = "powerlaw"
    num_head: int = _W

    def losses(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the losses [B, N]."""
        terms = _Terms.at(theta, weights)
        return terms.floor + terms.power

    def jacobian(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, P] of the losses by the parameters."""
        terms = _Terms.at(theta, weights)
        slope = terms.exponent * terms.power / terms.effective
        jacobian = np.empty((*terms.power.shape, theta.shape[1]))
        jacobian[:, :, _C] = terms.floor
        jacobian[:, :, _A] = terms.power
        jacobian[:, :, _E] = -slope * terms.offset
        jacobian[:, :, _B] = -terms.exponent * np.log(terms.effective) * terms.power
        jacobian[:, :, _W:] = -slope[:, :, None] * weights[None] * terms.rates[:, None, :]
        return jacobian

    def slopes(self, theta: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the derivatives [B, N, D] of the losses by the weights."""
        terms = _Terms.at(theta, weights)
        slope = terms.exponent * terms.power / terms.effective
        return np.asarray(-slope[:, :, None] * terms.rates[:, None, :])

    def starts(
        self, losses: np.ndarray, num_domains: int, num_starts: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return starting points [M, S, P]: floors from far below the losses to just below."""
        theta = np.zeros((losses.shape[1], num_starts, _W + num_domains))
        floors = np.log(np.linspace(0.2, 0.95, num_starts))
        theta[:, :, _C] = np.log(losses.min(0))[:, None] + floors
        theta[:, :, _E] = np.log(0.02)
        theta[:, :, _B] = rng.uniform(np.log(0.1), np.log(0.8), num_starts)
        theta[:, :, _W:] = rng.normal(0, 0.5, (num_starts, num_domains))
        gap = np.median(losses, axis=0)[:, None] - np.exp(theta[:, :, _C])
        theta[:, :, _A] = np.log(np.maximum(gap, 1e-6))
        return theta

    def centre(self, losses: np.ndarray, num_domains: int) -> np.ndarray:
        """Return the parameters [M, P] of a gentle law in which all domains count alike.

        Without a pull towards it 32 runs of 17 domains gave a few targets floors or offsets near
        0, and losses of hundreds of nats where a mixture lacks the domain that matters.
        """
        centre = np.zeros((losses.shape[1], _W + num_domains))
        centre[:, _C] = np.log(0.6 * losses.min(0))
        centre[:, _A] = np.log(np.median(losses, axis=0) - np.exp(centre[:, _C]))
        centre[:, _E], centre[:, _B] = np.log(0.1), np.log(0.3)
        return centre


def exchange_rates(theta: np.ndarray) -> np.ndarray:
    """Return [..., D]: what a token of a domain is worth, the best domain being 1."""
    logs = theta[..., _W:]
    return np.asarray(np.exp(logs - logs.max(-1, keepdims=True)))
