"""Steps of a large model that fits this machine, against a plain loop around transformers' Llama.

Enters: settings. Leaves: tokens/s and MFU as records: preset `cpu-128` on a CPU, `1b` on a GPU.
Tokens are drawn by chance: no time depends on them. Does not train a model worth having.
"""

from __future__ import annotations

import dataclasses
import statistics

import torch

from regmix.model.presets import make_shape
from regmix.provenance import available_cores
from regmix_bench import profiling, stack, timing
from regmix_bench.ceilings import ceiling_records, highest, measure_ceilings
from regmix_bench.harness import Record
from regmix_bench.peer_imports import missing
from regmix_bench.suites.registry import Settings
from regmix_bench.throughput import speed_records

SUITE = "train"
CPU_CASE = stack.Case(preset="cpu-128", vocab_size=4096, sequences=16, seq_len=256)
PEER = "float32 sdpa"


def measure(settings: Settings) -> list[Record]:
    """Measure steps of the large model of this device."""
    if settings.device == "cuda":
        from regmix_bench.gpu import block

        return block.train_records(settings)
    device = torch.device("cpu")
    torch.set_num_threads(available_cores())
    case = dataclasses.replace(CPU_CASE, sequences=2) if settings.quick else CPU_CASE
    settings.say(f"preset {case.preset}, {torch.get_num_threads()} threads, all on the CPU")
    settings.say("left out: preset 1b (it needs a GPU)")
    effort = 0.05 if settings.quick else 0.3
    before = measure_ceilings(device, seconds=effort)
    shape = make_shape(case.preset, vocab_size=case.vocab_size, seq_len=case.seq_len)
    ours, _ = stack.our_step(case, 1)
    contenders: dict[str, timing.Work] = {"ours": lambda _: ours()}
    peer = f"LlamaForCausalLM {PEER}"
    reason = missing("transformers")
    if reason is not None:
        settings.say(f"left out: transformers' Llama ({reason})")
    else:
        theirs, _ = stack.peer_step(case, PEER)
        contenders[peer] = lambda _: theirs()
    rounds, seconds = (2, 0.3) if settings.quick else (5, 2.0)
    found = timing.interleaved(contenders, device, rounds=rounds, seconds=seconds, warmup=1)
    tokens = case.sequences * case.seq_len
    ceilings = highest(before, measure_ceilings(device, seconds=effort))
    peers = {
        name: timing.times_as_fast(found["ours"], taken)
        for name, taken in found.items()
        if name != "ours"
    }
    rate = tokens / statistics.median(found["ours"])
    name = f"{case.preset}, batch {case.sequences} x {case.seq_len}, one model"
    records = ceiling_records(ceilings, SUITE)
    records += speed_records(SUITE, name, rate, shape, ceilings, peers=peers)
    if settings.profile is not None:
        profiling.profile_cpu_steps(case, 1, settings.profile / "train", settings.say)
    return records
