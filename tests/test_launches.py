"""What a step launches on a GPU: arguments that Triton binds, grids that CUDA takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from dry_launches import Launch, recorded
from regmix_kernels import launches, linear_cross_entropy, products
from torch.utils._python_dispatch import TorchDispatchMode

from regmix.model.fused import llama
from regmix.model.fused.operations import IMPLEMENTATIONS
from regmix.model.fused.stack import FusedStack
from regmix.model.optim import OptimConfig
from regmix.model.presets import PRESETS, ModelShape

# CUDA C++ programming guide, table of compute capabilities.
LARGEST_GRID = (2**31 - 1, 65535, 65535)
ON_TRITON = {op: kinds[0] for op, kinds in IMPLEMENTATIONS.items()}
# None of these waits for the device, copies from the host, or has a size that numbers decide.
CAPTURED = {
    *("empty", "empty_like", "new_empty", "scalar_tensor", "zero_", "clone", "copy_", "_to_copy"),
    *("alias", "detach", "select", "slice", "transpose", "view", "as_strided"),
    *("add_", "mul", "bitwise_and", "ge", "lt", "where", "index_select", "sort"),
}
SMALL = ModelShape(
    num_layers=2, width=24, num_heads=2, num_kv_heads=1, hidden=40, vocab_size=75, seq_len=32
)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmade(
        a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None, accumulate: bool = 0
    ) -> torch.Tensor:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out

    monkeypatch.setattr(llama, "matmul", unmade)
    monkeypatch.setattr(products, "matmul", unmade)
    monkeypatch.setattr(linear_cross_entropy, "_widens", lambda x: False)


def made(shape: ModelShape, *, proxies: int, micro: int, head: str = "streamed") -> FusedStack:
    return FusedStack(
        shape,
        OptimConfig(lr=1e-3, warmup_steps=1),
        num_proxies=proxies,
        batch_size=micro,
        num_steps=4,
        device="cpu",
        dtype=torch.bfloat16,
        kernels=ON_TRITON | {"head": head},
    )


def launched(work: Callable[[], object]) -> list[Launch]:
    with recorded() as found:
        work()
    assert found
    return found


def variants(found: list[Launch]) -> set[tuple[str, str]]:
    return {(launch.kernel, launch.variant) for launch in found}


@pytest.mark.parametrize("head", ["streamed", "chunked"])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_stack_launches_the_kernels_of_a_single_proxy(head: str, micro: int) -> None:
    single, stack = (made(SMALL, proxies=p, micro=micro, head=head) for p in (1, 3))
    assert variants(launched(stack._step)) == variants(launched(single._step))


def test_a_captured_step_launches_what_the_step_before_it_compiled() -> None:
    stack = made(SMALL, proxies=2, micro=2)
    assert variants(launched(stack._step)) == variants(launched(stack._step))


class Called(TorchDispatchMode):
    """Collects the names of the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["streamed", "chunked"])
def test_a_step_calls_of_torch_only_what_a_graph_can_capture(head: str) -> None:
    stack = made(SMALL, proxies=2, micro=2, head=head)
    # The first step may look at results, to prove that products are the same in a stack.
    launched(stack._step)
    with Called() as called:
        launched(stack._step)
    assert called.names
    assert called.names <= CAPTURED


def test_an_evaluation_launches_one_variant_whatever_the_stack() -> None:
    tokens, mask = torch.zeros(2, SMALL.seq_len + 1, dtype=torch.int32), torch.ones(2, 32)
    found = [
        variants(launched(lambda p=p: made(SMALL, proxies=p, micro=2).evaluate(tokens, mask)))
        for p in (1, 3)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("preset", ["1m", "60m"])
def test_grids_are_within_what_cuda_takes(preset: str) -> None:
    # Fewer layers launch the same.
    shape = dataclasses.replace(PRESETS[preset], num_layers=1)
    head = "streamed" if shape.width <= 256 else "chunked"
    for launch in launched(made(shape, proxies=1, micro=2, head=head)._step):
        assert all(
            1 <= length <= most for length, most in zip(launch.grid, LARGEST_GRID, strict=True)
        ), launch


def test_no_product_takes_a_factor_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a micro-batch of the reference proxy has goes in one.
    assert launches.head_product(50432) >= 34_000
    factors = []

    def seen(a: torch.Tensor, b: torch.Tensor, **_: object) -> None:
        factors.append((a.shape[2], b.shape[1]))

    monkeypatch.setattr(products, "matmul", seen)
    monkeypatch.setattr(launches, "LARGEST_FACTOR", 128 * 4096 + 1)
    e, head = (torch.zeros(1, rows, 32, dtype=torch.bfloat16) for rows in (300, 4096))
    labels = torch.zeros(1, 300, dtype=torch.int32)
    with recorded():
        linear_cross_entropy.fused(e, head, labels, scale=1.0, dhead_PVD=head.float())
    assert factors == [(128, 128), (128, 128), (44, 44)]


def test_a_launch_without_a_gpu_sees_alignment() -> None:
    from regmix_kernels import row_sums

    sums = torch.zeros(1, dtype=torch.float64)
    whole = torch.zeros(1, 64)
    with recorded() as found:
        row_sums.add_row_sums(whole[:, :32], sums)
        row_sums.add_row_sums(whole[:, 1:33], sums)
    assert len(variants(found)) == 2
