"""The suites of `regmix-fast bench`: their names, what they measure, how they are run.

Enters: a suite's name and settings. Leaves: its records. Each suite is imported when it runs, so
that listing them loads nothing; none of them needs a network or data of the user's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regmix.errors import ConfigError, nearest
from regmix_bench.harness import Record


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to measure, and what is asked about a sweep.

    quick: moments instead of minutes, for a first look; the figures are noisier.
    device: "cpu" or "cuda".
    num_proxies, proxy_tokens: the sweep whose time and cost are predicted; None for tokens takes
        2M on a CPU, as the command line does, and 0.25B on a GPU.
    price_per_hour: of this machine, in whatever currency.
    profile: folder for a trace and the operations by time; None profiles nothing.
    say: tells how far it is, and what is left out.
    """

    quick: bool = False
    device: str = "cpu"
    num_proxies: int = 64
    proxy_tokens: int | None = None
    price_per_hour: float | None = None
    profile: Path | None = None
    say: Callable[[str], None] = lambda words: None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """module: has `measure(settings) -> list[Record]`; text: what it measures."""

    module: str
    text: str


SUITES: dict[str, Suite] = {
    "kernels": Suite(
        module="regmix_bench.suites.kernels",
        text="operations of the model against eager PyTorch, torch.compile, SDPA and the machine",
    ),
    "proxies": Suite(
        module="regmix_bench.suites.proxies",
        text="training proxies: tokens/s, MFU, proxies per hour, time and cost of a sweep",
    ),
    "train": Suite(
        module="regmix_bench.suites.train",
        text="steps of a large model: tokens/s and MFU",
    ),
    "sampler": Suite(
        module="regmix_bench.suites.sampler",
        text="drawing batches: sequences/s against a gather of known rows, and other loaders",
    ),
    "decision": Suite(
        module="regmix_bench.suites.decision",
        text="fit and optimize on made-up runs: seconds, rank correlation, the optimum found",
    ),
    "pack": Suite(
        module="regmix_bench.suites.pack",
        text="text found on this machine into shards: MB/s per core, memory, identical ids",
    ),
}


def check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the suites asked for, all where none is; `ConfigError` for an unknown one."""
    for name in names:
        if name not in SUITES:
            raise ConfigError(f"no suite is called '{name}'", cure=nearest(name, SUITES))
    return tuple(dict.fromkeys(names)) or tuple(SUITES)


def run_suite(name: str, settings: Settings) -> list[Record]:
    """Run one suite and return its records."""
    measure = importlib.import_module(SUITES[name].module).measure
    records: list[Record] = measure(settings)
    return records
