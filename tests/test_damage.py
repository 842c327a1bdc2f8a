"""Damage: every cut is found at open, every flipped bit at the first touch, and said usefully."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from regmix.data import blocks
from regmix.data import writer as writer_module
from regmix.data.manifest import MANIFEST, MANIFEST_FORMAT, VERSION, Manifest, TokenizerRecord
from regmix.data.shards import DomainWriter, ShardSet, dtype_for, write_manifest
from regmix.errors import RegmixError, ShardError

TOKENIZER = "tokenizer.json"
VOCABULARIES = {"uint16": 5000, "uint32": 100_000}


def write_corpus(folder: Path, vocab_size: int, seed: int = 0) -> Path:
    """Three domains of several files each; every seed gives files of the same sizes."""
    folder.mkdir(parents=True)
    (folder / TOKENIZER).write_text('{"model": "none", "seed": 10}')
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        version=VERSION,
        dtype=dtype_for(vocab_size),
        tokenizer=TokenizerRecord(
            file=TOKENIZER,
            xxh3=xxhash.xxh3_64_hexdigest((folder / TOKENIZER).read_bytes()),
            vocab_size=vocab_size,
            separator="<|endoftext|>",
            separator_id=0,
        ),
    )
    draw = np.random.default_rng(seed)
    splits: dict = {}
    for split, domain in (("train", "code"), ("train", "web"), ("valid", "web")):
        with DomainWriter(folder, manifest, split, domain) as out:
            for length in (700, 900, 40, 1200):
                ids = draw.integers(0, vocab_size - 1, length)
                ids[0] = vocab_size - 1  # the largest id is in the header: the same in every file
                out.write(ids, np.array([length]), np.array([3 * length]))
        splits.setdefault(split, {})[domain] = out.stats(dropped={})
    write_manifest(folder, replace(manifest, splits=splits))
    return folder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has touched no file: files change here faster than the clock of a disk."""
    monkeypatch.setattr(blocks, "_CHECKED", {})


@pytest.fixture(params=list(VOCABULARIES))
def corpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writer_module, "FILE_BYTES", 4096)
    return write_corpus(tmp_path / "corpus", VOCABULARIES[request.param])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writer_module, "FILE_BYTES", 4096)
    return write_corpus(tmp_path / "corpus", 5000)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def touch_everything(folder: Path) -> None:
    """Read the corpus as a run does that has read nothing of it before."""
    blocks._CHECKED.clear()
    shards = ShardSet.open(folder)
    for split in shards.splits:
        for domain in shards.domains(split):
            shards.arrays(split, domain)


def check_message(error: RegmixError, path: Path) -> None:
    assert path.name in error.what, error
    assert len(error.cure) > 20, error
    if path.suffix == ".tokens":
        domain, split = path.name.rsplit("-", 1)[0], path.parent.name
        assert f"(domain '{domain}', {split})" in error.what, error


def draws(draw: random.Random, size: int, files: list[Path]) -> set[int]:
    """Places in a file, about 300 over all files of a corpus."""
    return {draw.randrange(size) for _ in range(300 // len(files))}


def test_every_truncation_is_found_at_open(corpus: Path, fresh: None) -> None:
    draw, done = random.Random(1), 0
    files = files_of(corpus)
    for path in files:
        content = path.read_bytes()
        for length in {0, 1, len(content) - 1, *draws(draw, len(content), files)}:
            path.write_bytes(content[:length])
            with pytest.raises(RegmixError) as caught:
                ShardSet.open(corpus)
            check_message(caught.value, path)
            done += 1
        path.write_bytes(content)
    touch_everything(corpus)
    assert done >= 250


def test_every_flipped_bit_is_found_by_the_first_touch(corpus: Path, fresh: None) -> None:
    draw, done = random.Random(2), 0
    files = files_of(corpus)
    for path in files:
        size = path.stat().st_size
        edges = {0, size - 1, size - 8, size - 9, min(4095, size - 2), min(4096, size - 3)}
        for position in edges | draws(draw, size, files):
            bit = 1 << draw.randrange(8)
            flip(path, position, bit)
            with pytest.raises(RegmixError) as caught:
                touch_everything(corpus)
            check_message(caught.value, path)
            flip(path, position, bit)
            done += 1
    touch_everything(corpus)
    assert done >= 300


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ bit]))


