"""How many bytes of text each token stands for.

Enters: the text of a `tokenizer.json`. Leaves: bytes by token id where the tokenizer is a
byte-level BPE, whose tokens spell the text byte for byte, else the reason why they cannot be
known. Counts no corpus.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np


def token_byte_lengths(text: str, separator: str) -> tuple[np.ndarray | None, str]:
    """Return (UTF-8 bytes by token id, "") or (None, why not).

    Special tokens and the separator have none. Where the tokenizer normalises to NFC, the bytes
    are those of the normalised text.
    """
    table = json.loads(text)
    if why := _why_not(table):
        return None, why
    alphabet = _byte_alphabet()
    vocabulary: dict[str, int] = table["model"]["vocab"]
    added = table.get("added_tokens") or []
    size = 1 + max([*vocabulary.values(), *(token["id"] for token in added)])
    lengths = np.zeros(size, np.uint32)
    for token, number in vocabulary.items():
        # A token of the alphabet has a character a byte; any other one stands for itself.
        lengths[number] = len(token) if alphabet.issuperset(token) else len(token.encode())
    for token in added:
        special = token.get("special") or token["content"] == separator
        lengths[token["id"]] = 0 if special else len(token["content"].encode())
    return lengths, ""


def _why_not(table: dict[str, Any]) -> str:
    model = table.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return "its tokenizer is no byte-level BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokenizer marks the parts of words"
    steps = [table.get("pre_tokenizer")]
    for step in steps:
        if step and step["type"] == "Sequence":
            steps += step["pretokenizers"]
    levels = [step for step in steps if step and step["type"] == "ByteLevel"]
    if not levels:
        return "its tokenizer is no byte-level BPE"
    if any(level.get("add_prefix_space") for level in levels):
        return "its tokenizer adds a space before a text"
    normaliser = table.get("normalizer")
    if normaliser is not None and normaliser.get("type") != "NFC":
        return "its tokenizer changes the text before it splits it"
    if any(
        (token.get("lstrip") or token.get("rstrip")) and not token.get("special")
        for token in table.get("added_tokens") or []
    ):
        return "its tokenizer has words that swallow the white space beside them"
    return ""


def _byte_alphabet() -> frozenset[str]:
    """Return the 256 characters that byte-level tokenizers write for bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + place) for place in range(256 - len(printable)))
    return frozenset([*map(chr, printable), *others])
