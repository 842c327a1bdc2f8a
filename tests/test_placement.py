"""How proxies are laid on a GPU: full where they are small, alone where one fills it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regmix.errors import StudyError
from regmix.model.presets import PRESETS, ModelShape, make_shape
from regmix.swarm.placement import (
    LARGEST_GPU_STACK,
    MICRO_STEP_TOKENS,
    gpu_memory_bytes,
    micro_batches,
    place,
    smaller_micro_batch,
)

GB = 1_000_000_000


def small_shape(seq_len: int = 128) -> ModelShape:
    return make_shape("cpu-64", vocab_size=8192, seq_len=seq_len)


@pytest.mark.parametrize("free", [40 * GB, 80 * GB, 141 * GB])
def test_a_reference_proxy_fills_a_gpu_alone(free: int) -> None:
    found = place(PRESETS["1m"], 512, num_proxies=64, num_gpus=1, free_bytes=free)
    assert (found.stack_size, found.micro_batch) == (1, 16)


@pytest.mark.parametrize(("batch_size", "stack_size"), [(16, 16), (64, 16), (128, 8), (512, 4)])
def test_small_proxies_are_stacked_until_a_step_is_full(batch_size: int, stack_size: int) -> None:
    found = place(small_shape(), batch_size, num_proxies=64, num_gpus=1, free_bytes=80 * GB)
    assert found.stack_size == stack_size
    assert found.micro_batch * 128 <= MICRO_STEP_TOKENS


def test_a_short_batch_of_the_reference_proxy_is_stacked_to_one_full_step() -> None:
    found = place(PRESETS["1m"], 4, num_proxies=64, num_gpus=1, free_bytes=80 * GB)
    assert (found.stack_size, found.micro_batch) == (4, 4)


def test_no_gpu_is_left_without_work() -> None:
    found = place(small_shape(), 16, num_proxies=10, num_gpus=8, free_bytes=80 * GB)
    assert found.stack_size == 2


def test_a_billion_parameters_fit_an_80_gb_gpu_with_a_smaller_micro_batch() -> None:
    shape = PRESETS["1b"]
    small, large = (
        place(shape, 512, num_proxies=8, num_gpus=1, free_bytes=free * GB) for free in (60, 141)
    )
    assert (small.stack_size, large.stack_size) == (1, 1)
    assert small.micro_batch < large.micro_batch == 16
    assert gpu_memory_bytes(shape, 1, small.micro_batch) < 60 * GB


def test_scarce_memory_costs_proxies_before_it_costs_sequences() -> None:
    shape, batch_size = small_shape(2048), 4
    plenty = place(shape, batch_size, num_proxies=64, num_gpus=1, free_bytes=80 * GB)
    assert (plenty.stack_size, plenty.micro_batch) == (16, 4)
    scarce = place(shape, batch_size, num_proxies=64, num_gpus=1, free_bytes=3 * GB)
    assert 1 < scarce.stack_size < 16
    assert scarce.micro_batch == 4
    # Two proxies do not fit, and one only with half of its batch.
    free = (gpu_memory_bytes(shape, 1, 2) + gpu_memory_bytes(shape, 1, 4)) / 2 / 0.9
    least = place(shape, batch_size, num_proxies=64, num_gpus=1, free_bytes=int(free))
    assert (least.stack_size, least.micro_batch) == (1, 2)


def test_what_the_user_chose_is_kept_or_refused() -> None:
    shape = PRESETS["1m"]
    chosen = place(
        shape, 512, num_proxies=64, num_gpus=1, free_bytes=80 * GB, stack_size=4, micro_batch=8
    )
    assert (chosen.stack_size, chosen.micro_batch) == (4, 8)
    with pytest.raises(StudyError, match=r"a stack of 8 .* 512 sequences needs about"):
        place(
            shape, 512, num_proxies=64, num_gpus=1, free_bytes=80 * GB, stack_size=8,
            micro_batch=512,
        )  # fmt: skip
    with pytest.raises(StudyError, match=r"does not divide .* Give a --micro-batch that does: 1, "):
        place(shape, 12, num_proxies=64, num_gpus=1, free_bytes=80 * GB, micro_batch=5)


def test_a_model_that_fits_no_way_is_refused() -> None:
    with pytest.raises(StudyError, match="a stack of 1 with a micro-batch of 1 sequences"):
        place(PRESETS["1b"], 512, num_proxies=1, num_gpus=1, free_bytes=24 * GB)


@given(st.integers(1, 3000))
def test_micro_batches_divide_the_batch_and_end_at_one(batch_size: int) -> None:
    found = list(micro_batches(batch_size))
    assert found[0] == batch_size
    assert found[-1] == 1
    assert all(batch_size % micro == 0 for micro in found)
    assert all(2 * after <= before for before, after in itertools.pairwise(found))


def test_smaller_micro_batches_are_halves_where_they_can_be() -> None:
    assert [smaller_micro_batch(micro, 16) for micro in (16, 8, 2, 1)] == [8, 4, 1, None]
    assert smaller_micro_batch(3, 24) == 1


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([8, 24, 512]),
    st.sampled_from([3, 9, 80]),
)
def test_a_placement_is_within_its_bounds(
    num_proxies: int, num_gpus: int, batch_size: int, free: int
) -> None:
    shape = dataclasses.replace(small_shape(), num_layers=3)
    found = place(
        shape, batch_size, num_proxies=num_proxies, num_gpus=num_gpus, free_bytes=free * GB
    )
    assert 1 <= found.stack_size <= min(LARGEST_GPU_STACK, -(-num_proxies // num_gpus))
    assert batch_size % found.micro_batch == 0
    assert gpu_memory_bytes(shape, found.stack_size, found.micro_batch) <= free * GB


def test_memory_grows_with_every_part() -> None:
    shape = PRESETS["60m"]
    base = gpu_memory_bytes(shape, 1, 4)
    assert gpu_memory_bytes(shape, 2, 4) > base
    assert gpu_memory_bytes(shape, 1, 8) > base
    assert gpu_memory_bytes(dataclasses.replace(shape, num_layers=11), 1, 4) > base
    # Parameters, gradients and moments in float32, and a copy in bfloat16.
    assert base > 18 * shape.num_parameters
