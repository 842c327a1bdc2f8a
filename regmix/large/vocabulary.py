"""The tokenizer that belongs to a model's weights, and whether it is the corpus's.

Enters: a Hugging Face checkpoint's folder, or the shards that a study's model was trained on.
Leaves: a tokenizer of the `tokenizers` library, or an error. Trains none and packs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.errors import ModelError, StorageError
from regmix.files import read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from regmix.data.shards import ShardSet


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, or of the checkpoint in a folder.

    It neither cuts nor pads. Raises `ModelError` where there is none.
    """
    import tokenizers

    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = read_text(path)
    except StorageError as error:
        raise ModelError(
            error.what,
            cure="Write one beside the weights, with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{path}: not a Hugging Face tokenizer ({str(error)[:200]})", cure="Restore the file"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_same_tokens(folder: Path, shards: ShardSet) -> None:
    """Raise `ModelError` unless every token of the corpus has the same id in a checkpoint.

    The checkpoint may know more tokens, and its tokenizer.json may be written in another way.
    """
    known = _vocabulary(folder)
    ours = _vocabulary(shards.tokenizer_path)
    different = [token for token, number in ours.items() if known.get(token) != number]
    if different:
        raise ModelError(
            f"{folder}: its tokenizer is not that of {shards.path} ({len(different)} of "
            f"{len(ours)} tokens differ, as {min(different)!r})",
            cure="Pack the corpus with it (regmix-fast pack CORPUS --tokenizer "
            f"{folder / 'tokenizer.json'}), and draw a study on that",
        )


def check_own_tokens(folder: Path, config: dict[str, Any], shards: ShardSet) -> None:
    """Raise `ModelError` where a study's model was trained with another tokenizer.

    config: the model's `config.json`, as `load_model` returns it.
    """
    if config["tokenizer"]["hash"] != shards.tokenizer_hash:
        raise ModelError(
            f"{folder}: the model was trained with another tokenizer than {shards.path} has",
            cure="Restore the corpus that it was trained on",
        )


def _vocabulary(path: Path) -> dict[str, int]:
    return dict(read_tokenizer(path).get_vocab(with_added_tokens=True))
