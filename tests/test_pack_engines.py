"""Engines: the fast one is used where it agrees with `tokenizers`, and never mixed with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from pack_corpora import content, lines, put, texts

from regmix.data.packing import lanes
from regmix.data.packing.corpus import Tally, find_sources, read_documents
from regmix.data.packing.encoder import EngineDiffers
from regmix.data.packing.encoder_pool import _error, describe_error
from regmix.data.packing.engines import FAST, FastEngine, ReferenceEngine, choose_engine, probes
from regmix.data.packing.pack import pack
from regmix.data.packing.units import UnitWriter
from regmix.data.shards import ShardSet
from regmix.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from regmix.errors import ConfigError, CorpusError, TokenizerError

pytest.importorskip("fastokens")
AWKWARD = "don't  stop\n\n\nnaïve e\u0301 東京\u3000\U0001f600 <|endoftext|>   x\r\n\ty 1234567 "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two domains of two files each."""
    for domain in ("code", "web"):
        for number in range(2):
            rows = [f"{text} {AWKWARD}" for text in texts(f"{domain} {number}", 40)]
            put(tmp_path / f"in/{domain}-{number}.jsonl", lines(rows))
    return tmp_path / "in"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    path = tmp_path / "t.json"
    path.write_text(train_bpe(texts("training", 60), 400).text)
    return path


def shards_of(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in content(folder).items() if name != "packing.json"}


def assert_equal_ids(tokenizer: Tokenizer, documents: Sequence[str]) -> None:
    fast, lengths = FastEngine(tokenizer).encode(documents)
    wanted, wanted_lengths = ReferenceEngine(tokenizer).encode(documents)
    np.testing.assert_array_equal(lengths, wanted_lengths)
    np.testing.assert_array_equal(fast, wanted)


@pytest.mark.parametrize("vocab_size", [257, 300, 900])
def test_the_fast_engine_gives_the_ids_of_tokenizers(vocab_size: int) -> None:
    tokenizer = train_bpe([AWKWARD, *texts("training", 60)], vocab_size)
    assert choose_engine(tokenizer, "auto").name == FAST
    assert_equal_ids(tokenizer, [AWKWARD * 3, "", *texts("others", 30), *probes(tokenizer)[::97]])


def test_the_published_tokenizer_and_corpus_give_the_same_ids(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt-neox-tokenizer.json")
    assert choose_engine(tokenizer, "auto").name == FAST
    sample = []
    for source in find_sources([shared / "corpus"]).files[::2]:
        for number, (text, _) in enumerate(read_documents(source, Tally())):
            if number % 97 == 5:
                sample.append(text[:6000])
            if number > 600:
                break
    assert len(sample) > 60
    assert_equal_ids(tokenizer, sample)


def test_both_engines_write_the_same_bytes(corpus: Path, trained: Path, tmp_path: Path) -> None:
    reports = {
        engine: pack([corpus], tmp_path / engine, tokenizer=trained, engine=engine)
        for engine in ("auto", "fast", "tokenizers")
    }
    for engine in ("fast", "tokenizers"):
        assert shards_of(tmp_path / engine) == shards_of(tmp_path / "auto")
    assert [report.engine for report in reports.values()] == [FAST, FAST, "tokenizers"]
    assert reports["tokenizers"].verified_bytes == 0


def test_a_sample_of_every_file_is_compared(corpus: Path, trained: Path, tmp_path: Path) -> None:
    large = [f"{text} {AWKWARD}" for text in texts("large", 9000)]
    put(corpus / "web-2.jsonl", lines(large))
    put(corpus / "web-3.txt", ("one long text of many words\n" * 9000).encode())
    report = pack([corpus], tmp_path / "out", tokenizer=trained, valid_fraction=0)
    least = text = 0
    for source in find_sources([corpus]).files:
        own = sum(len(utf8) for _, utf8 in read_documents(source, Tally()))
        least, text = least + min(lanes._Quota(source.num_bytes).first, own), text + own
    # Less would mean that some file, however small, was left out.
    assert least <= report.verified_bytes <= least + 0.02 * text
    kept = json.loads((tmp_path / "out/packing.json").read_text())
    assert kept["engine"] == FAST
    assert kept["verified_bytes"] == report.verified_bytes


def test_of_a_large_file_three_thousandths_are_compared_evenly() -> None:
    quota = lanes._Quota(100 << 20)
    asked = [quota.of(1 << 20) for _ in range(100)]
    assert asked[0] == 64 << 10
    assert min(asked[1:]) >= 0.0029 * (1 << 20)
    assert sum(asked) >= 0.003 * 100 * (1 << 20)
    small = lanes._Quota(320_000)
    assert [small.of(16_000) for _ in range(3)] == [16_000, 4_000, 48]
    assert lanes._Quota(0).of(5_000) == 1 << 10


def break_engine(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[np.ndarray], object]) -> None:
    """Let the fast engine go wrong where a text says "poison"."""
    original = FastEngine.encode

    def encode(self: FastEngine, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = original(self, documents)
        if any("poison" in text for text in documents):
            ids = ids.copy()
            spoil(ids)
        return ids, lengths

    monkeypatch.setattr(FastEngine, "encode", encode)


def one_id(ids: np.ndarray) -> None:
    ids[-3] = ids[-3] % 50 + 60


def failing(ids: np.ndarray) -> None:
    raise RuntimeError("match limit exceeded")


@pytest.mark.parametrize(("spoil", "words"), [(one_id, "other ids"), (failing, "match limit")])
def test_at_the_first_difference_all_is_packed_with_tokenizers(
    corpus: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[np.ndarray], object],
    words: str,
) -> None:
    put(corpus / "web-7.jsonl", lines([*texts("last", 3), "poison it is", "end"]))
    pack([corpus], tmp_path / "wanted", tokenizer=trained, engine="tokenizers")
    break_engine(monkeypatch, spoil)
    messages: list[str] = []
    report = pack([corpus], tmp_path / "out", tokenizer=trained, on_message=messages.append)
    (message,) = messages
    assert "web-7.jsonl, line" in message
    assert words in message
    assert "whole corpus is packed with tokenizers" in message
    assert report.engine == "tokenizers"
    assert words in report.engine_reason
    assert shards_of(tmp_path / "out") == shards_of(tmp_path / "wanted")


