"""Settings files: TOML in, frozen dataclasses out, and back.

Enters: TOML text or a mapping. Leaves: a validated, frozen dataclass; an unknown key is an error
that names the nearest known one. Does not decide any default: the dataclasses do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import reprlib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from regmix.errors import ConfigError, nearest
from regmix.files import read_text, write_text

Config = TypeVar("Config")
# A study of 10,000 domains has a quarter of that.
_LARGEST_CHARACTERS = 8_000_000
# Of a key of n parts the parser keeps n^2 / 2 names: 200 kB of `a.a.a` would take 40 GB.
_LONG_KEY = re.compile(r"(?<![\w.-])(?:(?:[\w-]++|\"[^\"\n]*+\"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}")


def build(kind: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """Return `kind(**values)`, nested dataclasses included; `where` names the file or table."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table", cure="Write it as a table of settings")
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = _hints(kind)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"{where}: unknown setting '{key}' ({nearest(key, known)})",
                cure="Correct or remove it",
            )
        arguments[key] = _convert(hints[key], value, where=f"{where}, '{key}'")
    missing = [
        name
        for name, field in known.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing setting '{missing[0]}'", cure="Add it")
    return kind(**arguments)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
        return _convert(hint, value, where=where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table", cure="Write it as a TOML table")
        return build(typing.cast(type, hint), value, where=where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list", cure="Write it as [a, b]")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, where=where) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a table", cure="Write it as a TOML table")
        inner = typing.get_args(hint)[1]
        for name in value:
            if not str(name).isprintable():
                raise ConfigError(
                    f"{where}: the name {name!r} has characters that cannot be shown",
                    cure="Rename it",
                )
        return {str(k): _convert(inner, item, where=where) for k, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(
                f"{where}: a number of {value.bit_length()} bits", cure="Correct the value"
            ) from None
    if hint in (int, float, str, bool) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise ConfigError(
            f"{where}: expected {hint.__name__}, got {_shown(value)}", cure="Correct the value"
        )
    return value


def _shown(value: Any) -> str:
    # Python refuses to write out numbers of thousands of digits, which TOML may hold as 0x....
    return reprlib.repr(value) if not isinstance(value, int) else type(value).__name__


def finite(value: Any) -> TypeGuard[float]:
    """Return whether a value read from a file is a number, finite also as float64."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_table(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested plain tables, without the settings that are None."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = as_table(value)
        elif isinstance(value, tuple):
            value = [as_table(item) if dataclasses.is_dataclass(item) else item for item in value]
        table[field.name] = value
    return table


def read_toml(path: Path | str) -> dict[str, Any]:
    """Read a TOML file; `ConfigError` names the line of a mistake."""
    text = read_text(path)
    if len(text) > _LARGEST_CHARACTERS:
        raise ConfigError(
            f"{path}: {len(text):,} characters are too many for settings", cure="Check the path"
        )
    if _LONG_KEY.search(text):
        raise ConfigError(f"{path}: a key of more than 64 parts", cure="Correct the TOML")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a mistake; a number too long; too much nesting
        raise ConfigError(f"{path}: {error}", cure="Correct the TOML") from error


def write_toml(path: Path | str, table: Mapping[str, Any]) -> None:
    """Write a TOML file atomically."""
    import tomli_w

    write_text(path, tomli_w.dumps(dict(table)))
