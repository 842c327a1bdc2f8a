"""Long texts: cutting and piecewise decoding change neither the text nor its ids."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from regmix.data.packing import long_texts
from regmix.data.packing.documents import MALFORMED, Refusal, line_documents, text_document
from regmix.data.packing.long_texts import LongText, json_text, split_long_strings, utf8_text
from regmix.data.packing.pieces import _PATTERNS, cut_pattern, pieces
from regmix.data.tokenizer import load_tokenizer, train_bpe

PARTS = [
    *(
        "a",
        "Z",
        "it's",
        "é",
        "e\u0301",
        "\u0301",
        "東",
        "カ",
        "か\u3099",
        "한",
        "7",
        "123",
        "'",
        "'s",
    ),
    *(" ", "  ", "     ", "\t", "\n", "\n\n", "\r\n", "\u3000", "\x85", "\u180e", "\u200b", "\x1c"),
    *("。", ".", "!?", "_", "\U0001f600", "\ufeff", "<|endoftext|>", "<|padding|>", "ſ", "ﬁ", "½"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=80).map("".join)


def llama(pattern: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["".join(PARTS) * 3, "a  a\n\nZ it's 123 !?\n 。\n"], trainer)
    return backend


def ours() -> tokenizers.Tokenizer:
    text = train_bpe(["".join(PARTS) * 3, "a  a\n\nZ it's 123 !?\n 。\n"], 420).text
    return tokenizers.Tokenizer.from_str(text)


KNOWN = [ours(), *(llama(pattern) for pattern in sorted(_PATTERNS))]


CUTS = [cut_pattern(json.loads(backend.to_str())) for backend in KNOWN]


def assert_cuts_change_nothing(
    backend: tokenizers.Tokenizer, cut: re.Pattern[str] | None, text: str, size: int
) -> None:
    assert cut is not None
    parts = list(pieces([text], cut, size=size))
    assert "".join(parts) == text
    backend.encode_special_tokens = True
    whole = backend.encode(text, add_special_tokens=False).ids
    assert [t for part in parts for t in backend.encode(part, add_special_tokens=False).ids] == (
        whole
    )


@pytest.mark.parametrize("place", range(len(KNOWN)))
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, size=st.integers(1, 12))
def test_the_ids_of_the_pieces_are_those_of_the_text(place: int, text: str, size: int) -> None:
    assert_cuts_change_nothing(KNOWN[place], CUTS[place], text, size)


def test_the_published_tokenizer_may_be_cut_after_any_sign(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt-neox-tokenizer.json")
    backend = tokenizers.Tokenizer.from_str(tokenizer.text)
    cut = cut_pattern(json.loads(tokenizer.text))
    for shift in range(60):
        text = "".join((PARTS[shift % len(PARTS) :] + PARTS) * 2) + " end\n" * shift
        assert_cuts_change_nothing(backend, cut, text, 1 + shift % 7)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 9), max_size=30), st.integers(1, 12))
def test_pieces_do_not_lose_a_sign_however_the_text_comes(
    text: str, sizes: list[int], size: int
) -> None:
    chunks, place = [], 0
    for length in sizes:
        chunks.append(text[place : place + length])
        place += length
    chunks = [chunk for chunk in [*chunks, text[place:]] if chunk]
    parts = list(pieces(chunks, CUTS[0], size=size))
    assert "".join(parts) == text
    for before, after in itertools.pairwise(parts):
        assert after[0] in " \n"
        assert not before[-1].isspace()


def changed(**settings: object) -> dict[str, object]:
    table = json.loads(KNOWN[0].to_str())
    added = settings.pop("added", {})
    model = settings.pop("model", {})
    table["added_tokens"][0] |= added  # type: ignore[operator]
    table["model"] |= model  # type: ignore[operator]
    return {**table, **settings}


@pytest.mark.parametrize(
    "table",
    [
        changed(normalizer={"type": "NFKC"}),
        changed(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer={"type": "Whitespace"}),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
        changed(added={"lstrip": True}),
        changed(added={"rstrip": True}),
        changed(added={"single_word": True}),
        changed(added={"content": "two words"}),
        changed(added={"content": "end\n"}),
        changed(model={"dropout": 0.1}),
        changed(model={"type": "Unigram"}),
    ],
)
def test_a_tokenizer_whose_ids_could_change_is_never_cut(table: dict[str, object]) -> None:
    assert cut_pattern(table) is None
    assert list(pieces(["a b", " c d"], None, size=1)) == ["a b c d"]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "STEP_BYTES", 13)
    monkeypatch.setattr(long_texts, "LONG_BYTES", 20)


STRINGS = st.text(st.sampled_from('ab"\\/\n\té東\U0001f600u'), max_size=90)


@pytest.mark.usefixtures("small_steps")
def test_steps_decode_to_the_same_text() -> None:
    @settings(max_examples=200, deadline=None)
    @given(STRINGS, st.booleans())
    def holds(text: str, ascii_only: bool) -> None:
        raw = json.dumps(text, ensure_ascii=ascii_only).encode()[1:-1]
        assert "".join(json_text(raw).chunks()) == text
        assert "".join(utf8_text(text.encode()).chunks()) == text

    holds()


@pytest.mark.usefixtures("small_steps")
def test_long_strings_are_taken_out_of_a_line_and_put_back() -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(STRINGS, STRINGS | st.integers() | st.lists(STRINGS), max_size=4))
    def holds(record: dict[str, object]) -> None:
        rest, strings = split_long_strings(json.dumps(record).encode())
        found = rest.decode()
        for name, raw in strings.items():
            assert len(raw) > 19
            whole = json.dumps("".join(json_text(raw).chunks()))
            found = found.replace(json.dumps(name), whole, 1)
        assert json.loads(found) == record

    holds()


LONG = "word " * (2 << 20)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "' + LONG + '\\ud83d"}', "half a surrogate pair"),
        ('{"text": "' + LONG + '\\x"}', "not JSON"),
        ('{"text": "' + LONG, "not JSON"),
        ('{"text": "' + LONG + '"} x', "not JSON"),
        ('{"other": "' + LONG + '"}', "no field 'text'"),
        ('{"text": 5, "other": "' + LONG + '"}', "a int, not a string"),
        ('{"text": "short", "other": "' + LONG + '\\q"}', "not JSON"),
        ('["' + LONG + '"]', "a JSON list"),
    ],
)
def test_a_long_line_is_malformed_for_the_reasons_of_a_short_one(line: str, words: str) -> None:
    ((_, found),) = line_documents(line.encode(), first=False, text_field="text", max_bytes=1 << 30)
    assert isinstance(found, Refusal)
    assert found.reason == MALFORMED
    assert words in found.words


def test_a_long_line_that_is_not_utf8_is_malformed() -> None:
    raw = b'{"text": "' + LONG.encode() + b'\xff"}'
    ((_, found),) = line_documents(raw, first=False, text_field="text", max_bytes=1 << 30)
    assert isinstance(found, Refusal)
    assert "not UTF-8" in found.words


@pytest.mark.parametrize("field", ["text", "other"])
def test_a_long_line_gives_its_text(field: str) -> None:
    record = {"id": "x" * 9, "text": LONG + 'end "\\" \U0001f600', "other": "short", "more": LONG}
    raw = json.dumps(record).encode()
    ((_, found),) = line_documents(raw, first=False, text_field=field, max_bytes=1 << 30)
    whole = "".join(found.chunks()) if isinstance(found, LongText) else found
    assert whole == record[field]


def test_a_long_text_file_that_is_not_utf8_names_the_line() -> None:
    ((number, found),) = text_document((LONG + "\n").encode() * 2 + b"a \xff b")
    assert number == 3
    assert isinstance(found, Refusal)
