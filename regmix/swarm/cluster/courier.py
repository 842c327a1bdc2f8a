"""Files carried between the coordinator and a Ray node that does not see the study's folder.

Enters: a job, and a way to call the node's actor. Leaves: the newest checkpoint where it is needed,
results and logs in the study's folder, each whole or not at all. Only the coordinator writes there.
Files go in parts, as a checkpoint may be larger than the memory that Ray has for objects.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regmix.data.shards import ShardSet
from regmix.errors import StorageError
from regmix.files import atomic_open
from regmix.swarm.checkpoint import KEPT, checkpoints
from regmix.swarm.cluster.scratch import checkpoint_name
from regmix.swarm.jobs import RESULT_FILE
from regmix.swarm.shard_cache import corpus_files, parts_of

PART_BYTES = 16 << 20
_TRIES = 3
# Calls the node's actor: its method's name, then arguments; waits for the answer.
Call = Callable[..., Any]


class Courier:
    """Carries files of one place.

    turns: how many transfers the coordinator takes part in at a time, over all places.
    """

    def __init__(self, call: Call, turns: threading.Semaphore) -> None:
        self._call, self._turns = call, turns

    def deliver(self, job: dict[str, Any]) -> None:
        """Bring a job's result, or its newest checkpoint, to the node, unless it has it."""
        folder, name = Path(job["folder"]), job["name"]
        self._call("keep_only", name)
        there = self._call("newest_step", name)
        if (folder / RESULT_FILE).is_file():
            self._bring(folder / RESULT_FILE, name)
            return
        newest = next(iter(checkpoints(folder)), None)
        if newest is not None and (there is None or newest.name > checkpoint_name(there)):
            # The newest may be damaged; then the one before it is used.
            for path in reversed(checkpoints(folder)):
                self._bring(path, name)

    def _bring(self, path: Path, stack: str) -> None:
        size, target = path.stat().st_size, f"stacks/{stack}/{path.name}"
        with self._turns:
            for offset, part in parts_of(path, PART_BYTES):
                is_last = offset + len(part) >= size
                self._call("write_file", target, offset, part, is_last)

    def fetch_checkpoint(self, job: dict[str, Any]) -> None:
        """Store a job's newest checkpoint in the study, unless it is there."""
        folder, name = Path(job["folder"]), job["name"]
        for _ in range(_TRIES):
            step = self._call("newest_step", name)
            if step is None or (folder / checkpoint_name(step)).is_file():
                return
            # The worker keeps two, and may remove this one while it is read.
            if self._fetch(
                f"stacks/{name}/{checkpoint_name(step)}", folder / checkpoint_name(step)
            ):
                break
        for old in checkpoints(folder)[KEPT:]:
            with contextlib.suppress(OSError):
                old.unlink()

    def fetch_results(self, job: dict[str, Any]) -> None:
        """Store a trained job's training losses and result in the study.

        Not its parameters: of proxies nobody reads them.
        """
        folder, name = Path(job["folder"]), job["name"]
        there = self._call("files", name)
        wanted = [f"{member['name']}.npy" for member in job["members"]]
        for file in [*wanted, RESULT_FILE]:
            if file in there and self._fetch(f"stacks/{name}/{file}", folder / file):
                continue
            # Of a stack that was trained before they may be in the study already.
            places = (folder / file, folder.parent.parent / "steps" / file)
            if not any(path.is_file() for path in places):
                raise StorageError(
                    f"{file} of stack {name} is not on its node any more",
                    cure="Let nobody clean the --scratch folder; the stack is trained again",
                )

    def fetch_log(self, name: str, target: Path) -> None:
        """Add a worker's log to the study's."""
        offset = 0
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "ab") as stream:
            while part := self._call("read_file", f"logs/{name}", offset, PART_BYTES):
                stream.write(part)
                offset += len(part)

    def _fetch(self, path: str, target: Path) -> bool:
        """Store a file; False where it went meanwhile, and then nothing is stored."""
        offset = 0
        with self._turns, contextlib.suppress(_GoneError), atomic_open(target) as stream:
            while True:
                part = self._call("read_file", path, offset, PART_BYTES)
                if part is None:
                    raise _GoneError
                stream.write(part)
                offset += len(part)
                if len(part) < PART_BYTES:
                    break
        return target.is_file()


class _GoneError(Exception):
    """A file went while it was read."""


def send_corpus(shards: ShardSet, cache: str, call: Call, pause: Callable[[float], object]) -> str:
    """Bring a corpus to a node's cache, unless it is there; return its path on that node.

    pause: waits some seconds, for another process of that machine that receives it; what it raises
    ends the waiting.
    """
    files = corpus_files(shards)
    while (state := call("begin_corpus", cache, shards.checksum, files)) == "busy":
        pause(1.0)
    if state != "send":
        return str(state)
    for name in files:
        for offset, part in parts_of(shards.path / name, PART_BYTES):
            call("write_corpus", name, offset, part)
            pause(0.0)
    return str(call("finish_corpus"))
