"""Documents per domain: every reader gives the same texts, and nothing is left out unsaid."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from regmix.data.packing.corpus import (
    Source,
    Tally,
    choose_sides,
    find_sources,
    read_documents,
    side_of,
)
from regmix.data.packing.readers import Meter, _chunks
from regmix.errors import ConfigError, CorpusError, StorageError

TEXTS = ["first\nwith lines", "zweites Dokument: äöü", "3 \U0001f600", "  kept as it is \r\n"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(path: Path, *, text_field: str = "text", strict: bool = False) -> tuple[list[str], Tally]:
    tally = Tally()
    texts = [
        text
        for source in find_sources([path]).files
        for text, _ in read_documents(source, tally, text_field=text_field, strict=strict)
    ]
    return texts, tally


def domains_of(root: Path, **options: object) -> dict[str, str]:
    files: tuple[Source, ...] = find_sources([root], **options).files  # type: ignore[arg-type]
    return {source.name: source.domain for source in files}


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("web-0.jsonl", bytes),
        ("web-0.json", bytes),
        ("web-0.jsonl.gz", gzip.compress),
        ("web-0.jsonl.zst", zstandard.compress),
    ],
)
def test_line_files_give_the_same_documents_in_order(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    texts, tally = read(put(tmp_path / name, compress(lines(TEXTS))))
    assert texts == TEXTS
    assert (tally.malformed, tally.empty) == (0, 0)
    assert tally.num_bytes == (tmp_path / name).stat().st_size


def test_parquet_gives_the_same_documents_in_order(tmp_path: Path) -> None:
    many = [f"{text} {number}" for number in range(300) for text in TEXTS]
    table = pyarrow.table({"text": many, "url": ["x"] * len(many)})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet", row_group_size=500)
    assert read(tmp_path / "web.parquet")[0] == many


@pytest.mark.parametrize(
    ("ending", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_a_text_file_is_one_document(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    text = "one\n\ntwo\n" * 40_000  # more than one chunk
    path = put(tmp_path / f"book-1.txt{ending}", compress(text.encode()))
    assert read(path)[0] == [text]


def test_frames_and_members_that_follow_each_other_are_all_read(tmp_path: Path) -> None:
    first, second = lines(TEXTS[:2]), lines(TEXTS[2:])
    put(tmp_path / "a-0.jsonl.zst", zstandard.compress(first) + zstandard.compress(second))
    put(tmp_path / "b-0.jsonl.gz", gzip.compress(first) + gzip.compress(second))
    assert read(tmp_path)[0] == TEXTS + TEXTS


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_a_compressed_file_cut_short_is_an_error(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(lines([f"{text} {number}" for number in range(50) for text in TEXTS]))
    path = put(tmp_path / f"web-0.jsonl{ending}", whole[: len(whole) * 2 // 3])
    with pytest.raises(CorpusError, match=r"web-0.*domain 'web'.*cut short"):
        read(path)


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"web\.parquet.*damaged"):
        read(put(tmp_path / "web.parquet", b"PAR1 not really PAR1"))


def test_a_last_line_without_newline_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + lines(TEXTS).rstrip(b"\n")
    assert read(put(tmp_path / "web.jsonl", content))[0] == TEXTS


MALFORMED = [
    (b"{not json", "not JSON"),
    (b'{"title": "x"}', "no field 'text'"),
    (b'{"text": 5}', "a int, not a string"),
    (b'{"text": null}', "null"),
    (b'["text"]', "a JSON list"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_a_malformed_line_is_counted_with_its_file_and_number(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = put(tmp_path / "web-0.jsonl", lines(TEXTS[:2]) + b"\n" + line + b"\n" + lines(TEXTS[2:]))
    texts, tally = read(path)
    assert texts == TEXTS
    assert tally.malformed == 1
    assert f"{path}, line 4: " in tally.examples[0]
    assert reason in tally.examples[0]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_strict_stops_at_the_first_malformed_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = put(tmp_path / "web-0.jsonl", lines(TEXTS[:2]) + line + b"\n{worse\n")
    with pytest.raises(CorpusError, match=r"web-0\.jsonl, line 3: ") as caught:
        read(path, strict=True)
    assert reason in str(caught.value)


def test_only_the_first_twenty_malformed_lines_are_kept_but_all_are_counted(tmp_path: Path) -> None:
    _, tally = read(put(tmp_path / "web-0.jsonl", b"{\n" * 50 + lines(TEXTS)))
    assert tally.malformed == 50
    assert len(tally.examples) == 20
    assert "line 20:" in tally.examples[-1]


def test_a_text_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    texts, tally = read(put(tmp_path / "book.txt", b"one\ntwo\nthr\xff\n"))
    assert texts == []
    assert "book.txt, line 3: not UTF-8" in tally.examples[0]


def test_parquet_rows_without_text_are_malformed(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", None, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    texts, tally = read(tmp_path / "web.parquet")
    assert texts == ["a", "b"]
    assert "web.parquet, line 2:" in tally.examples[0]


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "sliced"])
def test_parquet_columns_of_any_string_type_give_the_same_texts(tmp_path: Path, kind: str) -> None:
    texts = [*TEXTS, None, "", "last"]
    column = pyarrow.array(texts, pyarrow.large_string() if kind == "large_string" else None)
    if kind == "dictionary":
        column = column.dictionary_encode()
    if kind == "sliced":
        column = pyarrow.array(["before", *texts, "after"]).slice(1, len(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "web.parquet")
    found, tally = read(tmp_path / "web.parquet")
    assert found == [*TEXTS, "last"]
    assert (tally.malformed, tally.empty) == (1, 1)
    assert "line 5: field 'text' is empty (null), not a string" in tally.examples[0]


def test_parquet_bytes_are_no_text_and_text_that_is_not_utf8_is_malformed(tmp_path: Path) -> None:
    raw = pyarrow.array([b"ok", b"caf\xe9"])
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "bytes.parquet")
    _, tally = read(tmp_path / "bytes.parquet")
    assert "a bytes, not a string" in tally.examples[0]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "web.parquet")
    found, tally = read(tmp_path / "web.parquet")
    assert found == ["ok"]
    assert "line 2: not UTF-8" in tally.examples[0]


def test_a_missing_parquet_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "web.parquet")
    with pytest.raises(CorpusError, match=r"no column 'text' \(columns: body\).*--text-field"):
        read(tmp_path / "web.parquet")


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    texts, tally = read(put(tmp_path / "web-0.jsonl", lines(["a", "", " \n\t", "b"])))
    assert texts == ["a", "b"]
    assert (tally.empty, tally.malformed) == (2, 0)


def test_the_text_field_is_chosen(tmp_path: Path) -> None:
    path = put(tmp_path / "web-0.jsonl", b'{"text": "no", "content": "yes"}\n')
    assert read(path, text_field="content")[0] == ["yes"]


def test_a_domain_is_the_file_name_up_to_its_last_dash(tmp_path: Path) -> None:
    for name in ("web-0.jsonl.zst", "web-1.jsonl", "pile-cc-0.txt", "code.parquet", "v1.5-0.json"):
        put(tmp_path / name, b"")
    put(tmp_path / "README.md", b"")
    assert set(domains_of(tmp_path).values()) == {"web", "pile-cc", "code", "v1.5"}
    assert find_sources([tmp_path]).ignored == ("README.md",)


def test_a_domain_is_the_folder_that_is_not_a_side(tmp_path: Path) -> None:
    for name in ("train/web/a.txt", "valid/web/b.txt", "code/train/c.txt"):
        put(tmp_path / name, b"")
    assert domains_of(tmp_path, domain_by="folder") == {
        "train/web/a.txt": "web",
        "valid/web/b.txt": "web",
        "code/train/c.txt": "code",
    }


def test_named_globs_choose_files_and_leave_the_others_in_the_list_of_ignored(
    tmp_path: Path,
) -> None:
    for name in ("crawl/a.txt", "crawl/deep/b.txt", "src/c.py.txt", "src/d.txt"):
        put(tmp_path / name, b"")
    globs = {"web": "crawl/*", "code": "*.py.txt"}
    assert domains_of(tmp_path, domains=globs) == {
        "crawl/a.txt": "web",
        "crawl/deep/b.txt": "web",
        "src/c.py.txt": "code",
    }
    assert find_sources([tmp_path], domains=globs).ignored == ("src/d.txt",)


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"")
    with pytest.raises(CorpusError, match=r"domain 'code': no file .* matches '\*\.py'"):
        find_sources([tmp_path], domains={"all": "*.txt", "code": "*.py"})


def test_a_file_of_two_domains_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", b"")
    with pytest.raises(CorpusError, match=r"a\.txt: belongs to the domains one and two"):
        find_sources([tmp_path], domains={"one": "*", "two": "a*"})


@pytest.mark.parametrize("name", ["../up", "a b", "", ".hidden", "a/b", "ä", "x" * 101])
def test_a_name_that_cannot_be_a_domain_is_an_error(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.txt", b"")
    with pytest.raises(CorpusError, match="cannot name a domain"):
        find_sources([tmp_path], domains={name: "*"})


def test_a_missing_input_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        find_sources([tmp_path / "none"])
    with pytest.raises(CorpusError, match="no documents in"):
        find_sources([tmp_path])


def test_a_file_that_vanishes_is_a_storage_error(tmp_path: Path) -> None:
    source = find_sources([put(tmp_path / "web-0.jsonl", lines(TEXTS))]).files[0]
    source.path.unlink()
    with pytest.raises(StorageError, match=r"web-0\.jsonl: No such file"):
        list(read_documents(source, Tally()))


def test_linked_folders_are_read_once_and_cycles_end(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/deep/web-0.jsonl", b"")
    put(tmp_path / "in/real/code-0.jsonl", b"")
    (tmp_path / "in/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/also").symlink_to(tmp_path / "in/real")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "in")
    names = [source.name for source in find_sources([tmp_path / "in"]).files]
    assert names == ["real/code-0.jsonl", "more/deep/web-0.jsonl"]


def test_a_link_to_a_document_that_is_gone_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "web-0.jsonl", b"")
    (tmp_path / "web-1.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(StorageError, match=r"web-1\.jsonl: No such file"):
        find_sources([tmp_path])


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_a_file_that_grows_a_thousandfold_is_decompressed_in_bounded_steps(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = put(tmp_path / f"book.txt{ending}", compress(bytes(64 << 20)))
    sizes = [len(chunk) for chunk in _chunks(find_sources([path]).files[0], Meter())]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 32 << 20


def test_hidden_files_links_to_the_same_file_and_excluded_folders_are_passed_over(
    tmp_path: Path,
) -> None:
    put(tmp_path / "web-0.jsonl", b"")
    put(tmp_path / ".cache/web-1.jsonl", b"")
    put(tmp_path / "shards/tokenizer.json", b"")
    found = find_sources([tmp_path, tmp_path / "web-0.jsonl"], exclude=tmp_path / "shards")
    assert [source.name for source in found.files] == ["web-0.jsonl"]


@pytest.mark.parametrize("folder", ["valid", "val", "validation"])
def test_a_folder_of_validation_documents_decides_the_sides(tmp_path: Path, folder: str) -> None:
    for name in ("train/web-0.jsonl", f"{folder}/web-0.jsonl", "web-1.jsonl"):
        put(tmp_path / name, b"")
    files, fraction = choose_sides(find_sources([tmp_path]).files, None)
    assert fraction is None
    sides = {source.name: source.side for source in files}
    assert sides == {
        "train/web-0.jsonl": "train",
        f"{folder}/web-0.jsonl": "valid",
        "web-1.jsonl": "train",
    }
    with pytest.raises(CorpusError, match="--valid-fraction has no use"):
        choose_sides(files, 0.1)


def test_without_such_a_folder_hashes_decide(tmp_path: Path) -> None:
    put(tmp_path / "train/web-0.jsonl", b"")
    files, fraction = choose_sides(find_sources([tmp_path]).files, 0.25)
    assert (files[0].side, fraction) == (None, 0.25)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_outside_its_range_is_an_error(tmp_path: Path, fraction: float) -> None:
    put(tmp_path / "web-0.jsonl", b"")
    with pytest.raises(ConfigError, match="validation fraction"):
        choose_sides(find_sources([tmp_path]).files, fraction)


def test_the_hash_sends_the_asked_share_to_validation_and_equal_texts_to_one_side() -> None:
    texts = [f"document {number}".encode() for number in range(4000)]
    sides = [side_of(text, 0.2) for text in texts]
    # The share of 4000 draws at 0.2 has a standard deviation of 0.0063.
    assert sides.count("valid") / 4000 == pytest.approx(0.2, abs=0.032)
    assert sides == [side_of(bytes(text), 0.2) for text in texts]
    larger = [side_of(text, 0.3) for text in texts]
    assert all(big == "valid" for small, big in zip(sides, larger, strict=True) if small == "valid")
