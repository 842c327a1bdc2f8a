"""Numbers with their 90% intervals, as the files of a study hold them.

Enters: values read from JSON: a number (as older studies have them), [mean, low, high], or
[low, high]. Leaves: `Estimate`s and intervals, and the error for what is neither. Words nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from regmix.config import finite
from regmix.large.comparison import damaged

T = TypeVar("T")
Interval = tuple[float, float]
ByTarget = dict[str, dict[str, "Estimate"]]


@dataclass(frozen=True)
class Estimate:
    """A number, and what its 90% interval is where one is known."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> Interval | None:
        """The interval, None where it is not known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def includes_zero(self) -> bool:
        """Whether the interval leaves the sign open; False where none is known."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high


def number(value: Any) -> float | None:
    """Return a value as a number, None where it is none."""
    return float(value) if finite(value) else None


def table(value: Any, path: Path, key: str) -> dict[str, Any]:
    """Return what lies under `key`, empty where it is absent; `StudyError` where it is no table."""
    if not isinstance(value or {}, dict):
        raise damaged(path, f"'{key}' is not a table")
    return dict(value or {})


def tables_in(value: Mapping[str, Any], path: Path, key: str) -> None:
    """Raise `StudyError` unless every entry of a table is a table, or absent."""
    for entry in value.values():
        table(entry, path, key)


def estimate(value: Any, path: Path, key: str) -> Estimate:
    """Return a number or [mean, low, high]; `StudyError` where it is neither."""
    if finite(value):
        return Estimate(float(value))
    if isinstance(value, list) and len(value) == 3 and all(map(finite, value)):
        return Estimate(*map(float, value))
    raise damaged(path, f"'{key}': {value!r} is neither a number nor [mean, low, high]")


def interval(value: Any, path: Path, key: str) -> Interval:
    """Return [low, high]; `StudyError` where it is something else."""
    if isinstance(value, list) and len(value) == 2 and all(map(finite, value)):
        return float(value[0]), float(value[1])
    raise damaged(path, f"'{key}': {value!r} is not [low, high]")


def entries(value: Any, path: Path, key: str, read: Callable[[Any, Path, str], T]) -> dict[str, T]:
    """Return a table whose values are each read by `read`."""
    found: Mapping[str, Any] = table(value, path, key)
    return {str(name): read(item, path, key) for name, item in found.items()}


def by_target(value: Any, path: Path, key: str) -> ByTarget:
    """Return target -> domain -> estimate."""
    rows = table(value, path, key)
    return {str(target): entries(row, path, key, estimate) for target, row in rows.items()}