def test_a_difference_is_an_error_where_the_fast_engine_is_asked_for(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(corpus / "web-7.jsonl", lines(["end", "poison it is"]))
    break_engine(monkeypatch, one_id)
    with pytest.raises(TokenizerError, match=r"web-7\.jsonl, line 2: other ids.*--engine auto"):
        pack([corpus], tmp_path / "out", tokenizer=trained, engine="fast")


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = UnitWriter.finish

    def finish(self: UnitWriter, books: object) -> None:
        if books.name == name:  # type: ignore[attr-defined]
            raise CorpusError("stopped here", cure="Go on")
        original(self, books)  # type: ignore[arg-type]

    monkeypatch.setattr(UnitWriter, "finish", finish)


def test_a_run_goes_on_with_tokenizers_once_they_differed(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(corpus / "code-7.jsonl", lines(["poison it is"]))
    with monkeypatch.context() as patch:
        break_engine(patch, one_id)
        stop_at(patch, "web-1.jsonl")
        with pytest.raises(CorpusError, match="stopped here"):
            pack([corpus], tmp_path / "out", tokenizer=trained)
    report = pack([corpus], tmp_path / "out", tokenizer=trained)
    assert report.engine == "tokenizers"
    assert report.resumed_files == 4
    assert "code-7.jsonl, line 1" in report.engine_reason


def test_a_run_with_another_engine_takes_nothing_over(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, "web-1.jsonl")
        with pytest.raises(CorpusError, match="stopped here"):
            pack([corpus], tmp_path / "out", tokenizer=trained)
    report = pack([corpus], tmp_path / "out", tokenizer=trained, engine="tokenizers")
    assert report.resumed_files == 0


def test_without_fastokens_tokenizers_encodes_and_says_why(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens._native", None)
    report = pack([corpus], tmp_path / "out", tokenizer=trained)
    assert (report.engine, report.engine_reason) == ("tokenizers", "fastokens is not installed")
    with pytest.raises(TokenizerError, match=r"not installed.*--engine auto"):
        pack([corpus], tmp_path / "other", tokenizer=trained, engine="fast")


def test_a_tokenizer_that_the_fast_engine_gets_wrong_is_found_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_bpe(texts("training", 30), 300)
    original = FastEngine.encode

    def encode(self: FastEngine, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = original(self, documents)
        return np.where(ids == ids.max(), 5, ids), lengths

    monkeypatch.setattr(FastEngine, "encode", encode)
    assert "differs from tokenizers on" in choose_engine(tokenizer, "auto").reason


def test_a_tokenizer_that_cannot_be_read_by_the_fast_engine_is_left_to_tokenizers(
    tmp_path: Path,
) -> None:
    vocabulary = {"<|endoftext|>": 0, "time": 1, "?": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "w.json"
    path.write_text(backend.to_str())
    put(tmp_path / "in/web-0.jsonl", lines(["time and time", "b"]))
    report = pack([tmp_path / "in"], tmp_path / "out", tokenizer=path, valid_fraction=0)
    assert report.engine == "tokenizers"
    assert report.engine_reason
    ids = ShardSet.open(tmp_path / "out").arrays("train", "web")[0]
    assert ids.tolist() == [1, 2, 1, 0, 2, 0]


def test_errors_of_an_encoding_process_arrive_as_they_were(tmp_path: Path) -> None:
    vocabulary = {"end": 0, "a": 1, "?": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "w.json"
    path.write_text(backend.to_str())
    put(tmp_path / "in/web-0.jsonl", lines(["a", "the end"]))
    options = {"tokenizer": path, "separator": "end", "valid_fraction": 0, "workers": 2}
    with pytest.raises(TokenizerError, match=r"holds the separator 'end'.*--separator"):
        pack([tmp_path / "in"], tmp_path / "out", **options)  # type: ignore[arg-type]
    differs = _error(describe_error(EngineDiffers(3, "other ids")))
    assert isinstance(differs, EngineDiffers)
    assert (differs.number, differs.words) == (3, "other ids")
    defect = _error(describe_error(ZeroDivisionError("in a worker")))
    assert isinstance(defect, RuntimeError)
    assert "ZeroDivisionError: in a worker" in str(defect)


def test_an_unknown_engine_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown engine 'fats' .*did you mean 'fast'"):
        pack([tmp_path], tmp_path / "out", engine="fats")
