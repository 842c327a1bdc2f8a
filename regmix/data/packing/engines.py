"""Engines that turn text into token ids: the reference, and a faster one that must agree with it.

`tokenizers` defines the ids. `fastokens` gives them about fifty times as fast, and is trusted as
far as it is checked: on `PROBES` before it is used at all, and on a sample of every file while it
encodes (encoder.py). Both encode special tokens that a text spells out as text.

Enters: a `Tokenizer`, texts. Leaves: ids without separators. Reads no files.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from regmix.data.tokenizer import Tokenizer
from regmix.errors import TokenizerError

REFERENCE, FAST = "tokenizers", "fastokens"
CHOICES = ("auto", "fast", "tokenizers")
SEPARATORS = ("<|endoftext|>", "</s>", "<s>", "<pad>", "[UNK]", "<|im_start|>")
_SIGNS = (
    *("a", "Z", "é", "e\u0301", "\u0301", "ß", "ſ", "Ω", "ж", "\u05d0", "\u0627", "क\u094d"),
    *("東", "カ", "か\u3099", "한", "\u1112\u1161", "ﬁ", "0", "7", "²", "Ⅷ", "٣", "½", "'s", "'LL"),
    *("'", "’t", '"', "_", "-", "--", "==", "//", "{", "}", "\u3000", "。", "€", "\U0001f600"),
    *("\U0001f468\u200d\U0001f469", "\u200b", "\ufeff", "\xa0", "\x85", "\u2028", "\u180e", "\0"),
    *(" ", "  ", "   ", "     ", " " * 24, " " * 25, "\t", "\t\t", "\n", "\n\n", "\r\n", "\r"),
    *("\x0b", "\x1c", "\x7f", "\ufffd", "\uffff", "\U000e0001", "\U0010ffff", "the", "Hello"),
)


class Engine(Protocol):
    """What encodes texts."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in one array (uint32), and their lengths (int64)."""


class ReferenceEngine:
    """The `tokenizers` library, as `Tokenizer` sets it up."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths; `TokenizerError` where a text cannot be encoded."""
        rows = self._tokenizer.rows(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(itertools.chain.from_iterable(rows), np.uint32, lengths.sum()), lengths


class FastEngine:
    """The `fastokens` library, on the calling thread."""

    name = FAST

    def __init__(self, tokenizer: Tokenizer) -> None:
        from fastokens._native import Tokenizer as Backend

        self._backend: Any = Backend.from_json_str(tokenizer.backend_text())
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and lengths; raises what the library raises."""
        raw, offsets = self._backend.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(raw, "<u4"), np.diff(np.frombuffer(offsets, "<u8")).astype(np.int64)


@dataclass(frozen=True)
class Choice:
    """The engine to encode with, its version, and why it is not the fast one."""

    name: str
    version: str
    reason: str = ""


def choose_engine(tokenizer: Tokenizer, wanted: str) -> Choice:
    """Return the engine to use; "auto" takes the fast one where it is there and agrees.

    `TokenizerError` where "fast" is asked for and cannot be had.
    """
    reference = Choice(REFERENCE, importlib.metadata.version(REFERENCE))
    if wanted == "tokenizers":
        return Choice(reference.name, reference.version, "asked for")
    reason = _objection(tokenizer)
    if not reason:
        return Choice(FAST, importlib.metadata.version(FAST))
    if wanted == "fast":
        raise TokenizerError(
            f"the fast engine cannot be used: {reason}",
            cure="Pack with --engine auto or --engine tokenizers",
        )
    return Choice(reference.name, reference.version, reason)


def make_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """Return the engine of this name."""
    return FastEngine(tokenizer) if name == FAST else ReferenceEngine(tokenizer)


def _objection(tokenizer: Tokenizer) -> str:
    try:
        fast = FastEngine(tokenizer)
    except ImportError:
        return "fastokens is not installed"
    except Exception as error:  # the library raises what it likes
        return f"fastokens cannot read this tokenizer ({str(error)[:200]})"
    texts = probes(tokenizer)
    try:
        ids, lengths = fast.encode(texts)
        wanted, wanted_lengths = ReferenceEngine(tokenizer).encode(texts)
    except TokenizerError:
        return "tokenizers cannot encode every text with this tokenizer"
    except Exception as error:  # as above
        return f"fastokens fails ({str(error)[:200]})"
    if np.array_equal(lengths, wanted_lengths) and np.array_equal(ids, wanted):
        return ""
    return f"fastokens differs from tokenizers on {_first_other(texts, fast, tokenizer)[:60]!r}"


def _first_other(texts: Sequence[str], fast: FastEngine, tokenizer: Tokenizer) -> str:
    reference = ReferenceEngine(tokenizer)
    return next(
        (t for t in texts if not np.array_equal(fast.encode([t])[0], reference.encode([t])[0])),
        "all probes together",
    )


def probes(tokenizer: Tokenizer) -> list[str]:
    """Return texts that engines are likely to differ on: all pairs of awkward signs, and more."""
    signs = [*_SIGNS, *SEPARATORS, tokenizer.separator, *tokenizer.added_tokens()[:40]]
    texts = [f"{first}{second}x {second}{first}" for first in signs for second in signs]
    texts += [f"{sign}{sign}{sign} {sign}\n{sign}" for sign in signs]
    texts += ["", "a" * 300, " " * 700, "ab " * 200, "\n" * 90, "".join(signs)]
    return texts
