"""The fused stack, over the reference on a CPU, is the stack that the CPU trains."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from regmix.errors import ModelError
from regmix.model.fused.operations import IMPLEMENTATIONS, choose
from regmix.model.fused.stack import FusedStack
from regmix.model.optim import OptimConfig
from regmix.model.presets import PRESETS, ModelShape
from regmix.model.trainable import CpuStack, make_stack

SHAPE = ModelShape(num_layers=2, width=48, num_heads=4, hidden=40, vocab_size=97, seq_len=16)
GROUPED = ModelShape(
    num_layers=1,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    hidden=24,
    vocab_size=61,
    seq_len=8,
    tied=True,
)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=2, total_steps=6, schedule="cosine", clip_norm=0.5)
STEPS, BATCH = 6, 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tokens(shape: ModelShape, num_proxies: int, step: int) -> np.ndarray:
    draw = np.random.default_rng([step, 7])
    size = (num_proxies, BATCH, shape.seq_len + 1)
    return draw.integers(0, shape.vocab_size, size)


def fused(shape: ModelShape, num_proxies: int, **options: object) -> FusedStack:
    sizes = {"num_proxies": num_proxies, "batch_size": BATCH, "num_steps": STEPS}
    stack = FusedStack(shape, OPTIM, device="cpu", **(sizes | options))
    stack.reset(range(num_proxies))
    return stack


def trained(stack: FusedStack | CpuStack, num_proxies: int, shape: ModelShape) -> np.ndarray:
    for step in range(STEPS):
        stack.train_step(tokens(shape, num_proxies, step), step)
    return stack.losses(0, STEPS)


@pytest.mark.parametrize("shape", [SHAPE, GROUPED], ids=["plain", "grouped and tied"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_it_trains_as_the_cpu_does(shape: ModelShape, micro_batch: int | None) -> None:
    cpu = CpuStack(shape, OPTIM, num_proxies=3, num_steps=STEPS)
    cpu.reset(range(3))
    expected = trained(cpu, 3, shape)
    stack = fused(shape, 3, micro_batch=micro_batch)
    # AdamW divides by the root of tiny gradients: rounding grows with the steps.
    np.testing.assert_allclose(trained(stack, 3, shape), expected, rtol=2e-5)
    mask = torch.ones(2, shape.seq_len, dtype=torch.bool)
    mask[1, 5:] = False
    held_out = torch.from_numpy(tokens(shape, 1, 99)[0, :2])
    torch.testing.assert_close(
        stack.evaluate(held_out, mask), cpu.evaluate(held_out, mask), rtol=1e-4, atol=0
    )
    assert set(stack.state()) == set(cpu.state())
    for name, value in cpu.state().items():
        assert stack.state()[name].dtype == value.dtype, name
        assert stack.state()[name].shape == value.shape, name


def test_gradients_are_those_of_the_cpu() -> None:
    cpu = CpuStack(SHAPE, OPTIM, num_proxies=2, num_steps=STEPS)
    cpu.reset([3, 4])
    batch = tokens(SHAPE, 2, 0)
    grads = {name: torch.empty_like(value) for name, value in cpu.parameters.items()}
    cpu.model.loss_and_grads(cpu.parameters, grads, torch.from_numpy(batch))
    stack = FusedStack(SHAPE, OPTIM, num_proxies=2, batch_size=BATCH, num_steps=STEPS, device="cpu")
    stack.reset([3, 4])
    ids = torch.from_numpy(batch).int()
    inputs, labels = (part.reshape(2, -1) for part in (ids[..., :-1], ids[..., 1:]))
    stack.model.forward_backward(stack.flat, inputs, labels, 1 / inputs.shape[1])
    for name, grad in grads.items():
        torch.testing.assert_close(stack.flat.grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_member_gets_the_bits_of_a_single_model_and_nan_stays_alone() -> None:
    stack, single = fused(PRESETS["cpu-32"], 3), fused(PRESETS["cpu-32"], 1)
    single.reset([2])
    stack.parameters["head"][0, 0, 0] = float("nan")
    for step in range(3):
        batch = tokens(PRESETS["cpu-32"], 3, step)
        stack.train_step(batch, step)
        single.train_step(batch[2:], step)
    assert stack.failed.tolist() == [True, False, False]
    assert np.isfinite(stack.losses(0, 3)[:, 1:]).all()
    for name, value in single.parameters.items():
        assert torch.equal(stack.parameters[name][2], value[0]), name


def test_a_frozen_member_keeps_its_parameters() -> None:
    stack = fused(SHAPE, 2)
    stack.parameters["norm"][1, 0] = float("inf")
    before = {name: value[1].clone() for name, value in stack.parameters.items()}
    trained(stack, 2, SHAPE)
    for name, value in before.items():
        torch.testing.assert_close(
            stack.parameters[name][1], value, rtol=0, atol=0, equal_nan=True, msg=name
        )
    assert stack.state()["optimizer.num_steps"].tolist() == [STEPS, 0]


def test_what_is_stored_resumes_with_the_same_bits() -> None:
    whole, resumed = fused(SHAPE, 2), fused(SHAPE, 2)
    expected = trained(whole, 2, SHAPE)
    first = fused(SHAPE, 2)
    for step in range(2):
        first.train_step(tokens(SHAPE, 2, step), step)
    resumed.load(first.state(), first.losses(0, 2))
    # Nothing of its own is done yet: that tells a worker that works from one that dies at once.
    assert resumed.latest_loss()[0] == 2
    assert np.isnan(resumed.latest_loss()[1])
    for step in range(2, STEPS):
        resumed.train_step(tokens(SHAPE, 2, step), step)
    np.testing.assert_array_equal(resumed.losses(0, STEPS), expected)
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value), name


def test_a_stack_that_is_reset_trains_as_a_new_one() -> None:
    stack = fused(SHAPE, 2)
    expected = trained(stack, 2, SHAPE)
    stack.reset(range(2))
    np.testing.assert_array_equal(trained(stack, 2, SHAPE), expected)


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="number of proxies"):
        fused(SHAPE, 2).load(fused(SHAPE, 3).state(), np.zeros((1, 2), dtype=np.float32))


def test_tokens_travel_in_two_bytes_up_to_the_last_id() -> None:
    shape = ModelShape(num_layers=1, width=16, num_heads=1, hidden=16, vocab_size=65536, seq_len=4)
    stack = fused(shape, 1)
    (buffer, _) = stack.buffers(2)
    assert buffer.dtype == np.uint16
    buffer[:] = 65535
    cpu = CpuStack(shape, OPTIM, num_proxies=1, num_steps=STEPS)
    cpu.reset([0])
    stack.train_step(buffer, 0)
    cpu.train_step(buffer.astype(np.int64), 0)
    np.testing.assert_allclose(stack.losses(0, 1), cpu.losses(0, 1), rtol=1e-5)


def test_bf16_stays_near_float32() -> None:
    stack = fused(SHAPE, 2, dtype=torch.bfloat16)
    np.testing.assert_allclose(
        trained(stack, 2, SHAPE), trained(fused(SHAPE, 2), 2, SHAPE), rtol=2e-2
    )
    assert stack.parameters["head"].dtype == torch.float32


def test_micro_batches_must_divide_the_batch() -> None:
    with pytest.raises(ModelError, match="divisor"):
        fused(SHAPE, 1, micro_batch=3)


def test_every_operation_has_its_default_by_device_and_width() -> None:
    assert set(choose(SHAPE, "cpu").values()) == {"reference"}
    on_gpu = choose(PRESETS["1m"], "cuda")
    assert set(on_gpu) == set(IMPLEMENTATIONS)
    assert "reference" not in on_gpu.values()
    assert on_gpu["head"] == "streamed"
    assert choose(PRESETS["1b"], "cuda")["head"] == "chunked"
    assert on_gpu["attention"] == "triton"
    wide_heads = dataclasses.replace(PRESETS["1b"], num_heads=8)
    assert choose(wide_heads, "cuda")["attention"] == "sdpa"
    with pytest.raises(ModelError, match="sdpa"):
        choose(wide_heads, "cuda", {"attention": "triton"})


@pytest.mark.parametrize(
    ("wishes", "word"),
    [({"hed": "chunked"}, "head"), ({"head": "chunky"}, "chunked"), ({"head": "streamed"}, "256")],
)
def test_a_wish_that_cannot_be_had_names_what_can(wishes: dict[str, str], word: str) -> None:
    with pytest.raises(ModelError, match=word):
        choose(PRESETS["1b"], "cuda", wishes)


def test_a_gradient_in_bf16_is_rotated_back_as_exactly_as_it_is_stored() -> None:
    from regmix_kernels import by_reference
    from regmix_kernels.rope import rope_tables

    cos, sin = rope_tables(64, 32, 10000.0, "cpu")
    x = torch.randn(1, 64, 3 * 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, exact = x.clone(), x.double()
    for each in (ours, exact):
        by_reference.rotate(each, cos, sin, 1, 1)
    # Half a unit in the last of eight bits: the result is rounded once.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=0)


def test_a_stack_for_a_gpu_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    sizes = {"num_proxies": 1, "batch_size": 1, "num_steps": 1}
    with pytest.raises(ModelError, match="doctor"):
        make_stack(SHAPE, OPTIM, device="cuda", **sizes)
    with pytest.raises(ModelError, match="'cpu' or 'cuda'"):
        make_stack(SHAPE, OPTIM, device="tpu", **sizes)


class FakeStream:
    """A stream that runs everything at once, and notes what it is told to wait for."""

    def __init__(self, *_: object) -> None:
        self.waits: list[object] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waits.append(event)

    def wait_stream(self, stream: FakeStream) -> None:
        self.waits.append(stream)


class FakeEvent:
    """An event; `recorded` says on which stream it was recorded last."""

    recorded: FakeStream | None = None

    def __init__(self, *, blocking: bool = False) -> None:
        self.blocking = blocking

    def record(self, stream: FakeStream) -> None:
        self.recorded = stream

    def synchronize(self) -> None:
        assert self.recorded is not None


def test_the_order_of_copies_steps_and_graphs_gives_the_same_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # torch.cuda's words, on a CPU: this shows that the calls fit together, not that a GPU obeys.
    from regmix.model.fused import stack as module

    compute, steps = FakeStream(), []

    class FakeGraph:
        def replay(self) -> None:
            steps.append("replay")
            stack._step()

    def idle(*_: object) -> None:
        pass

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: compute)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", idle)
    monkeypatch.setattr(torch.cuda, "empty_cache", idle)
    expected = trained(fused(SHAPE, 2), 2, SHAPE)
    stack = fused(SHAPE, 2, capture=True)
    stack._streams = module._Streams(torch.device("cpu"))
    stack._staging = [torch.zeros_like(stack._tokens) for _ in range(2)]
    stack.reset(range(2))
    done = []
    for step in range(STEPS):
        stack.train_step(tokens(SHAPE, 2, step), step)
        done.append(stack.latest_loss()[0])
    assert steps == ["replay"] * STEPS
    # At step s the host knows of s - 2 steps only.
    assert done == [0, 0, 0, 1, 2, 3]
    np.testing.assert_array_equal(stack.losses(0, STEPS), expected)
    assert stack.latest_loss()[0] == STEPS
