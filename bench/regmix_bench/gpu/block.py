"""The 1B model on one GPU: one block forward and backward, and whole training steps.

Enters: a run, or the settings of `regmix-fast bench train`. Leaves: ns/token and MFU of a block of
ours (the difference between stacks of three layers and of one, halved: so nothing outside of blocks
counts) beside an eager and a compiled block; tokens/s and MFU of the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import TYPE_CHECKING

import torch

from regmix.model.presets import ModelShape
from regmix_bench import timing
from regmix_bench.ceilings import ceiling_records
from regmix_bench.gpu import baseline, parts
from regmix_bench.gpu.run import Contender, Run, prepare
from regmix_bench.gpu.stacks import TINY, Layout, make_batches, make_stack, seconds_per_step
from regmix_bench.harness import Record
from regmix_bench.throughput import speed_records

if TYPE_CHECKING:
    from regmix_bench.suites.registry import Settings

SUITE = "train"
# `1b` of `regmix.model.presets`.
LARGE = ModelShape(
    num_layers=22, width=2048, num_heads=16, hidden=5632, vocab_size=50432, seq_len=2048
)
BLOCK_SEQUENCES, STEP_BATCH, STEP_MICRO = 8, 16, 4


def blocks(run: Run) -> None:
    """Measure a block, then the whole model."""
    shape = dataclasses.replace(LARGE, vocab_size=4096) if not run.tiny else TINY
    sequences = BLOCK_SEQUENCES if not run.tiny else 2
    run.attempt("1B block, ours", lambda: our_block(run, shape, sequences), needs=15)
    work = functools.partial(peer_blocks, run, shape, sequences)
    run.attempt("1B block, peers", work, needs=10, has_contenders=True)
    whole = Layout(shape=LARGE, proxies=1, batch=STEP_BATCH, micro=STEP_MICRO)
    if run.tiny:
        whole = Layout(shape=TINY, proxies=1, batch=2, micro=2)
    run.attempt("1B model", lambda: whole_model(run, whole), needs=25)


def block_flops(shape: ModelShape) -> float:
    """Return the FLOPs per token of one block, forward and backward."""
    flops = parts.part_flops(dataclasses.replace(shape, num_layers=1))
    return flops[parts.ATTENTION] + flops[parts.MLP] + flops[parts.QKVO]


def our_block(run: Run, shape: ModelShape, sequences: int) -> None:
    """Emit ns/token and MFU of a block of ours."""
    taken = []
    for layers in (1, 3):
        layout = Layout(
            shape=dataclasses.replace(shape, num_layers=layers),
            proxies=1,
            batch=4 * sequences,
            micro=sequences,
        )
        count = 2 if run.tiny else 6
        stack = make_stack(run, layout, count + 2, for_speed=True)
        batches = make_batches(layout, 1, stack=stack)
        taken.append(seconds_per_step(run, stack, batches, count) / layout.tokens)
        del stack
        run.free()
    _emit_block(run, shape, sequences, "ours, by difference", (taken[1] - taken[0]) / 2)


def peer_blocks(run: Run, shape: ModelShape, sequences: int) -> None:
    """Emit ns/token and MFU of an eager and a compiled block in bf16."""
    contenders = {
        "eager": Contender(make=functools.partial(_peer_block, run, shape, sequences, False))
    }
    if run.compiles:
        make = functools.partial(_peer_block, run, shape, sequences, True)
        contenders["torch.compile"] = Contender(make=make, needs=20)
    there = prepare(run, "1B block", contenders)
    found = run.take_turns(there, rounds=3, seconds=0.2)
    for name, times in found.items():
        tokens = sequences * shape.seq_len
        _emit_block(run, shape, sequences, name, statistics.median(times) / tokens)


def _peer_block(run: Run, shape: ModelShape, sequences: int, compiled: bool) -> timing.Work:
    from regmix_kernels.rope import rope_tables

    torch.manual_seed(0)
    # cuDNN or FlashAttention: SDPA takes its own choice.
    made = baseline.Block(shape, baseline.Parts(False), None).to(run.device, run.dtype)
    cos, sin = rope_tables(shape.seq_len, shape.head_dim, shape.rope_base, run.device, run.dtype)
    size = (sequences, shape.seq_len, shape.width)
    x = torch.randn(size, device=run.device).to(run.dtype).requires_grad_()
    gradient = torch.randn(size, device=run.device).to(run.dtype)
    block = torch.compile(made) if compiled else made

    def work(call: int) -> None:
        made.zero_grad(set_to_none=True)
        x.grad = None
        block(x, cos, sin).backward(gradient)

    return work


def _emit_block(
    run: Run, shape: ModelShape, sequences: int, name: str, seconds_per_token: float
) -> None:
    limits, flops = run.limits(), block_flops(shape)
    case = f"1B block, {sequences} x {shape.seq_len}, width {shape.width}; {name}"
    if seconds_per_token <= 0:
        raise ArithmeticError("three layers took no longer than one: the machine was not quiet")
    rate = flops / seconds_per_token
    run.record(
        case,
        "forward and backward",
        1e9 * seconds_per_token,
        "ns/token",
        ceiling=limits.gemm_words,
        ratio_to_ceiling=rate / limits.flops,
    )
    if limits.peak is not None:
        metric = f"MFU, of the {limits.peak.name} datasheet"
        run.record(case, metric, 100 * rate / limits.peak.bf16_flops, "% of peak")


def whole_model(run: Run, layout: Layout) -> None:
    """Emit tokens/s and MFU of training the whole model."""
    count = 2 if run.tiny else 4
    stack = make_stack(run, layout, count + 2, for_speed=True)
    batches = make_batches(layout, 1, stack=stack)
    rate = layout.tokens / seconds_per_step(run, stack, batches, count)
    case = f"1B model: {layout.name}"
    for record in speed_records(run.suite, case, rate, layout.shape, run.limits()):
        run.emit(record)


def train_records(settings: Settings) -> list[Record]:
    """Return the records of `regmix-fast bench train` on a GPU."""
    records: list[Record] = []
    seconds = 90.0 if settings.quick else 300.0
    run = Run(torch.device("cuda"), seconds, records.append, settings.say, suite=SUITE)
    records += ceiling_records(run.limits(), SUITE)
    blocks(run)
    if settings.profile is not None:
        settings.say("no trace: profile the suite proxies, its steps have the same operations")
    return records
