"""What is minimised: one number from the predicted losses of all targets.

Enters: a target, several, weights over them, "mean" or "worst". Leaves: the value of predicted
losses and which targets it needs. Knows nothing of mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from regmix.decision.runs import resolve
from regmix.errors import ConfigError

# Far beyond any sensible weight, and far below where sums overflow.
_LARGEST_WEIGHT = 1e6
# Weights that differ by less, of the largest, are equal weights that went through a file.
_EQUAL = 1e-9

ObjectiveLike = str | int | Sequence[str] | Mapping[str, float] | Mapping[int, float]


@dataclass(frozen=True, eq=False)
class Objective:
    """The weighted mean of some targets' losses, or the highest of them (`worst`).

    columns: positions of the targets used; shares: their weights, summing to 1.
    """

    name: str
    columns: tuple[int, ...]
    shares: np.ndarray
    worst: bool = False

    def value(self, losses: np.ndarray) -> np.ndarray:
        """Return the objective [N] of the losses [N, len(columns)] of its own targets."""
        return losses.max(1) if self.worst else losses @ self.shares

    def of_all(self, losses: np.ndarray) -> np.ndarray:
        """Return the objective [N] of the losses [N, M] of all targets."""
        return self.value(np.asarray(losses)[:, list(self.columns)])


def make_objective(wanted: ObjectiveLike, targets: Sequence[str]) -> Objective:
    """Return an objective over `targets`, by name (a unique ending will do) or position.

    Weights are scaled to sum to 1, so that the value is a loss. Raises `LossTableError` for an
    unknown target, `ConfigError` for weights that are no weights.
    """
    every = tuple(range(len(targets)))
    equal = np.full(len(targets), 1 / len(targets))
    if isinstance(wanted, str) and wanted not in targets and wanted in ("mean", "worst"):
        return Objective(wanted, every, equal, worst=wanted == "worst")
    pairs: list[tuple[str | int, float]]
    if isinstance(wanted, (str, int)):
        pairs = [(wanted, 1.0)]
    elif isinstance(wanted, Mapping):
        pairs = [(name, float(weight)) for name, weight in wanted.items()]
    else:
        pairs = [(name, 1.0) for name in wanted]
    weights: dict[int, float] = {}
    for name, weight in pairs:
        column = _position(name, targets)
        if not 0 <= weight <= _LARGEST_WEIGHT or column in weights:
            raise ConfigError(
                f"objective: weight {weight:g} of target '{name}'",
                cure=f"Name each target once, with a weight from 0 to {_LARGEST_WEIGHT:g}",
            )
        weights[column] = weight
    used = {column: weight for column, weight in sorted(weights.items()) if weight > 0}
    if not used:
        raise ConfigError("the objective has no target", cure="Give one a weight above 0")
    shares = np.array(list(used.values())) / math.fsum(used.values())
    return Objective(_name(used, targets), tuple(used), shares)


def _name(used: Mapping[int, float], targets: Sequence[str]) -> str:
    """Return the objective in words: a target, a mean, or weights."""
    names = [targets[column] for column in used]
    if len(names) == 1:
        return names[0]
    if max(used.values()) - min(used.values()) <= _EQUAL * max(used.values()):
        return "mean" if len(names) == len(targets) else f"mean of {', '.join(names)}"
    return ",".join(f"{targets[column]}={weight:g}" for column, weight in used.items())


def _position(name: str | int, targets: Sequence[str]) -> int:
    if isinstance(name, str):
        return list(targets).index(resolve(name, targets, "target"))
    if not 0 <= int(name) < len(targets):
        raise ConfigError(
            f"objective: no target number {name}", cure=f"Count from 0 to {len(targets) - 1}"
        )
    return int(name)


def parse_objective(text: str) -> ObjectiveLike:
    """Return what `--objective` means: `web`, `mean`, `worst`, `web,books`, `web=0.5,books=0.5`."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if len(parts) == 1 and "=" not in parts[0]:
        return parts[0]
    if not any("=" in part for part in parts):
        return parts
    weights: dict[str, float] = {}
    for part in parts:
        name, _, number = part.partition("=")
        if name.strip() in weights:
            raise ConfigError(
                f"objective: target '{name.strip()}' is given twice", cure="Name each target once"
            )
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise ConfigError(
                f"objective: '{part}' is not target=weight", cure="Write web=0.5,books=0.5"
            ) from None
    return weights
