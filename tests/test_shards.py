"""Shards: what is written is read back, and no damage passes: cuts at open, bits on first touch."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from regmix.data import writer as writer_module
from regmix.data.manifest import MANIFEST, MANIFEST_FORMAT, VERSION, Manifest, TokenizerRecord
from regmix.data.shards import (
    DomainWriter,
    PackedFile,
    ShardSet,
    ShardWriter,
    dtype_for,
    write_manifest,
)
from regmix.errors import ShardError, StorageError

HEADER = 4096


def documents(seed: int, num: int, vocab_size: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return [draw.integers(0, vocab_size, draw.integers(1, 400)).astype(dtype) for _ in range(num)]


def empty_manifest(folder: Path, vocab_size: int) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    return Manifest(
        format=MANIFEST_FORMAT,
        version=VERSION,
        dtype=dtype_for(vocab_size),
        tokenizer=TokenizerRecord(
            file="tokenizer.json",
            xxh3=xxhash.xxh3_64_hexdigest(b"{}"),
            vocab_size=vocab_size,
            separator="<|endoftext|>",
            separator_id=0,
        ),
    )


def write_set(
    folder: Path, contents: dict[tuple[str, str], list[np.ndarray]], vocab_size: int = 1000
) -> str:
    manifest = empty_manifest(folder, vocab_size)
    splits: dict = {}
    for (split, domain), texts in contents.items():
        with DomainWriter(folder, manifest, split, domain) as out:
            for text in texts:
                out.write(text, np.array([len(text)]), np.array([3 * len(text)]))
        splits.setdefault(split, {})[domain] = out.stats(dropped={"malformed": 1, "empty": 2})
    return write_manifest(folder, replace(manifest, splits=splits))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, a file of a few hundred tokens each."""
    folder = tmp_path_factory.mktemp("small")
    write_set(
        folder,
        {
            ("train", "code"): documents(1, 3, 1000),
            ("train", "web"): documents(2, 4, 1000),
            ("valid", "web"): documents(3, 1, 1000),
        },
    )
    return folder


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small, tmp_path / "copy")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), (70_000, "uint32")])
def test_tokens_and_counts_are_read_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    texts = documents(0, 50, vocab_size)
    texts.append(np.array([vocab_size - 1], texts[0].dtype))
    digest = write_set(tmp_path, {("train", "web"): texts}, vocab_size)
    shards = ShardSet.open(tmp_path)
    assert (shards.dtype, shards.vocab_size, shards.checksum) == (dtype, vocab_size, digest)
    (tokens,) = shards.arrays("train", "web")
    assert tokens.dtype == np.dtype(dtype)
    assert not tokens.flags.writeable
    np.testing.assert_array_equal(tokens, np.concatenate(texts))
    starts = np.cumsum([0, *map(len, texts)])[:-1]
    np.testing.assert_array_equal(shards.document_offsets("train", "web"), starts)
    stats = shards.stats("train", "web")
    assert (stats.documents, stats.tokens) == (51, len(tokens))
    assert (stats.malformed, stats.empty) == (1, 2)
    assert stats.files[0].largest_id == vocab_size - 1
    assert shards.bytes_per_token("train", "web") == 3.0


def test_a_domain_over_several_files_is_one_sequence_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "FILE_BYTES", 2 * 1000)
    texts = documents(5, 30, 1000)
    write_set(tmp_path, {("train", "web"): texts})
    shards = ShardSet.open(tmp_path)
    arrays = shards.arrays("train", "web")
    assert len(arrays) > 3
    assert all(len(part) <= 1000 for part in arrays)
    tokens = np.concatenate(arrays)
    np.testing.assert_array_equal(tokens, np.concatenate(texts))
    for start, text in zip(shards.document_offsets("train", "web"), texts, strict=True):
        np.testing.assert_array_equal(tokens[int(start) : int(start) + len(text)], text)


def test_blocks_are_checked_over_several_mebibytes(tmp_path: Path) -> None:
    text = np.arange(1_300_000, dtype=np.uint32).astype(np.uint16) % 999
    write_set(tmp_path, {("train", "web"): [text[:700_001], text[700_001:]]})
    path = tmp_path / "train/web-0.tokens"
    assert ShardSet.open(tmp_path).verify() == path.stat().st_size
    flip(path, HEADER + 2 * (1 << 20) + 77)
    with pytest.raises(ShardError, match="block 2 of 3"):
        ShardSet.open(tmp_path).arrays("train", "web")


