"""The training step: how fast by layout, whether a stack keeps its bits, whether losses are right.

Enters: a run. Leaves: ns/token of eager and captured steps over micro-batches and stacks, at the
reference shape and at width 64; where the time of a step goes; 50 steps of a stack of 8, one of
them poisoned with NaN, against single proxies bit for bit; 100 steps against the CPU's engine and
some against the reference operations in float32, in nats.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from regmix_bench.gpu import parts
from regmix_bench.gpu.run import Run
from regmix_bench.gpu.stacks import (
    ALL_REFERENCE,
    REFERENCE,
    SMALL,
    TINY,
    Layout,
    make_batches,
    make_stack,
    seconds_per_step,
)
from regmix_bench.peaks import mfu

POISONED = 2
# A bf16 run strays from a float32 one by what rounding adds to its weights, not by a bias.
LOSS_BOUND_NATS = 0.02


def steps(run: Run) -> None:
    """Measure and check the step."""
    main = Layout(shape=REFERENCE, proxies=1, batch=64, micro=16)
    if run.tiny:
        main = Layout(shape=TINY, proxies=1, batch=4, micro=2)
    measure_layout(run, main)
    run.attempt("parts of a step", lambda: parts.parts_of_step(run, main), needs=8)
    stack = dataclasses.replace(main, proxies=8 if not run.tiny else 4, batch=8, micro=4)
    run.attempt("stack against singles", lambda: stack_equals_singles(run, stack), needs=10)
    small = dataclasses.replace(main, shape=TINY if run.tiny else SMALL, batch=16, micro=16)
    run.attempt("losses against the CPU", lambda: losses_against_cpu(run, small), needs=15)
    exact = dataclasses.replace(main, batch=4, micro=4)
    run.attempt("losses against float32", lambda: losses_against_exact(run, exact), needs=10)
    measure_layout(run, dataclasses.replace(main, graph=False))
    for layout in layouts(run.tiny, main):
        measure_layout(run, layout)


def layouts(tiny: bool, main: Layout) -> list[Layout]:
    """Return the layouts that are tried beside the main one, the telling ones first."""
    if tiny:
        return [dataclasses.replace(main, proxies=2)]
    small = Layout(shape=SMALL, proxies=1, batch=32, micro=32)  # 8k tokens
    found = [dataclasses.replace(small, proxies=proxies) for proxies in (1, 8, 16, 4)]
    found += [dataclasses.replace(main, micro=micro) for micro in (32, 8, 64)]
    for proxies, micros in ((4, (4, 16)), (8, (2, 8))):
        found += [
            dataclasses.replace(main, proxies=proxies, batch=16, micro=micro) for micro in micros
        ]
    others = ({"head": "chunked"}, {"attention": "sdpa"})
    return [*found, *(dataclasses.replace(main, kernels=kernels) for kernels in others)]


def measure_layout(run: Run, layout: Layout) -> None:
    """Emit ns/token and MFU of one layout."""
    wishes = "".join(f", {op} {kind}" for op, kind in (layout.kernels or {}).items())
    case = f"step: {layout.name}{wishes}"

    def work() -> None:
        count = 3 if run.tiny else 20
        stack = make_stack(run, layout, count + 2)
        run.say(f"{case}: {', '.join(f'{op} {kind}' for op, kind in stack.ops.names.items())}")
        batches = make_batches(layout, 2, stack=stack)
        rate = layout.tokens / seconds_per_step(run, stack, batches, count)
        flops, limits = layout.shape.flops_per_token(), run.limits()
        share = mfu(rate, flops, limits.flops)
        run.record(
            case,
            "training step",
            1e9 / rate,
            "ns/token",
            ceiling=limits.gemm_words,
            ratio_to_ceiling=share,
        )
        if limits.peak is not None:
            metric = f"MFU, of the {limits.peak.name} datasheet"
            run.record(case, metric, 100 * mfu(rate, flops, limits.peak.bf16_flops), "% of peak")

    run.attempt(case, work, needs=6)


def stack_equals_singles(run: Run, layout: Layout, num_steps: int = 50) -> None:
    """Train a stack with one proxy poisoned, and some of its members alone; compare all bits."""
    num_steps = 4 if run.tiny else num_steps
    batches = make_batches(layout, 4)
    stack = make_stack(run, layout, num_steps)
    stack.parameters["norm"][POISONED].fill_(float("nan"))
    stack.flat.refresh_copy()
    for step in range(num_steps):
        stack.train_step(batches[step % 4], step)
    losses, failed = stack.losses(0, num_steps), stack.failed
    state = {name: value.clone() for name, value in stack.parameters.items()}
    case = f"stack of {layout.proxies}, one NaN, {num_steps} steps: {layout.name}"
    expected = np.arange(layout.proxies) == POISONED
    run.record(case, "only the poisoned proxy failed", bool((failed == expected).all()), "equal")
    alone = dataclasses.replace(layout, proxies=1)
    for row in (0, layout.proxies - 1):
        single = make_stack(run, alone, num_steps)
        single.reset([row])
        for step in range(num_steps):
            single.train_step(batches[step % 4][row : row + 1], step)
        same = np.array_equal(single.losses(0, num_steps)[:, 0], losses[:, row])
        same &= all(
            bool((value[0] == state[name][row]).all()) for name, value in single.parameters.items()
        )
        run.record(case, f"proxy {row} equals its single run, bit for bit", same, "equal")
        if not same:
            run.say(f"NOT EQUAL: {case}: proxy {row}")


def losses_against_cpu(run: Run, layout: Layout, num_steps: int = 100) -> None:
    """Train on this device and by the CPU's float32 engine on the same tokens."""
    import torch

    from regmix.model.llama import StackedLlama, init_parameters
    from regmix.model.optim import OptimConfig, StackedAdamW

    num_steps = 5 if run.tiny else num_steps
    batches = make_batches(layout, 8)
    stack = make_stack(run, layout, num_steps, lr=2e-3)
    params = init_parameters(layout.shape, [0])
    config = OptimConfig(lr=2e-3, warmup_steps=min(100, max(1, num_steps // 4)))
    model, optimizer = StackedLlama(layout.shape), StackedAdamW(params, config)
    wanted = []
    for step in range(num_steps):
        stack.train_step(batches[step % 8], step)
        tokens = torch.from_numpy(batches[step % 8].astype(np.int64))
        wanted.append(float(model.train_step(params, optimizer, tokens, step)[0][0]))
    _compare_losses(run, "CPU, float32", layout, stack.losses(0, num_steps)[:, 0], wanted)


def losses_against_exact(run: Run, layout: Layout, num_steps: int = 20) -> None:
    """Train by the kernels and by the reference operations in float32, eager, on this device."""
    num_steps = 3 if run.tiny else num_steps
    exact = dataclasses.replace(layout, graph=False, kernels=ALL_REFERENCE, exact=True)
    batches = make_batches(layout, 4)
    found = []
    for each in (layout, exact):
        stack = make_stack(run, each, num_steps)
        for step in range(num_steps):
            stack.train_step(batches[step % 4], step)
        found.append(stack.losses(0, num_steps)[:, 0])
    _compare_losses(run, "reference operations, float32", layout, found[0], list(found[1]))


def _compare_losses(
    run: Run, name: str, layout: Layout, losses_S: np.ndarray, wanted: list[float]
) -> None:
    gaps = np.asarray(losses_S, dtype=np.float64) - np.asarray(wanted)
    case = f"{len(wanted)} steps against {name}: {layout.name}"
    emit = functools.partial(run.record, case)
    bound = {"ceiling": f"bound {LOSS_BOUND_NATS:g} nats"}
    worst, mean = float(np.abs(gaps).max()), float(gaps.mean())
    if not np.isfinite(gaps).all():
        raise ArithmeticError("a loss is not finite")
    emit("largest gap of a step's loss", worst, "nats", **bound)
    emit("mean gap of the losses, absolute", abs(mean), "nats", **bound)
    emit("last loss, there", float(wanted[-1]), "nats")
    emit("last loss, here", float(losses_S[-1]), "nats")
    if abs(mean) > LOSS_BOUND_NATS:
        run.say(f"OUT OF BOUND: {case}: losses are {mean:+.4f} nats off on average")
