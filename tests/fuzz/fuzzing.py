"""How much is tried: little in every test run, thousands where asked for.

REGMIX_FUZZ=5000 tries so many files with each reader, other ones in every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

FEW = 25
LONG = int(os.environ.get("REGMIX_FUZZ", "0"))


def fuzzed(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a property on `FEW` inputs, the same in every run, or on `LONG` new ones."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    chosen = settings(
        max_examples=LONG or FEW,
        derandomize=not LONG,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=True,
        suppress_health_check=list(HealthCheck),
    )
    return chosen(test)
