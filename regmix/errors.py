"""Errors a user can cure.

Enters: what is wrong, where, and how to cure it. Leaves: one line that says all three.
The command line prints that line without a traceback and exits with code 1. Anything that is not
a `RegmixError` is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# A name from a file may be of any length; a path has at most 4096 bytes.
_HEAD, _TAIL = 4500, 500
_LONGEST_NAME, _MOST_NAMES = 100, 1000


class RegmixError(Exception):
    """A user's problem: `what` happened and where, and the `cure`.

    Both are printable: what a file says in them cannot start a line or steer a terminal.
    """

    def __init__(self, what: str, *, cure: str) -> None:
        self.what = printable(what).rstrip(".")
        self.cure = printable(cure).rstrip(".")
        super().__init__(f"{self.what}. {self.cure}.")

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries between a worker and the coordinator.
        return _rebuild, (type(self), self.what, self.cure)


def _rebuild(kind: type[RegmixError], what: str, cure: str) -> RegmixError:
    return kind(what, cure=cure)


class ConfigError(RegmixError):
    """A setting is unknown, malformed or out of range."""


class StorageError(RegmixError):
    """A path cannot be read or written: missing, no permission, no space left."""


class CorpusError(RegmixError):
    """The documents cannot be used: no domain, an empty domain, malformed lines under --strict."""


class TokenizerError(RegmixError):
    """A tokenizer cannot be read, trained, or does not match the shards."""


class ShardError(RegmixError):
    """A shard or its manifest is truncated, corrupt or does not fit the request."""


class MixtureError(RegmixError):
    """A mixture's weights are invalid or name a domain that does not exist."""


class LossTableError(RegmixError):
    """A table of losses is malformed, incomplete or holds values that cannot be used."""


class StudyError(RegmixError):
    """A study is missing, incomplete, in use by another process or of another version."""


class ModelError(RegmixError):
    """A model's shape, checkpoint or weights cannot be used."""


class ConstraintError(RegmixError):
    """The constraints on a mixture contradict each other."""


def printable(text: str) -> str:
    """Return a text on one line, what is not printable as its escape, cut where it is long."""
    if len(text) > _HEAD + _TAIL:
        text = f"{text[:_HEAD]} ... {text[-_TAIL:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that names the nearest known word, or lists what is known."""
    options = sorted(known)
    # The comparison takes the product of both lengths, for every word.
    close = difflib.get_close_matches(name[:_LONGEST_NAME], options[:_MOST_NAMES], n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(options[:12]) + (", ..." if len(options) > 12 else "")
    return f"known: {shown}"
