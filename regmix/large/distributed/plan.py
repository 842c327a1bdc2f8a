"""What a distributed run needs and takes, before it starts; and the refusal of an impossible one.

Enters: a training, how many processes share it, and what each of their devices has and could do.
Leaves: a `Plan`: memory of a process by its parts, tokens per second, time and disk. Arithmetic
alone: the only thing measured is a matrix product, where a CPU's speed is asked for.

The memory of activations is what autograd keeps, counted from `module` and tested against it; the
speed is a share of the device's products that is assumed, never measured, and said to be.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from regmix.display import count, duration, size
from regmix.errors import ModelError, StorageError
from regmix.files import free_bytes
from regmix.large.distributed.job import rows_of
from regmix.large.distributed.splitting import is_even, refuse_uneven
from regmix.model.presets import ModelShape
from regmix.study import Training
from regmix.swarm.needs import WORKER_BASE_BYTES
from regmix.swarm.placement import RESERVE_BYTES

# The share of a device's matrix products that training is assumed to reach. Not measured.
ASSUMED_MFU = 0.4
# Part of the free memory that is planned with: the allocator rounds up and fragments.
USABLE = 0.9
# More at a time fills no GPU better, and a smaller micro-batch leaves memory free.
MICRO_STEP_TOKENS = 34_000
# As `operations` holds at once, and what a chunk takes beside its float32 logits.
_LOGITS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Device:
    """What every process of a run has: its memory [bytes] and products [FLOP/s]; None if unknown.

    name: "cpu", or the GPU's; source: where the FLOP/s are from, in words.
    """

    name: str
    free_bytes: int | None
    flops: float | None
    source: str = ""

    @property
    def kind(self) -> str:
        """The device as a job names it."""
        return "cpu" if self.name == "cpu" else "cuda"


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a model is trained: a job's settings of the same names; micro_batch in sequences."""

    num_ranks: int
    parallel: str
    dtype: str
    micro_batch: int
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """memory: bytes of a process by what they are for; seconds and tokens_per_second: None if
    unknown. disk_bytes: checkpoints and the model; free_disk_bytes: of the run's folder.
    """

    training: Training
    sharing: Sharing
    device: Device
    memory: Mapping[str, int]
    tokens_per_second: float | None
    seconds: float | None
    disk_bytes: int
    free_disk_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Bytes of one process."""
        return sum(self.memory.values())

    def lines(self) -> list[str]:
        """Return the plan for a person."""
        training, sharing = self.training, self.sharing
        shared = "" if sharing.num_ranks == 1 else f", {sharing.parallel.upper()}"
        recompute = ", activations recomputed" if sharing.recompute else ""
        share = training.batch_size // sharing.num_ranks
        parts = ", ".join(f"{name} {size(n)}" for name, n in self.memory.items() if n)
        free = self.device.free_bytes
        found = [
            f"Model: {count(training.shape.num_parameters)} parameters, {sharing.dtype}; "
            f"{training.num_steps:,} steps of {training.batch_size} x {training.shape.seq_len} = "
            f"{count(training.batch_size * training.shape.seq_len)} tokens, "
            f"{count(training.tokens)} in all",
            f"Processes: {sharing.num_ranks} x {self.device.name}{shared}; {share} sequences a "
            f"step each, {sharing.micro_batch} at a time{recompute}",
            f"Memory of a process: {size(self.memory_bytes)}"
            + ("" if free is None else f" of {size(free)} free")
            + f" (estimated: {parts})",
            f"Disk: {size(self.disk_bytes)} of {size(self.free_disk_bytes)} free",
        ]
        if self.tokens_per_second is None or self.seconds is None:
            return [*found, "Time: unknown, since the speed of this device is not known"]
        return [
            *found,
            f"Time: about {duration(self.seconds)} at {count(self.tokens_per_second)} tokens/s "
            f"(assumes {ASSUMED_MFU:.0%} of {self.device.source}: an assumption, not measured)",
        ]

    def to_table(self) -> dict[str, object]:
        """Return the plan as plain values, for JSON."""
        return {
            "parameters": self.training.shape.num_parameters,
            "tokens": self.training.tokens,
            "steps": self.training.num_steps,
            **dataclasses.asdict(self.sharing),
            "device": self.device.name,
            "memory_bytes": dict(self.memory),
            "memory_bytes_of_a_process": self.memory_bytes,
            "free_bytes_of_a_process": self.device.free_bytes,
            "tokens_per_second": self.tokens_per_second,
            "assumed_mfu": ASSUMED_MFU,
            "seconds": self.seconds,
            "disk_bytes": self.disk_bytes,
        }


def memory_of(shape: ModelShape, sharing: Sharing, device_kind: str) -> dict[str, int]:
    """Return the bytes that a process needs, by what they are for.

    Parameters, gradients and moments are float32, all of them or 1/N under FSDP. `copies` are what
    products read: under FSDP two layers and the tables, gathered, with one layer's and one table's
    whole gradient; otherwise a bfloat16 copy of what autograd keeps.
    """
    element = 4 if sharing.dtype == "float32" else 2
    is_split = sharing.parallel == "fsdp" and sharing.num_ranks > 1
    share = -(-shape.num_parameters // (sharing.num_ranks if is_split else 1))
    table = shape.vocab_size * shape.width
    tables = table if shape.tied else 2 * table
    block = shape.num_body_parameters // shape.num_layers
    if is_split:
        copies = element * (tables + 2 * block) + (element + 4) * (tables + block)
    elif element == 4:
        copies = 0
    else:
        copies = element * (block + tables if sharing.recompute else shape.num_parameters)
    tokens = sharing.micro_batch * shape.seq_len
    of_layer = kept_bytes_per_token(shape, element)
    if sharing.recompute:
        # Twice the layer that is run again: so a process of the 60m preset's shape (8,192 tokens at
        # a time, vocabulary 8192, float32, on a CPU) took 4.2 GB at its peak, where once says 3.7.
        activations = tokens * (element * shape.width * shape.num_layers + 2 * of_layer)
    else:
        activations = tokens * of_layer * shape.num_layers
    # One layer's gradients, and what its norms cast, pass by beside what is kept.
    activations += tokens * (element * (6 * shape.width + 5 * shape.hidden) + 16 * shape.width)
    logits = min(_LOGITS, tokens * shape.vocab_size) * (4 + 2 * element)
    return {
        "parameters": 4 * share,
        "gradients": 4 * share,
        "moments": 8 * share,
        "copies": copies,
        "activations": activations,
        "logits": logits + 8 * table + 2 * element * tokens * shape.width,
        "libraries": WORKER_BASE_BYTES if device_kind == "cpu" else RESERVE_BYTES,
    }


def kept_bytes_per_token(shape: ModelShape, element: int) -> int:
    """Return what autograd keeps of one layer for a token's backward; `element` bytes a number.

    Two norms keep their input and its normalised form in float32 where torch does not fuse them;
    then their outputs, packed and turned queries, keys and values, the attention's output, and
    SwiGLU's two inputs, its gate's silu and its output.
    """
    kv_width = shape.kv_heads * shape.head_dim
    numbers = 5 * shape.width + 3 * kv_width + 4 * shape.hidden
    return element * numbers + 16 * shape.width + 4 * shape.num_heads + 8


def plan_run(
    training: Training,
    device: Device,
    *,
    num_ranks: int,
    folder: Path,
    parallel: str | None = None,
    micro_batch: int | None = None,
    dtype: str = "float32",
    recompute: bool = False,
    keep_checkpoints: int = 2,
) -> Plan:
    """Return the plan of a run; what is None is chosen: DDP before FSDP, the largest micro-batch.

    Raises `ModelError` where the batch cannot be shared, or where nothing allowed fits the memory;
    `StorageError` where the disk cannot hold the checkpoints. Both say what would fit.
    """
    share = rows_of(0, num_ranks, training.batch_size)[1]
    if micro_batch is not None and share % micro_batch:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise ModelError(
            f"a micro-batch of {micro_batch} sequences does not divide the {share} of a process",
            cure=f"Give a --micro-batch that does: {divisors}",
        )
    free = free_bytes(folder)
    disk = (12 * (keep_checkpoints + 1) + 4) * training.shape.num_parameters
    if disk > free:
        raise StorageError(
            f"{folder}: this needs {size(disk)} of disk and {size(free)} are free",
            cure="Free some space, keep fewer with --keep-checkpoints, or move the study",
        )
    sharing = _fitting(training, device, num_ranks, parallel, micro_batch, dtype, recompute)
    rate = None
    if device.flops is not None:
        rate = ASSUMED_MFU * device.flops * num_ranks / training.shape.flops_per_token()
    return Plan(
        training=training,
        sharing=sharing,
        device=device,
        memory=memory_of(training.shape, sharing, device.kind),
        tokens_per_second=rate,
        seconds=None if rate is None else training.tokens / rate,
        disk_bytes=disk,
        free_disk_bytes=free,
    )


def _fitting(
    training: Training,
    device: Device,
    num_ranks: int,
    parallel: str | None,
    micro_batch: int | None,
    dtype: str,
    recompute: bool,
) -> Sharing:
    if parallel == "fsdp":
        refuse_uneven(training.shape, num_ranks)
    can_split = num_ranks > 1 and is_even(training.shape, num_ranks)
    kinds = [parallel] if parallel else ["ddp", "fsdp"] if can_split else ["ddp"]
    smallest = None
    for kind in kinds:
        for micro in _micro_batches(training, num_ranks, micro_batch):
            smallest = Sharing(
                num_ranks=num_ranks,
                parallel=kind,
                dtype=dtype,
                micro_batch=micro,
                recompute=recompute,
            )
            if _fits(training.shape, smallest, device):
                return smallest
    assert smallest is not None
    need = sum(memory_of(training.shape, smallest, device.kind).values())
    raise ModelError(
        f"a process needs about {size(need)} of memory, with {smallest.micro_batch} sequences at a "
        f"time, and {size(USABLE * (device.free_bytes or 0))} can be planned with "
        f"({size(device.free_bytes or 0)} free)",
        cure=_cure(training, smallest, device),
    )


def _micro_batches(training: Training, num_ranks: int, wanted: int | None) -> Iterator[int]:
    """Yield the micro-batches that are tried, largest first."""
    if wanted is not None:
        yield wanted
        return
    share = training.batch_size // num_ranks
    for micro in range(share, 0, -1):
        few = micro * training.shape.seq_len <= MICRO_STEP_TOKENS or micro == 1
        if share % micro == 0 and few:
            yield micro


def _fits(shape: ModelShape, sharing: Sharing, device: Device) -> bool:
    need = sum(memory_of(shape, sharing, device.kind).values())
    return device.free_bytes is None or need <= USABLE * device.free_bytes


def _cure(training: Training, tried: Sharing, device: Device) -> str:
    """Return the first change that would make a run fit."""
    one = dataclasses.replace(tried, micro_batch=1)
    if _fits(training.shape, one, device):
        return "Give a smaller --micro-batch"
    again = dataclasses.replace(one, recompute=True)
    if not tried.recompute and _fits(training.shape, again, device):
        return "Give --activation-checkpointing"
    for num_ranks in (2**power for power in range(1, 11)):
        split = dataclasses.replace(again, parallel="fsdp", num_ranks=num_ranks)
        even = is_even(training.shape, num_ranks)
        if even and _fits(training.shape, split, device):
            if num_ranks <= tried.num_ranks:
                return "Give --parallel fsdp --activation-checkpointing"
            what = "processes" if device.kind == "cpu" else "GPUs"
            return f"Use {num_ranks} such {what}, with --parallel fsdp --activation-checkpointing"
    return "Use a smaller model, or a shorter --seq-len"


def measured_flops(threads: int, seconds: float = 0.3) -> float:
    """Return the float32 FLOP/s of a matrix product on this machine's CPU, by `threads` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        length, done = 768, 0
        a, b = torch.ones(length, length), torch.ones(length, length)
        a @ b
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            a @ b
            done += 1
        return done * 2.0 * length**3 / (time.monotonic() - started)
    finally:
        torch.set_num_threads(before)
