"""Proxies end to end on one GPU, beside the published way to train them, in turns.

Enters: a run, or the settings of `regmix-fast bench proxies`. Leaves: tokens/s, MFU, proxies per
hour, the predicted sweep, and the ratio to each rebuilt baseline; and the speed of an evaluation.
Whole optimizer steps of 512 sequences, tokens copied from the host and losses copied back; no
sampler and no checkpoint takes part.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from regmix.model.presets import ModelShape
from regmix_bench import timing
from regmix_bench.ceilings import ceiling_records
from regmix_bench.gpu import baseline
from regmix_bench.gpu.run import Contender, Run, prepare
from regmix_bench.gpu.stacks import REFERENCE, TINY, Layout, make_batches, make_stack
from regmix_bench.harness import Record
from regmix_bench.peaks import Sweep
from regmix_bench.peer_imports import missing
from regmix_bench.throughput import speed_records, sweep_records

if TYPE_CHECKING:
    from regmix_bench.suites.registry import Settings

SUITE = "proxies"
# The paper's proxy: 1,000 steps of 512 x 2048; and what a sweep here takes by default.
PAPER_TOKENS, GPU_TOKENS = 1_048_576_000, 250_000_000
OURS = "ours, captured"


def main_layout(tiny: bool) -> Layout:
    """Return how the reference proxy is trained."""
    if tiny:
        return Layout(shape=TINY, proxies=1, batch=4, micro=2)
    return Layout(shape=REFERENCE, proxies=1, batch=512, micro=16)


def end_to_end(run: Run, sweep: Sweep | None = None) -> None:
    """Measure ours and the baselines in turns, then an evaluation."""
    layout = main_layout(run.tiny)
    work = functools.partial(_measure, run, layout, sweep)
    run.attempt("proxies end to end", work, needs=20, has_contenders=True)
    run.attempt("evaluation", functools.partial(_evaluation, run, layout), needs=5)


def _measure(run: Run, layout: Layout, sweep: Sweep | None) -> None:
    case = f"proxies: {layout.name}"
    there = prepare(run, case, {OURS: Contender(make=lambda: _our_step(run, layout), ours=True)})
    there |= prepare(run, case, _baselines(run, layout))
    peer_tokens = _peer_batch(layout) * layout.shape.seq_len
    sizes = {name: layout.tokens if name == OURS else peer_tokens for name in there}
    rounds = 4
    effort = max(0.3, min(3.0, run.left() / (2 * rounds * len(there) + 4)))
    found = run.take_turns(there, rounds=rounds, seconds=effort)
    rates = {name: [sizes[name] / taken for taken in times] for name, times in found.items()}
    _emit(run, case, layout.shape, rates, sweep)


def _emit(
    run: Run, case: str, shape: ModelShape, rates: dict[str, list[float]], sweep: Sweep | None
) -> None:
    limits = run.limits()
    peers = {
        name: statistics.median(
            mine / theirs for mine, theirs in zip(rates[OURS], values, strict=True)
        )
        for name, values in rates.items()
        if name != OURS and OURS in rates
    }
    for name, values in rates.items():
        rate, against = statistics.median(values), peers if name == OURS else {}
        label = f"{case}; {name}"
        for record in speed_records(run.suite, label, rate, shape, limits, peers=against):
            run.emit(record)
        paper = Sweep(num_proxies=512, proxy_tokens=PAPER_TOKENS)
        for each in (paper, sweep or Sweep(num_proxies=64, proxy_tokens=GPU_TOKENS)):
            for record in sweep_records(run.suite, label, rate, each, against):
                run.emit(record)


def _our_step(run: Run, layout: Layout) -> timing.Work:
    # The rates' table is as long as the run; a step past its end would read outside of it.
    num_steps = 4096
    stack = make_stack(run, layout, num_steps)
    batches = make_batches(layout, 2, stack=stack)
    steps = iter(range(num_steps))

    def work(call: int) -> None:
        step = next(steps)
        stack.train_step(batches[step % 2], step)

    return work


def _peer_batch(layout: Layout) -> int:
    """Return the sequences of a peer's step: as many, but no more than a few micro-batches."""
    return min(layout.batch, 128)


def _baselines(run: Run, layout: Layout) -> dict[str, Contender]:
    batch, shape = _peer_batch(layout), layout.shape
    found: dict[str, Contender] = {}

    def variant(name: str, micro: int) -> Callable[[], timing.Work]:
        return lambda: baseline.make_step(shape, name, batch=batch, micro=micro, device=run.device)

    if run.tiny:
        return {"reference style, eager": Contender(make=variant("eager", 2))}
    # The published micro-batch is not a limit of this GPU: two sizes, so that it has its best.
    found["reference style, fused parts, micro-batch 16"] = Contender(make=variant("fused", 16))
    found["reference style, fused parts, micro-batch 8"] = Contender(make=variant("fused", 8))
    found["reference style, torch.compile"] = Contender(make=variant("compiled", 16), needs=40)
    found["reference style, eager"] = Contender(make=variant("eager", 16))
    reason = missing("transformers")
    if reason is not None:
        run.say(f"left out: transformers with torch.compile ({reason})")
    else:
        found["transformers, torch.compile"] = Contender(
            make=lambda: baseline.transformers_step(
                shape, batch=batch, micro=16, device=run.device, compiled=True
            ),
            needs=40,
        )
    return found


def _evaluation(run: Run, layout: Layout) -> None:
    stack = make_stack(run, dataclasses.replace(layout, batch=layout.micro), 2)
    rows = layout.micro * 4
    batch = make_batches(dataclasses.replace(layout, batch=rows), 1)[0][0]
    tokens = torch.from_numpy(batch.astype("int64"))
    mask = torch.ones(rows, layout.shape.seq_len, dtype=torch.bool)
    work = {"": lambda _: stack.evaluate(tokens, mask)}
    found = run.take_turns(work, rounds=3, seconds=0.3)
    ns = 1e9 * statistics.median(found[""]) / (rows * layout.shape.seq_len)
    least = layout.shape.flops_per_token() / 3 / run.limits().flops
    run.record(
        f"evaluation: {layout.name}",
        "evaluation",
        ns,
        "ns/token",
        ceiling=run.limits().gemm_words,
        ratio_to_ceiling=1e9 * least / ns,
    )


def bench_records(settings: Settings) -> list[Record]:
    """Return the records of `regmix-fast bench proxies` on a GPU."""
    records: list[Record] = []
    seconds = 60.0 if settings.quick else 240.0
    run = Run(torch.device("cuda"), seconds, records.append, settings.say, suite=SUITE)
    records += ceiling_records(run.limits(), SUITE)
    sweep = Sweep(
        num_proxies=settings.num_proxies,
        proxy_tokens=settings.proxy_tokens or GPU_TOKENS,
        price_per_hour=settings.price_per_hour,
    )
    end_to_end(run, sweep)
    if settings.profile is not None:
        profile(run, settings)
    return records


def profile(run: Run, settings: Settings) -> None:
    """Trace a few steps, uncaptured, so that their parts have names."""
    from regmix_bench import profiling

    assert settings.profile is not None
    layout = dataclasses.replace(main_layout(run.tiny), batch=16, graph=False)
    stack = make_stack(run, layout, 16)
    profiling.mark(stack.model, profiling.GPU_PARTS)
    batches, steps = make_batches(layout, 2, stack=stack), iter(range(16))

    def step() -> None:
        number = next(steps)
        stack.train_step(batches[number % 2], number)

    print(profiling.profile_steps(step, settings.profile / SUITE, settings.say))
