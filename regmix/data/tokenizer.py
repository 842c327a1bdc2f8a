"""Tokenizers: load any Hugging Face `tokenizer.json`, train a byte-level BPE, encode batches.

Enters: a file, or documents to train on. Leaves: a `Tokenizer` with its separator (the token that
ends every document), and token ids identical to those of the `tokenizers` library with
`encode_special_tokens`. Reads no corpus and writes no shards.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regmix.errors import StorageError, TokenizerError, nearest
from regmix.files import read_text

SEPARATOR = "<|endoftext|>"
SMALLEST_BPE = 257  # the 256 bytes and the separator
LARGEST_BPE = 1 << 20  # the library reserves memory for all of it before it trains


class Tokenizer:
    """A tokenizer and its separator; made by `load_tokenizer` or `train_bpe`.

    `text` is the whole tokenizer.json, `hash` its xxh3_64, `vocab_size` the largest id + 1.
    """

    def __init__(self, text: str, *, separator: str | None = None, where: str) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(text)
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{where}: not a Hugging Face tokenizer ({str(error)[:200]})",
                cure="Name a tokenizer.json as saved by the tokenizers library, "
                "or train one: --train-bpe 8192",
            ) from error
        if not vocabulary:
            raise TokenizerError(f"{where}: an empty vocabulary", cure="Name another tokenizer")
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > max(LARGEST_BPE, 4 * len(vocabulary)):
            raise TokenizerError(
                f"{where}: ids up to {self.vocab_size - 1:,} for {len(vocabulary):,} tokens",
                cure="Name another tokenizer: models and the library hold a row for every id",
            )
        # A file may ask to cut or to pad; a corpus keeps every token and adds none.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.where = where
        self.text = text
        self.hash = xxhash.xxh3_64_hexdigest(text.encode())
        self.separator = separator or SEPARATOR
        if self.separator not in vocabulary:
            special = self.added_tokens()
            raise TokenizerError(
                f"{where}: no token '{self.separator}' to end documents with "
                f"({nearest(self.separator, special)})",
                cure="Name one of its tokens with --separator",
            )
        self.separator_id = vocabulary[self.separator]
        # A separator that a document spells out is text, not the end of a document.
        self._backend.add_special_tokens([self.separator])
        self._backend.encode_special_tokens = True
        try:
            knows_any = _knows_any_text(json.loads(text), vocabulary)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # The library reads some text that is no JSON.
            raise TokenizerError(
                f"{where}: not a Hugging Face tokenizer ({error!r})",
                cure="Save it again with the tokenizers library",
            ) from error
        if not knows_any:
            raise TokenizerError(
                f"{where}: loses the text it has no token for (not all bytes, "
                "no byte fallback, no unknown token)",
                cure="Name a tokenizer with one of these, or train one: --train-bpe 8192",
            )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all documents, each ended by the separator, and their lengths.

        The dtype is the narrowest that holds the vocabulary. Special tokens spelled out in a text
        are encoded as text. Releases the GIL while it encodes. `TokenizerError` where the library
        cannot encode a document, or finds the separator in its text all the same.
        """
        rows = self.rows(texts)
        lengths = np.fromiter((len(row) + 1 for row in rows), np.int64, len(rows))
        end = (self.separator_id,)
        flat = itertools.chain.from_iterable(itertools.chain(row, end) for row in rows)
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return np.fromiter(flat, dtype, int(lengths.sum())), lengths

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without separators; raises as `encode` does."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{self.where}: cannot encode a document ({str(error)[:200]})",
                cure="Name a tokenizer that can encode any text, or train one: --train-bpe 8192",
            ) from error
        rows = [encoding.ids for encoding in encodings]
        if any(self.separator_id in row for row in rows):
            raise self.separator_found()
        return rows

    def separator_found(self) -> TokenizerError:
        """Return the error of a text that holds the separator as a word."""
        return TokenizerError(
            f"{self.where}: the text of a document holds the separator '{self.separator}' "
            "as a word",
            cure="Name a token that no text holds with --separator",
        )

    def backend_text(self) -> str:
        """Return the tokenizer.json as it is used here: the separator is a special token."""
        return str(self._backend.to_str())

    def added_tokens(self) -> list[str]:
        """Return the tokens that are found in a text before it is divided into words."""
        return [str(token) for token in self._backend.get_added_tokens_decoder().values()]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def _knows_any_text(table: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Return whether text outside the vocabulary still leaves a token."""
    model = table["model"]
    if model.get("unk_token") in vocabulary or model.get("unk_id") is not None:
        return True
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return True
    steps = [table.get("normalizer"), table.get("pre_tokenizer")]
    for step in steps:
        if step:
            steps += step.get("normalizers", []) + step.get("pretokenizers", [])
    return any(step["type"] == "ByteLevel" for step in steps if step) and all(
        character in vocabulary for character in _byte_characters()
    )


def _byte_characters() -> set[str]:
    """Return what byte-level tokenizers write for the 243 bytes that occur in UTF-8."""
    from tokenizers.pre_tokenizers import ByteLevel

    every_start = [*range(0x800), 0x800, *range(0x1000, 0x10000, 0x1000)]
    every_start += [0x10000, *range(0x40000, 0x110000, 0x40000)]
    text = "".join(map(chr, every_start))
    ((characters, _),) = ByteLevel(False, use_regex=False).pre_tokenize_str(text)
    return set(characters)


def load_tokenizer(path: Path | str, *, separator: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json`; `TokenizerError` where it is not one or lacks the separator."""
    path = Path(path)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    try:
        text = read_text(path)
    except StorageError as error:
        raise TokenizerError(error.what, cure="Name a readable tokenizer.json") from error
    return Tokenizer(text, separator=separator, where=str(path))


def train_bpe(
    documents: Iterable[str], vocab_size: int, *, separator: str | None = None
) -> Tokenizer:
    """Train a byte-level BPE; the same documents give the same file.

    The vocabulary holds the 256 bytes, so any text can be encoded, and the separator, id 0. It
    ends up smaller than `vocab_size` where the documents hold too few pairs to merge.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_BPE:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} is too small for the 256 bytes and the separator",
            cure=f"Ask for at least {SMALLEST_BPE}, for example --train-bpe 8192",
        )
    if vocab_size > LARGEST_BPE:
        raise TokenizerError(
            f"a vocabulary of {vocab_size} is too large to train",
            cure=f"Ask for at most {LARGEST_BPE}, for example --train-bpe 8192",
        )
    backend: Any = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator or SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return Tokenizer(
        backend.to_str(pretty=True), separator=separator, where="the tokenizer just trained"
    )


@contextlib.contextmanager
def own_parallelism() -> Iterator[None]:
    """Keep the library to the thread that calls it: the caller has one thread a core itself."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
