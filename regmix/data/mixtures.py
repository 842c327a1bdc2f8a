"""Mixtures of domains: one, a table of them, and the swarm that proxies are trained on.

Enters: weights by domain, CSV tables and YAML files in the formats of sail-sg/regmix. Leaves:
validated, exactly normalised mixtures and tables, the same bits after writing and reading. Does
not count tokens, and never renormalises in silence: `Mixture.requested_sum` keeps what was asked.
"""

from __future__ import annotations

import csv
import io
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.draws import (
    BoundedOptions,
    RegmixOptions,
    bounds_array,
    check_bounds,
    distinct,
    draw_bounded,
    draw_regmix,
)
from regmix.data.strict_yaml import read_yaml
from regmix.errors import ConfigError, MixtureError, nearest
from regmix.files import atomic_open, read_text, write_text

# Published tables are rounded to 0.001, so their rows sum to 0.996-1.003.
SUM_TOLERANCE = 0.01
PREFIX = "train_"
# Token counts pass as weights to be scaled; beyond this nothing is a weight, and sums overflow.
_LARGEST_WEIGHT = 1e18
_MOST_MIXTURES = 100_000


def normalised(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return weights whose correctly rounded sum is exactly 1; unchanged where it already is."""
    values = np.array(weights, dtype=np.float64)
    total = math.fsum(values)
    if total == 1.0:
        return values
    values /= total
    for _ in range(4):
        residue = math.fsum([1.0, *(-values)])
        if residue == 0.0 or math.fsum(values) == 1.0:
            break
        values[int(np.argmax(values))] += residue
    return values


def _check_weight(weight: Any, where: str) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if isinstance(weight, bool) or not 0 <= value <= _LARGEST_WEIGHT:
        raise MixtureError(
            f"{where}: weight {_shown(weight)} is not a finite number >= 0, or above "
            f"{_LARGEST_WEIGHT:g}",
            cure="Correct the weight",
        )
    return value


def _shown(weight: Any) -> str:
    """Return a weight in few characters: a few bytes of YAML can stand for gigabytes of list."""
    if isinstance(weight, (str, float, bool, type(None))):
        return reprlib.repr(weight)
    if isinstance(weight, int) and abs(weight) < 10**18:
        return str(weight)
    return f"of type {type(weight).__name__}"


def _check_sum(total: float, where: str) -> None:
    if abs(total - 1) > SUM_TOLERANCE:
        raise MixtureError(
            f"{where}: the weights sum to {total:.6g}, not 1",
            cure=f"Divide them by their sum; up to {SUM_TOLERANCE:g} is accepted as rounding",
        )


class Mixture(Mapping[str, float]):
    """An immutable mapping of domain to weight, domains sorted, weights summing to exactly 1.

    A domain's weight is the fraction of training tokens drawn from it; zero weights are kept.
    `requested_sum` is the sum before normalisation. Raises `MixtureError` for no domain, a weight
    that is not a finite number >= 0, or a sum further than 0.01 from 1 (any positive sum with
    `normalise=True`).
    """

    __slots__ = ("_weights", "requested_sum")
    _weights: dict[str, float]
    requested_sum: float

    def __init__(
        self, weights: Mapping[str, float], *, normalise: bool = False, where: str = "mixture"
    ) -> None:
        if not weights:
            raise MixtureError(f"{where}: no domain", cure="Name at least one domain")
        names = sorted(weights)
        values = [_check_weight(weights[name], f"{where}, '{name}'") for name in names]
        total = math.fsum(values)
        if not normalise or total <= 0:
            _check_sum(total, where)
        final = normalised(values).tolist()
        object.__setattr__(self, "_weights", dict(zip(names, final, strict=True)))
        object.__setattr__(self, "requested_sum", total)

    def __getitem__(self, domain: str) -> float:
        return float(self._weights[domain])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Mixture is immutable: build another one")

    def __hash__(self) -> int:
        return hash(tuple(self._weights.items()))

    def __repr__(self) -> str:
        return f"Mixture({self._weights!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return Mixture, (dict(self._weights),)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, sorted."""
        return tuple(self._weights)

    def array(self, domains: Iterable[str]) -> np.ndarray:
        """Return the weights [D] in the order of `domains`, 0 for those not in the mixture.

        Raises `MixtureError` where a positive weight would be lost.
        """
        order = list(domains)
        lost = [name for name, weight in self.items() if weight > 0 and name not in order]
        if lost:
            raise MixtureError(
                f"mixture: unknown domain '{lost[0]}' ({nearest(lost[0], order)})",
                cure="Use the domains of the study",
            )
        return np.array([self.get(name, 0.0) for name in order])


@dataclass(frozen=True, eq=False)
class MixtureTable:
    """Mixtures of the same domains, one a row: weights [K, D] float64, each row summing to 1.

    `indices` name the rows (unique integers >= 0); `domains` keep the order they came in. Rows may
    be alike: replicates of a mixture. Raises `MixtureError` with the row for what is no mixture.
    """

    domains: tuple[str, ...]
    indices: tuple[int, ...]
    weights: np.ndarray

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (len(self.indices), len(self.domains)):
            raise MixtureError(
                f"table of mixtures: weights of shape {weights.shape} for {len(self.indices)} "
                f"indices and {len(self.domains)} domains",
                cure="Give one row per index and one column per domain",
            )
        _check_unique(self.domains, "table of mixtures, domain")
        _check_unique(self.indices, "table of mixtures, index")
        rows = []
        for index, row in zip(self.indices, weights, strict=True):
            where = f"mixture {index}"
            for name, weight in zip(self.domains, row.tolist(), strict=True):
                _check_weight(weight, f"{where}, '{name}'")
            _check_sum(math.fsum(row), where)
            rows.append(normalised(row))
        final = np.array(rows).reshape(weights.shape)
        final.flags.writeable = False
        object.__setattr__(self, "weights", final)
        object.__setattr__(self, "domains", tuple(self.domains))
        object.__setattr__(self, "indices", tuple(int(index) for index in self.indices))

    def __len__(self) -> int:
        return len(self.indices)

    def mixture(self, row: int) -> Mixture:
        """Return the mixture of a row (0 is the first)."""
        return Mixture(dict(zip(self.domains, self.weights[row].tolist(), strict=True)))

    def extended(self, other: MixtureTable) -> MixtureTable:
        """Return this table followed by the rows of another one over the same domains."""
        _check_domains(other.domains, self.domains, "second table of mixtures")
        columns = [other.domains.index(name) for name in self.domains]
        stacked = np.concatenate([self.weights, other.weights[:, columns]])
        return MixtureTable(self.domains, self.indices + other.indices, stacked)

    @classmethod
    def read_csv(cls, path: Path | str, domains: Iterable[str] | None = None) -> MixtureTable:
        """Read `index,train_<domain>,...`; `domains` are those that may and must appear."""
        header, indices, values = read_index_table(path)
        for name in header:
            if not name.startswith(PREFIX) or name == PREFIX:
                raise MixtureError(
                    f"{path}: column '{name}' is neither 'index' nor 'train_<domain>'",
                    cure="Rename or remove the column",
                )
        names = tuple(name[len(PREFIX) :] for name in header)
        if domains is not None:
            _check_domains(names, tuple(domains), str(path))
        rows = []
        for number, (index, cells) in enumerate(zip(indices, values, strict=True), start=1):
            where = f"{path}, row {number} (index {index})"
            pairs = zip(names, cells, strict=True)
            row = [_check_weight(cell, f"{where}, '{name}'") for name, cell in pairs]
            _check_sum(math.fsum(row), where)
            rows.append(row)
        return cls(names, tuple(indices), np.array(rows, dtype=np.float64))

    def write_csv(self, path: Path | str) -> None:
        """Write `index,train_<domain>,...`, atomically; reading it gives the same bits."""
        with atomic_open(path, "w") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["index", *(PREFIX + name for name in self.domains)])
            for index, row in zip(self.indices, self.weights.tolist(), strict=True):
                writer.writerow([index, *(repr(weight) for weight in row)])


