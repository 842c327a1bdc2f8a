"""Where a step's time goes, by the parts of `KERNELS.md`'s budget: head, attention, MLP, QKVO.

Enters: a stack that is not captured as a graph. Leaves: ns/token of each part, against what its
products take at the GEMM rate measured. Every operation is timed by the device's own events, in a
step of full size, where launches run ahead; what lies between operations shows as the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from regmix.model.presets import ModelShape
from regmix_bench import timing
from regmix_bench.gpu.run import Run
from regmix_bench.gpu.stacks import Layout, make_batches, make_stack

if TYPE_CHECKING:
    from regmix.model.fused.stack import FusedStack

HEAD, ATTENTION, MLP, QKVO = "lm_head and loss", "attention", "MLP", "QKVO"
NORMS, EMBEDDING, OPTIMIZER = "norms", "embedding", "clip and AdamW"
OPERATIONS_OF = {
    HEAD: ("head", "head_loss"),
    ATTENTION: ("attention", "attention_backward", "rotate"),
    MLP: ("swiglu", "swiglu_backward"),
    NORMS: ("rmsnorm", "rmsnorm_backward"),
    EMBEDDING: ("embed", "plan", "add_rows"),
    OPTIMIZER: ("gradient_norms", "update"),
}


def part_flops(shape: ModelShape) -> dict[str, float]:
    """Return the FLOPs per token, forward and backward, of the parts that multiply matrices."""
    heads = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim
    layers = shape.num_layers
    return {
        HEAD: 6.0 * shape.width * shape.vocab_size,
        ATTENTION: 6.0 * layers * shape.width * (shape.seq_len + 1),
        MLP: 6.0 * layers * 3 * shape.width * shape.hidden,
        QKVO: 6.0 * layers * (heads + shape.width) * shape.width,
    }


class Stopwatch:
    """Seconds of each part, by events on a GPU and by the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside to a part; a part within a part counts to the outer one."""
        if self._inside:
            yield
            return
        self._inside = True
        try:
            if self._device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
            else:
                started = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - started
        finally:
            self._inside = False

    def seconds(self) -> dict[str, float]:
        """Return the sums so far."""
        timing.synchronize(self._device)
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


@contextmanager
def watched(stack: FusedStack, watch: Stopwatch) -> Iterator[None]:
    """Have every operation of the stack counted while the block runs."""
    from regmix.model.fused import llama

    def counted(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*words: Any, **named: Any) -> Any:
            with watch.part(part):
                return function(*words, **named)

        return call

    shape, operations, product = stack.shape, stack.ops, llama.matmul
    mlp = {shape.hidden, 2 * shape.hidden}

    def matmul(a: Any, b: Any, **named: Any) -> Any:
        inside = {a.shape[1], a.shape[2], b.shape[2]} & mlp
        with watch.part(MLP if inside and shape.width not in mlp else QKVO):
            return product(a, b, **named)

    functions: dict[str, Any] = {
        name: counted(getattr(operations, name), part)
        for part, names in OPERATIONS_OF.items()
        for name in names
    }
    ops = dataclasses.replace(operations, **functions)
    stack.ops = stack.model.ops = ops
    vars(llama)["matmul"] = matmul
    try:
        yield
    finally:
        stack.ops = stack.model.ops = operations
        vars(llama)["matmul"] = product


def parts_of_step(run: Run, layout: Layout, *, steps: int = 3) -> None:
    """Emit ns/token of every part of the layout's step, and of what lies between them."""
    layout = dataclasses.replace(layout, graph=False)
    stack = make_stack(run, layout, steps + 2)
    batches = make_batches(layout, 2, stack=stack)
    for step in range(2):
        stack.train_step(batches[step % 2], step)
    watch = Stopwatch(run.device)
    timing.synchronize(run.device)
    started = time.perf_counter()
    with watched(stack, watch):
        for step in range(2, steps + 2):
            stack.train_step(batches[step % 2], step)
    timing.synchronize(run.device)
    whole = time.perf_counter() - started
    found = watch.seconds()
    limits, flops = run.limits(), part_flops(layout.shape)
    case = f"parts of a step: {layout.name}"
    tokens = layout.tokens * steps
    for part, seconds in sorted(found.items(), key=lambda pair: -pair[1]):
        against: dict[str, Any] = {}
        if part in flops:
            least = flops[part] * tokens / limits.flops
            against = {"ceiling": limits.gemm_words, "ratio_to_ceiling": least / seconds}
        run.record(case, part, 1e9 * seconds / tokens, "ns/token", **against)
    rest = whole - sum(found.values())
    run.record(case, "between the parts, eager", 1e9 * max(rest, 0.0) / tokens, "ns/token")