def test_the_manifest_and_the_files_repeat_bit_for_bit(tmp_path: Path) -> None:
    contents = {("train", "b"): documents(1, 5, 1000), ("train", "a"): documents(2, 5, 1000)}
    first = write_set(tmp_path / "one", contents)
    second = write_set(tmp_path / "two", dict(reversed(contents.items())))
    assert first == second
    for name in (MANIFEST, "train/a-0.tokens", "train/b-0.tokens"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_unknown_domains_and_splits_are_errors_that_name_the_nearest(small: Path) -> None:
    shards = ShardSet.open(small)
    assert shards.splits == ("train", "valid")
    assert shards.domains("train") == ("code", "web")
    assert shards.domains("test") == ()
    with pytest.raises(ShardError, match=r"no domain 'wbe' in split 'train' \(did you mean 'web'"):
        shards.arrays("train", "wbe")


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def cut_points() -> list[float]:
    draw = random.Random(0)
    return [0.0, *(draw.random() for _ in range(20)), 1.0]


@pytest.mark.parametrize("share", cut_points())
def test_every_truncation_is_found_at_open(copy: Path, share: float) -> None:
    path = copy / "train/web-0.tokens"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * (len(content) - 1))])
    with pytest.raises(ShardError, match=r"web-0\.tokens \(domain 'web', train\).*cut short.*pack"):
        ShardSet.open(copy)


@pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 1, -9, -8, -1])
def test_truncations_at_the_edges_are_found_at_open(copy: Path, size: int) -> None:
    path = copy / "train/code-0.tokens"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardError, match=r"domain 'code', train.*cut short"):
        ShardSet.open(copy)


def test_an_appended_byte_is_found_at_open(copy: Path) -> None:
    with open(copy / "train/web-0.tokens", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ShardError, match="cut short or changed"):
        ShardSet.open(copy)


def test_every_flipped_bit_of_the_header_is_found_at_open(copy: Path) -> None:
    path = copy / "train/web-0.tokens"
    for position in [*range(0, 260, 7), HEADER - 1]:
        flip(path, position, position % 8)
        with pytest.raises(ShardError, match="damaged or replaced"):
            ShardSet.open(copy)
        flip(path, position, position % 8)
    ShardSet.open(copy)


def test_every_flipped_bit_after_the_header_is_found_on_first_touch(copy: Path) -> None:
    path = copy / "train/web-0.tokens"
    size = path.stat().st_size
    draw = random.Random(1)
    edges = [HEADER, size - 1, size - 8, size - 9]
    for position in edges + [draw.randrange(HEADER, size) for _ in range(40)]:
        bit = draw.randrange(8)
        flip(path, position, bit)
        with pytest.raises(ShardError, match=r"domain 'web', train.*damaged"):
            ShardSet.open(copy).arrays("train", "web")
        with pytest.raises(ShardError, match=r"domain 'web', train.*damaged"):
            ShardSet.open(copy).verify()
        flip(path, position, bit)
    ShardSet.open(copy).verify()


def test_damage_of_one_domain_leaves_the_others_usable(copy: Path) -> None:
    flip(copy / "train/web-0.tokens", HEADER + 5)
    shards = ShardSet.open(copy)
    assert len(shards.arrays("train", "code")) == 1
    with pytest.raises(ShardError):
        shards.arrays("train", "web")


def test_blocks_are_checked_once_a_process_and_again_by_verify(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet.open(copy)
    shards.arrays("train", "web")
    reads = []
    monkeypatch.setattr(PackedFile, "load", lambda file: reads.append(file))
    ShardSet.open(copy).arrays("train", "web")
    assert reads == []
    ShardSet.open(copy).arrays("train", "code", verify=False)
    assert reads == []
    monkeypatch.undo()
    flip(copy / "train/code-0.tokens", HEADER)
    with pytest.raises(ShardError):
        shards.verify()


def test_every_flipped_bit_of_the_manifest_is_found(copy: Path) -> None:
    path = copy / MANIFEST
    size = path.stat().st_size
    draw = random.Random(2)
    for position in [0, size - 1] + [draw.randrange(size) for _ in range(150)]:
        bit = draw.randrange(8)
        flip(path, position, bit)
        with pytest.raises(ShardError, match=r"manifest\.json"):
            ShardSet.open(copy)
        flip(path, position, bit)


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -1, -2, -30])
def test_every_truncation_of_the_manifest_is_found(copy: Path, cut: int) -> None:
    path = copy / MANIFEST
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardError, match=r"manifest\.json.*--force"):
        ShardSet.open(copy)


