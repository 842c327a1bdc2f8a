"""Stacks of the GPU engine as the suite trains them: made, fed with made-up tokens, timed.

Enters: a run, a shape, sizes. Leaves: a `FusedStack`, batches of tokens, seconds per step. The
tokens follow one another by a rule with noise, so that a model has something to learn; no time
depends on them.

P proxies, B sequences of a step, T tokens of one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from regmix.model.optim import OptimConfig
from regmix.model.presets import NEOX_VOCAB_SIZE, ModelShape
from regmix_bench import timing
from regmix_bench.gpu.run import Run

if TYPE_CHECKING:
    from regmix.model.fused.stack import FusedStack

# `1m` of `regmix.model.presets`; the trial without a GPU takes the other two.
REFERENCE = ModelShape(
    num_layers=2, width=256, num_heads=8, hidden=512, vocab_size=NEOX_VOCAB_SIZE, seq_len=2048
)
SMALL = ModelShape(num_layers=2, width=64, num_heads=4, hidden=128, vocab_size=8192, seq_len=256)
TINY = ModelShape(num_layers=1, width=32, num_heads=2, hidden=32, vocab_size=96, seq_len=16)

OPERATIONS = ("embedding", "rmsnorm", "swiglu", "rope", "attention", "head", "row_sums", "adamw")
ALL_REFERENCE = dict.fromkeys(OPERATIONS, "reference")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A shape and how it is trained: P proxies, sequences of a step and of a micro-batch each.

    graph: whether the step is captured; None takes the device's default.
    kernels: operation -> implementation, instead of the engine's choice.
    exact: float32 instead of the device's dtype.
    """

    shape: ModelShape
    proxies: int
    batch: int
    micro: int
    graph: bool | None = None
    kernels: Mapping[str, str] | None = None
    exact: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all proxies."""
        return self.proxies * self.batch * self.shape.seq_len

    @property
    def name(self) -> str:
        """In the records."""
        shape = self.shape
        words = f"width {shape.width}, vocabulary {shape.vocab_size}, P = {self.proxies}, "
        words += f"batch {self.batch} x {shape.seq_len}, micro-batch {self.micro}"
        return words + (", eager" if self.graph is False else "")


def make_stack(
    run: Run, layout: Layout, num_steps: int, *, lr: float = 4e-4, for_speed: bool = False
) -> FusedStack:
    """Return the stack of a layout, its weights drawn from seeds 0, 1, 2 ...

    for_speed: draw them on the device instead, all alike: a large model's take the host long.
    """
    import torch

    from regmix.model.fused.stack import FusedStack

    stack = FusedStack(
        layout.shape,
        OptimConfig(lr=lr, warmup_steps=min(100, max(1, num_steps // 4))),
        num_proxies=layout.proxies,
        batch_size=layout.batch,
        num_steps=num_steps,
        micro_batch=layout.micro,
        device=run.device,
        dtype=torch.float32 if layout.exact else None,
        kernels=layout.kernels,
        capture=layout.graph,
    )
    if for_speed:
        stack.flat.values_PS.normal_(0.0, 0.02)
        stack.flat.refresh_copy()
    else:
        stack.reset(range(layout.proxies))
    return stack


def make_batches(
    layout: Layout, count: int, *, seed: int = 0, stack: FusedStack | None = None
) -> list[np.ndarray]:
    """Return batches [P, B, T+1], in the stack's own pinned buffers where one is given.

    Half of the tokens follow from the one before, the others are drawn, small ones more often.
    Proxy p of a batch has the numbers of seed + p, whatever P is.
    """
    shape = layout.shape
    kind = np.uint16 if shape.vocab_size <= 1 << 16 else np.int32
    size = (layout.batch, shape.seq_len + 1)
    found = []
    buffers = stack.buffers(count) if stack is not None else None
    for number in range(count):
        made = np.empty((layout.proxies, *size), kind) if buffers is None else buffers[number]
        for proxy in range(layout.proxies):
            draw = np.random.default_rng([seed + proxy, number])
            tokens = (shape.vocab_size ** draw.random(size)).astype(np.int64) - 1
            follows = draw.random(size) < 0.5
            for place in range(1, size[1]):
                rule = (tokens[:, place - 1] * 7 + 3) % shape.vocab_size
                tokens[:, place] = np.where(follows[:, place], rule, tokens[:, place])
            made[proxy] = tokens
        found.append(made)
    return found


def seconds_per_step(run: Run, stack: FusedStack, batches: list[np.ndarray], steps: int) -> float:
    """Return the seconds per step of so many steps, tokens and losses carried as in a sweep."""
    for step in range(2):
        stack.train_step(batches[step % len(batches)], step)
    timing.synchronize(run.device)
    started = time.perf_counter()
    for step in range(2, 2 + steps):
        stack.train_step(batches[step % len(batches)], step)
    timing.synchronize(run.device)
    return (time.perf_counter() - started) / steps