def test_all_damage_is_listed_not_only_the_first(corpus: Path, fresh: None) -> None:
    whole = ShardSet.open(corpus)
    paths = [path for path in files_of(corpus) if path.suffix == ".tokens"]
    for path in paths[:3]:
        flip(path, 4096 + 33, 4)
    paths[3].unlink()
    with open(paths[4], "ab") as stream:
        stream.write(b"more")
    found = whole.damage()
    assert [Path(damage.path).name for damage in found] == [path.name for path in paths[:5]]
    assert [damage.block for damage in found] == [0, 0, 0, None, None]
    assert "missing" in found[3].what
    assert "changed" in found[4].what


@pytest.mark.parametrize("name", ["train/web-0.tokens", TOKENIZER, MANIFEST])
def test_a_missing_file_is_found_at_open(small: Path, name: str) -> None:
    (small / name).unlink()
    with pytest.raises(ShardError, match=Path(name).name):
        ShardSet.open(small)


@pytest.mark.parametrize("name", ["train/web-0.tokens", TOKENIZER, MANIFEST])
@pytest.mark.parametrize("kind", ["folder", "empty", "pipe", "loop"])
def test_something_else_in_place_of_a_file_is_found_at_open(
    small: Path, name: str, kind: str
) -> None:
    path = small / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    else:
        path.symlink_to(path.name)
    signal.alarm(30)  # a wait would last for ever
    with pytest.raises(RegmixError, match=path.name):
        ShardSet.open(small)
    signal.alarm(0)


@pytest.mark.parametrize(
    "pair",
    [("train/web-0.tokens", "train/web-1.tokens"), ("train/web-0.tokens", "train/code-0.tokens")],
)
def test_two_files_that_changed_places_are_found_at_open(
    small: Path, pair: tuple[str, str]
) -> None:
    first, second = (small / name for name in pair)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ShardError, match=r"-\d\.tokens \(domain"):
        ShardSet.open(small)


def test_a_file_of_an_older_pack_of_the_same_size_is_found_at_open(
    small: Path, tmp_path: Path
) -> None:
    older = write_corpus(tmp_path / "older", 5000, seed=1)
    name = "train/web-1.tokens"
    assert (older / name).stat().st_size == (small / name).stat().st_size
    shutil.copy(older / name, small / name)
    with pytest.raises(ShardError, match=r"web-1\.tokens \(domain 'web', train\): its checksum"):
        ShardSet.open(small)


def test_a_file_that_grew_is_found_at_open(small: Path) -> None:
    with open(small / "valid/web-0.tokens", "ab") as stream:
        stream.write(b"\0" * 4096)
    with pytest.raises(ShardError, match=r"web-0\.tokens \(domain 'web', valid\).*changed"):
        ShardSet.open(small)


def test_a_file_that_cannot_be_read_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet.open(small)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(blocks, "_CHECKED", {})
    with pytest.raises(ShardError, match=r"code-0\.tokens \(domain 'code', train\): Input/output"):
        shards.arrays("train", "code")


@pytest.mark.parametrize("change", ["flip", "cut", "replace", "remove"])
def test_a_change_between_open_and_first_touch_is_found(
    small: Path, tmp_path: Path, fresh: None, change: str
) -> None:
    shards = ShardSet.open(small)
    path = small / "train/web-1.tokens"
    if change == "flip":
        flip(path, 5000, 2)
    elif change == "cut":
        os.truncate(path, 5000)
    elif change == "remove":
        path.unlink()
    else:
        older = write_corpus(tmp_path / "older", 5000, seed=1)
        os.replace(older / "train/web-1.tokens", path)
    with pytest.raises(ShardError, match=r"web-1\.tokens \(domain 'web', train\)"):
        shards.arrays("train", "web")
    assert len(shards.arrays("train", "code")) > 1


