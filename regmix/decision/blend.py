"""What `auto` blends, and why.

Enters: held-out predictions of the Gaussian process and the power law. Leaves: each one's share and
the reason in words. Fits nothing.

Cross-validation sees the proxies' scale only; smooth monotone laws carry over better to larger
models (Olmix, arXiv 2602.12237). So the law has a quarter at least; it gets more where
cross-validation asks for it too, by more than its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMOOTH, LAW = "gp", "powerlaw"
LAW_SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, eq=False)
class Choice:
    """shares: regressor -> share; mean, sd [K, M]: held-out predictions of the blend."""

    shares: dict[str, float]
    mean: np.ndarray
    sd: np.ndarray
    why: str


def sum_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of arrays of one shape, in order (the same bits every time)."""
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def choose(
    losses: np.ndarray,
    means: dict[str, np.ndarray],
    sds: dict[str, np.ndarray],
    folds: np.ndarray,
) -> Choice:
    """Choose the law's share; losses, means and sds are [K, M], held out.

    The blend's held-out predictions use shares chosen without each run's fold [K], so the error
    that is reported includes the choice.
    """
    # Targets count alike: errors are taken relative to each target's own spread.
    spread = losses.var(0)
    error = np.stack(
        [
            ((((1 - share) * means[SMOOTH] + share * means[LAW] - losses) ** 2) / spread).mean(1)
            for share in LAW_SHARES
        ]
    )
    blended, deviation = np.empty_like(losses), np.empty_like(losses)
    for fold in range(int(folds.max()) + 1):
        inside = folds == fold
        law = LAW_SHARES[_best(error[:, ~inside])]
        blended[inside] = (1 - law) * means[SMOOTH][inside] + law * means[LAW][inside]
        deviation[inside] = (1 - law) * sds[SMOOTH][inside] + law * sds[LAW][inside]
    law = LAW_SHARES[_best(error)]
    alone = [np.sqrt((((means[n] - losses) ** 2) / spread).mean()) for n in (SMOOTH, LAW)]
    together = np.sqrt((((blended - losses) ** 2) / spread).mean())
    why = (
        f"held-out error relative to the spread of the losses: {alone[0]:.3f} {SMOOTH}, "
        f"{alone[1]:.3f} {LAW}, {together:.3f} together; the law keeps a quarter, since laws carry "
        "over better to larger models"
    )
    if law > LAW_SHARES[0]:
        why += ", and gets more here, since held-out errors fall with it too"
    return Choice({SMOOTH: 1 - law, LAW: law}, blended, deviation, why)


def _best(error: np.ndarray) -> int:
    """Return the position of the share to take, from errors [S, K]: the first, unless beaten."""
    position = 0
    for other in range(1, len(error)):
        less = error[position] - error[other]
        if less.mean() > less.std() / np.sqrt(len(less)):
            position = other
    return position
