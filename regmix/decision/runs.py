"""The runs of a swarm: which mixture gave which losses.

Enters: a table of mixtures and a table of losses, in the format published with RegMix, joined on
`index`. Leaves: weights [K, D], losses [K, M] and their names. Fits nothing; a run without usable
losses is left out, counted and named, never filled in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.mixtures import MixtureTable, read_index_table
from regmix.errors import LossTableError, MixtureError, nearest

TARGET_PREFIX = "metric/"
TARGET_SUFFIX = "_val_loss"
FEWEST_RUNS = 3
# A run above this diverged: a uniform guess over any vocabulary costs under 20 nats.
HIGHEST_LOSS_NATS = 1e6


class NamedArray(np.ndarray):
    """A NumPy array whose columns have names (`columns`), kept by selections of rows only."""

    columns: tuple[str, ...] | None

    @classmethod
    def of(cls, values: np.ndarray, columns: Sequence[str]) -> NamedArray:
        """Return `values` [N, C] under the names `columns` [C]."""
        array = np.ascontiguousarray(values, dtype=np.float64).view(cls)
        array.columns = tuple(columns)
        return array

    def __array_finalize__(self, source: Any) -> None:
        self.columns = None

    def __getitem__(self, key: Any) -> Any:
        chosen = super().__getitem__(key)
        # Any other key may reorder the columns, so it gives an array without names.
        rows_only = isinstance(key, (slice, list, np.ndarray)) and np.ndim(chosen) == self.ndim
        if rows_only and isinstance(chosen, NamedArray):
            chosen.columns = self.columns
        return chosen

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (np.asarray(self), self.columns)


def _restore(values: np.ndarray, columns: tuple[str, ...] | None) -> np.ndarray:
    return values if columns is None else NamedArray.of(values, columns)


@dataclass(frozen=True)
class DroppedRun:
    """A run that was left out, and why."""

    index: int
    reason: str


@dataclass(frozen=True, eq=False)
class Runs:
    """weights [K, D], losses [K, M] in nats, their names, the runs' indices, and those left out."""

    weights: NamedArray
    losses: NamedArray
    domains: tuple[str, ...]
    targets: tuple[str, ...]
    indices: tuple[int, ...]
    dropped: tuple[DroppedRun, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def replicate_groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions of runs on one mixture, groups of 2 or more: they tell the noise of a seed."""
        return replicate_groups(self.weights)

    @property
    def constant_domains(self) -> tuple[str, ...]:
        """Domains with one weight in all runs: nothing can be learned about them."""
        spread = np.ptp(np.asarray(self.weights), axis=0)
        return tuple(name for name, gap in zip(self.domains, spread, strict=True) if gap < 1e-12)

    def select(self, targets: Sequence[str]) -> Runs:
        """Return the runs with these targets only, in this order."""
        columns = [self.targets.index(resolve(name, self.targets, "target")) for name in targets]
        names = tuple(self.targets[column] for column in columns)
        losses = NamedArray.of(np.asarray(self.losses)[:, columns], names)
        return Runs(self.weights, losses, self.domains, names, self.indices, self.dropped)


def replicate_groups(weights: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return the positions of identical rows of weights [K, D], groups of 2 or more, in order."""
    groups: dict[bytes, list[int]] = {}
    # Adding 0 makes the two zeros of floating point one.
    for position, row in enumerate(np.asarray(weights, dtype=np.float64) + 0.0):
        groups.setdefault(row.tobytes(), []).append(position)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def resolve(name: str, known: Sequence[str], kind: str) -> str:
    """Return the known name that is `name` or, alone, ends in `_name` (`pile_cc`).

    Raises `LossTableError` (`MixtureError` for a domain) that names the nearest, or the candidates
    where there are several.
    """
    fault = MixtureError if kind == "domain" else LossTableError
    if name in known:
        return name
    ends = [candidate for candidate in known if candidate.endswith("_" + name)]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise fault(f"{kind} '{name}' could be {', '.join(ends)}", cure="Write the whole name")
    inside = [candidate for candidate in known if name and name in candidate]
    hint = f"did you mean '{inside[0]}'?" if len(inside) == 1 else nearest(name, known)
    raise fault(f"unknown {kind} '{name}' ({hint})", cure="Correct it")


def read_runs(
    mixtures: Path | str,
    losses: Path | str,
    *,
    targets: Sequence[str] | None = None,
    partial: bool = False,
) -> Runs:
    """Read `index,train_<domain>,...` and `index,metric/<target>_val_loss,...`, joined on index.

    Runs on one mixture under several indices are kept: they are replicates, of different seeds.
    Runs whose losses are not finite, or above a million nats, are left out and named in `.dropped`;
    so are mixtures without losses when `partial`, otherwise they are an error. Raises
    `MixtureError` and `LossTableError`.
    """
    table = MixtureTable.read_csv(mixtures)
    names, by_index = _read_losses(losses)
    known = set(table.indices)
    strangers = [index for index in by_index if index not in known]
    if strangers:
        raise LossTableError(
            f"{losses}: {_listed(strangers)} not in {mixtures}",
            cure="Give the two tables of the same swarm",
        )
    absent = [index for index in table.indices if index not in by_index]
    if absent and not partial:
        raise LossTableError(
            f"{losses}: {_listed(absent)} of {mixtures} missing",
            cure="Finish the proxies (regmix-fast proxies), or go on without them: --partial",
        )
    dropped = [DroppedRun(index, "no losses") for index in absent]
    rows: list[int] = []
    for row, index in enumerate(table.indices):
        if index not in by_index:
            continue
        pairs = zip(names, by_index[index], strict=True)
        bad = [(name, loss) for name, loss in pairs if not loss <= HIGHEST_LOSS_NATS]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            finite = math.isfinite(bad[0][1])
            fault = f"above {HIGHEST_LOSS_NATS:,.0f} nats" if finite else "not finite"
            dropped.append(DroppedRun(index, f"loss of '{bad[0][0]}'{more} is {fault}"))
        else:
            rows.append(row)
    if len(rows) < FEWEST_RUNS:
        raise LossTableError(
            f"{losses}: {len(rows)} usable runs ({len(dropped)} left out)",
            cure=f"Train at least {FEWEST_RUNS}; 64 make a good swarm",
        )
    indices = tuple(table.indices[row] for row in rows)
    runs = Runs(
        weights=NamedArray.of(table.weights[rows], table.domains),
        losses=NamedArray.of(np.array([by_index[index] for index in indices]), names),
        domains=table.domains,
        targets=names,
        indices=indices,
        dropped=tuple(sorted(dropped, key=lambda run: run.index)),
    )
    return runs if targets is None else runs.select(targets)


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in indices[:5]) + (", ..." if len(indices) > 5 else "")
    noun = "run" if len(indices) == 1 else f"{len(indices)} runs, indices"
    return f"{noun} {shown}"