def test_a_file_that_changes_after_its_check_is_not_mapped(
    small: Path, tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet.open(small)
    older = write_corpus(tmp_path / "older", 5000, seed=1)
    find_damage = blocks.find_damage

    def check_and_replace(*arguments: object, **options: object) -> list:
        found = find_damage(*arguments, **options)  # type: ignore[arg-type]
        os.replace(older / "train/web-0.tokens", small / "train/web-0.tokens")
        return found

    monkeypatch.setattr(blocks, "find_damage", check_and_replace)
    with pytest.raises(ShardError, match=r"web-0\.tokens .*changed on disk while it was checked"):
        shards.arrays("train", "web")


def test_a_file_that_changes_after_the_first_touch_is_checked_again(
    small: Path, fresh: None
) -> None:
    shards = ShardSet.open(small)
    shards.arrays("train", "web")
    path = small / "train/web-0.tokens"
    flip(path, 4096, 1)
    os.utime(path, ns=(0, 0))  # as if it had happened later than within the clock's tick
    with pytest.raises(ShardError, match=r"web-0\.tokens"):
        shards.arrays("train", "web")


def test_a_replaced_file_leaves_what_is_mapped_whole(small: Path, tmp_path: Path) -> None:
    (first, *_) = ShardSet.open(small).arrays("train", "web")
    before = first.copy()
    older = write_corpus(tmp_path / "older", 5000, seed=1)
    os.replace(older / "train/web-0.tokens", small / "train/web-0.tokens")
    np.testing.assert_array_equal(first, before)


def test_a_file_cut_under_its_map_ends_the_process_and_the_next_one_names_it(small: Path) -> None:
    program = """
import os, sys
from regmix.data.shards import ShardSet
array = ShardSet.open(sys.argv[1]).arrays("train", "web")[0]
os.truncate(sys.argv[1] + "/train/web-0.tokens", 100)
print(int(array.sum()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(small)], capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == b""  # no sum of what is not there
    with pytest.raises(ShardError, match=r"web-0\.tokens \(domain 'web', train\): 100 bytes"):
        ShardSet.open(small)


def test_a_file_cut_while_it_is_checked_is_an_error(
    tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus(tmp_path / "corpus", 5000)
    shards = ShardSet.open(folder)
    path = folder / "train/web-0.tokens"
    read = blocks._read

    def cut_and_read(*arguments: object) -> int:
        os.truncate(path, 5000)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blocks, "_read", cut_and_read)
    with pytest.raises(ShardError, match=r"web-0\.tokens .*cut short"):
        shards.arrays("train", "web")


def test_many_threads_find_what_one_finds(tmp_path: Path, fresh: None) -> None:
    path = write_corpus(tmp_path / "corpus", 100_000)
    manifest = ShardSet.open(path).manifest
    ids = np.random.default_rng(0).integers(0, 100_000, 5_000_000)
    with DomainWriter(path, manifest, "train", "large") as out:
        out.write(ids, np.array([len(ids)]), np.array([1]))
    stats = {"train": {"large": out.stats(dropped={})}}
    write_manifest(path, replace(manifest, splits=stats))
    file = path / "train/large-0.tokens"
    for block in (3, 11, 19):
        flip(file, 4096 + block * (1 << 20) + 999, 8)
    shards = ShardSet.open(path)
    found = [[damage.block for damage in shards.damage(threads=n)] for n in (1, 2, 5)]
    assert found == [[3, 11, 19]] * 3
    with pytest.raises(ShardError, match="block 3 of 20"):
        shards.arrays("train", "large")


def test_a_check_that_takes_long_says_so(
    small: Path, fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blocks, "PATIENCE_SECONDS", 0.0)
    ShardSet.open(small).arrays("train", "code")
    line = capsys.readouterr().err
    assert "checking the shards of domain 'code'" in line
    assert "MB/s" in line


def test_damage_in_a_copy_says_to_remove_it_and_not_to_pack(small: Path) -> None:
    (small / "verified.json").write_text("{}")
    path = small / "train" / "code-0.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"Remove .* it is a copy, and is made again"):
        ShardSet.open(small)
