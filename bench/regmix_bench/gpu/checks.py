"""Every kernel against its specification in float64, in what it leaves and in how it stacks.

Enters: a run. Leaves: for every operation and dtype the relative error of each result (Frobenius
norm, the worst proxy), and whether a stack of 8 gave the bits of single proxies. Memory that a
kernel should fill is poisoned with NaN first. Times nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from regmix_bench.gpu.check_cases import CASES, Case, Sizes
from regmix_bench.gpu.run import Run

# Relative Frobenius errors. bf16 keeps 8 bits: 2^-9 = 2e-3 for each rounding of inputs and results
# that the specification does not make; some results pass three of them.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
STACK = 8

GPU_SIZES = (
    Sizes(name="1m", tokens=512, seq_len=256, width=256, heads=8, kv_heads=8, vocab=50432),
    Sizes(name="odd", tokens=3 * 123, seq_len=123, width=64, heads=4, kv_heads=2, vocab=1003),
    Sizes(name="1b", tokens=512, seq_len=256, width=2048, heads=16, kv_heads=16, vocab=8192),
)
TINY_SIZES = (Sizes(name="tiny", tokens=32, seq_len=16, width=32, heads=2, kv_heads=1, vocab=65),)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, while a kernel runs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other operations, which are not the point
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_kernels(run: Run) -> None:
    """Check every operation at every size and dtype, what proxies run on first."""
    for dtype in _dtypes(run):
        names = list(CASES)
        if dtype == torch.float32:
            # Exact products compile for long: those that have none of their own come first.
            names.reverse()
        for sizes in TINY_SIZES if run.tiny else GPU_SIZES:
            for name in names:
                if CASES[name].fits(sizes):
                    label = f"{name}, {sizes.name} sizes, {WORDS[dtype]}"
                    run.attempt(label, _check(run, label, CASES[name], sizes, dtype))


def _dtypes(run: Run) -> tuple[torch.dtype, ...]:
    # The interpreter's bf16 products are wrong (triton issue 11584).
    if run.device.type == "cuda":
        return (torch.bfloat16, torch.float32)
    return (torch.float32,)


def _check(
    run: Run, label: str, case: Case, sizes: Sizes, dtype: torch.dtype
) -> Callable[[], None]:
    def work() -> None:
        stack = 2 if run.tiny else STACK
        with torch.device(run.device):
            rows = [case.inputs(sizes, seed, dtype) for seed in range(stack)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        with poisoned():
            together = case.ours(clones(stacked), sizes)
        worst: dict[str, float] = {}
        alike = True
        for row in (0, stack - 1):
            single = {name: value[row : row + 1].clone() for name, value in stacked.items()}
            with poisoned():
                alone = case.ours(clones(single), sizes)
            alike &= all(torch.equal(alone[name][0], together[name][row]) for name in alone)
            wanted = case.wanted({name: value[0] for name, value in single.items()}, sizes)
            for name, value in wanted.items():
                error = relative_error(together[name][row], value)
                worst[name] = max(worst.get(name, 0.0), error)
        bound = BOUNDS[dtype]
        for name, error in worst.items():
            run.record(
                label,
                f"error of {name} against float64",
                error,
                "relative error",
                ceiling=f"bound {bound:g}",
                ratio_to_ceiling=error / bound,
            )
            if not error <= bound:
                run.say(f"OUT OF BOUND: {label}: {name} is off by {error:.3g}, bound {bound:g}")
        run.record(label, f"stack of {stack} equals single proxies", float(alike), "equal")
        if not alike:
            run.say(f"NOT EQUAL: {label}: a stack of {stack} gave other bits than single proxies")

    return work


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies: some operations work in place."""
    return {name: value.clone() for name, value in tensors.items()}


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Return |value - wanted| / |wanted| (Frobenius), 1e30 where the value is not finite."""
    difference = (value.double() - wanted.double()).norm()
    error = float(difference / wanted.double().norm().clamp_min(1e-30))
    return error if error == error and error < 1e30 else 1e30
