"""How much is tried: little in every test run, thousands where asked for.

REGMIX_FUZZ=5000 tries so many files with each reader, other ones in every run, and shrinks what
fails; hunt.py only counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

# A test run takes a minute with these: a report, or a run of `pack`, takes 50 ms, most take 2 ms.
MANY, FEW = 150, 25
LONG = int(os.environ.get("REGMIX_FUZZ", "0"))


def fuzzed(test: Callable[..., Any], *, slow: bool = False) -> Callable[..., Any]:
    """Run a property on some inputs, the same in every run, or on `LONG` new ones."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    chosen = settings(
        max_examples=LONG or (FEW if slow else MANY),
        derandomize=not LONG,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=True,
        suppress_health_check=list(HealthCheck),
    )
    return chosen(test)
