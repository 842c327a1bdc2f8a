"""Packing: no token is lost, the bytes do not depend on the workers, and bad input says so."""

from __future__ import annotations

import errno
import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from click.testing import CliRunner
from pack_corpora import content, lines, put, texts

from regmix.cli.pack import command
from regmix.data import writer
from regmix.data.packing import pack as pack_module
from regmix.data.packing import plan as pack_plan
from regmix.data.packing import readers
from regmix.data.packing.corpus import Tally, find_sources, read_documents, side_of
from regmix.data.packing.pack import pack
from regmix.data.shards import ShardSet
from regmix.data.tokenizer import LARGEST_BPE, SMALLEST_BPE
from regmix.errors import ConfigError, CorpusError, ShardError, StorageError, TokenizerError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three domains in folders train and valid, in three formats."""
    root = tmp_path / "corpus"
    for side, num in (("train", 60), ("valid", 8)):
        put(root / side / "web-0.jsonl.zst", zstandard.compress(lines(texts(f"web {side}", num))))
        put(root / side / "web-1.jsonl", lines(texts(f"more {side}", num)))
        put(root / side / "code-0.jsonl.gz", gzip.compress(lines(texts(f"code {side}", num))))
        table = pyarrow.table({"text": texts(f"book {side}", num)})
        pyarrow.parquet.write_table(table, root / side / "books-0.parquet")
    return root


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)


def expected(corpus: Path, tokenizer: Path, side: str, domain: str) -> tuple[list[int], int, int]:
    """Return (tokens, documents, bytes) as the `tokenizers` library gives them."""
    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    library.encode_special_tokens = True
    ids: list[int] = []
    count = num_bytes = 0
    for source in find_sources([corpus]).files:
        if (source.side, source.domain) == (side, domain):
            for text, utf8 in read_documents(source, Tally()):
                ids += library.encode(text, add_special_tokens=False).ids
                ids.append(library.token_to_id("<|endoftext|>"))
                count, num_bytes = count + 1, num_bytes + len(utf8)
    return ids, count, num_bytes


@pytest.mark.usefixtures("small_batches")
def test_every_token_of_every_document_is_in_the_shards_and_counted(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    report = pack([corpus], out, train_bpe=300, workers=2)
    shards = ShardSet.open(out)
    assert shards.checksum == report.checksum
    for side in ("train", "valid"):
        assert shards.domains(side) == ("books", "code", "web")
        for domain in shards.domains(side):
            ids, count, num_bytes = expected(corpus, shards.tokenizer_path, side, domain)
            assert np.concatenate(shards.arrays(side, domain)).tolist() == ids
            stats = shards.stats(side, domain)
            assert (stats.tokens, stats.documents, stats.utf8_bytes) == (len(ids), count, num_bytes)
            starts = shards.document_offsets(side, domain)
            ends = [place + 1 for place, token in enumerate(ids) if token == shards.separator_id]
            assert starts.tolist() == [0, *ends[:-1]]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", [2, 5])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    corpus: Path, tmp_path: Path, workers: int
) -> None:
    pack([corpus], tmp_path / "one", train_bpe=300, workers=1)
    pack([corpus], tmp_path / "many", train_bpe=300, workers=workers)
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_files_of_limited_size_hold_the_same_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack([corpus], tmp_path / "one", train_bpe=300)
    monkeypatch.setattr(writer, "FILE_BYTES", 4000)
    pack([corpus], tmp_path / "many", train_bpe=300)
    one = ShardSet.open(tmp_path / "one").arrays("train", "web")
    many = ShardSet.open(tmp_path / "many").arrays("train", "web")
    assert len(one) == 1 < len(many)
    np.testing.assert_array_equal(one[0], np.concatenate(many))


def test_a_large_vocabulary_is_stored_in_32_bits(corpus: Path, tmp_path: Path) -> None:
    pack([corpus], tmp_path / "small", train_bpe=300)
    table = json.loads((tmp_path / "small/tokenizer.json").read_text())
    table["model"]["vocab"] |= {f"<unused {number}>": number for number in range(300, 70_000)}
    (tmp_path / "large.json").write_text(json.dumps(table))
    report = pack([corpus], tmp_path / "large", tokenizer=tmp_path / "large.json")
    assert report.dtype == "uint32"
    np.testing.assert_array_equal(
        ShardSet.open(tmp_path / "large").arrays("train", "web")[0],
        ShardSet.open(tmp_path / "small").arrays("train", "web")[0],
    )


def test_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    once = texts("web", 100)
    put(tmp_path / "in/web-0.jsonl", lines(once))
    put(tmp_path / "in/web-1.jsonl", lines(list(reversed(once))))
    pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0.3)
    shards = ShardSet.open(tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(shards.tokenizer_path))
    sides = {}
    for side in ("train", "valid"):
        parts = np.split(
            shards.arrays(side, "web")[0], shards.document_offsets(side, "web")[1:].astype(int)
        )
        sides[side] = sorted(library.decode(part[:-1].tolist()) for part in parts)
        wanted = [text for text in once if side_of(text.encode(), 0.3) == side]
        assert sides[side] == sorted(wanted * 2)
    assert not set(sides["train"]) & set(sides["valid"])


def test_what_is_left_out_is_counted_per_domain_and_named_by_line(tmp_path: Path) -> None:
    rows = lines(texts("web", 20))
    put(tmp_path / "in/web-0.jsonl", rows + b'{"nothing": 1}\n' + lines(["", "last"]))
    put(tmp_path / "in/code-0.jsonl", lines(texts("code", 20)))
    report = pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    web = ShardSet.open(tmp_path / "out").stats("train", "web")
    assert (web.documents, web.malformed, web.empty) == (21, 1, 1)
    assert report.splits["train"]["code"].malformed == 0
    (example,) = report.dropped_examples
    assert "web-0.jsonl, line 21: no field 'text'" in example


def unknown_words(path: Path) -> Path:
    """A tokenizer that has tokens for time and person, and drops all that is not ASCII."""
    vocabulary = {"<|endoftext|>": 0, "time": 1, "person": 2, "?": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("[^ -~]"), "")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path.write_text(backend.to_str())
    return path


def test_documents_without_a_token_are_left_out_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "in/web-0.jsonl", lines(["time person", "東京", "x"]))
    put(tmp_path / "in/code-0.jsonl", lines(["time"]))
    path = unknown_words(tmp_path / "t.json")
    report = pack([tmp_path / "in"], tmp_path / "out", tokenizer=path, valid_fraction=0)
    shards = ShardSet.open(tmp_path / "out")
    assert shards.arrays("train", "web")[0].tolist() == [1, 2, 0, 3, 0]
    web = shards.stats("train", "web")
    assert (web.documents, web.tokens, web.utf8_bytes, web.no_token) == (2, 5, 12, 1)
    assert report.dropped_examples == (
        f"{tmp_path}/in/web-0.jsonl, line 2: no token in the document '東京'",
    )


@pytest.mark.parametrize(("strict", "message"), [(True, "no token in"), (False, "no documents to")])
def test_a_domain_without_a_token_is_an_error(tmp_path: Path, strict: bool, message: str) -> None:
    put(tmp_path / "in/web-0.jsonl", lines(["東京"]))
    path = unknown_words(tmp_path / "t.json")
    with pytest.raises(CorpusError, match=f"domain 'web'.*{message}|{message}.*東京"):
        pack([tmp_path / "in"], tmp_path / "out", tokenizer=path, valid_fraction=0, strict=strict)


def test_a_document_that_spells_out_the_separator_stays_one_document(tmp_path: Path) -> None:
    put(tmp_path / "in/web-0.jsonl", lines(["a<|endoftext|>b", "c"]))
    pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    shards = ShardSet.open(tmp_path / "out")
    (ids,) = shards.arrays("train", "web")
    assert (ids == shards.separator_id).sum() == shards.stats("train", "web").documents == 2


def test_strict_stops_and_leaves_no_corpus(tmp_path: Path) -> None:
    put(tmp_path / "in/web-0.jsonl", lines(texts("web", 20)) + b"{bad\n")
    with pytest.raises(CorpusError, match=r"web-0\.jsonl, line 21: not JSON"):
        pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, strict=True)
    with pytest.raises(ShardError):
        ShardSet.open(tmp_path / "out")


@pytest.mark.parametrize("rows", [b"", b"{bad\n" * 3, lines(["", " "])])
@pytest.mark.parametrize("side", ["train", "valid"])
def test_an_empty_domain_is_an_error(corpus: Path, tmp_path: Path, rows: bytes, side: str) -> None:
    put(corpus / side / "legal-0.jsonl", rows)
    with pytest.raises(CorpusError, match=f"domain 'legal' has no documents to {side} on"):
        pack([corpus], tmp_path / "out", train_bpe=300)


def test_a_domain_too_small_to_be_split_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "in/web-0.jsonl", lines(texts("web", 3)))
    with pytest.raises(CorpusError, match=r"none fell to the valid side.*--valid-fraction"):
        pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0.001)


def test_validation_documents_alone_cannot_train_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no training documents to train a tokenizer on"):
        pack([corpus / "valid"], tmp_path / "out", train_bpe=300)


def test_a_target_may_have_no_training_data(corpus: Path, tmp_path: Path) -> None:
    put(corpus / "valid" / "target-0.jsonl", lines(texts("target", 5)))
    pack([corpus], tmp_path / "out", train_bpe=300)
    shards = ShardSet.open(tmp_path / "out")
    assert "target" in shards.domains("valid")
    assert "target" not in shards.domains("train")


def test_the_tokenizer_is_trained_on_training_documents_of_every_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for domain in ("aa", "bb"):
        rows = [f"{domain} {number} " + "word " * 10 for number in range(400)]
        put(tmp_path / f"in/{domain}-0.jsonl", lines(rows))
    seen: list[str] = []
    original = pack_module.train_bpe_on

    def spy(sample: Iterator[str], vocab_size: int, **options: Any) -> Any:
        seen.extend(sample)
        return original(seen, vocab_size, **options)

    monkeypatch.setattr(pack_module, "train_bpe_on", spy)
    monkeypatch.setattr(pack_module, "SAMPLE_BYTES", 8000)
    pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0.3)
    whole = [text for text in seen if text.count("word ") == 10]  # the last ones are cut
    assert len(whole) > 100
    assert {side_of(text.encode(), 0.3) for text in whole} == {"train"}
    for domain in ("aa", "bb"):
        size = sum(len(text) for text in seen if text.startswith(domain))
        assert 3900 < size <= 4000


def test_a_complete_corpus_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack([corpus], out, train_bpe=300)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = pack([corpus], out, train_bpe=300)
    assert (first.already_complete, again.already_complete) == (False, True)
    assert again.checksum == first.checksum
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_bpe": 320}, "tokenizer was bpe 300, now bpe 320"),
        ({"train_bpe": 300, "text_field": "content"}, "text_field was text, now content"),
        ({"train_bpe": 300, "domain_by": "folder"}, "source file train/books-0.parquet differs"),
    ],
)
def test_another_corpus_is_not_overwritten_without_force(
    corpus: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    first = pack([corpus], tmp_path / "out", train_bpe=300)
    with pytest.raises(ShardError, match=f"{message}.*--force"):
        pack([corpus], tmp_path / "out", **options)
    assert ShardSet.open(tmp_path / "out").checksum == first.checksum


def test_changed_documents_of_the_same_size_are_noticed(corpus: Path, tmp_path: Path) -> None:
    pack([corpus], tmp_path / "out", train_bpe=300)
    path = corpus / "train/web-1.jsonl"
    path.write_bytes(path.read_bytes().replace(b"year", b"dear"))
    with pytest.raises(ShardError, match=r"source file train/web-1\.jsonl differs"):
        pack([corpus], tmp_path / "out", train_bpe=300)


def test_a_change_is_noticed_where_two_inputs_hold_files_of_one_name(tmp_path: Path) -> None:
    for folder in "ab":
        put(tmp_path / folder / "web-0.jsonl", lines(texts(folder, 40)))
    inputs = [tmp_path / "a", tmp_path / "b"]
    pack(inputs, tmp_path / "out", train_bpe=300)
    assert pack(inputs, tmp_path / "out", train_bpe=300).already_complete
    for folder in "ab":
        path = tmp_path / folder / "web-0.jsonl"
        before = path.read_bytes()
        path.write_bytes(before.replace(b"year", b"dear"))
        with pytest.raises(ShardError, match=r"source file web-0\.jsonl differs"):
            pack(inputs, tmp_path / "out", train_bpe=300)
        path.write_bytes(before)


def test_force_keeps_the_corpus_until_the_new_one_is_complete(corpus: Path, tmp_path: Path) -> None:
    first = pack([corpus], tmp_path / "out", train_bpe=300)
    whole = (corpus / "train/web-0.jsonl.zst").read_bytes()
    for broken in (whole[: len(whole) // 2], zstandard.compress(b"{bad\n")):
        put(corpus / "train/web-0.jsonl.zst", broken)
        with pytest.raises(CorpusError, match=r"web-0\.jsonl"):
            pack([corpus], tmp_path / "out", train_bpe=310, force=True, strict=True)
        shards = ShardSet.open(tmp_path / "out")
        assert shards.checksum == first.checksum
        assert shards.arrays("train", "web")
    put(corpus / "train/web-0.jsonl.zst", whole)
    pack([corpus], tmp_path / "out", train_bpe=310, force=True)
    pack([corpus], tmp_path / "fresh", train_bpe=310)
    assert (
        content(tmp_path / "out")["train/web-0.tokens"]
        == (content(tmp_path / "fresh")["train/web-0.tokens"])
    )
    assert not (tmp_path / "out/.replacement").exists()


def test_force_replaces_a_corpus_and_removes_its_other_files(corpus: Path, tmp_path: Path) -> None:
    pack([corpus], tmp_path / "out", train_bpe=300)
    for side in ("train", "valid"):
        (corpus / side / "books-0.parquet").unlink()
    pack([corpus], tmp_path / "out", train_bpe=310, force=True)
    pack([corpus], tmp_path / "fresh", train_bpe=310)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_too_little_space_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan, "free_bytes", lambda path: 1000)
    with pytest.raises(StorageError, match=r"the shards take about .* kB.*; 1\.0 kB are free"):
        pack([corpus], tmp_path / "out", train_bpe=300)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_is_an_error_that_leaves_no_half_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def write(self, raw: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    original = writer.ShardWriter.__enter__

    def enter(self: writer.ShardWriter) -> writer.ShardWriter:
        original(self)
        self._stream = FullDisk(self._stream)
        return self

    monkeypatch.setattr(writer.ShardWriter, "__enter__", enter)
    with pytest.raises(StorageError, match=r"books-0\.tokens: No space left on device\. Free some"):
        pack([corpus], tmp_path / "out", train_bpe=300)
    assert not list((tmp_path / "out").glob("*/*tokens*"))


def test_a_folder_that_cannot_be_written_is_an_error(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="file/shards: Not a directory"):
        pack([corpus], tmp_path / "file" / "shards", train_bpe=300)


def test_a_corrupt_tokenizer_is_an_error_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"t\.json: not a Hugging Face tokenizer"):
        pack([corpus], tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_loaded_or_trained_not_both(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both loaded and trained"):
        pack([corpus], tmp_path / "out", tokenizer="t.json", train_bpe=300)


def test_shards_inside_the_corpus_are_not_read_as_documents(corpus: Path) -> None:
    pack([corpus], corpus / "shards", train_bpe=300)
    assert pack([corpus], corpus / "shards", train_bpe=300).already_complete


def test_a_corpus_may_be_moved_before_it_is_packed_again(corpus: Path, tmp_path: Path) -> None:
    first = pack([corpus], tmp_path / "one", train_bpe=300)
    shutil.move(corpus, tmp_path / "elsewhere")
    assert pack([tmp_path / "elsewhere"], tmp_path / "two", train_bpe=300).checksum == (
        first.checksum
    )


def test_the_command_shows_cost_and_counts_and_the_next_command(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [str(corpus), "--out", str(out), "--train-bpe", "300"]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "Packing 8 files, 3 domains: reads " in shown.output
    documents = ShardSet.open(out).stats("train", "web").documents
    assert any(
        "web" in line and "train" in line and str(documents) in line
        for line in shown.output.splitlines()
    )
    assert f"Next: regmix-fast mixtures STUDY --shards {out} --num 64" in shown.output
    again = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert "Already complete" in again.output


def test_the_command_answers_in_json(corpus: Path, tmp_path: Path) -> None:
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--train-bpe", "300", "--json"]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False)
    answer = json.loads(shown.stdout)
    shards = ShardSet.open(tmp_path / "out")
    assert answer["checksum"] == shards.checksum
    assert answer["splits"]["valid"]["code"]["tokens"] == shards.stats("valid", "code").tokens


@pytest.mark.parametrize("vocab_size", [SMALLEST_BPE - 1, LARGEST_BPE + 1, 10**20])
def test_the_command_refuses_a_vocabulary_that_cannot_be_trained(
    corpus: Path, tmp_path: Path, vocab_size: int
) -> None:
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--train-bpe", str(vocab_size)]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 2
    assert f"{SMALLEST_BPE}<=x<={LARGEST_BPE}" in shown.output


@pytest.mark.parametrize("pair", ["web", "=x", "web="])
def test_the_command_refuses_a_domain_without_glob(corpus: Path, tmp_path: Path, pair: str) -> None:
    arguments = [str(corpus), "--out", str(tmp_path / "out"), "--domain", pair]
    shown = CliRunner().invoke(command, arguments)
    assert shown.exit_code == 2
    assert "write NAME=GLOB" in shown.output
