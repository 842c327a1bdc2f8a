"""Text that a model writes after a prompt, token by token.

Enters: a model of a study or a Hugging Face checkpoint, a prompt, and how to choose among the
likely tokens. Leaves: the ids and the text, the same for the same seed. Scores nothing: whether
the text is good is for a person to see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regmix.errors import ConfigError, ModelError
from regmix.files import read_table
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from regmix.study import Study

END, LENGTH, ROOM = "end of document", "number of tokens", "trained length"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the next token is chosen.

    temperature: divides the logits; 0 takes the likeliest token always.
    top_k: choose among so many of the likeliest only; None for all.
    top_p: choose among the likeliest that together have this probability.
    seed: of the draws; the same seed gives the same text on the same machine.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_fine, wanted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not is_fine:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", cure=f"Give a number of {wanted}"
                )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token of a text: its id, the text it adds, and why the text ends with it, if it does.

    text: empty where it ends within a character, which the next token completes. The id of an end
    of document is the last one and adds no text.
    """

    token: int
    text: str
    stopped: str | None = None


class Writer:
    """A model with its tokenizer; made by `of_study` or `of_checkpoint`."""

    def __init__(
        self,
        name: str,
        shape: ModelShape,
        parameters: dict[str, Tensor],
        tokenizer: Tokenizer,
        *,
        ends: frozenset[int],
        start: int | None,
        gpu: bool = False,
    ) -> None:
        from regmix.large.evaluate import pick_device
        from regmix.large.inference import LlamaForward

        device, dtype = pick_device(gpu)
        self.name, self.shape = name, shape
        self._model = LlamaForward(shape, parameters, device=device, dtype=dtype)
        self._tokenizer, self._ends, self._start = tokenizer, ends, start

    @classmethod
    def of_study(cls, study: Study, name: str, *, gpu: bool = False) -> Writer:
        """Load a model of a study; `ModelError` where it is unknown or of another tokenizer."""
        from regmix.large.evaluate import load_model
        from regmix.large.export import model_folder
        from regmix.large.vocabulary import check_own_tokens, read_tokenizer

        folder = model_folder(study, name)
        shape, parameters, config = load_model(folder)
        shards = study.open_shards()
        check_own_tokens(folder, config, shards)
        tokenizer, end = read_tokenizer(shards.tokenizer_path), shards.separator_id
        ends = frozenset([end])
        return cls(name, shape, parameters, tokenizer, ends=ends, start=end, gpu=gpu)

    @classmethod
    def of_checkpoint(cls, folder: Path, *, gpu: bool = False) -> Writer:
        """Load a Hugging Face Llama checkpoint; `ModelError` where it cannot be used."""
        from regmix.large.importing import load_hugging_face, read_shape
        from regmix.large.vocabulary import read_tokenizer

        read_shape(folder)
        tokenizer = read_tokenizer(folder)
        shape, parameters = load_hugging_face(folder)
        ends, start = _special_ids(folder, shape.vocab_size)
        return cls(str(folder), shape, parameters, tokenizer, ends=ends, start=start, gpu=gpu)

    def encode(self, prompt: str | None) -> list[int]:
        """Return a prompt's ids, None for the start of a document; `ModelError` where it is none.

        As `transformers` does: what the tokenizer itself puts before a text is put there.
        """
        if prompt is None:
            if self._start is None:
                raise ModelError(
                    f"{self.name}: its config.json names no token that starts a document",
                    cure="Give a --prompt",
                )
            return [self._start]
        ids = list(self._tokenizer.encode(prompt).ids) if prompt else []
        if not ids:
            raise ModelError(
                "the prompt is empty",
                cure="Give some text, or leave --prompt out to start a new document",
            )
        if max(ids) >= self.shape.vocab_size:
            raise ModelError(
                f"the prompt has token {max(ids)}, and {self.name} knows {self.shape.vocab_size}",
                cure="Use the tokenizer that the model was trained with",
            )
        if len(ids) >= self.shape.seq_len:
            raise ModelError(
                f"the prompt has {len(ids)} tokens, and {self.name} was trained on sequences of "
                f"{self.shape.seq_len}",
                cure=f"Give a prompt of at most {self.shape.seq_len - 1} tokens",
            )
        return ids

    def write(
        self, ids: Sequence[int], num_tokens: int, choice: Choice, sample: Sequence[int] = (0,)
    ) -> Iterator[Piece]:
        """Yield what follows the prompt `ids`, until `num_tokens`, an end, or the trained length.

        sample: which of several texts with one seed this is; each has its own draws.
        """
        import torch

        room = self.shape.seq_len - len(ids)
        last = min(num_tokens, room)
        cache = self._model.new_cache(len(ids) + last)
        # The seed's words make the stream, so no text's draws depend on how long another is.
        random = np.random.Generator(np.random.PCG64([choice.seed, *sample]))
        made: list[int] = []
        # Decoded with the prompt: alone, some tokenizers drop a text's first space.
        shown = self._decode(ids)
        logits = self._model.next_logits(torch.tensor(ids), cache)
        for number in range(1, last + 1):
            token = choose(logits.cpu().double().numpy(), choice, random)
            if token in self._ends:
                yield Piece(token=token, text="", stopped=END)
                return
            made.append(token)
            stopped = None
            if number == last:
                stopped = LENGTH if num_tokens <= room else ROOM
            text = self._decode([*ids, *made])
            # A character that is not whole yet is decoded as a replacement.
            new = "" if stopped is None and text.endswith("\ufffd") else text[len(shown) :]
            shown += new
            yield Piece(token=token, text=new, stopped=stopped)
            if stopped is None:
                logits = self._model.next_logits(torch.tensor([token]), cache)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def choose(logits_V: np.ndarray, choice: Choice, random: np.random.Generator) -> int:
    """Return the next token: the likeliest, or a draw from the softmax of what is kept."""
    if choice.temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")[: choice.top_k]
    scaled = (logits_V[order] - logits_V[order[0]]) / choice.temperature
    weights = np.exp(scaled)
    below = np.cumsum(weights)
    if choice.top_p < 1:
        # The first that reaches top_p is kept, so at least one is.
        kept = int(np.searchsorted(below, choice.top_p * below[-1])) + 1
        order, below = order[:kept], below[:kept]
    place = int(np.searchsorted(below, random.random() * below[-1], side="right"))
    return int(order[min(place, len(order) - 1)])


def _special_ids(folder: Path, vocab_size: int) -> tuple[frozenset[int], int | None]:
    """Return the ids that end a text and the one that starts it, as a checkpoint says."""
    table: dict[str, Any] = read_table(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        table |= {k: v for k, v in read_table(generation).items() if v is not None}
    end = table.get("eos_token_id")
    ends = end if isinstance(end, list) else [] if end is None else [end]
    start = table.get("bos_token_id")
    for number in (*ends, *([] if start is None else [start])):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ModelError(f"{folder}: {number!r} is no token id", cure="Restore its config.json")
    if start is not None and not 0 <= start < vocab_size:
        raise ModelError(
            f"{folder}: a text starts with token {start}, and the model knows {vocab_size}",
            cure="Restore its config.json and its generation_config.json",
        )
    return frozenset(ends), start
