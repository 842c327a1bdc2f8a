"""What a result was made with: versions, git revision, machine.

Enters: nothing. Leaves: plain tables to store beside results. Imports nothing but the standard
library, so that the benchmarks can use it where little is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    *("regmix-fast", "torch", "triton", "numpy", "lightgbm"),
    *("tokenizers", "fastokens", "transformers"),
)


@functools.cache
def revision() -> str:
    """Return the git revision of the source tree, "+" where it has changes; else "unknown"."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        # An installed package may lie inside another project's checkout.
        return "unknown"
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def processor() -> str:
    """Return what this machine's processor calls itself."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as stream:
        for line in stream:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Return the cores this process may use; the machine's where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_record() -> dict[str, Any]:
    """Return versions, revision, system and cores, as results of a study store them."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "revision": revision(),
        "versions": versions(),
    }
