"""The sampler measurements at a size that every machine has room for.

Enters: settings. Leaves: the records of `sampler`, from data made on the spot and thrown away. The
other loaders take part where they are installed; `python -m regmix_bench.sampler` is the full
measurement (6 GB of disk).
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from regmix.errors import StorageError
from regmix.files import free_bytes
from regmix_bench import sampler
from regmix_bench.harness import Record
from regmix_bench.peer_imports import with_versions
from regmix_bench.sampler_peers import PEERS
from regmix_bench.suites.registry import Settings

SMALL = dataclasses.replace(
    sampler.QUICK, num_bytes=120_000_000, rounds=3, seconds=0.5, starts=3, damages=20
)


def measure(settings: Settings) -> list[Record]:
    """Measure the sampler, the loaders that are here, and the limits."""
    effort = sampler.QUICK if settings.quick else SMALL
    peers = ["reference"] if settings.quick else list(PEERS)
    if settings.quick:
        names = ", ".join(name for name in PEERS if name not in peers)
        settings.say(f"left out in a quick run: {names}")
    size = f"{effort.num_bytes / 1e6:.0f} MB of tokens"
    settings.say(f"{size}, so the cache holds more of them than of a real corpus")
    with tempfile.TemporaryDirectory(prefix="regmix-bench-") as temporary:
        needed = 5 * effort.num_bytes
        if free_bytes(temporary) < needed:
            raise StorageError(
                f"{temporary}: the sampler suite needs {needed / 1e9:.1f} GB of disk",
                cure="Free some space, or set TMPDIR to a folder that has it",
            )
        records = sampler.measure_all(Path(temporary), effort, peers)
    return with_versions(record for record in records if not sampler._is_trace(record, effort))
