"""Checkpoints of a run on many ranks: every rank writes its part, any number of ranks reads it.

Enters: tensors, sharded (`DTensor`) or the same on all ranks, and a JSON state; a folder that all
ranks see. Leaves: `step-<n>/` with a file per rank and, last, `index.json`; the newest undamaged
one back in tensors that are sharded in any other way. A rank reads and writes a piece at a time,
its own. Pickles and unpickles nothing. Does not know what the tensors are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regmix.errors import ModelError, StorageError
from regmix.files import checksum, read_text, storage_errors, sync_directory, write_text
from regmix.large.distributed.checkpoint_index import (
    INDEX,
    Index,
    Outline,
    ShardRecord,
    parse,
    render,
    shard_name,
)
from regmix.large.distributed.checkpoint_shard import DTYPES, open_shard, read_slice, write_shard
from regmix.large.distributed.exchange import Exchange, this_rank
from regmix.large.distributed.pieces import Box, assign, held

__all__ = ["Save", "keep_last", "load_newest", "save"]

VISIBLE_SECONDS = 60.0  # a network file system may show another machine's file that late
_NAME = re.compile(r"step-(\d{8,})")
_pending: list[Save] = []
# Found damaged by this process: kept on disk, but not counted as a checkpoint to fall back on.
_damaged: set[Path] = set()
logger = logging.getLogger(__name__)


class Save:
    """A checkpoint that is being written, or was; `target` is its folder."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it is written or has failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is written; raise, once, what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self in _pending:
            _pending.remove(self)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _start(self, writing: _Writing) -> None:
        def run() -> None:
            try:
                writing.run()
            except BaseException as error:
                self._error = error

        _pending.append(self)
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], *, wait: bool
) -> Save:
    """Write the checkpoint of `step`; every rank calls it, with the same names, step and state.

    Tensors that are not sharded must be equal on all ranks: each is written by one of them; so is
    `state`, by rank 0. Without `wait` what this rank will write is copied to memory, and the call
    returns; call `wait` of the result before the process group is destroyed.
    Raises `StorageError` on all ranks where one cannot write, here or at the next call; whatever
    was there before is then still there. `ValueError` where the ranks do not agree.
    """
    _finish_pending()
    exchange = Exchange()
    plain_state = json.loads(json.dumps(state))
    parts: dict[str, tuple[Box, Tensor]] = {}

    def describe() -> dict[str, Any]:
        parts.update((name, held(tensor)) for name, tensor in tensors.items())
        return {
            "step": step,
            "tensors": {name: _outline(name, tensor) for name, tensor in tensors.items()},
            "boxes": {name: [box.offset, box.shape] for name, (box, _) in parts.items()},
        }

    ranks = exchange.together(describe)
    for rank, other in enumerate(ranks):
        if other["step"] != ranks[0]["step"] or other["tensors"] != ranks[0]["tensors"]:
            raise ValueError(f"rank {rank} saves another step or other tensors than rank 0")
    boxes = [_boxes(rank["boxes"]) for rank in ranks]
    widths = {name: tensor.element_size() for name, tensor in tensors.items()}
    pieces = {name: parts[name] for name in assign(boxes, widths)[exchange.rank]}
    if not wait:
        pieces = {name: (box, part.to("cpu", copy=True)) for name, (box, part) in pieces.items()}
    outlines = {n: Outline(dtype, tuple(s)) for n, (dtype, s) in ranks[0]["tensors"].items()}
    index = Index(step=step, tensors=outlines, shards=(), state=plain_state)
    writing = _Writing(_place(folder, step), exchange, pieces, index)
    handle = Save(writing.target)
    if wait:
        writing.run()
    else:
        handle._start(writing)
    return handle


