"""How the ranks of a run share one model: alone, DDP or FSDP2.

Enters: a job, and the ranks as torchrun or Slurm describes them. Leaves: a model whose forward and
backward the loop calls alike in every case, its parameters as they lie on this rank, and sums over
the ranks. Draws no batch and updates no parameter.

DDP keeps the whole model on every rank and sums gradients once a step. FSDP2 (`fully_shard`)
splits dimension 1 of every parameter, dimension 0 being the stack of one; it gathers a layer for
its forward and backward and leaves gradients split. Both average gradients over ranks in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from regmix.errors import ModelError
from regmix.large.distributed.job import TrainJob
from regmix.large.distributed.module import LargeLlama
from regmix.large.distributed.splitting import refuse_uneven
from regmix.model.parameters import initial_values

# The others wait while the first rank writes a whole model: 28 GB at 7B.
_PATIENCE = timedelta(minutes=30)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and on which device; one rank alone has no group."""

    rank: int
    num_ranks: int
    device: torch.device

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of every rank's `values`, the same bits on all of them."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
        return values

    def wait_for_all(self) -> None:
        """Return once every rank is here."""
        if self.num_ranks > 1:
            dist.barrier()


def join(device: str) -> Place:
    """Return this process's place; joins the group that the environment describes.

    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them.
    """
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = torch.device("cpu")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ModelError(
                f"process {local} of this machine has no GPU: torch sees "
                f"{torch.cuda.device_count()}",
                cure="Start as many processes on a machine as it has GPUs",
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if num_ranks > 1 and not dist.is_initialized():
        # Checkpoints agree over gloo, whose collectives do not queue behind those of training.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return Place(rank, num_ranks, place)


class ParallelModel:
    """The model of a job on this rank.

    parameters: by name, [1, ...]; whole tensors, or DTensors of which this rank has its part.
    """

    def __init__(self, job: TrainJob, place: Place, *, separator: int | None = None) -> None:
        self.shape, self.place = job.training.shape, place
        self.is_sharded = job.parallel == "fsdp" and place.num_ranks > 1
        # On the meta device first: under FSDP no rank ever holds the whole model.
        with torch.device("meta"):
            self.module = LargeLlama(
                self.shape,
                dtype=_DTYPES[job.dtype],
                separator=separator if job.within_documents else None,
                recompute=job.recompute,
            )
        if job.compiled:
            for block in self.module.layers:
                block.compile()
        if self.is_sharded:
            refuse_uneven(self.shape, place.num_ranks)
            _shard(self.module, place, _DTYPES[job.dtype])
        self.module.to_empty(device=place.device)
        self.parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        self._runner: nn.Module = self.module

    def fill(self, seed: int) -> None:
        """Give every parameter its initial value, the same on any number of ranks."""
        self.fill_from(initial_values(self.shape, seed))

    @torch.no_grad()
    def fill_from(self, values: Iterator[tuple[str, Tensor]]) -> None:
        """Take parameters of one model without the stack's dimension, one after the other."""
        for name, value in values:
            local = local_part(self.parameters[name])
            whole = value[None].to(torch.float32)
            if isinstance(self.parameters[name], DTensor):
                whole = whole.chunk(self.place.num_ranks, dim=1)[self.place.rank]
            local.copy_(whole)

    def begin(self) -> None:
        """Get ready for forward and backward; every parameter has its value."""
        if self.place.num_ranks > 1 and not self.is_sharded:
            devices = None if self.place.device.type == "cpu" else [self.place.device]
            self._runner = DistributedDataParallel(
                self.module, device_ids=devices, gradient_as_bucket_view=True
            )

    def backward(self, tokens_BT1: Tensor, scale: float, *, is_last: bool) -> Tensor:
        """Add the gradient of scale x nats; return the nats, float64 [].

        is_last: of the step's micro-batches; DDP sums gradients over ranks then. FSDP does so at
        every micro-batch, since what it would keep meanwhile is the whole model's gradient.
        """
        with self._without_sums(is_last):
            nats = self._runner(tokens_BT1)
            # The ranks' gradients are averaged, and the step's is their sum.
            (nats * (scale * self.place.num_ranks)).backward()
        return nats.detach()

    def _without_sums(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self._runner, DistributedDataParallel) and not is_last:
            skipping: contextlib.AbstractContextManager[None] = self._runner.no_sync()
            return skipping
        return contextlib.nullcontext()

    @torch.no_grad()
    def nats(self, tokens_BT1: Tensor, kept_BT: Tensor) -> Tensor:
        """Return the sum of nats where `kept_BT` holds, float64 []; every rank calls it as often.

        Documents are attended across, as `evaluate` and an exported model do.
        """
        separator, self.module.separator = self.module.separator, None
        try:
            total: Tensor = self.module(tokens_BT1, kept_BT)
        finally:
            self.module.separator = separator
        if self.is_sharded:
            # The outermost parameters stay gathered after a forward, for a backward to come.
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()
        return total

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter whole, on the CPU, [1, ...]; every rank iterates to the end."""
        for name, value in self.parameters.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            yield name, whole.detach().to("cpu", copy=True)

    def drop_gradients(self) -> None:
        """Forget the step's gradients."""
        for value in self.parameters.values():
            value.grad = None


def local_part(value: Tensor) -> Tensor:
    """Return what this rank has of a parameter, a gradient or a moment; it shares memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def _shard(module: LargeLlama, place: Place, dtype: torch.dtype) -> None:
    mesh = init_device_mesh(place.device.type, (place.num_ranks,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        # The module casts what it wants cast; rotary tables stay float32.
        cast_forward_inputs=False,
    )
    parts: list[FSDPModule] = []
    for block in module.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
        assert isinstance(block, FSDPModule)
        parts.append(block)
    fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
    # The next layer is gathered while this one computes, forward and backward.
    for one, following in itertools.pairwise(parts):
        one.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([one])
