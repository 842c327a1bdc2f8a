"""The packages of the peers: their versions, and a way to import one without torchvision.

Enters: records; nothing. Leaves: records that name the peers' versions, too; `sys.modules` with an
empty torchvision, in the process of that peer alone: the CPU build of torch has none that fits, and
mosaicml-streaming imports it at once, for image data.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterable

from regmix_bench.harness import Record

PACKAGES = ("fastokens", "litdata", "megatron-core", "mosaicml-streaming", "numba", "zstandard")


def with_versions(records: Iterable[Record]) -> list[Record]:
    """Return the records with the versions of the peers that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return [dataclasses.replace(r, versions={**r.versions, **found}) for r in records]


def missing(package: str) -> str | None:
    """Return why a peer cannot run, or None where its package is installed."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def stand_in_for_torchvision() -> None:
    """Let `import streaming` pass where torchvision is missing or does not fit this torch."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        _fake_torchvision()


def _fake_torchvision() -> None:
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    vars(sys.modules["torchvision.datasets"])["VisionDataset"] = type("VisionDataset", (), {})
    vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = None
