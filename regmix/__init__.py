"""Find the data mixture to pre-train a language model on: the public interface.

Enters: nothing at import; each name is loaded when it is first used. Leaves: the names of
`__all__`, the only ones that keep their meaning between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regmix.data.mixtures import Mixture, draw_swarm
    from regmix.data.sampling.sampler import MixtureSampler
    from regmix.data.sampling.stream import MixtureDataset
    from regmix.data.shards import ShardSet
    from regmix.decision.optimum import optimize
    from regmix.decision.runs import read_runs
    from regmix.decision.surrogate import fit
    from regmix.errors import RegmixError
    from regmix.study import Study

__all__ = [
    "Mixture",
    "MixtureDataset",
    "MixtureSampler",
    "RegmixError",
    "ShardSet",
    "Study",
    "draw_swarm",
    "fit",
    "optimize",
    "read_runs",
]

_HOMES = {
    "Mixture": "regmix.data.mixtures",
    "MixtureDataset": "regmix.data.sampling.stream",
    "MixtureSampler": "regmix.data.sampling.sampler",
    "RegmixError": "regmix.errors",
    "ShardSet": "regmix.data.shards",
    "Study": "regmix.study",
    "draw_swarm": "regmix.data.mixtures",
    "fit": "regmix.decision.surrogate",
    "optimize": "regmix.decision.optimum",
    "read_runs": "regmix.decision.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'regmix' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
