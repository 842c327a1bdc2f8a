"""Token files of other programs: read as the shards they were made from, wherever shards are."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest

from regmix.data import blocks
from regmix.data.foreign.description import describe, render
from regmix.data.foreign.token_set import ForeignSet, record_checksums
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, RegmixError, ShardError, StudyError

CHUNK = 1000
LAYOUTS = ("litpkds", "megatron", "npy", "raw")


def write_litpkds(folder: Path, prefix: str, tokens: np.ndarray, separator: int) -> None:
    """Write chunks as the reference's builder does, the last one padded."""
    code = {"uint16": 8, "int32": 4, "int64": 5}[tokens.dtype.name]
    for number in range(-(-len(tokens) // CHUNK)):
        part = tokens[number * CHUNK : (number + 1) * CHUNK]
        chunk = np.full(CHUNK, separator, tokens.dtype)
        chunk[: len(part)] = part
        header = b"LITPKDS" + struct.pack("<Q", 1) + struct.pack("<B", code)
        content = header + struct.pack("<Q", CHUNK) + chunk.tobytes()
        (folder / f"{prefix}_{number:010d}.bin").write_bytes(content)


def write_megatron(path: Path, tokens: np.ndarray, offsets: np.ndarray) -> None:
    """Write a pair with one sequence a document."""
    code = {"uint16": 8, "int32": 4, "int64": 5, "uint8": 1}[tokens.dtype.name]
    lengths = np.diff(np.append(offsets, len(tokens))).astype(np.int32)
    path.write_bytes(tokens.tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
        + lengths.tobytes()
        + (offsets * tokens.itemsize).astype(np.int64).tobytes()
        + np.arange(len(lengths) + 1, dtype=np.int64).tobytes()
    )


def convert(shards: ShardSet, folder: Path, layout: str) -> Path:
    """Write a packed corpus as another program would."""
    folder.mkdir(parents=True)
    shutil.copy(shards.tokenizer_path, folder)
    for split in shards.splits:
        for domain in shards.domains(split):
            tokens = np.concatenate(shards.arrays(split, domain))
            offsets = shards.document_offsets(split, domain).astype(np.int64)
            if layout == "litpkds":
                write_litpkds(folder, f"{split}_{domain}", tokens, shards.separator_id)
            elif layout == "megatron":
                path = folder / f"{split}_{domain}_text_document.bin"
                write_megatron(path, tokens.astype(np.int32), offsets)
            elif layout == "npy":
                (folder / split).mkdir(exist_ok=True)
                np.save(folder / split / f"{domain}.npy", tokens)
            else:
                (folder / f"{split}-{domain}.bin").write_bytes(b"head" + tokens.tobytes())
    if layout == "raw":
        lines = ['tokenizer = "tokenizer.json"', 'separator = "<|endoftext|>"']
        for split in shards.splits:
            for domain in shards.domains(split):
                lines += [f"[splits.{split}.{domain}]", 'format = "raw"', 'dtype = "uint16"']
                lines += ["header_bytes = 4", f'files = ["{split}-{domain}.bin"]']
        (folder / "tokens.toml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(params=LAYOUTS)
def foreign(request: pytest.FixtureRequest, tiny_shards: ShardSet, tmp_path: Path) -> Path:
    return convert(tiny_shards, tmp_path / "foreign", request.param)


@pytest.fixture
def chunks(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    return convert(tiny_shards, tmp_path / "chunks", "litpkds")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has touched no file."""
    monkeypatch.setattr(blocks, "_CHECKED", {})


def test_tokens_documents_and_bytes_are_those_of_the_packed_corpus(
    foreign: Path, tiny_shards: ShardSet
) -> None:
    opened = ShardSet.open(foreign)
    assert opened.splits == tiny_shards.splits
    assert opened.tokenizer_hash == tiny_shards.tokenizer_hash
    assert opened.separator_id == tiny_shards.separator_id
    for split in opened.splits:
        assert opened.domains(split) == tiny_shards.domains(split)
        for domain in opened.domains(split):
            ours, theirs = tiny_shards.arrays(split, domain), opened.arrays(split, domain)
            np.testing.assert_array_equal(np.concatenate(theirs), np.concatenate(ours))
            assert not any(array.flags.writeable for array in theirs)
            stats, packed = opened.stats(split, domain), tiny_shards.stats(split, domain)
            assert (stats.tokens, stats.documents) == (packed.tokens, packed.documents)
            assert stats.utf8_bytes == packed.utf8_bytes
            assert opened.bytes_per_token(split, domain) == tiny_shards.bytes_per_token(
                split, domain
            )
            np.testing.assert_array_equal(
                opened.document_offsets(split, domain), tiny_shards.document_offsets(split, domain)
            )


def test_a_run_reads_the_batches_of_the_packed_corpus(foreign: Path, tiny_shards: ShardSet) -> None:
    mixture = {"animals": 0.5, "colours": 0.3, "numbers": 0.2}
    theirs, ours = (
        MixtureSampler(shards, mixture, seq_len=33, batch_size=4)
        for shards in (ShardSet.open(foreign), tiny_shards)
    )
    for step in (0, 1, 50, 3):
        np.testing.assert_array_equal(theirs.batch(step), ours.batch(step))


def test_the_printed_description_opens_the_same_corpus(foreign: Path) -> None:
    before = ShardSet.open(foreign)
    assert isinstance(before, ForeignSet)
    (foreign / "tokens.toml").write_text(render(before.description))
    again = ShardSet.open(foreign)
    assert again.checksum == before.checksum
    assert ShardSet.open(foreign / "tokens.toml").checksum == before.checksum


def test_the_checksum_follows_what_is_in_the_files(foreign: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(foreign, tmp_path / "moved")
    assert ShardSet.open(moved).checksum == ShardSet.open(foreign).checksum
    path = next(path for path in sorted(moved.rglob("*")) if path.suffix in (".bin", ".npy"))
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert ShardSet.open(moved).checksum != ShardSet.open(foreign).checksum


def test_every_truncation_is_found_at_open(foreign: Path) -> None:
    draw = random.Random(3)
    paths = [p for p in sorted(foreign.rglob("*")) if p.suffix in (".bin", ".idx", ".npy")]
    for path in draw.sample(paths, 4):
        content = path.read_bytes()
        body = 4 if (foreign / "tokens.toml").exists() else 0
        for length in {0, 1, *(draw.randrange(len(content)) for _ in range(10))}:
            # A file without a format is known by nothing but whole ids.
            if body and length > body and (length - body) % 2 == 0:
                continue
            path.write_bytes(content[:length])
            with pytest.raises(RegmixError, match=path.stem) as caught:
                ShardSet.open(foreign)
            assert "(domain '" in caught.value.what
            assert len(caught.value.cure) > 10
        path.write_bytes(content)
    ShardSet.open(foreign)


def test_an_id_outside_the_vocabulary_is_found_on_first_touch(chunks: Path) -> None:
    path = chunks / "train_animals_0000000002.bin"
    content = bytearray(path.read_bytes())
    content[24 + 2 * 77 : 24 + 2 * 78] = struct.pack("<H", 9999)
    path.write_bytes(content)
    opened = ShardSet.open(chunks)
    opened.arrays("train", "colours")
    with pytest.raises(
        ShardError,
        match=r"0002\.bin \(domain 'animals', train\).*id 9999 at position 77 is outside .* of 320",
    ):
        opened.arrays("train", "animals")


def test_a_flipped_bit_is_found_against_recorded_checksums(foreign: Path) -> None:
    opened = ShardSet.open(foreign)
    assert isinstance(opened, ForeignSet)
    assert "--record" in opened.not_verified
    before = opened.checksum
    record_checksums(opened)
    recorded = ShardSet.open(foreign)
    assert recorded.checksum == before
    assert isinstance(recorded, ForeignSet)
    assert recorded.not_verified == ""
    assert recorded.damage() == []
    draw = random.Random(4)
    paths = [p for p in sorted(foreign.rglob("*")) if p.suffix in (".bin", ".idx", ".npy")]
    for _ in range(30):
        path = draw.choice(paths)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(RegmixError, match=path.stem):
            touch_everything(foreign)
        path.write_bytes(content)
    touch_everything(foreign)


def touch_everything(folder: Path) -> None:
    blocks._CHECKED.clear()
    shards = ShardSet.open(folder)
    for split in shards.splits:
        for domain in shards.domains(split):
            shards.arrays(split, domain)


def test_damaged_checksums_are_an_error(chunks: Path) -> None:
    opened = ShardSet.open(chunks)
    assert isinstance(opened, ForeignSet)
    path = record_checksums(opened)
    content = path.read_bytes()
    for place in (0, len(content) // 2, len(content) - 3):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(changed)
        with pytest.raises(ShardError, match=r"tokens\.checksums\.json.*delete it"):
            ShardSet.open(chunks)


def test_a_recorded_file_that_is_gone_and_a_new_one_are_named(chunks: Path) -> None:
    opened = ShardSet.open(chunks)
    assert isinstance(opened, ForeignSet)
    record_checksums(opened)
    last = sorted(chunks.glob("train_numbers_*.bin"))[-1]
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(ShardError, match=rf"{last.name} \(domain 'numbers', train\).*missing"):
        ShardSet.open(chunks)
    last.write_bytes(content)
    number = int(last.stem[-10:]) + 1
    (chunks / f"train_numbers_{number:010d}.bin").write_bytes(content)
    with pytest.raises(ShardError, match=r"was not there when the checksums were recorded"):
        ShardSet.open(chunks)


def test_a_chunk_that_is_missing_in_a_row_is_an_error(chunks: Path) -> None:
    (chunks / "train_animals_0000000001.bin").unlink()
    with pytest.raises(ShardError, match=r"train_animals_0000000001\.bin .*missing.*by name"):
        ShardSet.open(chunks)


def test_padding_is_left_out_and_counted(chunks: Path, tiny_shards: ShardSet) -> None:
    opened = ShardSet.open(chunks)
    assert isinstance(opened, ForeignSet)
    every = [(s, d) for s in tiny_shards.splits for d in tiny_shards.domains(s)]
    padding = sum(-tiny_shards.stats(*place).tokens % CHUNK for place in every)
    assert f"{padding:,} separators at the ends of chunks are not read" in opened.remarks()[0]


def test_the_reference_names_give_domains_as_its_mixtures_name_them(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    shutil.copy(tiny_shards.tokenizer_path, tmp_path)
    tokens = np.arange(1, 3 * CHUNK, dtype=np.uint16) % 300
    for name in ("the_pile_pile_cc_0", "the_pile_gutenberg_pg_19_7", "the_pile_arxiv-10_743_3"):
        write_litpkds(tmp_path, f"train_{name}", tokens, 0)
    write_litpkds(tmp_path, "valid_the_pile_pile_cc_0", tokens, 0)
    opened = ShardSet.open(tmp_path)
    names = ("the_pile_arxiv", "the_pile_gutenberg_pg_19", "the_pile_pile_cc")
    assert opened.domains("train") == names
    assert opened.domains("valid") == ("the_pile_pile_cc",)


def test_a_study_is_made_of_them_and_holds_to_them(foreign: Path, tmp_path: Path) -> None:
    from regmix.model.optim import OptimConfig
    from regmix.model.presets import ModelShape
    from regmix.study import Study, Training
    from regmix.swarm.drawing import SwarmRequest, make_study

    shape = ModelShape(num_layers=1, width=32, num_heads=2, hidden=32, vocab_size=320, seq_len=32)
    training = Training(
        shape=shape, optim=OptimConfig(lr=1e-3, total_steps=2), batch_size=2, num_steps=2
    )
    make_study(
        tmp_path / "study",
        ShardSet.open(foreign),
        swarm=SwarmRequest(num=4),
        training=training,
        objective={"animals": 1.0},
    )
    study = Study.open(tmp_path / "study")
    assert isinstance(study.open_shards(), ForeignSet)
    for path in foreign.rglob("*animals*"):
        path.unlink()
    with pytest.raises((StudyError, ShardError)):
        study.open_shards()


def test_bits_per_byte_are_left_out_where_bytes_are_unknown(chunks: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from regmix.large.evaluate import evaluation_table

    study = SimpleNamespace(config=SimpleNamespace(objective={"animals": 1.0}))
    opened = ShardSet.open(chunks)
    known = evaluation_table(study, opened, {"animals": 3.0})["targets"]["animals"]
    stats = opened.stats("valid", "animals")
    assert known["bits_per_byte"] == pytest.approx(
        3.0 * (stats.tokens - 1) / (math.log(2) * (stats.utf8_bytes or 0))
    )
    content = (chunks / "tokenizer.json").read_text()
    assert '"add_prefix_space":false' in content.replace(" ", "")
    changed = content.replace('"add_prefix_space": false', '"add_prefix_space": true', 1)
    (chunks / "tokenizer.json").write_text(changed)
    opened = ShardSet.open(chunks)
    assert isinstance(opened, ForeignSet)
    assert opened.bytes_per_token("valid", "animals") is None
    assert any("bits per byte are left out" in line for line in opened.remarks())
    unknown = evaluation_table(study, opened, {"animals": 3.0})["targets"]["animals"]
    assert "bits_per_byte" not in unknown


def test_a_folder_without_its_tokenizer_is_an_error_that_says_so(chunks: Path) -> None:
    (chunks / "tokenizer.json").unlink()
    with pytest.raises(ShardError, match=r"tokenizer of these token files is missing.*--describe"):
        ShardSet.open(chunks)
    assert describe(chunks) is not None


def test_a_file_that_says_nothing_of_itself_is_not_left_out(chunks: Path) -> None:
    (chunks / "extra.bin").write_bytes(b"\1\0" * 50)
    with pytest.raises(ShardError, match=r"extra\.bin: neither LITPKDS.*tokens\.toml"):
        ShardSet.open(chunks)
    for path in chunks.glob("*_00000*.bin"):
        path.unlink()
    with pytest.raises(ShardError, match=r"extra\.bin: neither LITPKDS"):
        ShardSet.open(chunks)


@pytest.mark.parametrize(
    "name",
    ["train_animals_0000000001.bin", "tokenizer.json", "tokens.checksums.json"],
)
def test_a_pipe_in_place_of_a_file_does_not_hang(chunks: Path, name: str) -> None:
    (chunks / name).unlink(missing_ok=True)
    os.mkfifo(chunks / name)
    signal.alarm(30)  # a wait would last for ever
    with pytest.raises(ShardError, match=name):
        ShardSet.open(chunks)
    signal.alarm(0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("splits.train", "splits.training", r"unknown split 'training' \(did you mean 'train'"),
        ('format = "raw"', 'format = "rwa"', r"unknown format 'rwa' \(did you mean 'raw'"),
        ('dtype = "uint16"\n', "", "raw files need 'dtype'"),
        (
            'dtype = "uint16"',
            'dtype = "int64"',
            "ids of type int64 cannot be read.*astype",
        ),
        ("header_bytes = 4", "header_bytes = 3", "start at byte 3, no multiple of 2"),
        ("header_bytes = 4", "header_bytes = -4", "header_bytes is -4"),
        ("train-animals.bin", "train-animal.bin", "animal.bin .*missing"),
        ("train-animals.bin", "no-*.bin", r"no-\*\.bin .*no such files"),
        ('separator = "<|endoftext|>"', 'separator = "<s>"', "no token '<s>' to end documents"),
        ('separator = "<|endoftext|>"', 'seperator = "x"', "unknown setting 'seperator'"),
        ("train-animals.bin", "valid-animals.bin", r"described twice, also for domain 'animals'"),
        ("splits.train.animals", 'splits.train."../x"', "'../x' is no name of a domain"),
    ],
)
def test_a_mistake_in_the_description_is_named(
    tiny_shards: ShardSet, tmp_path: Path, old: str, new: str, message: str
) -> None:
    folder = convert(tiny_shards, tmp_path / "raw", "raw")
    text = (folder / "tokens.toml").read_text()
    assert old in text
    (folder / "tokens.toml").write_text(text.replace(old, new, 1))
    with pytest.raises((ConfigError, RegmixError), match=message):
        ShardSet.open(folder)


def test_more_files_than_may_be_open_are_mapped_all_the_same(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    import resource

    shutil.copy(tiny_shards.tokenizer_path, tmp_path)
    write_litpkds(tmp_path, "train_web", np.resize(np.arange(1, 301, dtype=np.uint16), 300_000), 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, hard), hard))
    try:
        arrays = ShardSet.open(tmp_path).arrays("train", "web")
        assert [int(array[-1]) for array in arrays] == [100, 200, 300] * 100
        del arrays
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
