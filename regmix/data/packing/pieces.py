"""Where a long text may be cut so that its token ids cannot change.

A tokenizer may be cut where three things hold, which are read from its tokenizer.json:

1. Its normaliser is none or NFC: an ASCII space or newline never joins what stands before it.
2. Its pre-tokeniser ends a word before a space that follows anything but white space, and before
   a newline that follows a letter or digit, whatever comes later. GPT-2's and the patterns named
   here do, and none of them looks back. (GPT-2's ends one before a newline after any sign, too.)
3. No added token holds such a place, nor takes in what stands beside it (lstrip, rstrip,
   single_word).

Then the words before and after the cut are those of the whole text, and a BPE without dropout
encodes word by word. Any other tokenizer gets its documents whole.

Enters: tokenizer.json, a text. Leaves: the pieces. Encodes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

PIECE_CHARACTERS = 1 << 20
# A longer piece has no place to be cut: one word, or white space, of megabytes. The tokenizers
# need 50 to 100 bytes of memory for each of its bytes.
LONGEST_PIECE_BYTES = 4 << 20

# Not white space for any version of Unicode, nor for any of the regular expression libraries.
_SIGN = r"[^\s\x1c-\x1f\x85\u180e\u200b\ufeff]"
# Letters and digits ever since the first versions of Unicode: Latin, kana, Chinese, Hangul.
_LETTER = r"[A-Za-z0-9\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3]"
_AFTER_SIGNS = re.compile(rf"{_SIGN}(?=[ \n])")
_AFTER_LETTERS = re.compile(rf"{_SIGN}(?= )|{_LETTER}(?=\n)")
_INSIDE = re.compile(r"\S[ \n]")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    # Llama 3 and cl100k; Qwen 2.
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
}


def cut_pattern(table: dict[str, Any]) -> re.Pattern[str] | None:
    """Return what matches the sign before a cut, for this tokenizer.json; None: never cut."""
    model = table["model"]
    normaliser = table.get("normalizer")
    if (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and (normaliser is None or normaliser["type"] == "NFC")
        and all(_keeps_apart(token) for token in table.get("added_tokens", []))
    ):
        return _pattern(table.get("pre_tokenizer"))
    return None


def _pattern(step: dict[str, Any] | None) -> re.Pattern[str] | None:
    if step is None:
        return None
    if step["type"] == "ByteLevel":
        plain = step.get("use_regex", True) and not step["add_prefix_space"]
        return _AFTER_SIGNS if plain else None
    if step["type"] != "Sequence" or len(step["pretokenizers"]) != 2:
        return None
    split, level = step["pretokenizers"]
    known = (
        split["type"] == "Split"
        and split["pattern"].get("Regex") in _PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and level["type"] == "ByteLevel"
        and not level.get("use_regex", True)
        and not level["add_prefix_space"]
    )
    return _AFTER_LETTERS if known else None


def _keeps_apart(token: dict[str, Any]) -> bool:
    wide = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not wide and not _INSIDE.search(token["content"])


def pieces(
    chunks: Iterable[str], cut: re.Pattern[str] | None, *, size: int = PIECE_CHARACTERS
) -> Iterator[str]:
    """Yield a text, given in any chunks, in pieces of about `size` characters.

    It is cut where ids cannot change; a piece is longer where no such place comes sooner.
    """
    held: list[str] = []
    length = 0
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        while cut is not None and length >= size:
            last = held[-1]
            # The sign before the cut may be the last one of the chunk before.
            sign = held[-2][-1:] if len(held) > 1 else ""
            wanted = size - (length - len(last))
            found = cut.search(sign + last, max(0, wanted - 1 + len(sign)))
            if found is None:
                break
            end = found.end() - len(sign)
            yield "".join([*held[:-1], last[:end]])
            held, length = [last[end:]], len(last) - end
    if length:
        yield "".join(held)
