"""Training proxies on this machine: how fast, how near its limits, how long a sweep would take.

Enters: settings. Leaves: tokens/s, MFU, proxies per hour, and the predicted time and cost of a
sweep as records, beside a loop that trains one proxy at a time (transformers' Llama, where it is
installed). On a CPU the layout is that of `regmix-fast proxies`: a process for every core, each
with a stack of its own. Looks at no loss.
"""

from __future__ import annotations

import statistics

import torch

from regmix.model.presets import make_shape
from regmix.provenance import available_cores
from regmix_bench import profiling, timing
from regmix_bench.ceilings import ceiling_records, highest, measure_ceilings
from regmix_bench.harness import Record
from regmix_bench.peaks import Sweep
from regmix_bench.peer_imports import missing
from regmix_bench.stack import Case, Contender, Runner
from regmix_bench.suites.registry import Settings
from regmix_bench.throughput import speed_records, sweep_records

SUITE = "proxies"
STACK, PROFILED = 16, 4
# As `regmix-fast mixtures` has it: preset cpu-64, batches of 16, 2M tokens a proxy.
CASE = Case(preset="cpu-64", vocab_size=4096, sequences=16, seq_len=128)
CPU_TOKENS = 2_000_000
PEER = "float32 sdpa"


def measure(settings: Settings) -> list[Record]:
    """Measure the training of proxies on this device."""
    if settings.device == "cuda":
        from regmix_bench.gpu import proxies

        return proxies.bench_records(settings)
    settings.say("left out: the GPU engine and preset 1m at full length (no GPU here)")
    cores = available_cores()
    torch.set_num_threads(cores)
    device, seconds = torch.device("cpu"), 0.05 if settings.quick else 0.3
    before = measure_ceilings(device, seconds=seconds)
    speeds = measure_speeds(settings, cores)
    ceilings = highest(before, measure_ceilings(device, seconds=seconds))
    shape = make_shape(CASE.preset, vocab_size=CASE.vocab_size, seq_len=CASE.seq_len)
    own = next(name for name in speeds if name.startswith("stack of"))
    peers = {
        name: timing.times_as_fast(_inverse(speeds[own]), _inverse(rates))
        for name, rates in speeds.items()
        if name != own
    }
    case = f"{CASE.name}; {own}"
    records = ceiling_records(ceilings, SUITE)
    records += speed_records(
        SUITE, case, statistics.median(speeds[own]), shape, ceilings, peers=peers
    )
    for name in peers:
        theirs = statistics.median(speeds[name])
        records += speed_records(SUITE, f"{CASE.name}; {name}", theirs, shape, ceilings)
    sweep = Sweep(
        num_proxies=settings.num_proxies,
        proxy_tokens=settings.proxy_tokens or CPU_TOKENS,
        price_per_hour=settings.price_per_hour,
    )
    records += sweep_records(SUITE, case, statistics.median(speeds[own]), sweep, peers)
    settings.say("a sweep's prediction: training only, without evaluation and checkpoints")
    if settings.profile is not None:
        profiling.profile_cpu_steps(CASE, PROFILED, settings.profile / "proxies", settings.say)
    return records


def measure_speeds(settings: Settings, cores: int) -> dict[str, list[float]]:
    """Return tokens per second of every contender in every round; ours comes first."""
    contenders = [Contender(kind="ours", variant="", stack=STACK, processes=cores, threads=1)]
    reason = missing("transformers")
    if reason is not None:
        settings.say(f"left out: transformers' Llama ({reason})")
    else:
        variants = [PEER] if settings.quick else [PEER, f"{PEER} compile"]
        contenders += [
            Contender(kind="peer", variant=variant, processes=cores, threads=1)
            for variant in variants
        ]
        if settings.quick:
            settings.say("left out in a quick run: transformers' Llama under torch.compile")
    runners = []
    try:
        for contender in contenders:
            runner = Runner(CASE, contender)
            runners.append(runner)
            if not runner.ready():
                settings.say(f"left out: {contender.name} (it does not start here)")
                runners.pop().close()
        rates: dict[str, list[float]] = {runner.contender.name: [] for runner in runners}
        rounds, seconds = (2, 1.0) if settings.quick else (5, 4.0)
        for number in range(rounds):
            settings.say(f"round {number + 1} of {rounds}")
            for runner in runners:
                rates[runner.contender.name].append(runner.measure(seconds) * _step_tokens(CASE))
    finally:
        for runner in runners:
            runner.close()
    return rates


def _step_tokens(case: Case) -> int:
    return case.sequences * case.seq_len


def _inverse(rates: list[float]) -> list[float]:
    return [1 / rate for rate in rates]
