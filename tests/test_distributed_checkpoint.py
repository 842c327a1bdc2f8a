"""Checkpoints of many ranks: exact on any number of them, and never a damaged one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_ranks as acts
import pytest
import torch
from checkpoint_ranks import Ranks

from regmix.errors import ModelError, StorageError
from regmix.large.distributed import checkpoint, checkpoint_index
from regmix.large.distributed.checkpoint_index import INDEX
from regmix.large.distributed.checkpoint_shard import write_shard
from regmix.large.distributed.pieces import Box, assign

NEWEST = "step-00000020"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved_by_two(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20 of seeds 1 and 2, written by two ranks. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("saved") / "two"
    ranks.run(2, acts.save, folder, 1, 2)
    return folder


@pytest.fixture
def two_steps(saved_by_two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_by_two, tmp_path / "two"))


@pytest.fixture(autouse=True)
def forget_damage() -> Iterator[None]:
    yield
    checkpoint._damaged.clear()


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_index(folder: Path, change: Callable[[dict], None], *, sign: bool) -> None:
    """Change the index of the newest step; `sign` it again, as a forger would."""
    path = folder / NEWEST / INDEX
    table = json.loads(path.read_text())
    del table["checksum"]
    digest = checkpoint_index._digest(table)
    change(table)
    digest = checkpoint_index._digest(table) if sign else digest
    path.write_text(checkpoint_index._text({**table, "checksum": digest}))


@pytest.mark.parametrize(("writers", "readers"), [(2, 2), (2, 1), (1, 2), (2, 3), (3, 2), (3, 3)])
def test_tensors_are_the_same_bits_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, writers: int, readers: int
) -> None:
    ranks.run(writers, acts.save, tmp_path, 1, 2)
    for found in ranks.run(readers, acts.load, tmp_path):
        assert found == {"step": 20, "differing": [], "said": []}


def test_ranks_and_a_process_without_ranks_read_each_other(
    ranks: Ranks, saved_by_two: Path, tmp_path: Path
) -> None:
    assert acts.load(saved_by_two) == {"step": 20, "differing": [], "said": []}
    acts.save(tmp_path, 3)
    for found in ranks.run(2, acts.load, tmp_path):
        assert found == {"step": 10, "differing": [], "said": []}


def test_every_element_is_written_once_and_replicas_by_all_ranks_in_turn(
    saved_by_two: Path,
) -> None:
    index = checkpoint_index.parse((saved_by_two / NEWEST / INDEX).read_text(), 20)
    for name, outline in index.tensors.items():
        numel = sum(shard.pieces[name].numel for shard in index.shards if name in shard.pieces)
        assert numel == torch.Size(outline.shape).numel(), name
    boxes = {"a": Box((0,), (100,)), "b": Box((0,), (90,)), "c": Box((0,), (80,))}
    assert assign([boxes, boxes], dict.fromkeys(boxes, 4)) == [{"a"}, {"b", "c"}]


def test_a_fully_sharded_module_is_read_whole_by_one_process(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, acts.save_module, tmp_path) == [48, 48]
    like = {"weight": torch.zeros(1, 6, 4)}
    assert checkpoint.load_newest(tmp_path, like) == (10, {})
    assert torch.equal(like["weight"], torch.arange(24.0).reshape(1, 6, 4))


def test_equal_state_gives_equal_bytes(ranks: Ranks, saved_by_two: Path, tmp_path: Path) -> None:
    ranks.run(2, acts.save, tmp_path / "again", 1, 2)
    assert content(tmp_path / "again") == content(saved_by_two)
    tensors = acts.whole_tensors(1)
    backwards = dict(reversed(tensors.items()))
    assert write_shard(tmp_path / "x", tensors) == write_shard(tmp_path / "y", backwards)
    checkpoint.save(tmp_path / "a", 1, tensors, {"x": 1, "y": [2.5, None]}, wait=True)
    checkpoint.save(tmp_path / "b", 1, backwards, {"y": [2.5, None], "x": 1}, wait=False).wait()
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_what_changes_while_a_save_is_written_is_not_in_it(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(2, acts.change_while_saving, tmp_path):
        assert found == {"was_done": False, "step": 10, "differing": [], "said": []}


def test_an_error_in_the_background_is_raised_on_all_ranks_at_the_next_call(
    ranks: Ranks, tmp_path: Path
) -> None:
    first, second = ranks.run(2, acts.fail_on_one_rank, tmp_path)
    assert "No space left" in second["raised"]
    assert first["raised"].startswith("Rank 1: ")
    assert "No space left" in first["raised"]
    for found in (first, second):
        assert found["between"] == 10
        assert (found["step"], found["differing"]) == (30, [])


def test_a_background_error_is_raised_once_by_wait_and_by_load(tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    tensors = acts.whole_tensors(1)
    saving = checkpoint.save(tmp_path / "a-file", 1, tensors, {}, wait=False)
    with pytest.raises(StorageError, match="a-file"):
        saving.wait()
    saving.wait()
    checkpoint.save(tmp_path / "a-file", 1, tensors, {}, wait=False)
    with pytest.raises(StorageError, match="a-file"):
        checkpoint.load_newest(tmp_path, tensors)
    assert checkpoint.load_newest(tmp_path, tensors) is None


def truncate(folder: Path) -> Path:
    path = folder / NEWEST / "shard-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def flip(folder: Path) -> Path:
    path = folder / NEWEST / "shard-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    return path


def flip_header(folder: Path) -> Path:
    path = folder / NEWEST / "shard-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    return path


def lose(folder: Path) -> Path:
    path = folder / NEWEST / "shard-00001-of-00002.safetensors"
    path.unlink()
    return path


def lose_the_index(folder: Path) -> Path:
    (folder / NEWEST / INDEX).unlink()
    return folder / NEWEST


def take_the_shard_before(folder: Path) -> Path:
    name = "shard-00000-of-00002.safetensors"
    shutil.copy(folder / "step-00000010" / name, folder / NEWEST / name)
    return folder / NEWEST / name


def take_the_index_before(folder: Path) -> Path:
    shutil.copy(folder / "step-00000010" / INDEX, folder / NEWEST / INDEX)
    return folder / NEWEST / INDEX


def take_an_index_of_another_world(folder: Path) -> Path:
    acts.save(folder.parent / "one", 1, 2)
    shutil.copy(folder.parent / "one" / NEWEST / INDEX, folder / NEWEST / INDEX)
    return folder / NEWEST / "shard-00000-of-00001.safetensors"


def edit(folder: Path) -> Path:
    edit_index(folder, lambda table: table["state"].update(seed=3), sign=False)
    return folder / NEWEST / INDEX


def cut_the_index(folder: Path) -> Path:
    path = folder / NEWEST / INDEX
    path.write_text(path.read_text()[:-40])
    return path


def empty_the_index(folder: Path) -> Path:
    (folder / NEWEST / INDEX).write_text("[]")
    return folder / NEWEST / INDEX


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, flip, flip_header, lose, lose_the_index, take_the_shard_before),
        *(take_the_index_before, take_an_index_of_another_world),
        *(edit, cut_the_index, empty_the_index),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(
    two_steps: Path, damage: Callable[[Path], Path]
) -> None:
    culprit = damage(two_steps)
    found = acts.load(two_steps)
    assert (found["step"], found["differing"]) == (10, [])
    assert len(found["said"]) == 1
    assert str(culprit) in found["said"][0]
    assert "the checkpoint before it is used" in found["said"][0]


def test_where_all_are_damaged_nothing_is_touched_and_it_is_said(two_steps: Path) -> None:
    flip(two_steps)
    lose_the_index(two_steps)
    (two_steps / "step-00000010" / INDEX).unlink()
    tensors = acts.whole_tensors(5)
    with acts.warnings() as said:
        assert checkpoint.load_newest(two_steps, tensors) is None
    assert acts.differing(tensors, 5) == []
    assert "there is no checkpoint before it" in said[-1]
    assert checkpoint.load_newest(two_steps / "nowhere", tensors) is None


def test_all_ranks_take_the_one_before_if_only_one_of_them_sees_damage(
    ranks: Ranks, saved_by_two: Path
) -> None:
    name = "shard-00001-of-00002.safetensors"
    found = ranks.run(2, acts.load_where_one_rank_reads_wrong, saved_by_two, name)
    assert [(f["step"], f["differing"]) for f in found] == [(10, []), (10, [])]
    assert name in found[0]["said"][0]


def test_nothing_is_unpickled(ranks: Ranks, saved_by_two: Path) -> None:
    for found in ranks.run(2, acts.load_without_pickle, saved_by_two):
        assert found == {"step": 20, "differing": [], "said": []}
    names = {path.name for path in (saved_by_two / NEWEST).iterdir()}
    assert names == {INDEX, *(f"shard-{rank:05d}-of-00002.safetensors" for rank in (0, 1))}


@pytest.mark.parametrize(
    "name", ["../step-00000010/shard-00000-of-00002.safetensors", "/etc/passwd"]
)
def test_an_index_cannot_name_a_file_outside_its_folder(two_steps: Path, name: str) -> None:
    edit_index(two_steps, lambda table: table["shards"][0].update(file=name), sign=True)
    found = acts.load(two_steps)
    assert found["step"] == 10
    assert str(two_steps / NEWEST / INDEX) in found["said"][0]


@pytest.mark.parametrize(
    "piece",
    [
        {"offset": [0, -1, 0], "shape": [1, 4, 5]},
        {"offset": [0, 1, 0], "shape": [1, 7, 5]},
        {"offset": [0, 0, 0], "shape": [1, 3, 5]},
        {"offset": [0, 0], "shape": [1, 4]},
    ],
)
def test_an_index_whose_pieces_do_not_fill_a_tensor_is_refused(
    two_steps: Path, piece: dict[str, list[int]]
) -> None:
    def change(table: dict) -> None:
        table["shards"][0]["pieces"]["parameters.embed"] = piece

    edit_index(two_steps, change, sign=True)
    assert acts.load(two_steps)["step"] == 10


def test_a_checkpoint_of_a_newer_version_is_an_error_with_a_cure(two_steps: Path) -> None:
    edit_index(two_steps, lambda table: table.update(version=2), sign=True)
    with pytest.raises(ModelError, match=r"version 2.*Install the newer"):
        acts.load(two_steps)


def test_a_checkpoint_of_another_model_is_an_error_not_damage(two_steps: Path) -> None:
    tensors = acts.whole_tensors(5)
    tensors["parameters.norm"] = torch.zeros(1, 6)
    with pytest.raises(ModelError, match=r"parameters\.norm.*\[1, 5\] there and .*\[1, 6\] in"):
        checkpoint.load_newest(two_steps, tensors)
    del tensors["parameters.norm"]
    with pytest.raises(ModelError, match=r"parameters\.norm.*absent in this run"):
        checkpoint.load_newest(two_steps, tensors)
    tensors = acts.whole_tensors(5)
    tensors["optimizer.step"] = torch.tensor(0.0)
    with pytest.raises(ModelError, match=r"optimizer\.step.*I64"):
        checkpoint.load_newest(two_steps, tensors)


def test_keep_last_keeps_the_newest_complete_ones(two_steps: Path) -> None:
    for step in (30, 40):
        shutil.copytree(two_steps / NEWEST, two_steps / f"step-{step:08d}")
    (two_steps / "step-00000040" / INDEX).unlink()
    (two_steps / "notes").mkdir()
    acts.save(two_steps.parent / "one", 1, 2, 3)
    shutil.rmtree(two_steps / "step-00000030")
    shutil.copytree(two_steps.parent / "one" / "step-00000030", two_steps / "step-00000030")
    checkpoint.keep_last(two_steps, 2)
    names = sorted(path.name for path in two_steps.iterdir())
    assert names == ["notes", NEWEST, "step-00000030", "step-00000040"]
    checkpoint.keep_last(two_steps, 1)
    assert acts.load(two_steps)["step"] == 30
    assert not (two_steps / NEWEST).exists()


@pytest.mark.parametrize("damage", [truncate, lose, lose_the_index, edit])
def test_keep_last_does_not_count_what_is_not_complete(
    two_steps: Path, damage: Callable[[Path], Path]
) -> None:
    damage(two_steps)
    checkpoint.keep_last(two_steps, 1)
    assert acts.load(two_steps)["step"] == 10


def test_keep_last_does_not_count_what_loading_found_damaged(two_steps: Path) -> None:
    flip(two_steps)
    assert acts.load(two_steps)["step"] == 10
    checkpoint.keep_last(two_steps, 1)
    assert acts.load(two_steps)["step"] == 10
    acts.save(two_steps, 1, 2)
    checkpoint.keep_last(two_steps, 1)
    assert acts.load(two_steps)["step"] == 20
    assert not (two_steps / "step-00000010").exists()


def test_keep_last_does_not_touch_what_is_being_written(two_steps: Path) -> None:
    begun, released, right = threading.Event(), threading.Event(), checkpoint._await_visible

    def late(*args: Any) -> None:
        begun.set()
        released.wait()
        right(*args)

    with mock.patch.object(checkpoint, "_await_visible", late):
        saving = checkpoint.save(two_steps, 5, acts.whole_tensors(5), {}, wait=False)
        begun.wait()
        checkpoint.keep_last(two_steps, 1)
        released.set()
        saving.wait()
    assert sorted(path.name for path in two_steps.iterdir()) == ["step-00000005", NEWEST]
    assert (two_steps / "step-00000005" / INDEX).exists()


def test_a_save_of_the_same_step_never_leaves_less_than_was_there(two_steps: Path) -> None:
    tensors = acts.spread(acts.whole_tensors(2))
    for failing in ("write_shard", "write_text"):
        error = StorageError("no", cure="Wait")
        with (
            mock.patch.object(checkpoint, failing, side_effect=error),
            pytest.raises(StorageError, match="no"),
        ):
            checkpoint.save(two_steps, 20, tensors, {"seed": 2}, wait=True)
        assert acts.load(two_steps) == {"step": 20, "differing": [], "said": []}
    checkpoint.save(two_steps, 20, tensors, {"seed": 2}, wait=True)
    names = {path.name for path in (two_steps / NEWEST).iterdir()}
    assert names == {INDEX, "shard-00000-of-00001.safetensors"}


def test_a_rank_copies_and_reads_no_more_than_its_own_part(ranks: Ranks, tmp_path: Path) -> None:
    rows = 1 << 18  # 64 MiB for each of two tensors
    assert max(ranks.run(2, acts.save_large, tmp_path, rows)) < 16 << 20
    for read, held in ranks.run(3, acts.load_large, tmp_path, rows):
        assert read == held < 45 << 20


def test_a_folder_that_the_machines_do_not_share_is_an_error(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(2, acts.write_elsewhere, tmp_path):
        assert "shard-00001-of-00002.safetensors: missing" in said
        assert "all machines of the run share" in said


def test_ranks_at_different_steps_write_nothing(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks.run(2, acts.disagree, tmp_path):
        assert "rank 1 saves another step" in said
    assert content(tmp_path) == {}


def test_killed_between_shards_and_index_the_one_before_is_used(
    ranks: Ranks, tmp_path: Path
) -> None:
    assert ranks.run(2, acts.die_before_the_index, tmp_path) == [None, "the other rank noticed"]
    assert len(list((tmp_path / NEWEST).glob("shard-*"))) == 2
    found = acts.load(tmp_path)
    assert (found["step"], found["differing"]) == (10, [])
    assert f"{tmp_path / NEWEST}: not finished" in found["said"][0]
