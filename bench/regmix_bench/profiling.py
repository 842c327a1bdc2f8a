"""Where the time of a few steps goes: a trace for Perfetto, and the operations by time.

Enters: a step and the parts of the object that runs it. Leaves: `FOLDER/NAME.json` (chrome trace,
opens at ui.perfetto.dev) and a table in words. Its figures are for looking, not for the records:
the profiler slows what it watches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from regmix_bench import stack
from regmix_bench.compare import aligned

STEPS = 3
ROWS, NAME_CHARACTERS = 15, 60


@contextlib.contextmanager
def named_range(name: str) -> Iterator[None]:
    """Mark what runs inside: for the profiler, and as an NVTX range where there is a GPU."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if cuda:
            torch.cuda.nvtx.range_pop()


def mark(owner: Any, methods: Sequence[str]) -> list[str]:
    """Make each of the object's methods a range of its own; return those that it has."""
    found = [name for name in methods if callable(getattr(owner, name, None))]
    for name in found:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def ranged(*words: Any, _inner: Any = inner, _name: str = name, **named: Any) -> Any:
            with named_range(_name.strip("_")):
                return _inner(*words, **named)

        setattr(owner, name, ranged)
    return found


def profile_steps(
    step: Callable[[], object], path: Path, say: Callable[[str], None], *, steps: int = STEPS
) -> str:
    """Run a few steps under the profiler, write the trace, and return the operations by time."""
    from regmix.files import storage_errors

    step()  # what is allocated and compiled at first use is no part of a step
    activities = [ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as watched:
        for _ in range(steps):
            with named_range("step"):
                step()
        if cuda:
            torch.cuda.synchronize()
    path = path.with_suffix(".json")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(path))
    say(f"{steps} steps under the profiler; their trace: {path} (open it at ui.perfetto.dev)")
    return time_tables(watched.key_averages(), cuda=cuda)


def time_tables(averages: Sequence[Any], *, cuda: bool) -> str:
    """Return the ranges by their whole time, and the operations by their own, as text."""
    kind = "device_time" if cuda else "cpu_time"
    whole, own = f"{kind}_total", f"self_{kind}_total"
    # A kernel's time also counts to the host's call that launched it, and a range has an entry on
    # either side: kernels are taken from the device's side, ranges from the host's.
    side = DeviceType.CUDA if cuda else DeviceType.CPU
    parts = [e for e in averages if e.is_user_annotation and e.device_type == DeviceType.CPU]
    single = [e for e in averages if not e.is_user_annotation and e.device_type == side]
    total = sum(getattr(entry, own) for entry in single) or 1.0
    tables = []
    for title, entries, key in (("part", parts, whole), ("operation", single, own)):
        rows = [(f"{title}, by time", "ms", "share", "calls")]
        for entry in sorted(entries, key=lambda entry: -getattr(entry, key))[:ROWS]:
            value = getattr(entry, key)
            shown = (f"{value / 1000:.1f}", f"{value / total:.1%}", str(entry.count))
            rows.append((entry.key[:NAME_CHARACTERS], *shown))
        tables.append(aligned(rows))
    return "\n\n".join(tables)


GPU_PARTS = ("_forward", "_layer_forward", "_layer_backward", "forward_backward")
CPU_PARTS = (
    *("_forward", "_layer_forward", "_head", "_mlp_backward", "_attention_backward"),
    "_embedding_backward",
)


def profile_cpu_steps(
    case: stack.Case, num_proxies: int, path: Path, say: Callable[[str], None]
) -> None:
    """Profile steps of a stack on one thread of the CPU, its parts as ranges; print the tables."""
    torch.set_num_threads(1)
    from regmix.model.llama import StackedLlama, init_parameters
    from regmix.model.optim import OptimConfig, StackedAdamW
    from regmix.model.presets import make_shape

    shape = make_shape(case.preset, vocab_size=case.vocab_size, seq_len=case.seq_len)
    params = init_parameters(shape, range(num_proxies))
    model, optimizer = StackedLlama(shape), StackedAdamW(params, OptimConfig())
    mark(model, CPU_PARTS)
    mark(optimizer, ("update",))
    size = (num_proxies, case.sequences, case.seq_len + 1)
    tokens = torch.randint(0, case.vocab_size, size, generator=torch.Generator().manual_seed(0))
    print()
    print(profile_steps(lambda: model.train_step(params, optimizer, tokens, 0), path, say))
