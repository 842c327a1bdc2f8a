"""`verify`: all damage is named, and the exit code says whether there is any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from regmix.cli.verify import command
from regmix.data import blocks
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, ShardError


@pytest.fixture
def copy(tiny_shards_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "_CHECKED", {})
    return shutil.copytree(tiny_shards_path, tmp_path / "shards")


@pytest.fixture
def arrays(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    """The training domains of the tiny corpus as .npy files."""
    folder = tmp_path / "arrays"
    (folder / "train").mkdir(parents=True)
    shutil.copy(tiny_shards.tokenizer_path, folder)
    for domain in tiny_shards.domains("train"):
        tokens = np.concatenate(tiny_shards.arrays("train", domain))
        np.save(folder / "train" / f"{domain}.npy", tokens)
    return folder


def verify(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def flip(path: Path, position: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def test_whole_shards_pass(copy: Path) -> None:
    result = verify(copy)
    assert result.exit_code == 0
    assert "Whole: 6 files" in result.output
    assert "MB/s" in result.output
    assert f"Next: regmix-fast inspect {copy}" in result.output


def test_every_damage_is_named_with_its_cure_and_the_exit_code_is_not_0(copy: Path) -> None:
    flip(copy / "train/animals-0.tokens", 4096 + 5)
    (copy / "valid/numbers-0.tokens").unlink()
    (copy / "tokenizer.json").write_text("{}")
    result = verify(copy)
    assert result.exit_code == 1
    assert "animals-0.tokens (domain 'animals', train): block 0 of 1 is damaged" in result.output
    assert "numbers-0.tokens (domain 'numbers', valid): the file is missing" in result.output
    assert "tokenizer.json: not the tokenizer" in result.output
    assert "Cure: Pack the corpus again" in result.output
    assert "3 problems in 3 files" in result.output
    assert "Whole" not in result.output


def test_json_has_all_damage(copy: Path) -> None:
    flip(copy / "train/animals-0.tokens", 4096 + 5)
    result = verify(copy, "--json", "--threads", 2)
    assert result.exit_code == 1
    answer = json.loads(result.stdout)
    (damage,) = answer["damage"]
    assert damage["domain"] == "animals"
    assert damage["block"] == 0
    assert answer["files"] == 6
    assert answer["token_bytes"] > 0


def test_json_of_whole_shards_says_so(copy: Path) -> None:
    answer = json.loads(verify(copy, "--json").stdout)
    assert answer["damage"] == []
    assert answer["checksum"] == ShardSet.open(copy).checksum


def test_a_damaged_manifest_is_an_error_that_names_it(copy: Path) -> None:
    flip(copy / "manifest.json", 100)
    with pytest.raises(ShardError, match=r"manifest\.json"):
        verify(copy)


def test_token_files_of_others_say_what_is_not_checked(arrays: Path) -> None:
    result = verify(arrays)
    assert result.exit_code == 0
    assert "Not checked: these formats hold no checksums" in result.output
    flip(arrays / "train/animals.npy", 128 + 401, 0x40)
    result = verify(arrays)
    assert result.exit_code == 1
    assert "animals.npy (domain 'animals', train): block 0: token id" in result.output


def test_recorded_checksums_find_what_ids_do_not(arrays: Path) -> None:
    path = arrays / "train/animals.npy"
    recorded = verify(arrays, "--record")
    assert recorded.exit_code == 0
    assert "tokens.checksums.json" in recorded.output
    assert "Not checked" not in verify(arrays).output
    tokens = np.load(path)
    tokens[100] ^= 1
    np.save(path, tokens)
    result = verify(arrays)
    assert result.exit_code == 1
    assert "block 0 is damaged: not what was recorded" in result.output
    # Meant to change: recorded anew.
    assert verify(arrays, "--record").exit_code == 0
    assert verify(arrays).exit_code == 0


def test_damaged_files_are_not_recorded(arrays: Path) -> None:
    flip(arrays / "train/animals.npy", 128 + 401, 0x40)
    assert verify(arrays, "--record").exit_code == 1
    assert not (arrays / "tokens.checksums.json").exists()


def test_packed_shards_need_no_recording(copy: Path) -> None:
    with pytest.raises(ConfigError, match="Leave --record out"):
        verify(copy, "--record")


def test_a_file_that_is_cut_does_not_count_as_checked(copy: Path) -> None:
    path = copy / "train/animals-0.tokens"
    path.write_bytes(path.read_bytes()[:-8])
    whole = json.loads(verify(copy, "--json").stdout)
    assert whole["files"] == 5
    assert "1 problem in 1 file; checked 5 files" in verify(copy).output


def test_json_has_the_same_fields_for_all_token_files(copy: Path, arrays: Path) -> None:
    packed, foreign = (json.loads(verify(path, "--json").stdout) for path in (copy, arrays))
    assert packed.keys() == foreign.keys()
    assert (packed["not_checked"], packed["recorded"]) == ("", None)
