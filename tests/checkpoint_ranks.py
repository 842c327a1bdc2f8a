"""Processes that are the ranks of a run, for tests: kept alive, called by function and arguments.

What the ranks do for the checkpoint tests is here too: a process finds a function by its module.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, ones

from regmix.errors import StorageError
from regmix.large.distributed import checkpoint

SECONDS = 120.0
# Kind, shape, type. 7 and 5 split unevenly over 2 and 3 ranks; 1 leaves empty shards on both.
TENSORS: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {
    "parameters.embed": ("shard", (1, 7, 5), torch.float32),
    "parameters.norm": ("shard", (1, 5), torch.float32),
    "parameters.tiny": ("shard", (1, 1, 3), torch.float32),
    "parameters.half": ("shard", (1, 6, 4), torch.bfloat16),
    "parameters.last": ("shard last", (2, 3, 5), torch.float32),
    "optimizer.mean.embed": ("shard", (1, 7, 5), torch.float32),
    "optimizer.square.embed": ("shard", (1, 7, 5), torch.float64),
    "optimizer.step": ("plain", (), torch.int64),
    "hybrid.weight": ("hybrid", (1, 5, 4), torch.float32),
    "replica.weight": ("replicate", (3, 5), torch.float32),
    "replica.plain": ("plain", (4, 4), torch.float32),
    "flags.frozen": ("plain", (6,), torch.bool),
    "flags.counts": ("shard", (1, 5), torch.int32),
    "flags.empty": ("plain", (0, 3), torch.uint8),
}


class Ranks:
    """Three processes at most; `run` makes the first few of them the ranks of a new run."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, itertools.count()
        # torch is imported once, in a process that has no threads, and its copies are the ranks.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch.distributed.fsdp", "regmix.large.distributed.checkpoint"]
        )
        self._workers: list[tuple[Any, Any]] = []

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what `function` returns on every rank; None for a rank that was killed."""
        while len(self._workers) < max(3, num_ranks):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        store = self._folder / f"store-{next(self._number)}"
        for rank, (_, pipe) in enumerate(self._workers[:num_ranks]):
            pipe.send((rank, num_ranks, str(store), function, args))
        answers = [self._answer(pipe) for _, pipe in self._workers[:num_ranks]]
        self._workers = [worker for worker in self._workers if worker[0].is_alive()]
        failures = [text for kind, text in answers if kind == "failed"]
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()

    @staticmethod
    def _answer(pipe: Any) -> tuple[str, Any]:
        try:
            if not pipe.poll(SECONDS):
                return "failed", f"no answer in {SECONDS} s"
            return pipe.recv()
        except EOFError:
            return "killed", None


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            rank, num_ranks, store, function, args = pipe.recv()
        except EOFError:
            return
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks
        )
        try:
            answer = ("done", function(*args))
        except BaseException as error:
            answer = ("failed", f"rank {rank}: {error!r}")
        dist.destroy_process_group()
        pipe.send(answer)


def whole_tensors(seed: int) -> dict[str, Tensor]:
    """The tensors of TENSORS, unsharded, with random bits: NaNs of all kinds among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, shape, dtype) in TENSORS.items():
        if dtype == torch.bool:
            tensors[name] = torch.randint(0, 2, shape, generator=generator).bool()
            continue
        # One element too many, of which none is used: a scalar's bits need an array to be viewed.
        count = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
        tensors[name] = bits.view(dtype).reshape(shape)
    return tensors


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shard or replicate the tensors over the ranks there are; plain ones where there is one."""
    if not dist.is_initialized():
        return {name: tensor.clone() for name, tensor in tensors.items()}
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    grid = init_device_mesh("cpu", (1, dist.get_world_size()))
    places = {
        "shard": (line, [Shard(1)]),
        "shard last": (line, [Shard(-1)]),
        "hybrid": (grid, [Replicate(), Shard(1)]),
        "replicate": (line, [Replicate()]),
    }
    return {
        name: tensor.clone()
        if (kind := TENSORS[name][0]) == "plain"
        else distribute_tensor(tensor.clone(), *places[kind])
        for name, tensor in tensors.items()
    }


def blank() -> dict[str, Tensor]:
    """Tensors as `spread` makes them, all zeros."""
    return spread({name: torch.zeros_like(tensor) for name, tensor in whole_tensors(0).items()})


def differing(tensors: dict[str, Tensor], seed: int) -> list[str]:
    """Names of the tensors whose bits are not those of `whole_tensors(seed)`."""
    wrong = []
    for name, expected in whole_tensors(seed).items():
        found = tensors[name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
        if found.shape != expected.shape or not torch.equal(*bits):
            wrong.append(name)
    return wrong


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect what the checkpoints warn of."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    checkpoint.logger.addHandler(handler)
    try:
        yield lines
    finally:
        checkpoint.logger.removeHandler(handler)


def save(folder: Path, *seeds: int) -> None:
    """Save a checkpoint per seed: step 10, 20, ... with the seed in its state."""
    for number, seed in enumerate(seeds):
        tensors = spread(whole_tensors(seed))
        checkpoint.save(folder, 10 * (number + 1), tensors, {"seed": seed}, wait=True)


def load(folder: Path) -> dict[str, Any]:
    """Load the newest into zeros; what step and seed it was, what differs, what was said."""
    tensors = blank()
    with warnings() as lines:
        found = checkpoint.load_newest(folder, tensors)
    if found is None:
        return {"step": None, "said": lines}
    step, state = found
    return {"step": step, "differing": differing(tensors, state["seed"]), "said": lines}


def load_without_pickle(folder: Path) -> dict[str, Any]:
    """`load`, where anything that unpickles is an error."""
    refuse = mock.Mock(side_effect=AssertionError("unpickled"))
    with (
        mock.patch("pickle.loads", refuse),
        mock.patch("pickle.load", refuse),
        mock.patch("pickle.Unpickler", refuse),
        mock.patch("torch.load", refuse),
        mock.patch("torch.distributed.distributed_c10d._unpickler", refuse),
    ):
        return load(folder)


def load_where_one_rank_reads_wrong(folder: Path, name: str) -> dict[str, Any]:
    """`load`, where rank 1 alone reads another content of the file `name`."""
    right = checkpoint.checksum

    def wrong(path: Path) -> str:
        return (
            "0" * 16 if path.name == name and path.parent.name == "step-00000020" else right(path)
        )

    with mock.patch.object(checkpoint, "checksum", wrong if dist.get_rank() == 1 else right):
        return load(folder)


def change_while_saving(folder: Path) -> dict[str, Any]:
    """Save seed 1 without waiting, change every tensor before a byte is written; load it."""
    changed, right = threading.Event(), checkpoint.write_shard

    def late(path: Path, tensors: Any) -> tuple[int, str]:
        assert changed.wait(SECONDS)
        return right(path, tensors)

    tensors = spread(whole_tensors(1))
    with mock.patch.object(checkpoint, "write_shard", late):
        saving = checkpoint.save(folder, 10, tensors, {"seed": 1}, wait=False)
        was_done = saving.done
        for tensor in tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        changed.set()
        saving.wait()
    return {"was_done": was_done, **load(folder)}


def fail_on_one_rank(folder: Path) -> dict[str, Any]:
    """Save 1, then 2 in the background where rank 1 has no space, then 3, and again 3; load."""
    save(folder, 1)

    def full(path: Path, tensors: Any) -> tuple[int, str]:
        raise StorageError(f"{path}: No space left on device", cure="Free some space")

    patch = mock.patch.object(checkpoint, "write_shard", full)
    if dist.get_rank() == 1:
        patch.start()
    checkpoint.save(folder, 20, spread(whole_tensors(2)), {"seed": 2}, wait=False)
    raised = ""
    try:
        checkpoint.save(folder, 30, spread(whole_tensors(3)), {"seed": 3}, wait=True)
    except StorageError as error:
        raised = str(error)
    mock.patch.stopall()
    between = load(folder)["step"]
    checkpoint.save(folder, 30, spread(whole_tensors(3)), {"seed": 3}, wait=True)
    return {"raised": raised, "between": between, **load(folder)}


def die_before_the_index(folder: Path) -> str:
    """Save 1; while 2 is saved, rank 0 is killed when all shards are there."""
    save(folder, 1)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(checkpoint, "write_text", die):
        try:
            checkpoint.save(folder, 20, spread(whole_tensors(2)), {"seed": 2}, wait=True)
        except RuntimeError:
            return "the other rank noticed"
    return "nothing happened"


def write_elsewhere(folder: Path) -> str:
    """Save where rank 1 has a disk of its own under the same name."""
    if dist.get_rank() == 1:
        folder = folder / "another-machine"
    with mock.patch.object(checkpoint, "VISIBLE_SECONDS", 0.3):
        try:
            checkpoint.save(folder, 10, spread(whole_tensors(1)), {}, wait=True)
        except StorageError as error:
            return str(error)
    return "nothing happened"


def disagree(folder: Path) -> str:
    """Save where the ranks are at different steps."""
    try:
        checkpoint.save(folder, dist.get_rank(), spread(whole_tensors(1)), {}, wait=True)
    except ValueError as error:
        return str(error)
    return "nothing happened"


def save_module(folder: Path) -> int:
    """Save the parameters of a `fully_shard` module split on dim 1; the bytes this rank holds."""
    module = nn.Linear(4, 6, bias=False)
    module.weight = nn.Parameter(torch.arange(24.0).reshape(1, 6, 4))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda parameter: Shard(1))
    checkpoint.save(folder, 10, dict(module.named_parameters()), {}, wait=True)
    return module.weight.to_local().nbytes


def large_tensors(rows: int) -> dict[str, Tensor]:
    """A sharded weight and its moment, of [1, rows, 64] float32 each."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: ones(1, rows, 64, device_mesh=mesh, placements=[Shard(1)])
        for name in ("weight", "moment")
    }


