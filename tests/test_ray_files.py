"""Files between a coordinator and a node that does not see the study, without Ray itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regmix.data.shards import ShardSet
from regmix.errors import StorageError
from regmix.swarm.cluster import courier as courier_module
from regmix.swarm.cluster.actor import PlaceActor
from regmix.swarm.cluster.courier import Courier, send_corpus
from regmix.swarm.cluster.scratch import Scratch
from regmix.swarm.shard_cache import find_copy


@pytest.fixture
def actor(tmp_path: Path) -> Iterator[PlaceActor]:
    """An actor as Ray would make it, in this process."""
    made = PlaceActor(device="cpu", threads=1, module="none", scratch=str(tmp_path / "scratch"))
    made.make_scratch()
    yield made
    made.close()


def calls_of(actor: PlaceActor) -> Callable[..., Any]:
    return lambda method, *arguments: getattr(actor, method)(*arguments)


@pytest.fixture
def courier(actor: PlaceActor, monkeypatch: pytest.MonkeyPatch) -> Courier:
    monkeypatch.setattr(courier_module, "PART_BYTES", 1000)
    return Courier(calls_of(actor), threading.Semaphore(1))


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """What the courier reads of a job."""
    folder = tmp_path / "study" / "stacks" / "stack-0001"
    folder.mkdir(parents=True)
    return {"name": "stack-0001", "folder": str(folder), "members": [{"name": "3"}, {"name": "4"}]}


def there(actor: PlaceActor, job: dict[str, Any]) -> Path:
    folder = Path(actor.make_scratch()) / "stacks" / job["name"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint(folder: Path, step: int, size: int = 2500) -> bytes:
    content = step.to_bytes(4, "little") + os.urandom(size - 4)
    (folder / f"step-{step:08d}.safetensors").write_bytes(content)
    return content


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in folder.glob("step-*.safetensors"))


@pytest.mark.parametrize("size", [4, 999, 1000, 1001, 2000, 2500])
def test_a_checkpoint_comes_and_goes_whole(
    actor: PlaceActor, courier: Courier, job: dict[str, Any], size: int
) -> None:
    here, far = Path(job["folder"]), there(actor, job)
    made = checkpoint(far, 20, size)
    courier.fetch_checkpoint(job)
    assert (here / "step-00000020.safetensors").read_bytes() == made
    (far / "step-00000020.safetensors").unlink()
    courier.deliver(job)
    assert (far / "step-00000020.safetensors").read_bytes() == made


def test_only_the_newest_checkpoint_travels_and_two_are_kept(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    here, far = Path(job["folder"]), there(actor, job)
    for step in (10, 20):
        checkpoint(far, step)
    courier.fetch_checkpoint(job)
    assert steps(here) == [20]
    for step in (30, 40):
        checkpoint(far, step)
        courier.fetch_checkpoint(job)
    assert steps(here) == [30, 40]
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_a_node_keeps_its_newer_checkpoint(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    checkpoint(Path(job["folder"]), 10)
    newer = checkpoint(there(actor, job), 20)
    courier.deliver(job)
    assert steps(there(actor, job)) == [20]
    assert (there(actor, job) / "step-00000020.safetensors").read_bytes() == newer


def test_both_checkpoints_are_delivered_so_that_a_damaged_one_can_be_passed_over(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    for step in (10, 20):
        checkpoint(Path(job["folder"]), step)
    courier.deliver(job)
    assert steps(there(actor, job)) == [10, 20]


def test_a_result_is_delivered_instead_of_a_checkpoint(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    here = Path(job["folder"])
    checkpoint(here, 10)
    (here / "result.json").write_text("{}")
    courier.deliver(job)
    assert [path.name for path in there(actor, job).iterdir()] == ["result.json"]


def test_results_come_without_parameters(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    far = there(actor, job)
    for name in ("3.npy", "4.npy", "3.safetensors", "4.safetensors", "result.json"):
        (far / name).write_bytes(name.encode())
    courier.fetch_results(job)
    here = Path(job["folder"])
    assert sorted(path.name for path in here.iterdir()) == ["3.npy", "4.npy", "result.json"]
    assert (here / "4.npy").read_bytes() == b"4.npy"


def test_a_file_that_goes_while_it_is_read_leaves_nothing(
    actor: PlaceActor, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier_module, "PART_BYTES", 1000)
    far, here = there(actor, job), Path(job["folder"])
    checkpoint(far, 10)
    call = calls_of(actor)

    def removing(method: str, *arguments: Any) -> Any:
        if method == "read_file" and arguments[1] == 1000 and "00000010" in arguments[0]:
            # As a worker does that keeps two.
            (far / "step-00000010.safetensors").unlink()
            checkpoint(far, 30)
        return call(method, *arguments)

    Courier(removing, threading.Semaphore(1)).fetch_checkpoint(job)
    assert [path.name for path in here.iterdir()] == ["step-00000030.safetensors"]


def test_an_order_removes_what_lies_there_of_other_stacks(
    actor: PlaceActor, courier: Courier, job: dict[str, Any]
) -> None:
    checkpoint(there(actor, {"name": "stack-0000"}), 10)
    courier.deliver(job)
    assert actor.files("stack-0000") == {}


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/passwd", "", ".hidden", "a//b"])
def test_no_name_leaves_the_scratch_folder(tmp_path: Path, name: str) -> None:
    scratch = Scratch(tmp_path / "base")
    with pytest.raises(StorageError, match="no name of a stack's file"):
        scratch.write(name, 0, b"x", True)
    with pytest.raises(StorageError, match="no name of a stack's file"):
        scratch.read(name, 0, 1)
    with pytest.raises(StorageError, match="no name of a stack's file"):
        scratch.stack(name.replace("//", "/"))
    scratch.close()


def test_a_folder_of_a_killed_process_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    living = Scratch(tmp_path)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from regmix.swarm.cluster.scratch import Scratch\n"
        "Scratch(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -9
    assert len(list(tmp_path.glob("actor-*"))) == 2
    new = Scratch(tmp_path)
    assert set(tmp_path.glob("actor-*")) == {living.path, new.path}
    living.close()
    new.close()
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_a_node_does_not_see_is_sent(
    actor: PlaceActor,
    tiny_shards: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(courier_module, "PART_BYTES", 5000)
    cache = tmp_path / "cache"
    call, pauses = calls_of(actor), []
    path = send_corpus(tiny_shards, str(cache), call, pauses.append)
    assert find_copy(cache, tiny_shards.checksum) == Path(path)
    assert ShardSet.open(path).damage() == []
    sent = len(pauses)
    assert send_corpus(tiny_shards, str(cache), call, pauses.append) == path
    assert len(pauses) == sent


def test_a_place_that_nobody_polls_ends_itself_and_its_worker(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import json, sys, time\nprint(json.dumps({'ready': 1}), flush=True)\ntime.sleep(600)\n"
    )
    code = (
        "import sys, time\n"
        "from regmix.swarm.cluster.actor import PlaceActor\n"
        "actor = PlaceActor(device='cpu', threads=1, module='sleeper', scratch=sys.argv[1],"
        " contact_seconds=1.0)\n"
        "actor.make_scratch()\n"
        "actor.start(0, 'worker', None)\n"
        "while not actor.poll(0, 5.0): pass\n"
        "print(actor._workers[0].process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "scratch"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    assert process.wait(60) == 1
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    assert list((tmp_path / "scratch").iterdir()) == []
