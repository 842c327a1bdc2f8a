"""A pack that is stopped or killed goes on, does no file twice, and ends with the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pack_corpora import content, lines, put, texts

from regmix.data.packing import assembly, lanes, replacement
from regmix.data.packing import run as pack_run
from regmix.data.packing.pack import pack
from regmix.data.packing.units import UnitWriter
from regmix.data.shards import ShardSet
from regmix.errors import CorpusError, ShardError, StorageError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files of two domains, split by folders."""
    root = tmp_path / "corpus"
    for domain in ("code", "web"):
        for side, num in (("train", 3), ("valid", 1)):
            for number in range(num):
                name = f"{side}/{domain}-{number}.jsonl"
                put(root / name, lines(texts(name, 12)) + b"{bad\n")
    return root


def stop_after(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    """Interrupt the run when it has finished `num` units."""
    original, done = UnitWriter.finish, []

    def finish(self: UnitWriter, books: Any) -> None:
        original(self, books)
        done.append(1)
        if len(done) == num:
            raise CorpusError("stopped here", cure="Go on")

    monkeypatch.setattr(UnitWriter, "finish", finish)


@pytest.mark.parametrize("num", [1, 3, 7, 8])
def test_a_file_that_is_encoded_is_not_encoded_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num: int
) -> None:
    pack([corpus], tmp_path / "whole", train_bpe=300)
    with monkeypatch.context() as patch:
        stop_after(patch, num)
        with pytest.raises(CorpusError, match="stopped here"):
            pack([corpus], tmp_path / "out", train_bpe=300)
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        ShardSet.open(tmp_path / "out")
    (tmp_path / "out/train").mkdir(exist_ok=True)
    (tmp_path / "out/train/.web-0.tokens.123.tmp").write_bytes(b"of a killed run")
    (tmp_path / "out/.packing/0123.tmp").write_bytes(b"of a killed run")
    report = pack([corpus], tmp_path / "out", train_bpe=300)
    assert report.resumed_files == num
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("dedup", [False, True])
def test_a_group_that_is_in_the_shards_stays_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dedup: bool
) -> None:
    put(corpus / "train/web-9.jsonl", lines([*texts("valid/code-0.jsonl", 12), "new"]))
    pack([corpus], tmp_path / "whole", train_bpe=300, dedup=dedup)
    original = assembly.write_json

    def stop_after_code(path: Path, value: Any) -> None:
        original(path, value)
        if path.name == "code.train.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(assembly, "write_json", stop_after_code)
    with pytest.raises(KeyboardInterrupt):
        pack([corpus], tmp_path / "out", train_bpe=300, dedup=dedup)
    monkeypatch.undo()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tokens")}
    assert len(written) == 3
    report = pack([corpus], tmp_path / "out", train_bpe=300, dedup=dedup)
    assert report.resumed_files >= 5
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_settings_changed_files_and_missing_shards_are_done_again(
    corpus: Path, tmp_path: Path
) -> None:
    put(corpus / "valid/zero-0.jsonl", b"")  # no training document: the tokenizer stays the same
    out = tmp_path / "out"
    for vocab_size in (300, 310):
        with pytest.raises(CorpusError, match="domain 'zero'"):
            pack([corpus], out, train_bpe=vocab_size)
    assert len(list((out / ".packing").glob("*.unit"))) >= 1
    put(corpus / "valid/zero-0.jsonl", lines(["something"]))
    changed = corpus / "valid/code-0.jsonl"
    os.utime(changed, ns=(1, 1))  # only the time: the content is compared
    (out / "valid/web-0.tokens").unlink()
    pack([corpus], out, train_bpe=310)
    pack([corpus], tmp_path / "fresh", train_bpe=310)
    assert content(out) == content(tmp_path / "fresh")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_unit_damaged_by_a_power_cut_is_noticed_and_made_anew(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float
) -> None:
    pack([corpus], tmp_path / "whole", train_bpe=300)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(CorpusError):
            pack([corpus], tmp_path / "out", train_bpe=300)
    unit = max((tmp_path / "out/.packing").glob("*.unit"), key=lambda path: path.stat().st_size)
    raw = bytearray(unit.read_bytes())
    raw[int(len(raw) * place)] ^= 0xFF
    unit.write_bytes(raw)
    # Where the end of the unit is damaged, it does not count as one at all.
    with contextlib.suppress(StorageError):
        pack([corpus], tmp_path / "out", train_bpe=300)
    pack([corpus], tmp_path / "out", train_bpe=300)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def start(corpus: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "regmix.cli", "pack", str(corpus), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--train-bpe", "300", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_kills_at_any_moment_change_no_byte(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for number in range(6):
        put(corpus / f"web-{number}.jsonl", lines(texts(f"web {number}", 900)))
        put(corpus / f"code-{number}.jsonl", lines(texts(f"code {number}", 600)))
    options = ("--workers", "2", "--dedup")
    started = time.monotonic()
    assert start(corpus, tmp_path / "whole", *options).wait() == 0
    whole = time.monotonic() - started
    draw = random.Random(7)
    for number in range(3):
        process = start(corpus, tmp_path / "out", *options)
        time.sleep(whole * draw.uniform(0.3, 0.9))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (-signal.SIGKILL, 0), number
    assert start(corpus, tmp_path / "out", *options).wait() == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


STEPS = ["write_manifest", "_settle", "_link", "_clean", "remove_others"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("links", [True, False])
def test_a_replacement_that_is_killed_at_any_step_is_healed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, links: bool
) -> None:
    out = tmp_path / "out"
    first = pack([corpus], out, train_bpe=300)
    (corpus / "train/web-2.jsonl").unlink()
    fresh = pack([corpus], tmp_path / "fresh", train_bpe=310)
    original, calls = getattr(replacement, step), []

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == (4 if step == "_link" else 1):
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(replacement, step, killed)
        if not links:
            patch.setattr(replacement.os, "link", no_links)
        with pytest.raises(KeyboardInterrupt):
            pack([corpus], out, train_bpe=310, force=True)
        if links or step == "write_manifest":
            shards = ShardSet.open(out)
            assert shards.verify() > 0
            assert (shards.checksum == first.checksum) == (step == "write_manifest")
        report = pack([corpus], out, train_bpe=310, force=step == "write_manifest")
    assert report.checksum == fresh.checksum
    assert content(out) == content(tmp_path / "fresh")


def no_links(source: Path, target: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(source)
    raise PermissionError("no hard links here")


def test_a_replacement_that_was_complete_is_not_packed_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    pack([corpus], out, train_bpe=300)
    with monkeypatch.context() as patch:
        patch.setattr(replacement, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            pack([corpus], out, train_bpe=310, force=True)
    monkeypatch.setattr(pack_run.Lanes, "__init__", stop)
    assert pack([corpus], out, train_bpe=310, force=True).dtype == "uint16"
    assert ShardSet.open(out).manifest.settings["tokenizer"] == "bpe 310"


def stop(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_two_packs_into_one_folder_are_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack_again(*arguments: object) -> None:
        with pytest.raises(StorageError, match="another process packs into it"):
            pack([corpus], tmp_path / "out", train_bpe=300)
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_run, "_begin", pack_again)
    with pytest.raises(KeyboardInterrupt):
        pack([corpus], tmp_path / "out", train_bpe=300)


def test_an_encoding_process_that_dies_is_an_error_and_the_next_run_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = lanes.Lanes.__enter__

    def kill_one(self: lanes.Lanes) -> lanes.Lanes:
        os.kill(self._encoders.processes[0], signal.SIGKILL)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(lanes.Lanes, "__enter__", kill_one)
        with pytest.raises(StorageError, match=r"killed by signal 9 \(out of memory\?\).*again"):
            pack([corpus], tmp_path / "out", train_bpe=300, workers=2)
    pack([corpus], tmp_path / "out", train_bpe=300, workers=2)
    pack([corpus], tmp_path / "whole", train_bpe=300)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