class _Writing:
    """The part of a save that touches the disk; runs in the caller's thread or beside it."""

    def __init__(
        self,
        target: Path,
        exchange: Exchange,
        pieces: dict[str, tuple[Box, Tensor]],
        index: Index,
    ) -> None:
        self.target, self._exchange = target, exchange
        self._pieces, self._index = pieces, index

    def run(self) -> None:
        """Write this rank's file; once all ranks have, rank 0 writes the index."""
        shards = self._exchange.together(self._write_shard)
        self._exchange.from_first(lambda: self._commit(shards))

    def _write_shard(self) -> dict[str, Any]:
        exchange = self._exchange
        path = self.target / shard_name(exchange.rank, exchange.num_ranks)
        size, digest = write_shard(path, {name: part for name, (_, part) in self._pieces.items()})
        boxes = {name: [box.offset, box.shape] for name, (box, _) in self._pieces.items()}
        return {"bytes": size, "xxh3_64": digest, "pieces": boxes}

    def _commit(self, shards: list[dict[str, Any]]) -> None:
        records = tuple(
            ShardRecord(
                bytes=shard["bytes"],
                xxh3_64=shard["xxh3_64"],
                pieces=_boxes(shard["pieces"]),
            )
            for shard in shards
        )
        index = Index(self._index.step, self._index.tensors, records, self._index.state)
        _await_visible(self.target, index)
        # A checkpoint of this step that lies there already stays whole until here: equal shards
        # replaced equal ones, or have the names of another number of ranks.
        write_text(self.target / INDEX, render(index))
        sync_directory(self.target.parent)
        _damaged.discard(self.target)
        keep = {INDEX, *index.shard_names()}
        with contextlib.suppress(OSError):
            for path in self.target.iterdir():
                if path.name not in keep:
                    path.unlink()


def load_newest(folder: Path, like: Mapping[str, Tensor]) -> tuple[int, dict[str, Any]] | None:
    """Fill `like` in place from the newest undamaged checkpoint; return its step and state.

    Every rank calls it with the same names; `like` may be sharded in any way. All ranks take the
    same checkpoint: one that is damaged for any of them is named in a warning, and the one before
    it is used. None, with `like` untouched, where there is none.
    Raises `ModelError` where a checkpoint is whole but of other tensors, `StorageError` where
    reading fails after it was found whole: then `like` may be filled in part.
    """
    _finish_pending()
    exchange = Exchange()
    folder = Path(folder).absolute()
    steps = exchange.from_first(lambda: _steps(folder))
    for number, step in enumerate(steps):
        target = _place(folder, step)
        index = None
        text, damage = exchange.from_first(partial(_read_index, target, step))
        if damage is None:
            index = parse(text, step)
            damage = _find_damage(exchange, target, index)
        if index is None or damage is not None:
            if exchange.rank == 0:
                _damaged.add(target)
                before = "the checkpoint before it is used"
                if number + 1 == len(steps):
                    before = "there is no checkpoint before it"
                logger.warning("%s; %s", damage, before)
            continue
        exchange.together(partial(_fill, target, index, like))
        return step, index.state
    return None


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the newest `count` complete checkpoints, and what is older than they.

    Rank 0 does it, the others return at once. Complete is one with a sound index and all files in
    full length that this process did not find damaged; one that is being written is not counted
    and not touched. What is unfinished or damaged goes once `count` newer ones are complete.
    """
    if count < 1:
        raise ValueError("at least one checkpoint must be kept")
    if this_rank() != 0:
        return
    folder = Path(folder).absolute()
    busy = {handle.target for handle in _pending if not handle.done}
    kept = 0
    for step in _steps(folder):
        target = _place(folder, step)
        if target in busy:
            continue
        if kept >= count:
            _remove(target)
        elif target not in _damaged and _is_complete(target, step):
            kept += 1


def _finish_pending() -> None:
    for handle in list(_pending):
        handle.wait()


def _place(folder: Path, step: int) -> Path:
    return Path(folder).absolute() / f"step-{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in `folder`, complete or not, newest first."""
    if not folder.is_dir():
        return []
    with storage_errors(folder):
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    found = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return sorted((s for s in found if _place(folder, s).name in names), reverse=True)


def _boxes(table: Mapping[str, Any]) -> dict[str, Box]:
    return {name: Box(tuple(offset), tuple(shape)) for name, (offset, shape) in table.items()}


