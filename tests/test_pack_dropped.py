"""What is left out is counted by reason, listed with its line, and the books balance."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_corpora import content, lines, put, texts

from regmix.cli.pack import command
from regmix.data.packing import assembly, encoder, units
from regmix.data.packing.dedup import SeenDocuments
from regmix.data.packing.pack import PackReport, pack
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, CorpusError

REASONS = ("malformed", "empty", "too_long", "no_token", "duplicate")


def counts(report: PackReport, domain: str) -> dict[str, int]:
    """What became of a domain's records, over both splits."""
    parts = [split[domain] for split in report.splits.values() if domain in split]
    return {name: sum(getattr(p, name) for p in parts) for name in ("documents", *REASONS)}


def listed(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def assert_balanced(report: PackReport) -> None:
    domains = {domain for split in report.splits.values() for domain in split}
    assert report.records == sum(sum(counts(report, domain).values()) for domain in domains)


ODD_FILES = [
    # name, bytes, documents, malformed, empty, words of the first record that is left out
    ("latin-0.jsonl", '{"text": "café"}\n'.encode("latin-1") * 2, 0, 2, 0, "not UTF-8"),
    ("sixteen-0.jsonl", '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"), 0, 3, 0, "UTF-16"),
    ("sixteenbe-0.jsonl", b"\xfe\xff" + '{"text": "a"}\n'.encode("utf-16-be"), 0, 1, 0, "UTF-16"),
    ("unmarked-0.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), 0, 2, 0, "not JSON"),
    ("latin-0.txt", "café\n".encode("latin-1"), 0, 1, 0, "not UTF-8"),
    ("sixteen-0.txt", "plain text\n".encode("utf-16"), 0, 1, 0, "UTF-16"),
    ("unmarked-0.txt", "plain text\n".encode("utf-16-le"), 0, 1, 0, "every second byte is NUL"),
    ("thirtytwo-0.txt", "plain text\n".encode("utf-32"), 0, 1, 0, "UTF-32"),
    ("mark-0.txt", b"\xef\xbb\xbfwith a mark", 1, 0, 0, ""),
    ("windows-0.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', 2, 0, 0, ""),
    ("nul-0.jsonl", b'{"text": "a\\u0000b"}\n', 1, 0, 0, ""),
    ("half-0.jsonl", b'{"text": "\\ud83d"}\n{"text": "\\ude00\\ud83d"}\n', 0, 2, 0, "surrogate"),
    ("elsewhere-0.jsonl", b'{"x": "\\ud83d", "text": "a"}\n', 1, 0, 0, ""),
    ("pair-0.jsonl", b'{"text": "\\ud83d\\ude00"}\n', 1, 0, 0, ""),
    ("infinite-0.jsonl", b'{"text": "a", "score": NaN}\n', 1, 0, 0, ""),
    ("blank-0.jsonl", b'{"text": "a"}\n\n \t\r\n{"text": " \\u2003"}\n', 1, 0, 1, ""),
    ("twice-0.jsonl", b'{"text": "a"}{"text": "b"}\n', 0, 1, 0, "not JSON"),
]


@pytest.mark.parametrize(("name", "raw", "documents", "malformed", "empty", "words"), ODD_FILES)
def test_another_encoding_is_never_mangled_in_silence(
    tmp_path: Path, name: str, raw: bytes, documents: int, malformed: int, empty: int, words: str
) -> None:
    domain = name.partition("-")[0]
    put(tmp_path / "in" / name, raw)
    put(tmp_path / f"in/{domain}-9.jsonl", lines(["a text that is there"]))
    report = pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    found = counts(report, domain)
    assert (found["documents"], found["malformed"], found["empty"]) == (
        documents + 1,
        malformed,
        empty,
    )
    assert_balanced(report)
    if words:
        assert words in report.dropped_examples[0]
        assert f"{name}, line 1: " in report.dropped_examples[0]


def test_texts_with_odd_signs_come_back_as_they_were(tmp_path: Path) -> None:
    odd = ["a\x00b", "windows\r\nlines\r", "\ufeffmark", "e\u0301", "\U0001f600\ud7ff", "\x1c"]
    put(tmp_path / "in/web-0.jsonl", lines(odd))
    pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    import tokenizers

    shards = ShardSet.open(tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(shards.tokenizer_path))
    parts = np.split(
        shards.arrays("train", "web")[0], shards.document_offsets("train", "web")[1:].astype(int)
    )
    kept = [text for text in odd if not text.isspace()]
    assert [library.decode(part[:-1].tolist()) for part in parts] == kept


def test_records_above_the_limit_are_left_out_with_their_line_in_every_format(
    tmp_path: Path,
) -> None:
    long = "long " * 300_000
    put(tmp_path / "in/a-0.jsonl", lines(["one", long, "two"]))
    put(tmp_path / "in/b-0.jsonl.gz", gzip.compress(lines(["one", "two", long])))
    put(tmp_path / "in/c-0.txt", long.encode())
    put(tmp_path / "in/c-1.txt", b"short")
    table = pyarrow.table({"text": ["one", long, "two"]})
    pyarrow.parquet.write_table(table, tmp_path / "in/d-0.parquet")
    report = pack(
        [tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0, max_document_mb=1
    )
    places = {(row["file"], row["line"]) for row in listed(tmp_path / "out")}
    assert places == {("a-0.jsonl", 2), ("b-0.jsonl.gz", 3), ("c-0.txt", 1), ("d-0.parquet", 2)}
    for domain in "abcd":
        assert counts(report, domain)["too_long"] == 1
    assert "too long: 1.5 MB, the limit is 1.0 MB" in report.dropped_examples[0]
    assert_balanced(report)
    with pytest.raises(CorpusError, match=r"a-0\.jsonl, line 2: too long"):
        pack([tmp_path / "in"], tmp_path / "o", train_bpe=300, max_document_mb=1, strict=True)


def test_one_endless_word_is_too_long_and_not_cut(tmp_path: Path) -> None:
    put(tmp_path / "in/a-0.txt", b"x" * (5 << 20))
    put(tmp_path / "in/a-1.txt", b"word " * (1 << 20))
    report = pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    assert counts(report, "a")["too_long"] == 1
    assert "without a place to cut" in report.dropped_examples[0]


def test_the_list_is_bounded_and_the_counts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (assembly, encoder, units):
        monkeypatch.setattr(module, "MAX_LISTED", 7)
    put(tmp_path / "in/a-0.jsonl", b"{\n" * 5 + lines(["x", ""]) + b"{\n" * 50)
    put(tmp_path / "in/b-0.jsonl", b"[]\n" + lines(["x"]))
    report = pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    assert counts(report, "a")["malformed"] == 55
    rows = listed(tmp_path / "out")
    assert [row["line"] for row in rows if row["domain"] == "a"] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert rows[-1] == {
        "file": "b-0.jsonl",
        "line": 1,
        "domain": "b",
        "split": "train",
        "reason": "malformed",
        "words": "a JSON list, not an object",
    }


def test_nothing_left_out_leaves_no_list(tmp_path: Path) -> None:
    put(tmp_path / "in/a-0.jsonl", lines(["x"]))
    report = pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    assert report.dropped_list is None
    assert not (tmp_path / "out/dropped.jsonl").exists()


def test_any_mixture_of_records_is_accounted_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = st.sampled_from(
        [b"{bad", b"", b" ", b'{"text": ""}', b'{"text": "a"}', b'{"text": "b"}', b"\xff", b"5"]
    )

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.lists(kinds, max_size=30), min_size=1, max_size=3), st.booleans())
    def holds(files: list[list[bytes]], dedup: bool) -> None:
        root = tmp_path_factory.mktemp("books")
        for number, rows in enumerate(files):
            put(root / f"in/a-{number}.jsonl", b"\n".join(rows))
        put(root / "in/a-9.jsonl", lines(["a", "always"]))
        report = pack([root / "in"], root / "out", train_bpe=300, valid_fraction=0, dedup=dedup)
        everything = [row for rows in files for row in rows if row.strip()]
        good = [row for row in everything if row.startswith(b'{"text": ') and row[-3:] != b'""}']
        found = counts(report, "a")
        assert report.records == len(everything) + 2 == sum(found.values())
        assert found["empty"] == everything.count(b'{"text": ""}')
        assert found["documents"] + found["duplicate"] == len(good) + 2
        assert found["documents"] == (
            len({b'{"text": "a"}', *good}) + 1 if dedup else len(good) + 2
        )

    holds()


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Two domains with documents in common, also with validation files."""
    common, valid = texts("common", 30), texts("valid", 10)
    put(tmp_path / "in/train/a-0.jsonl", lines([*texts("a", 20), *common, *valid[:5]]))
    put(tmp_path / "in/train/b-0.jsonl", lines([*common[:10], *texts("b", 20), *common[5:15]]))
    put(tmp_path / "in/valid/a-0.jsonl", lines(valid[:2]))
    put(tmp_path / "in/valid/b-0.jsonl", lines([*valid, valid[3]]))
    return tmp_path / "in"


def test_of_duplicates_the_first_stays_and_validation_comes_first(
    repeated: Path, tmp_path: Path
) -> None:
    report = pack([repeated], tmp_path / "out", train_bpe=300, dedup=True)
    kept = {
        (split, domain): (stats.documents, stats.duplicate)
        for split, domains in report.splits.items()
        for domain, stats in domains.items()
    }
    assert kept == {
        ("valid", "a"): (2, 0),
        ("valid", "b"): (8, 3),
        ("train", "a"): (50, 5),
        ("train", "b"): (20, 20),
    }
    assert_balanced(report)
    rows = [row for row in listed(tmp_path / "out") if row["split"] == "train"]
    assert [row["line"] for row in rows if row["domain"] == "a"] == [51, 52, 53, 54, 55]
    assert {row["reason"] for row in rows} == {"duplicate"}


@pytest.mark.parametrize("workers", [1, 3])
def test_deduplication_does_not_depend_on_the_number_of_workers(
    repeated: Path, tmp_path: Path, workers: int
) -> None:
    pack([repeated], tmp_path / "one", train_bpe=300, dedup=True)
    pack([repeated], tmp_path / "other", train_bpe=300, dedup=True, workers=workers)
    assert content(tmp_path / "one") == content(tmp_path / "other")


def test_deduplication_is_a_setting_of_the_corpus(repeated: Path, tmp_path: Path) -> None:
    pack([repeated], tmp_path / "out", train_bpe=300)
    from regmix.errors import ShardError

    with pytest.raises(ShardError, match="dedup was false, now true"):
        pack([repeated], tmp_path / "out", train_bpe=300, dedup=True)


def test_the_table_of_documents_agrees_with_a_set() -> None:
    draw = random.Random(3)
    seen, known = SeenDocuments(slots=4), set[tuple[int, int]]()
    for _ in range(60):
        # Few values, zeros among them, and neighbours that meet in the table.
        rows = [
            (draw.choice((0, 1, 2, 64, 1 << 63)), draw.randrange(40))
            for _ in range(draw.randrange(50))
        ]
        fresh = seen.add(np.array(rows, np.uint64).reshape(-1, 2))
        for row, new in zip(rows, fresh.tolist(), strict=True):
            row = (0, 1) if row == (0, 0) else row  # both mark the same slot
            assert new == (row not in known)
            known.add(row)
    assert seen.num == len(known)
    assert seen.num_bytes <= 16 * 4 * len(known) / 0.6


@pytest.mark.parametrize("limit", [0, -1, 2001])
def test_a_limit_that_cannot_be_is_an_error(tmp_path: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"a limit of {limit} MB"):
        pack([tmp_path], tmp_path / "out", max_document_mb=limit)


def test_the_command_says_what_was_left_out_and_that_the_books_balance(tmp_path: Path) -> None:
    put(tmp_path / "in/a-0.jsonl", lines(["x", "x", ""]) + b"{bad\n")
    arguments = [str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--train-bpe", "300"]
    arguments += ["--dedup", "--valid-fraction", "0"]
    shown = CliRunner().invoke(command, arguments, catch_exceptions=False).output
    assert "Records: 4 read = 1 packed + 3 left out" in shown
    assert "(1 malformed, 1 without text, 1 duplicates)" in shown
    assert "a-0.jsonl, line 4: not JSON" in shown
    assert "dropped.jsonl" in shown
    assert "compared with tokenizers, no difference: " in shown
