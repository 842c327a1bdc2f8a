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
    library.encode_special_tokens = True
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


@pytest.mark.parametrize("special", [True, False])
def test_a_separator_spelled_out_in_a_document_is_text(tmp_path: Path, special: bool) -> None:
    table = json.loads(train_bpe(TEXTS, 300).text)
    table["added_tokens"][0]["special"] = special
    loaded = load_tokenizer(saved(tmp_path / "t.json", json.dumps(table)))
    text = f"one{SEPARATOR}two {SEPARATOR}"
    ids = loaded.encode([text, SEPARATOR])[0].tolist()
    assert ids.count(loaded.separator_id) == 2
    assert loaded.decode(ids) == text + SEPARATOR + SEPARATOR + SEPARATOR


def words(path: Path, vocabulary: dict[str, int], **options: str) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, **options))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return saved(path, backend.to_str())


def test_a_separator_that_is_a_word_of_a_document_is_an_error(tmp_path: Path) -> None:
    path = words(tmp_path / "t.json", {"end": 0, "a": 1, "?": 2}, unk_token="?")
    loaded = load_tokenizer(path, separator="end")
    assert loaded.encode(["a b"])[0].tolist() == [1, 2, 0]
    with pytest.raises(TokenizerError, match=r"holds the separator 'end'.*--separator"):
        loaded.encode(["a", "a end a"])


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_a_tokenizer_that_loses_unknown_text_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.json"
    if kind == "words":
        words(path, {SEPARATOR: 0, "a": 1}, unk_token="[UNK]")  # which it does not have
    else:
        model = tokenizers.models.BPE(vocab={SEPARATOR: 0, "a": 1}, merges=[])
        saved(path, tokenizers.Tokenizer(model).to_str())
    with pytest.raises(TokenizerError, match=r"t\.json: loses the text.*--train-bpe"):
        load_tokenizer(path)


def alphabet() -> list[str]:
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize(("missing", "refused"), [(0x09, True), (0xF4, True), (0xF5, False)])
def test_a_byte_level_tokenizer_lacks_only_bytes_that_no_text_has(
    tmp_path: Path, missing: int, refused: bool
) -> None:
    character = "ĉ" if missing == 0x09 else chr(missing)
    letters = [letter for letter in alphabet() if letter != character]
    vocabulary = {letter: place for place, letter in enumerate([SEPARATOR, *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(), tokenizers.pre_tokenizers.ByteLevel()]
    )
    path = saved(tmp_path / "t.json", backend.to_str())
    if refused:
        with pytest.raises(TokenizerError, match="loses the text"):
            load_tokenizer(path)
    else:
        assert load_tokenizer(path).vocab_size == 256


@pytest.mark.parametrize(("num_bytes", "refused"), [(256, False), (255, True)])
def test_a_byte_fallback_needs_all_bytes(tmp_path: Path, num_bytes: int, refused: bool) -> None:
    tokens = [SEPARATOR, "a", *(f"<0x{byte:02X}>" for byte in range(num_bytes))]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True)
    path = saved(tmp_path / "t.json", tokenizers.Tokenizer(model).to_str())
    if refused:
        with pytest.raises(TokenizerError, match="loses the text"):
            load_tokenizer(path)
    else:
        assert load_tokenizer(path).encode(["ab"])[0].tolist() == [1, 2 + ord("b"), 0]


def test_an_error_of_the_library_while_it_encodes_names_the_tokenizer(tmp_path: Path) -> None:
    letters = {letter: place for place, letter in enumerate([SEPARATOR, *alphabet()])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    loaded = load_tokenizer(saved(tmp_path / "t.json", backend.to_str()))
    with pytest.raises(TokenizerError, match=r"t\.json: cannot encode a document \(WordLevel"):
        loaded.encode(["ab"])


@pytest.mark.parametrize("vocab_size", [(1 << 20) + 1, 99999999999999999999])
def test_too_large_a_vocabulary_is_an_error(vocab_size: int) -> None:
    with pytest.raises(TokenizerError, match=f"{vocab_size} is too large.*at most 1048576"):
        train_bpe(TEXTS, vocab_size)


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
    table["added_tokens"][-1]["special"] = False
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