def _check_unique(names: Sequence[object], where: str) -> None:
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise MixtureError(f"{where} {name!r} appears twice", cure="Remove one of them")
        seen.add(name)


def _check_domains(names: Sequence[str], known: Sequence[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise MixtureError(
                f"{where}: unknown domain '{name}' ({nearest(name, known)})",
                cure="Use the domains of the study",
            )
    missing = [name for name in known if name not in names]
    if missing:
        raise MixtureError(f"{where}: no column for domain '{missing[0]}'", cure="Add the column")


def _shown_name(name: str, where: str) -> str:
    """Return a name of a domain or of a column; `MixtureError` where it cannot be shown."""
    if not name.isprintable():
        raise MixtureError(
            f"{where}: the name {name!r} has characters that cannot be shown", cure="Rename it"
        )
    return name


def is_count(text: str) -> bool:
    """Return whether a cell is a whole number of 0 or more that 64 bits hold."""
    return text.isdecimal() and len(text) <= 18


def read_index_table(
    path: Path | str, *, unique: bool = True
) -> tuple[list[str], list[int], list[list[str]]]:
    """Read a CSV with an `index` column: the other columns' names, the indices, the cells.

    Raises `MixtureError` with the row for an index that is missing, malformed or, where they are
    to be `unique`, there twice, and for a row of another length.
    """
    text = read_text(path).removeprefix("\ufeff")
    try:
        lines = [line for line in csv.reader(io.StringIO(text)) if line]
    except csv.Error as error:
        raise MixtureError(f"{path}: not a CSV table ({error})", cure="Write it again") from error
    if len(lines) < 2:
        raise MixtureError(f"{path}: no rows", cure="Give a header and at least one row")
    header = [_shown_name(name.strip(), str(path)) for name in lines[0]]
    if "index" not in header:
        raise MixtureError(f"{path}: no column 'index'", cure="Add it: it names the runs")
    _check_unique(header, f"{path}: column")
    place = header.index("index")
    indices: list[int] = []
    rows: list[list[str]] = []
    seen: set[int] = set()
    for number, cells in enumerate(lines[1:], start=1):
        where = f"{path}, row {number}"
        if len(cells) != len(header):
            raise MixtureError(
                f"{where}: {len(cells)} cells under {len(header)} columns", cure="Correct the row"
            )
        text_index = cells[place].strip()
        if not is_count(text_index):
            raise MixtureError(
                f"{where}: index {text_index!r} is not a whole number", cure="Number the rows"
            )
        index = int(text_index)
        if unique and index in seen:
            raise MixtureError(f"{where}: index {index} appears twice", cure="Remove one of them")
        seen.add(index)
        indices.append(index)
        rows.append(cells[:place] + cells[place + 1 :])
    return header[:place] + header[place + 1 :], indices, rows


def read_mixture_yaml(path: Path | str, *, normalise: bool = False) -> Mixture:
    """Read the `train:` section of a mixture in the format of RegMix.

    With `normalise`, weights of any positive sum are scaled (two of the four published files sum
    to about 0.8) and `requested_sum` says from what; without it that is a `MixtureError`.
    """
    return mixture_of(read_yaml(path), normalise=normalise, where=str(path))


def mixture_of(content: Any, *, normalise: bool = False, where: str) -> Mixture:
    """Return the mixture that a table's section `train` holds; `where` names the table."""
    train = content.get("train") if isinstance(content, dict) else None
    if not isinstance(train, dict) or not train:
        raise MixtureError(
            f"{where}: no section 'train'", cure="Write 'train: {train_<domain>: w}'"
        )
    weights: dict[str, float] = {}
    for key, weight in train.items():
        if isinstance(key, int) and abs(key) > _LARGEST_WEIGHT:
            raise MixtureError(f"{where}: a domain is a number of many digits", cure="Name it")
        name = _shown_name(str(key), where).removeprefix(PREFIX)
        if name in weights:
            raise MixtureError(f"{where}: domain '{name}' appears twice", cure="Remove one of them")
        # PyYAML reads 1e-5 (no dot) as text, which _check_weight turns into the number.
        weights[name] = _check_weight(weight, f"{where}, '{name}'")
    return Mixture(weights, normalise=normalise, where=where)


def write_mixture_yaml(
    path: Path | str,
    mixture: Mapping[str, float],
    *,
    valid: Mapping[str, float] | None = None,
    model_name: str | None = None,
    sections: Mapping[str, Any] | None = None,
) -> None:
    """Write a mixture in the format of RegMix, atomically; `sections` follow (plain values)."""
    import yaml

    checked = mixture if isinstance(mixture, Mixture) else Mixture(mixture)
    content: dict[str, Any] = {"train": {PREFIX + name: checked[name] for name in checked}}
    if valid is not None:
        content["valid"] = {f"valid_{name}": float(weight) for name, weight in valid.items()}
    if model_name is not None:
        content["model_name"] = model_name
    content.update(sections or {})
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))


