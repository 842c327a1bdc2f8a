"""Tokenizers: ids are those of the `tokenizers` library, training repeats, bad files say so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
import xxhash

from regmix.data.tokenizer import SEPARATOR, load_tokenizer, own_parallelism, train_bpe
from regmix.errors import TokenizerError

TEXTS = [
    "the cat sat on the mat, the cat sat",
    "naïve café — 東京 \U0001f600\n\n\tif x == 1:\n        return",
    "a" * 3000,
    f"a text that says {SEPARATOR} itself",
    "\x00\x7f\r\n",
]


def saved(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_equal_those_of_the_library_with_a_separator_after_each(tmp_path: Path) -> None:
    trained = train_bpe(TEXTS * 3, 300)
    path = saved(tmp_path / "tokenizer.json", trained.text)
    library = tokenizers.Tokenizer.from_file(str(path))
    ids, lengths = load_tokenizer(path).encode(TEXTS)
    wanted = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert lengths.tolist() == [len(row) + 1 for row in wanted]
    separator = library.token_to_id(SEPARATOR)
    assert ids.tolist() == [token for row in wanted for token in [*row, separator]]


def test_a_trained_tokenizer_gives_any_text_back() -> None:
    trained = train_bpe(["only ascii here"], 260)
    for text in TEXTS:
        assert trained.decode(trained.encode([text])[0][:-1].tolist()) == text


def test_training_repeats_bit_for_bit() -> None:
    texts = [f"{word} {word}s of {word}ing" for word in ("walk", "talk", "bake", "make")] * 5
    assert train_bpe(texts, 330).text == train_bpe(iter(texts), 330).text


def test_training_reaches_the_vocabulary_asked_for_or_says_how_far_it_came() -> None:
    assert train_bpe(TEXTS, 280).vocab_size == 280
    assert train_bpe(["ab"], 5000).vocab_size == 258


def test_too_small_a_vocabulary_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="256 bytes"):
        train_bpe(TEXTS, 256)


def test_a_file_that_asks_to_cut_or_pad_loses_and_adds_no_token(tmp_path: Path) -> None:
    table = json.loads(train_bpe(TEXTS, 300).text)
    plain = load_tokenizer(saved(tmp_path / "plain.json", json.dumps(table)))
    table["truncation"] = {
        "max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    table["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": SEPARATOR,
    }  # fmt: skip
    cutting = load_tokenizer(saved(tmp_path / "cutting.json", json.dumps(table)))
    assert cutting.encode(TEXTS)[0].tolist() == plain.encode(TEXTS)[0].tolist()


def test_the_hash_is_that_of_the_text_and_the_vocabulary_ends_at_the_largest_id(
    tmp_path: Path,
) -> None:
    trained = train_bpe(TEXTS, 270)
    assert trained.hash == xxhash.xxh3_64_hexdigest(trained.text.encode())
    table = json.loads(trained.text)
    table["added_tokens"].append({**table["added_tokens"][0], "id": 999, "content": "<far>"})
    loaded = load_tokenizer(saved(tmp_path / "far.json", json.dumps(table)))
    ids = loaded.encode(["x<far>"])[0]
    assert int(ids.max()) + 1 == loaded.vocab_size


def test_another_separator_is_used_and_a_missing_one_names_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.json", train_bpe(TEXTS, 300, separator="</s>").text)
    loaded = load_tokenizer(path, separator="</s>")
    assert loaded.encode(["x"])[0][-1] == loaded.separator_id
    with pytest.raises(TokenizerError, match=r"no token '<\|endoftext\|>'.*</s>.*--separator"):
        load_tokenizer(path)


def test_a_folder_that_holds_a_tokenizer_is_accepted(tmp_path: Path) -> None:
    saved(tmp_path / "tokenizer.json", train_bpe(TEXTS, 300).text)
    assert load_tokenizer(tmp_path).vocab_size == 300


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}', "[1, 2]"])
def test_a_corrupt_file_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(TokenizerError, match=r"t\.json: not a Hugging Face tokenizer"):
        load_tokenizer(saved(tmp_path / "t.json", content))


def test_a_missing_and_a_binary_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"none\.json: No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TokenizerError, match="not UTF-8"):
        load_tokenizer(tmp_path / "binary.json")


@pytest.mark.parametrize("before", [None, "true"])
def test_the_library_is_kept_to_one_thread_only_while_we_encode(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if before is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
    with own_parallelism():
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


def test_the_published_tokenizer_loads(shared: Path) -> None:
    loaded = load_tokenizer(shared / "tokenizers" / "gpt-neox-tokenizer.json")
    assert (loaded.vocab_size, loaded.separator_id) == (50277, 0)