def _read_losses(path: Path | str) -> tuple[tuple[str, ...], dict[int, list[float]]]:
    try:
        header, indices, rows = read_index_table(path)
    except MixtureError as error:
        raise LossTableError(error.what, cure=error.cure) from error
    names = []
    for column in header:
        name = column.removeprefix(TARGET_PREFIX).removesuffix(TARGET_SUFFIX)
        if not column.startswith(TARGET_PREFIX) or not column.endswith(TARGET_SUFFIX) or not name:
            raise LossTableError(
                f"{path}: column '{column}' is neither 'index' nor 'metric/<target>_val_loss'",
                cure="Rename or remove the column",
            )
        names.append(name)
    if not names:
        raise LossTableError(f"{path}: no losses", cure="Add 'metric/<target>_val_loss' columns")
    by_index: dict[int, list[float]] = {}
    for number, (index, cells) in enumerate(zip(indices, rows, strict=True), start=1):
        where = f"{path}, row {number} (index {index})"
        pairs = zip(names, cells, strict=True)
        by_index[index] = [_loss(cell, f"{where}, '{name}'") for name, cell in pairs]
    return tuple(names), by_index


def _loss(cell: str, where: str) -> float:
    text = cell.strip()
    try:
        # An empty cell is how tables write a loss that was not measured.
        value = float(text) if text else math.nan
    except ValueError:
        raise LossTableError(f"{where}: {cell!r} is not a number", cure="Correct it") from None
    if value <= 0 and math.isfinite(value):
        raise LossTableError(
            f"{where}: a loss of {value:g} nats", cure="Give losses per token in nats, above 0"
        )
    return value
