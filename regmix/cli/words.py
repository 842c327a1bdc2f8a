"""What several commands read from a person's words: counts with suffixes, models, objectives.

Enters: text from the command line. Leaves: numbers and settings, or a `ConfigError` that says
what was expected. Prints nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from regmix.errors import ConfigError

if TYPE_CHECKING:
    from regmix.model.presets import ModelShape
    from regmix.study import Training

_COUNT = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kKmMbBgGtT]?)\s*")
_LARGEST_COUNT = 1e18
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """Return the whole number that `250`, `40k`, `0.25B` or `1e9` says."""
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{text}' is not a number", cure="Write for example 500000, 2M or 0.25B")
    number = float(match[1]) * _FACTORS[match[2].lower()]
    if number > _LARGEST_COUNT:
        raise ConfigError(
            f"'{text[:40]}' is above {_LARGEST_COUNT:g}", cure="Give a smaller number"
        )
    value = round(number)
    if value < 1:
        raise ConfigError(f"'{text}' is below 1", cure="Give a larger number")
    return value


def training_from(
    *,
    model: str,
    vocab_size: int,
    seq_len: int | None,
    batch_size: int,
    tokens: int,
    learning_rate: float,
    warmup_steps: int,
    schedule: str,
    eval_tokens: int | None = None,
    eval_every: int | None = None,
) -> Training:
    """Return how to train a model that a preset's name or a TOML file describes.

    The number of steps is the smallest that reaches `tokens`.
    """
    from regmix.model.optim import OptimConfig
    from regmix.study import Training

    shape = shape_from(model, vocab_size, seq_len)
    num_steps = max(1, -(-tokens // (batch_size * shape.seq_len)))
    return Training(
        shape=shape,
        optim=OptimConfig(
            lr=learning_rate,
            warmup_steps=min(warmup_steps, num_steps),
            schedule=schedule,
            total_steps=num_steps,
        ),
        batch_size=batch_size,
        num_steps=num_steps,
        eval_tokens=eval_tokens,
        eval_every=eval_every,
    )


def shape_from(model: str, vocab_size: int, seq_len: int | None) -> ModelShape:
    """Return the shape of a preset's name or of a TOML file."""
    from regmix.config import build, read_toml
    from regmix.model.presets import ModelShape, make_shape

    if not model.endswith(".toml"):
        return make_shape(model, vocab_size=vocab_size, seq_len=seq_len)
    table = {"vocab_size": vocab_size, **read_toml(model)}
    if seq_len is not None:
        table["seq_len"] = seq_len
    return build(ModelShape, table, where=str(Path(model)))


def parse_pairs(words: tuple[str, ...]) -> dict[str, float] | None:
    """Return {name: number} from words like `web=0.2`; commas may join them; None for no words."""
    pairs: dict[str, float] = {}
    for word in (part for text in words for part in text.split(",")):
        name, equals, number = word.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not equals or not name.strip() or value != value:
            raise ConfigError(f"'{word}' is not NAME=NUMBER", cure="Write for example web=0.2")
        if name.strip() in pairs:
            raise ConfigError(f"'{name.strip()}' is given twice", cure="Give each name once")
        pairs[name.strip()] = value
    return pairs or None


def parse_objective(text: str, targets: tuple[str, ...]) -> dict[str, float]:
    """Return target -> weight from `web`, `mean` (all targets), `a,b` or `a=0.7,b=0.3`."""
    if text == "mean":
        return {target: 1 / len(targets) for target in targets}
    if "=" in text:
        return parse_pairs((text,)) or {}
    names = [name.strip() for name in text.split(",") if name.strip()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"target '{twice[0]}' is given twice", cure="Name each target once")
    return {name: 1 / len(names) for name in names}
