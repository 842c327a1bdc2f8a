"""A run's memory is predicted as autograd takes it, and what cannot fit is refused with a cure."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regmix.errors import ModelError, StorageError
from regmix.large.distributed import plan
from regmix.large.distributed.module import LargeLlama
from regmix.large.distributed.plan import Device, Sharing, kept_bytes_per_token, memory_of, plan_run
from regmix.model.optim import OptimConfig
from regmix.model.parameters import init_parameters
from regmix.model.presets import PRESETS, ModelShape
from regmix.study import Training

GB = 10**9
SHAPE = ModelShape(
    num_layers=2, width=64, num_heads=4, num_kv_heads=2, hidden=176, vocab_size=300, seq_len=45
)
H100 = Device(name="NVIDIA H100", free_bytes=80 * GB, flops=989e12, source="its datasheet's")


def training_of(preset: str, batch_size: int = 256) -> Training:
    return Training(
        shape=PRESETS[preset], optim=OptimConfig(), batch_size=batch_size, num_steps=1000
    )


@pytest.fixture(autouse=True)
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 10_000 * GB)


def kept_bytes(shape: ModelShape, dtype: torch.dtype, *, recompute: bool = False) -> int:
    """Bytes that a forward of two sequences keeps, parameters and their copies left out.

    No activation has a parameter's shape: 90 tokens are no dimension of one.
    """
    module = LargeLlama(shape, dtype=dtype, recompute=recompute)
    module.load_state_dict(init_parameters(shape, [0]))
    sizes = {tuple(value.shape[1:]) for value in module.parameters()}
    sizes |= {size[::-1] for size in sizes}
    kept: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if tuple(value.squeeze(0).shape) not in sizes:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    tokens = torch.zeros(2, shape.seq_len + 1, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(tokens)
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [2, None])
def test_a_layer_keeps_what_the_plan_says(dtype: torch.dtype, kv_heads: int | None) -> None:
    shape = dataclasses.replace(SHAPE, num_kv_heads=kv_heads)
    longer = dataclasses.replace(shape, num_layers=5)
    measured = (kept_bytes(longer, dtype) - kept_bytes(shape, dtype)) / (3 * 2 * shape.seq_len)
    predicted = kept_bytes_per_token(shape, dtype.itemsize)
    assert 0.97 * measured < predicted < 1.1 * measured


def test_recomputed_layers_keep_their_input_only() -> None:
    longer = dataclasses.replace(SHAPE, num_layers=5)
    more = kept_bytes(longer, torch.float32, recompute=True) - kept_bytes(
        SHAPE, torch.float32, recompute=True
    )
    assert more == 3 * 2 * SHAPE.seq_len * SHAPE.width * 4


def test_fsdp_divides_what_ddp_repeats() -> None:
    whole, split = (
        memory_of(
            PRESETS["1b"],
            Sharing(num_ranks=8, parallel=kind, dtype="bfloat16", micro_batch=4),
            "cuda",
        )
        for kind in ("ddp", "fsdp")
    )
    for part in ("parameters", "gradients", "moments"):
        assert whole[part] == pytest.approx(8 * split[part], rel=1e-6)
    assert whole["activations"] == split["activations"]


def test_ddp_comes_first_and_fsdp_where_it_does_not_fit() -> None:
    small = plan_run(training_of("1b"), H100, num_ranks=8, folder=Path("/"), dtype="bfloat16")
    large = plan_run(training_of("7b"), H100, num_ranks=8, folder=Path("/"), dtype="bfloat16")
    assert small.sharing.parallel == "ddp"
    assert large.sharing.parallel == "fsdp"
    for found in (small, large):
        assert found.memory_bytes <= plan.USABLE * 80 * GB
        assert 256 // 8 % found.sharing.micro_batch == 0


def test_time_is_the_assumed_share_of_the_devices_products() -> None:
    found = plan_run(training_of("1b"), H100, num_ranks=8, folder=Path("/"), dtype="bfloat16")
    rate = plan.ASSUMED_MFU * 8 * 989e12 / PRESETS["1b"].flops_per_token()
    assert found.tokens_per_second == pytest.approx(rate)
    assert found.seconds == pytest.approx(found.training.tokens / rate)
    unknown = dataclasses.replace(H100, flops=None)
    found = plan_run(training_of("1b"), unknown, num_ranks=8, folder=Path("/"), dtype="bfloat16")
    assert found.seconds is None
    assert "Time: unknown" in found.lines()[-1]


@pytest.mark.parametrize(
    ("preset", "num_ranks", "free", "cure"),
    [
        ("7b", 1, 80, "Use 2 such GPUs, with --parallel fsdp --activation-checkpointing"),
        ("1b", 1, 32, "Give --activation-checkpointing"),
        ("1b", 1, 3, "Use a smaller model"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(
    preset: str, num_ranks: int, free: int, cure: str
) -> None:
    device = dataclasses.replace(H100, free_bytes=free * GB)
    with pytest.raises(ModelError, match="of memory") as caught:
        plan_run(
            training_of(preset), device, num_ranks=num_ranks, folder=Path("/"), dtype="bfloat16"
        )
    assert cure in caught.value.cure


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 20 * GB)
    with pytest.raises(StorageError, match="--keep-checkpoints"):
        plan_run(training_of("1b"), H100, num_ranks=1, folder=Path("/"), dtype="bfloat16")