def rewrite(folder: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest as its author could, with a checksum that fits."""
    table = json.loads((folder / MANIFEST).read_text())
    del table["checksum"]
    change(table)
    render = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    table["checksum"] = xxhash.xxh3_64_hexdigest(render.encode())
    (folder / MANIFEST).write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("name", ["../outside.tokens", "train/../../outside.tokens", "/etc/passwd"])
def test_a_shard_path_cannot_leave_the_folder(copy: Path, name: str) -> None:
    shutil.copy(copy / "train/web-0.tokens", copy.parent / "outside.tokens")
    rewrite(copy, lambda t: t["splits"]["train"]["web"]["files"][0].update(path=name))
    with pytest.raises(ShardError, match="leaves the folder"):
        ShardSet.open(copy)


def test_a_link_cannot_lead_out_of_the_folder(copy: Path) -> None:
    path = copy / "train/web-0.tokens"
    path.rename(copy.parent / "outside.tokens")
    path.symlink_to(copy.parent / "outside.tokens")
    with pytest.raises(ShardError, match="leaves the folder"):
        ShardSet.open(copy)


def test_a_tokenizer_path_cannot_leave_the_folder(copy: Path) -> None:
    rewrite(copy, lambda t: t["tokenizer"].update(file="../../tokenizer.json"))
    with pytest.raises(ShardError, match="leaves the folder"):
        ShardSet.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(version=99), "newer regmix-fast"),
        (lambda t: t.update(format="other"), "not a manifest of shards"),
        (lambda t: t.update(dtype="float64"), "unknown token type"),
        (lambda t: t.pop("tokenizer"), "missing setting 'tokenizer'"),
        (lambda t: t.update(extra=1), "unknown setting 'extra'"),
        (lambda t: t["splits"]["train"].update(web=3), "expected a table"),
    ],
)
def test_a_manifest_of_another_make_is_an_error(
    copy: Path, change: Callable[[dict], None], message: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(ShardError, match=message):
        ShardSet.open(copy)


def test_a_file_of_another_corpus_is_an_error(copy: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", {("train", "web"): documents(9, 4, 500)}, vocab_size=500)
    theirs = (tmp_path / "other/train/web-0.tokens").read_bytes()
    path = copy / "train/web-0.tokens"
    path.write_bytes(theirs[:HEADER] + path.read_bytes()[HEADER:])
    with pytest.raises(ShardError, match="header does not fit"):
        ShardSet.open(copy)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ShardError, match="not a token shard"):
        ShardSet.open(copy)


def test_a_missing_shard_tokenizer_or_manifest_is_an_error(copy: Path) -> None:
    (copy / "train/web-0.tokens").unlink()
    with pytest.raises(ShardError, match=r"domain 'web', train.*missing"):
        ShardSet.open(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ShardError, match="tokenizer is missing"):
        ShardSet.open(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        ShardSet.open(copy)


def test_another_tokenizer_is_an_error(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{ }")
    with pytest.raises(ShardError, match="not the tokenizer that made these shards"):
        ShardSet.open(copy)


def test_an_id_outside_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    manifest = empty_manifest(tmp_path, 1000)
    with (
        pytest.raises(ShardError, match="token id 1000 is outside the vocabulary"),
        ShardWriter(tmp_path, manifest, "train", "web", 0) as out,
    ):
        out.write(np.array([5, 1000]), np.array([2]))
    assert list((tmp_path / "train").iterdir()) == []


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    manifest = empty_manifest(tmp_path, 1000)

    def write_and_fail() -> None:
        with DomainWriter(tmp_path, manifest, "train", "web") as out:
            out.write(np.array([5, 7]), np.array([2]), np.array([2]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert list((tmp_path / "train").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    manifest = empty_manifest(tmp_path, 1000)
    (tmp_path / "train").write_text("a file, where a folder should be")
    with (
        pytest.raises(StorageError, match=r"web-0\.tokens"),
        ShardWriter(tmp_path, manifest, "train", "web", 0),
    ):
        pass


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.EACCES, "Check the permissions"),
        (errno.EIO, "The disk reports errors"),
        (errno.ENOENT, "Pack the corpus again"),
    ],
)
def test_what_packing_would_not_cure_has_a_cure_of_its_own(
    tiny_shards: ShardSet, code: int, cure: str
) -> None:
    from regmix.data.stored_file import damage_of, file_problem

    file = tiny_shards.every_file()[0]
    found = damage_of(file, file_problem(OSError(code, os.strerror(code))))
    assert cure in found.cure