def draw_swarm(
    prior: Mapping[str, float],
    num: int,
    *,
    sampler: str = "bounded",
    seed: int,
    lower: Mapping[str, float] | None = None,
    upper: Mapping[str, float] | None = None,
    options: BoundedOptions | RegmixOptions | None = None,
    existing: MixtureTable | None = None,
) -> MixtureTable:
    """Draw `num` distinct mixtures, deterministic for a seed.

    `bounded` fills the simplex within the bounds evenly; `regmix` is the paper's sampler. Indices
    start at 1, or after those of `existing`, whose mixtures are not drawn again. Raises
    `ConstraintError` for bounds that no mixture meets, `MixtureError` where there are not enough
    distinct mixtures.
    """
    centre = prior if isinstance(prior, Mixture) else Mixture(prior, where="prior")
    for name, share in centre.items():
        if share <= 0:
            raise MixtureError(f"prior: domain '{name}' has share 0", cure="Leave the domain out")
    if num < 1:
        raise ConfigError(f"{num} mixtures asked for", cure="Ask for at least 1")
    if num > _MOST_MIXTURES:
        raise ConfigError(
            f"{num:,} mixtures asked for",
            cure=f"Ask for at most {_MOST_MIXTURES:,}; 64 make a good swarm",
        )
    names = centre.domains
    shares = centre.array(names)
    low = bounds_array(lower, names, 0.0)
    high = np.minimum(bounds_array(upper, names, 1.0), 1.0)
    check_bounds(low, high, names)
    known = np.zeros((0, len(names)))
    if existing is not None:
        _check_domains(existing.domains, names, "existing mixtures")
        known = existing.weights[:, [existing.domains.index(name) for name in names]]
    weights = np.zeros((0, len(names)))
    # Sparse draws can coincide (two pure mixtures of one domain), so more are drawn as needed.
    for factor in (1, 2, 4, 8, 16):
        wanted = factor * num + len(known)
        if sampler == "bounded":
            chosen = options if isinstance(options, BoundedOptions) else BoundedOptions()
            drawn = draw_bounded(shares, low, high, wanted, seed, chosen)
        elif sampler == "regmix":
            paper = options if isinstance(options, RegmixOptions) else RegmixOptions()
            drawn = draw_regmix(shares, low, high, num + len(known), seed, paper)
        else:
            raise ConfigError(
                f"unknown sampler '{sampler}' ({nearest(sampler, ['bounded', 'regmix'])})",
                cure="Use 'bounded' or 'regmix'",
            )
        weights = distinct(drawn, known)[:num]
        if len(weights) == num or sampler == "regmix":
            break
    if len(weights) < num:
        raise MixtureError(
            f"only {len(weights)} distinct new mixtures of the {num} asked for exist or were found",
            cure="Ask for fewer, loosen the bounds or use another seed",
        )
    first = max(existing.indices, default=0) + 1 if existing is not None else 1
    return MixtureTable(names, tuple(range(first, first + num)), weights)


@dataclass(frozen=True, kw_only=True)
class DomainCoverage:
    """How a table of mixtures covers one domain."""

    domain: str
    prior: float  # the domain's share in the prior
    present: float  # share of the mixtures in which its weight is positive
    visible: float  # share of the mixtures in which its weight is at least half its prior
    minimum: float  # smallest, median and largest weight over all mixtures
    median: float
    maximum: float
    max_to_prior: float  # largest weight over prior share


def coverage(table: MixtureTable, prior: Mapping[str, float]) -> tuple[DomainCoverage, ...]:
    """Return, per domain of the table, how its mixtures cover it."""
    shares = Mixture(prior, where="prior").array(table.domains)
    report = []
    for name, share, column in zip(table.domains, shares.tolist(), table.weights.T, strict=True):
        largest = float(column.max())
        report.append(
            DomainCoverage(
                domain=name,
                prior=share,
                present=float((column > 0).mean()),
                visible=float((column >= 0.5 * max(share, 1e-12)).mean()),
                minimum=float(column.min()),
                median=float(np.median(column)),
                maximum=largest,
                max_to_prior=largest / share if share > 0 else math.inf,
            )
        )
    return tuple(report)