def save_large(folder: Path, rows: int) -> int:
    """Save large tensors; the bytes by which this process grew at most."""
    tensors = large_tensors(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint.save(folder, 10, tensors, {}, wait=True)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


class Counted:
    """An opened shard, or a tensor in it, that counts the bytes it gives."""

    def __init__(self, source: Any, sizes: list[int]) -> None:
        self._source, self._sizes = source, sizes

    def get_slice(self, name: str) -> Counted:
        return Counted(self._source.get_slice(name), self._sizes)

    def get_shape(self) -> list[int]:
        return self._source.get_shape()

    def get_tensor(self, name: str) -> Tensor:
        tensor = self._source.get_tensor(name)
        self._sizes.append(tensor.nbytes)
        return tensor

    def __getitem__(self, cut: tuple[slice, ...]) -> Tensor:
        piece = self._source[cut]
        self._sizes.append(piece.nbytes)
        return piece


def load_large(folder: Path, rows: int) -> tuple[int, int]:
    """Load large tensors; the bytes read, and those that this rank holds."""
    sizes: list[int] = []
    right = checkpoint.open_shard

    @contextmanager
    def counted(path: Path) -> Iterator[Counted]:
        with right(path) as stream:
            yield Counted(stream, sizes)

    tensors = large_tensors(rows)
    with mock.patch.object(checkpoint, "open_shard", counted):
        checkpoint.load_newest(folder, tensors)
    return sum(sizes), sum(tensor.to_local().nbytes for tensor in tensors.values())
