"""What `fit` and `optimize` share: where the runs come from, and the objective that is meant.

Enters: a study's name or two tables. Leaves: paths and an objective. Prints nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regmix.errors import ConfigError, StudyError

if TYPE_CHECKING:
    import numpy as np

    from regmix.decision.objective import ObjectiveLike
    from regmix.study import Study


def open_source(
    study: str | None, mixtures: str | None, losses: str | None
) -> tuple[Study | None, Path, Path]:
    """Return (study or None, table of mixtures, table of losses)."""
    from regmix.study import Study, find_study

    if mixtures is not None or losses is not None:
        if study is not None or mixtures is None or losses is None:
            raise ConfigError(
                "runs come from a study or from two tables",
                cure="Name a STUDY, or give both --mixtures and --losses",
            )
        return None, Path(mixtures), Path(losses)
    opened = Study.open(find_study(study))
    if not opened.losses_path.is_file():
        raise StudyError(
            f"{opened.path} has no losses yet", cure="Train the proxies: regmix-fast proxies"
        )
    return opened, opened.mixtures_path, opened.losses_path


def natural_of(study: Study | None, domains: tuple[str, ...]) -> np.ndarray | None:
    """Return the study's natural mixture over these domains [D], None where there is no study."""
    import numpy as np

    if study is None or not set(domains) <= set(study.config.prior):
        return None
    weights = np.array([study.config.prior[domain] for domain in domains])
    return np.asarray(weights / weights.sum())


def wanted_objective(
    text: str | None, study: Study | None, targets: tuple[str, ...]
) -> ObjectiveLike:
    """Return the objective named, else the study's as far as its targets are there, else `mean`."""
    from regmix.decision.objective import parse_objective

    if text is not None:
        return parse_objective(text)
    if study is not None and set(study.config.objective) <= set(targets):
        return study.config.objective
    return "mean"
