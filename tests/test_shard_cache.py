"""The shard cache: a copy is whole and checked or is not there, and is made once a machine."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regmix.data.manifest import COPY_MARKER
from regmix.data.shards import ShardSet
from regmix.errors import ShardError, StorageError, StudyError
from regmix.study import Training
from regmix.swarm import shard_cache
from regmix.swarm.caching import CachingExecutor
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.shard_cache import (
    IncomingCorpus,
    copy_corpus,
    copy_path,
    corpus_files,
    doubt,
    find_copy,
    parts_of,
)
from regmix.swarm.sweep import SweepOptions, run_sweep


@pytest.fixture
def source(tiny_shards_path: Path, tmp_path: Path) -> ShardSet:
    shutil.copytree(tiny_shards_path, tmp_path / "source")
    return ShardSet.open(tmp_path / "source")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 1]))


def a_shard(folder: Path) -> Path:
    return sorted(folder.rglob("*.tokens"))[0]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def test_a_copy_holds_the_same_bytes_and_is_another_file(source: ShardSet, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    copy = copy_corpus(source, cache, lambda done, total: seen.append((done, total)))
    files = corpus_files(source)
    assert {name: (copy / name).read_bytes() for name in files} == {
        name: (source.path / name).read_bytes() for name in files
    }
    assert not any((copy / name).samefile(source.path / name) for name in files)
    assert ShardSet.open(copy).checksum == source.checksum
    assert seen[-1] == (sum(files.values()), sum(files.values()))
    assert names(cache) == [copy.name]


def test_a_whole_copy_is_not_made_again(source: ShardSet, cache: Path) -> None:
    copy = copy_corpus(source, cache)
    before = (copy / COPY_MARKER).stat()
    shutil.rmtree(source.path)
    assert copy_corpus(source, cache) == copy
    assert (copy / COPY_MARKER).stat().st_ino == before.st_ino


def test_a_copy_without_its_marker_is_made_again(source: ShardSet, cache: Path) -> None:
    copy = copy_corpus(source, cache)
    flip(a_shard(copy), 5000)
    # The flipped bit is inside a block, so that only who reads it can find it, and then says so.
    assert find_copy(cache, source.checksum) == copy
    with pytest.raises(ShardError, match=f"Remove {copy}"):
        ShardSet.open(copy).verify()
    doubt(copy)
    assert find_copy(cache, source.checksum) is None
    assert ShardSet.open(copy_corpus(source, cache)).damage() == []


@pytest.mark.parametrize("damage", ["cut", "missing", "manifest", "tokenizer", "another corpus"])
def test_a_damaged_copy_is_made_again(source: ShardSet, cache: Path, damage: str) -> None:
    copy = copy_corpus(source, cache)
    if damage == "cut":
        os.truncate(a_shard(copy), a_shard(copy).stat().st_size - 1)
    elif damage == "missing":
        a_shard(copy).unlink()
    elif damage == "manifest":
        flip(copy / "manifest.json", 100)
    elif damage == "tokenizer":
        flip(copy / source.manifest.tokenizer.file, 100)
    else:
        copy.rename(copy_path(cache, "0123456789abcdef"))
        assert find_copy(cache, "0123456789abcdef") is None
    assert find_copy(cache, source.checksum) is None
    assert ShardSet.open(copy_corpus(source, cache)).damage() == []


def test_a_half_made_copy_is_no_copy(source: ShardSet, cache: Path) -> None:
    files = corpus_files(source)
    incoming = IncomingCorpus(cache, source.checksum, files)
    assert incoming.begin()
    for name in list(files)[:-1]:
        for offset, part in parts_of(source.path / name):
            incoming.write(name, offset, part)
    assert find_copy(cache, source.checksum) is None
    with pytest.raises(ShardError, match="what was copied is damaged"):
        incoming.finish()
    incoming.close()
    assert names(cache) == []
    copy_corpus(source, cache)


def test_a_copy_that_was_killed_is_made_again(source: ShardSet, cache: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from regmix.data.shards import ShardSet\n"
        "from regmix.swarm.shard_cache import copy_corpus\n"
        "copy_corpus(ShardSet.open(sys.argv[1]), Path(sys.argv[2]), lambda done, _: done > 50_000 "
        "and os.kill(os.getpid(), 9))"
    )
    process = subprocess.run([sys.executable, "-c", code, source.path, cache])
    assert process.returncode == -9
    assert [name for name in names(cache) if name.endswith(".part")]
    copy = copy_corpus(source, cache)
    assert names(cache) == [copy.name]
    assert ShardSet.open(copy).damage() == []


def test_a_damaged_corpus_is_named_and_leaves_no_copy(source: ShardSet, cache: Path) -> None:
    flip(a_shard(source.path), 5000)
    with pytest.raises(ShardError, match="block 0 of 1 is damaged") as caught:
        copy_corpus(source, cache)
    assert str(a_shard(source.path)) in str(caught.value)
    assert names(cache) == []


def test_a_file_that_cannot_be_read_is_named(source: ShardSet, cache: Path) -> None:
    path = a_shard(source.path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=f"{path}: Is a directory"):
        copy_corpus(source, cache)
    assert names(cache) == []


def test_a_disk_without_room_is_refused_before_anything_is_copied(
    source: ShardSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "free_bytes", lambda _: 1000)
    with pytest.raises(StorageError, match=r"are free\. Free some space, name a --shard-cache"):
        copy_corpus(source, cache)
    assert names(cache) == []


def test_one_process_copies_at_a_time(source: ShardSet, cache: Path) -> None:
    files = corpus_files(source)
    first, second = (IncomingCorpus(cache, source.checksum, files) for _ in range(2))
    assert first.begin()
    assert not second.begin()
    first.close()
    with second:
        assert second.begin()
        assert second.whole is None


def test_who_waited_finds_the_copy_made(source: ShardSet, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from regmix.data.shards import ShardSet\n"
        "from regmix.swarm.shard_cache import copy_corpus\n"
        "copy_corpus(ShardSet.open(sys.argv[1]), Path(sys.argv[2]), lambda d, t: print(d))"
    )
    command = [sys.executable, "-c", code, source.path, cache]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(bool(words) for words in said) == 1


def test_no_file_leaves_the_cache(source: ShardSet, cache: Path) -> None:
    with IncomingCorpus(cache, source.checksum, {"../../out": 3, "a": 1}) as incoming:
        assert incoming.begin()
        with pytest.raises(ShardError, match="leaves the folder"):
            incoming.write("../../out", 0, b"abc")
        with pytest.raises(ShardError, match="no file of this corpus"):
            incoming.write("b", 0, b"abc")
    assert not (cache.parent / "out").exists()


def test_token_files_of_other_programs_are_refused_with_the_cure(
    tmp_path: Path, source: ShardSet
) -> None:
    import numpy as np

    folder = tmp_path / "foreign"
    folder.mkdir()
    shutil.copy(source.tokenizer_path, folder / "tokenizer.json")
    for split in ("train", "valid"):
        (folder / split).mkdir()
        np.save(folder / split / "a.npy", np.arange(200, dtype=np.uint16) % 300)
    with pytest.raises(StudyError, match="leave --shard-cache out, or pack the corpus"):
        copy_corpus(ShardSet.open(folder), tmp_path / "cache")


def test_a_copy_that_went_bad_is_made_again_by_the_next_run(
    source: ShardSet, cache: Path, tiny_training: Training, tmp_path: Path
) -> None:
    study = make_study(
        tmp_path / "study",
        source,
        swarm=SwarmRequest(num=2),
        training=tiny_training,
        objective={"animals": 1.0},
    )
    options = SweepOptions(
        num_workers=1, make_executor=functools.partial(CachingExecutor, shard_cache=cache)
    )
    copy = copy_corpus(source, cache)
    for path in (copy / "train").glob("*.tokens"):
        flip(path, 5000)
    first = run_sweep(study, options)
    assert first.num_done == 0
    ((_, why),) = first.failures
    assert f"Remove {copy}" in why
    second = run_sweep(study, options)
    assert (second.num_done, second.failures) == (2, [])
    assert ShardSet.open(copy).damage() == []