def _outline(name: str, tensor: Tensor) -> tuple[str, list[int]]:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"'{name}' has the type {tensor.dtype}, which checkpoints do not hold")
    return DTYPES[tensor.dtype], list(tensor.shape)


def _await_visible(target: Path, index: Index) -> None:
    """Wait until this machine sees the files of all ranks."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while (problem := _wrong_size(target, index)) is not None:
        if time.monotonic() > deadline:
            raise StorageError(
                f"{problem}, though its rank has written it",
                cure="Name a folder that all machines of the run share",
            )
        time.sleep(0.2)


def _wrong_size(target: Path, index: Index) -> str | None:
    for name, shard in zip(index.shard_names(), index.shards, strict=True):
        path = target / name
        try:
            size = path.stat().st_size
        except OSError:
            return f"{path}: missing"
        if size != shard.bytes:
            return f"{path}: {size} bytes, {shard.bytes} were written"
    return None


def _read_index(target: Path, step: int) -> tuple[str | None, str | None]:
    """Return the text of a sound index, or what is wrong with it."""
    path = target / INDEX
    if not path.exists():
        return None, f"{target}: not finished, it has no {INDEX}"
    try:
        text = read_text(path)
        parse(text, step)
    except StorageError as error:
        return None, error.what
    except ValueError as error:
        return None, f"{path}: {error}"
    except ModelError as error:
        raise ModelError(f"{path}: {error.what}", cure=error.cure) from error
    return text, None


def _find_damage(exchange: Exchange, target: Path, index: Index) -> str | None:
    """Return what any rank finds wrong with the files; each of them reads its share whole."""

    def look() -> str | None:
        problem = _wrong_size(target, index)
        names = index.shard_names()
        for name, shard in list(zip(names, index.shards, strict=True))[
            exchange.rank :: exchange.num_ranks
        ]:
            if problem is None:
                problem = _wrong_content(target / name, shard)
        return problem

    return next((problem for problem in exchange.together(look) if problem is not None), None)


def _wrong_content(path: Path, shard: ShardRecord) -> str | None:
    try:
        digest = checksum(path)
    except StorageError as error:
        return error.what
    return None if digest == shard.xxh3_64 else f"{path}: its content does not match its checksum"


def _fill(target: Path, index: Index, like: Mapping[str, Tensor]) -> None:
    """Copy into `like` what overlaps with this rank's parts of it."""
    _check_names(target, index, like)
    parts = {name: held(tensor) for name, tensor in like.items()}
    for file, shard in zip(index.shard_names(), index.shards, strict=True):
        common = {
            name: overlap
            for name, box in shard.pieces.items()
            if (overlap := box.overlap(parts[name][0])) is not None
        }
        if not common:
            continue
        with open_shard(target / file) as stream, torch.no_grad():
            for name, overlap in common.items():
                stored, (box, local) = shard.pieces[name], parts[name]
                piece = read_slice(stream, name, stored.shape, overlap.inside(stored))
                local[overlap.inside(box)].copy_(piece)


def _check_names(target: Path, index: Index, like: Mapping[str, Tensor]) -> None:
    cure = "Resume with the settings that it was trained with, or name another folder"
    there = {name: (outline.dtype, outline.shape) for name, outline in index.tensors.items()}
    here = {name: (DTYPES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in like.items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            kinds = [
                f"{dtype} {list(shape)}" if dtype else "absent"
                for dtype, shape in (there.get(name, ("", ())), here.get(name, ("", ())))
            ]
            raise ModelError(
                f"{target}: '{name}' is {kinds[0]} there and {kinds[1]} in this run", cure=cure
            )


def _is_complete(target: Path, step: int) -> bool:
    try:
        index = parse(read_text(target / INDEX), step)
    except (ValueError, StorageError, ModelError):
        return False
    return _wrong_size(target, index) is None


def _remove(target: Path) -> None:
    """Remove a checkpoint, its index first: what a kill leaves of it is not complete."""
    with contextlib.suppress(OSError):
        (target / INDEX).unlink(missing_ok=True)
        sync_directory(target)
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
