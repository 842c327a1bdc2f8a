"""The native sampler checks a block when a row first touches it, before it hands out the row."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from regmix.data import blocks, shards
from regmix.data import writer as writer_module
from regmix.data.block_checks import BlockCheck
from regmix.data.manifest import MANIFEST_FORMAT, VERSION, Manifest, TokenizerRecord
from regmix.data.sampling.backends import available_backends, load_backend
from regmix.data.sampling.ring import BatchRing
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import DomainWriter, ShardSet, dtype_for, write_manifest
from regmix.errors import ShardError

pytestmark = pytest.mark.skipif(
    "native" not in available_backends(), reason="needs the C++ extension: this checks its reading"
)
BLOCK = 1 << 20
HEADER = 4096
VOCABULARIES = {"uint16": 60_000, "uint32": 100_000}
MIXTURE = {"code": 0.5, "web": 0.5}
STEPS, SEQ_LEN, BATCH = 80, 2048, 16  # an epoch of both domains as uint16, two as uint32


@pytest.fixture(scope="module", params=list(VOCABULARIES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of 2.6 MB, in two files of a whole block and a short one each."""
    folder = tmp_path_factory.mktemp("written") / request.param
    write_corpus(folder, VOCABULARIES[request.param], seed=0)
    return folder


def write_corpus(folder: Path, vocab_size: int, seed: int) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = TokenizerRecord(
        file="tokenizer.json",
        xxh3=xxhash.xxh3_64_hexdigest(b"{}"),
        vocab_size=vocab_size,
        separator="<|endoftext|>",
        separator_id=0,
    )
    manifest = Manifest(
        format=MANIFEST_FORMAT, version=VERSION, dtype=dtype_for(vocab_size), tokenizer=tokenizer
    )
    draw = np.random.default_rng(seed)
    stats = {}
    size = 2 if vocab_size <= 1 << 16 else 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "FILE_BYTES", BLOCK + 400_000)
        for domain in MIXTURE:
            with DomainWriter(folder, manifest, "train", domain) as out:
                lengths = np.full(26, 100_000 // size)
                ids = draw.integers(0, vocab_size - 1, lengths.sum())
                ids[:: lengths[0]] = vocab_size - 1  # the headers of all seeds are the same
                out.write(ids, lengths, 3 * lengths)
            stats[domain] = out.stats(dropped={})
    write_manifest(folder, replace(manifest, splits={"train": stats}))


@pytest.fixture
def corpus(written: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The corpus, whole again afterwards, in a process that has touched no file."""
    monkeypatch.setattr(blocks, "_CHECKED", {})
    before = {path: path.read_bytes() for path in written.rglob("*.tokens")}
    yield written
    for path, content in before.items():
        if not path.exists() or path.read_bytes() != content:
            path.unlink(missing_ok=True)
            path.write_bytes(content)


def flip(path: Path, place: int, bit: int = 1) -> None:
    with open(path, "r+b") as stream:
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ bit]))


def opened(folder: Path, backend: str = "native", **options: int) -> MixtureSampler:
    """A sampler of a process that has touched no file."""
    blocks._CHECKED.clear()
    settings = {"seq_len": SEQ_LEN, "batch_size": BATCH, **options}
    return MixtureSampler(ShardSet.open(folder), MIXTURE, backend=backend, **settings)


def reader(
    sampler: MixtureSampler, way: str, steps: int = STEPS
) -> Iterator[tuple[int, np.ndarray]]:
    """Every batch of an epoch, made by `batch`, or by a ring of so many threads."""
    if way == "batch":
        yield from ((step, sampler.batch(step)) for step in range(steps))
        return
    with BatchRing(sampler, stop=steps, threads=int(way)) as ring:
        yield from ((step, batch.copy()) for step, batch in ring)


def eager_error(folder: Path, domain: str) -> str:
    """What the check of a whole domain says."""
    blocks._CHECKED.clear()
    with pytest.raises(ShardError) as caught:
        ShardSet.read(folder).arrays("train", domain)
    return str(caught.value)


def blocks_of(folder: Path) -> list[tuple[Path, str, int, int, int]]:
    """Every block: file, domain, number, and its first token and the one after, in the domain."""
    found = []
    whole = ShardSet.open(folder)
    for domain in MIXTURE:
        before = 0
        for file in whole.files("train", domain):
            per_block = BLOCK // file.dtype.itemsize
            for number, first in enumerate(range(0, file.tokens, per_block)):
                last = before + min(first + per_block, file.tokens)
                found.append((file.path, domain, number, before + first, last))
            before += file.tokens
    return found


def touches(sampler: MixtureSampler, step: int, domain: str, first: int, last: int) -> bool:
    """Whether a row of the step reads tokens `first` to `last - 1` of the domain."""
    names, sequences = sampler.ids(step)
    starts = sequences[names == sampler.domains.index(domain)] * sampler.seq_len
    return bool(((starts < last) & (starts + sampler.seq_len >= first)).any())


@pytest.mark.parametrize("way", ["batch", "1", "3"])
def test_every_flipped_bit_is_found_before_a_row_of_its_block_is_handed_out(
    corpus: Path, way: str
) -> None:
    draw, done = random.Random(way), 0
    truth = [batch for _, batch in reader(opened(corpus, "numpy"), "batch")]
    for path, domain, number, first, last in blocks_of(corpus):
        size = (last - first) * ShardSet.open(corpus).files("train", domain)[0].dtype.itemsize
        for place in (0, size - 1, draw.randrange(size)):
            bit = 1 << draw.randrange(8)
            flip(path, HEADER + number * BLOCK + place, bit)
            expected = eager_error(corpus, domain)
            sampler = opened(corpus)
            handed_out: list[bytes] = []
            with pytest.raises(ShardError) as caught:
                handed_out.extend(batch.tobytes() for _, batch in reader(sampler, way))
            assert str(caught.value) == expected
            assert f"{path.name} (domain '{domain}', train): block {number} of 2 " in expected
            first_touch = next(
                step for step in range(STEPS) if touches(sampler, step, domain, first, last)
            )
            assert handed_out == [batch.tobytes() for batch in truth[: len(handed_out)]]
            assert len(handed_out) <= first_touch
            if way == "batch":  # a ring may hold batches that it made and did not hand out
                assert len(handed_out) == first_touch
            flip(path, HEADER + number * BLOCK + place, bit)
            done += 1
    assert done == 24
    again = [batch.tobytes() for _, batch in reader(opened(corpus), way)]
    assert again == [batch.tobytes() for batch in truth]


def test_rows_that_cross_blocks_and_files_are_checked_whole(corpus: Path) -> None:
    seq_len = 230_000  # of any block, so that rows have every number of blocks and files
    options = {"seq_len": seq_len, "batch_size": 2}
    truth = [batch.tobytes() for _, batch in reader(opened(corpus, "numpy", **options), "batch", 4)]
    lazy = opened(corpus, **options)
    assert [batch.tobytes() for _, batch in reader(lazy, "batch", 4)] == truth
    for path, domain, number, first, last in blocks_of(corpus):
        flip(path, HEADER + number * BLOCK + 3)
        sampler = opened(corpus, **options)
        for step in range(4):
            if touches(sampler, step, domain, first, last):
                with pytest.raises(ShardError, match=rf"{path.name} .*: block {number} of 2 "):
                    sampler.batch(step)
            else:
                assert sampler.batch(step).tobytes() == truth[step]
        flip(path, HEADER + number * BLOCK + 3)


def test_a_row_may_be_longer_than_a_file(corpus: Path) -> None:
    tokens = ShardSet.open(corpus).stats("train", "web").tokens
    options = {"seq_len": tokens - 1, "batch_size": 2}
    truth = opened(corpus, "numpy", **options).batch(0)
    np.testing.assert_array_equal(opened(corpus, **options).batch(0), truth)
    for path, _, number, _, _ in blocks_of(corpus):
        flip(path, HEADER + number * BLOCK + 3)
        with pytest.raises(ShardError, match=rf"{path.name} .*: block {number} of 2 "):
            opened(corpus, **options).batch(0)
        flip(path, HEADER + number * BLOCK + 3)


def test_a_row_that_ends_with_a_block_does_not_touch_the_next(corpus: Path) -> None:
    array, check = ShardSet.open(corpus).lazy_arrays("train", "code")[0]
    assert check is not None
    seq_len = BLOCK // array.itemsize - 1
    gather = load_backend("native").gather()
    slots, zero = np.array([gather.add([array], [check])]), np.zeros(1, np.int64)
    gather.fill(slots, zero, zero, seq_len, np.empty((1, seq_len + 1), np.int64))
    assert check.states.tolist() == [1, 0]


def test_a_damaged_block_stays_an_error_and_the_others_are_served(corpus: Path) -> None:
    truth = opened(corpus, "numpy")
    path, domain, number, first, last = blocks_of(corpus)[1]
    flip(path, HEADER + number * BLOCK + 77)
    sampler = opened(corpus)
    served = 0
    for step in [*range(STEPS), *range(STEPS)]:
        if touches(sampler, step, domain, first, last):
            with pytest.raises(ShardError, match=f"block {number} of 2 is damaged"):
                sampler.batch(step)
        else:
            np.testing.assert_array_equal(sampler.batch(step), truth.batch(step))
            served += 1
    assert 0 < served < 2 * STEPS


def test_a_ring_that_met_damage_stays_an_error(corpus: Path) -> None:
    path, *_ = blocks_of(corpus)[0]
    flip(path, HEADER)
    ring = BatchRing(opened(corpus), stop=STEPS, threads=2)
    for _ in range(2):
        with pytest.raises(ShardError, match=f"{path.name} .*: block 0 of 2 is damaged"):
            for _ in ring:
                pass
    ring.close()


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_other_backends_check_a_domain_whole_when_it_is_opened(corpus: Path, backend: str) -> None:
    path, domain, *_ = blocks_of(corpus)[0]
    flip(path, HEADER)
    expected = eager_error(corpus, domain)
    with pytest.raises(ShardError) as caught:
        opened(corpus, backend)
    assert str(caught.value) == expected


def test_opening_reads_no_token(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "map_blocks", None)
    opened(corpus)
    assert [int(states.sum()) for states in blocks._CHECKED.values()] == [0, 0, 0, 0]


def test_what_was_read_whole_is_not_checked_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = opened(corpus)
    for _ in reader(sampler, "batch"):
        pass
    monkeypatch.setattr(blocks, "map_blocks", None)
    shards = ShardSet.open(corpus)
    for domain in MIXTURE:
        assert [check for _, check in shards.lazy_arrays("train", domain)] == [None, None]
        assert len(shards.arrays("train", domain)) == 2


def test_what_was_read_in_part_is_checked_further(corpus: Path) -> None:
    path, domain, number, first, last = blocks_of(corpus)[1]
    flip(path, HEADER + number * BLOCK)
    sampler = opened(corpus)
    for step in range(STEPS):
        if not touches(sampler, step, domain, first, last):
            sampler.batch(step)
    assert all(states.any() for states in blocks._CHECKED.values())
    shards = ShardSet.open(corpus)
    again = MixtureSampler(shards, MIXTURE, seq_len=SEQ_LEN, batch_size=BATCH)
    with pytest.raises(ShardError, match="block 1 of 2 is damaged"):
        for _ in reader(again, "batch"):
            pass
    with pytest.raises(ShardError, match="block 1 of 2 is damaged"):
        shards.arrays("train", domain)


def test_what_was_checked_whole_is_not_checked_by_rows(corpus: Path) -> None:
    shards = ShardSet.open(corpus)
    for domain in MIXTURE:
        shards.arrays("train", domain)
        assert [check for _, check in shards.lazy_arrays("train", domain)] == [None, None]


def test_a_check_of_all_serves_samplers_that_are_open(corpus: Path) -> None:
    sampler = opened(corpus)
    ShardSet.open(corpus).arrays("train", "web")
    # Damage after a check is not looked for, so this tells who looks.
    flip(blocks_of(corpus)[-1][0], HEADER + 5)
    for _ in reader(sampler, "batch"):
        pass


def test_two_openings_of_a_corpus_share_what_they_checked(corpus: Path) -> None:
    states = [
        [check.states for _, check in ShardSet.open(corpus).lazy_arrays("train", "web") if check]
        for _ in range(2)
    ]
    assert [a is b for a, b in zip(*states, strict=True)] == [True, True]


def test_a_partly_read_file_that_changed_is_checked_anew(corpus: Path) -> None:
    sampler = opened(corpus)
    for _ in reader(sampler, "batch"):
        pass
    path, *_ = blocks_of(corpus)[0]
    flip(path, HEADER + 9)
    os.utime(path, ns=(0, 0))  # as if it had happened later than within the clock's tick
    again = MixtureSampler(ShardSet.open(corpus), MIXTURE, seq_len=SEQ_LEN, batch_size=BATCH)
    with pytest.raises(ShardError, match="block 0 of 2 is damaged"):
        for _ in reader(again, "batch"):
            pass


@pytest.mark.parametrize("way", ["batch", "1", "3"])
@pytest.mark.parametrize("length", [0, 100, HEADER + 5000, HEADER + BLOCK + 1000])
def test_a_file_that_is_cut_after_open_is_an_error(corpus: Path, way: str, length: int) -> None:
    path, domain, *_ = blocks_of(corpus)[0]
    sampler = opened(corpus)
    os.truncate(path, length)
    with pytest.raises(ShardError) as caught:
        for _ in reader(sampler, way):
            pass
    assert str(caught.value) == eager_error(corpus, domain)


def test_a_footer_that_is_damaged_is_found_when_its_domain_is_opened(corpus: Path) -> None:
    path, domain, *_ = blocks_of(corpus)[0]
    flip(path, path.stat().st_size - 20)
    with pytest.raises(ShardError, match=rf"{path.name} \(domain '{domain}', train\): the footer"):
        opened(corpus)


def test_a_file_that_is_replaced_while_it_is_opened_is_not_mapped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, *_ = blocks_of(corpus)[0]
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    load = shards.PackedFile.load

    def load_and_replace(file: shards.PackedFile) -> str | None:
        what = load(file)
        if file.path == path and other.exists():
            os.replace(other, path)
        return what

    monkeypatch.setattr(shards.PackedFile, "load", load_and_replace)
    with pytest.raises(ShardError, match=rf"{path.name} .*changed on disk while it was checked"):
        opened(corpus)


def test_a_replaced_file_leaves_what_is_open_whole(corpus: Path, tmp_path: Path) -> None:
    truth = [batch.tobytes() for _, batch in reader(opened(corpus, "numpy"), "batch")]
    sampler = opened(corpus)
    sampler.batch(0)
    for path in corpus.rglob("*.tokens"):
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes()[::-1])
        os.replace(other, path)
    assert [batch.tobytes() for _, batch in reader(sampler, "batch")] == truth


def test_a_block_that_cannot_be_read_is_named(corpus: Path) -> None:
    path, *_ = blocks_of(corpus)[0]
    pairs = ShardSet.open(corpus).lazy_arrays("train", "code")
    gather = load_backend("native").gather()
    slots = np.array([gather.add([array for array, _ in pairs], [check for _, check in pairs])])
    folder = os.open(corpus, os.O_RDONLY)
    os.dup2(folder, pairs[0][1].descriptor)  # its reads fail
    os.close(folder)
    zero = np.zeros(1, np.int64)
    with pytest.raises(ShardError, match=rf"{path.name} \(domain 'code', train\): Is a directory"):
        gather.fill(slots, zero, zero, 8, np.empty((1, 9), np.int64))


def test_a_block_that_is_right_the_second_time_is_an_error_that_says_so(corpus: Path) -> None:
    _, check = ShardSet.open(corpus).lazy_arrays("train", "code")[0]
    assert isinstance(check, BlockCheck)
    assert "block 1 was read wrong once and right the second time" in check.error(1, 0).what
    assert check.error(1, errno.EIO).what.endswith(": Input/output error")


def test_many_rings_of_one_corpus_check_side_by_side(corpus: Path) -> None:
    truth = [batch.tobytes() for _, batch in reader(opened(corpus, "numpy"), "batch")]
    for damaged in (False, True):
        if damaged:
            flip(blocks_of(corpus)[2][0], HEADER + 1)
        first = opened(corpus)
        samplers = [first, first.copy()]
        samplers += [
            MixtureSampler(ShardSet.open(corpus), MIXTURE, seq_len=SEQ_LEN, batch_size=BATCH)
            for _ in range(2)
        ]
        results: list[list[bytes] | str] = []

        def read(sampler: MixtureSampler, results: list[list[bytes] | str] = results) -> None:
            try:
                results.append([batch.tobytes() for _, batch in reader(sampler, "2")])
            except ShardError as error:
                results.append(str(error))

        threads = [threading.Thread(target=read, args=(sampler,)) for sampler in samplers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if damaged:
            assert len(set(map(str, results))) == 1
            assert "block 0 of 2 is damaged" in str(results[0])
        else:
            assert results == [truth] * 4


def test_descriptors_are_closed_with_the_shards(corpus: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    sampler = opened(corpus)
    assert len(os.listdir("/dev/fd")) > before
    del sampler
    assert len(os.listdir("/dev/fd")) == before


def test_a_low_limit_on_open_files_is_raised(corpus: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 3, hard))
        sampler = opened(corpus)
    finally:
        with suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sampler.batch(0).shape == (BATCH, SEQ_LEN + 1)


def test_a_check_that_does_not_fit_its_file_is_refused(corpus: Path) -> None:
    (array, check), *_ = ShardSet.open(corpus).lazy_arrays("train", "code")
    gather = load_backend("native").gather()
    with pytest.raises(ValueError, match="digest"):
        gather.add([array[: len(array) // 2]], [check])
    with pytest.raises(ValueError, match="one a file"):
        gather.add([array, array], [check])
