"""Final models side by side: each mixture's objective over its replicates.

Enters: a study's models with their evaluations. Leaves: mean and spread by mixture, paired gains
and a plain sentence. Trains and plots nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.files import read_json
from regmix.study import Study


@dataclass(frozen=True, kw_only=True)
class MixtureResult:
    """losses [R]: the objective of each replicate, nats per token; targets: mean by target."""

    mixture: str
    replicates: tuple[int, ...]
    losses: tuple[float, ...]
    targets: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the replicates."""
        return float(np.mean(self.losses))

    @property
    def spread(self) -> float | None:
        """Standard deviation over the replicates; None for a single one."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much lower the optimum's objective is than a baseline's, over the same seeds.

    error: standard error of the mean difference; None for a single seed.
    """

    baseline: str
    mean_nats: float
    error_nats: float | None

    def __str__(self) -> str:
        error = "" if self.error_nats is None else f" ± {self.error_nats:.4f}"
        word = "ahead of" if self.mean_nats > 0 else "behind"
        return f"{word} {self.baseline} by {abs(self.mean_nats):.4f}{error} nats"


def compare_models(study: Study) -> list[MixtureResult]:
    """Return the results of all evaluated final models, best mixture first."""
    rows: dict[str, list[tuple[int, float, dict[str, float]]]] = {}
    for path in sorted(study.models_path.glob("*/summary.json")):
        evaluation = path.with_name("evaluation.json")
        if not evaluation.is_file():
            continue
        summary, losses = read_json(path), read_json(evaluation)
        targets = {name: values["loss_nats"] for name, values in losses["targets"].items()}
        rows.setdefault(summary["mixture"], []).append(
            (summary["replicate"], losses["objective"]["loss_nats"], targets)
        )
    results = []
    for mixture, found in rows.items():
        found.sort(key=lambda row: row[0])
        results.append(
            MixtureResult(
                mixture=mixture,
                replicates=tuple(row[0] for row in found),
                losses=tuple(row[1] for row in found),
                targets={
                    name: float(np.mean([row[2][name] for row in found])) for name in found[0][2]
                },
            )
        )
    return sorted(results, key=lambda result: result.mean)


def gains_of(results: list[MixtureResult], mixture: str = "optimum") -> list[Gain]:
    """Return the gains of `mixture` over every other mixture, over the seeds that both have."""
    ours = next((result for result in results if result.mixture == mixture), None)
    if ours is None:
        return []
    mine = dict(zip(ours.replicates, ours.losses, strict=True))
    gains = []
    for other in results:
        theirs = dict(zip(other.replicates, other.losses, strict=True))
        shared = sorted(set(mine) & set(theirs))
        if other is ours or not shared:
            continue
        differences = np.array([theirs[seed] - mine[seed] for seed in shared])
        error = None
        if len(shared) > 1:
            error = float(differences.std(ddof=1) / np.sqrt(len(shared)))
        gains.append(
            Gain(
                baseline=other.mixture,
                mean_nats=float(differences.mean()),
                error_nats=error,
            )
        )
    return gains
