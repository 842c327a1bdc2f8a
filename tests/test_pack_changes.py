"""What changes under a pack: files between stop and resume, units, another process, the system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from pack_corpora import content, lines, put, texts

from regmix.data.packing import encoder_pool, lanes, replacement
from regmix.data.packing import pack as pack_module
from regmix.data.packing.encoder import EncoderSettings
from regmix.data.packing.encoder_pool import ProcessEncoders
from regmix.data.packing.pack import pack
from regmix.data.packing.readers import Block
from regmix.data.packing.run import sole_packer
from regmix.data.packing.units import UnitWriter
from regmix.data.tokenizer import train_bpe
from regmix.errors import CorpusError, StorageError


@pytest.fixture
def shared_texts(tmp_path: Path) -> Path:
    """Two domains with texts in common, and a tokenizer that does not depend on them."""
    root = tmp_path / "corpus"
    put(root / "train/a-1.jsonl", lines(texts("a", 30)))
    put(root / "train/b-1.jsonl", lines(texts("b", 30) + texts("c", 20)))
    put(root / "valid/a-1.jsonl", lines(texts("valid", 5)))
    put(root / "valid/b-1.jsonl", lines(texts("valid b", 5)))
    (tmp_path / "bpe.json").write_text(train_bpe(texts("bpe", 50), 300).text)
    return root


def stop_before_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "_finish", stop)


def deduplicated(corpus: Path, out: Path) -> None:
    pack([corpus], out, tokenizer=corpus.parent / "bpe.json", dedup=True)


def test_duplicates_of_a_file_that_changed_before_the_resume_are_found(
    shared_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_before_manifest(patch)
        with pytest.raises(KeyboardInterrupt):
            deduplicated(shared_texts, tmp_path / "out")
    put(shared_texts / "train/a-1.jsonl", lines(texts("a", 30) + texts("c", 20)))
    deduplicated(shared_texts, tmp_path / "out")
    deduplicated(shared_texts, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_unit_of_a_group_in_the_shards_is_made_anew_for_deduplication(
    shared_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patch:
        stop_before_manifest(patch)
        with pytest.raises(KeyboardInterrupt):
            deduplicated(shared_texts, tmp_path / "out")
    for unit in (tmp_path / "out/.packing").glob("*.unit"):
        raw = bytearray(unit.read_bytes())
        raw[len(raw) // 3] ^= 0xFF
        unit.write_bytes(raw if damage == "flipped" else raw[:-20])
        if damage == "gone":
            unit.unlink()
    for _ in range(4):  # one flipped byte is found at a time
        with contextlib.suppress(StorageError):
            deduplicated(shared_texts, tmp_path / "out")
    deduplicated(shared_texts, tmp_path / "out")
    deduplicated(shared_texts, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["a-1.jsonl", "a-1.txt"])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / "corpus" / name
    put(file, lines(texts("a", 30)))
    original = lanes.read_blocks

    def read_and_append(*arguments: Any, **options: Any) -> Any:
        yield from original(*arguments, **options)
        with open(file, "ab") as stream:
            stream.write(lines(["one more"]))

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "read_blocks", read_and_append)
        with pytest.raises(CorpusError, match="changed while it was read"):
            pack([file], tmp_path / "out", train_bpe=300, valid_fraction=0)
    report = pack([file], tmp_path / "out", train_bpe=300, valid_fraction=0)
    assert report.records == (1 if name.endswith("txt") else 31)


def test_a_disk_that_fills_up_under_a_unit_is_an_error_with_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        closed = False

        def write(self, raw: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    put(tmp_path / "a-1.jsonl", lines(texts("a", 30)))
    original = UnitWriter.__init__

    def on_a_full_disk(self: UnitWriter, path: Path) -> None:
        original(self, path)
        self._stream.close()
        self._stream = FullDisk()  # type: ignore[assignment]

    monkeypatch.setattr(UnitWriter, "__init__", on_a_full_disk)
    with pytest.raises(StorageError, match=r"No space left on device\. Free some"):
        pack([tmp_path / "a-1.jsonl"], tmp_path / "out", train_bpe=300, valid_fraction=0)
    assert not list((tmp_path / "out/.packing").glob("*.tmp"))


def test_a_second_pack_leaves_the_lock_of_the_one_that_replaces_the_corpus(
    shared_texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pack([shared_texts], out, train_bpe=300)
    with sole_packer(out):
        assert pack([shared_texts], out, train_bpe=300).already_complete
        with pytest.raises(StorageError, match="another process packs into it"):
            pack([shared_texts], out, train_bpe=300, force=True)


def test_a_second_pack_does_not_end_the_replacement_of_another(
    shared_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack([shared_texts], out, train_bpe=300)
    original = replacement._settle

    def meanwhile(folder: Path) -> None:
        monkeypatch.setattr(replacement, "_settle", original)
        with pytest.raises(StorageError, match="another process packs into it"):
            pack([shared_texts], out, train_bpe=320)
        original(folder)

    monkeypatch.setattr(replacement, "_settle", meanwhile)
    pack([shared_texts], out, train_bpe=320, force=True)
    pack([shared_texts], tmp_path / "whole", train_bpe=320)
    assert content(out) == content(tmp_path / "whole")


def test_a_lock_that_was_removed_while_it_was_taken_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", original)
        (tmp_path / ".pack.lock").unlink()  # the owner ends between open and flock
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        sole_packer(tmp_path),
        pytest.raises(StorageError, match="another process"),
        sole_packer(tmp_path),
    ):
        pass


def test_a_corpus_completed_by_another_since_the_look_is_not_packed_again(
    shared_texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def meanwhile(*arguments: object) -> None:
        monkeypatch.undo()
        pack([shared_texts], out, train_bpe=300)

    monkeypatch.setattr(pack_module, "check_space", meanwhile)
    assert pack([shared_texts], out, train_bpe=300).already_complete


def settings() -> EncoderSettings:
    tokenizer = train_bpe(texts("bpe", 50), 300)
    return EncoderSettings(
        tokenizer=tokenizer.text,
        separator=tokenizer.separator,
        where="here" * 500_000,  # more than a pipe holds
        engine="tokenizers",
        text_field="text",
        valid_fraction=None,
        max_bytes=1_000_000,
        hashes=False,
    )


def encoded(encoders: ProcessEncoders) -> int:
    raw = lines(texts("a", 10))
    future: Future[Any] = encoders.submit(
        Block(kind="lines", parts=(raw,), first=True), side="train", verify_bytes=0
    )
    return int(future.result(timeout=20).num_records)


def test_a_system_that_refuses_large_pipes_encodes_through_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Linux gives 64 MiB of pipes to a user who is not root: 32 processes of two pipes.
    original = fcntl.fcntl

    def refuse(descriptor: int, command: int, *arguments: Any) -> Any:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return original(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    encoders = ProcessEncoders(settings(), 1)
    try:
        assert encoded(encoders) == 10
    finally:
        encoders.close()


def test_an_answer_that_cannot_be_read_is_an_error_and_no_endless_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(stream: object) -> None:
        raise MemoryError("no room for the answer")

    encoders = ProcessEncoders(settings(), 1)
    monkeypatch.setattr(encoder_pool, "receive", no_memory)
    try:
        with pytest.raises(MemoryError, match="no room"):
            encoded(encoders)
    finally:
        encoders.close()


def test_an_encoding_process_that_never_starts_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_pool.sys, "executable", "/bin/false")
    encoders = ProcessEncoders(settings(), 1)
    try:
        with pytest.raises(StorageError, match="an encoding process ended with code 1"):
            encoded(encoders)
    finally:
        encoders.close()


def test_a_file_name_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/a-\xff.jsonl"
    with open(name, "wb") as stream:
        stream.write(lines(texts("a", 30)))
    with pytest.raises(CorpusError, match=r"a-\\xff\.jsonl: its name is not UTF-8\. Rename it"):
        pack([tmp_path], tmp_path / "out", train_bpe=300, valid_fraction=0)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_cut_short(tmp_path: Path, compression: str) -> None:
    put(tmp_path / "in/a-1.jsonl", lines(texts("a", 30)))
    put(tmp_path / f"in/a-2.jsonl{compression}", b"")
    with pytest.raises(CorpusError, match=r"a-2.*damaged or cut short.*no bytes"):
        pack([tmp_path / "in"], tmp_path / "out", train_bpe=300, valid_fraction=0)
