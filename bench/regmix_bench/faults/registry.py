"""All faults that the suite knows, in the order of its table.

Enters: a pattern, or none. Leaves: faults.
"""

from __future__ import annotations

import re

from regmix_bench.faults import (
    coordinators,
    disks,
    hangs,
    kills,
    ledger_faults,
    permissions,
    proxies,
    shard_faults,
)
from regmix_bench.faults.fault import Fault

_MODULES = (
    kills,
    hangs,
    coordinators,
    disks,
    shard_faults,
    ledger_faults,
    permissions,
    proxies,
)


def every_fault(pattern: str | None = None) -> list[Fault]:
    """Return the faults whose name matches, or all."""
    faults = [fault for module in _MODULES for fault in module.FAULTS]
    return [fault for fault in faults if pattern is None or re.search(pattern, fault.name)]
