"""How long a piece of work takes: by the GPU's own events, or by the clock on a CPU.

Enters: work as functions of the number of the call, and a device. Leaves: seconds per call,
medians, and ratios from rounds that visit the contenders in turn, so that a change of the
machine's speed meets all of them. Knows nothing of what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

Work = Callable[[int], object]
Input = TypeVar("Input")

# Twice the largest L2 cache of the GPUs in `peaks` (B200: 126 MB), and a CPU's last level.
ROTATION_BYTES = {"cuda": 256_000_000, "cpu": 64_000_000}
MAX_SETS = 16
MAX_CALLS = 1000
# About 1 ms at a GPU's clock: the host runs ahead meanwhile, so gaps between launches do not count.
HEAD_START_CYCLES = 2_000_000
HEAD_START_CALLS = 64


class Rotation(Generic[Input]):
    """Several sets of inputs, so that a call does not find its own in the cache.

    make: the inputs of set number i; num_bytes: the bytes one set reads and writes.
    """

    def __init__(
        self, make: Callable[[int], Input], *, num_bytes: float, device: torch.device
    ) -> None:
        wanted = ROTATION_BYTES[device.type]
        count = min(MAX_SETS, max(1, -(-wanted // max(1, int(num_bytes)))))
        self._sets = [make(number) for number in range(count)]

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, call: int) -> Input:
        return self._sets[call % len(self._sets)]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Work, calls: int, device: torch.device) -> float:
    """Return the seconds per call of so many calls, one after the other."""
    if device.type != "cuda":
        started = time.perf_counter()
        for call in range(calls):
            work(call)
        return (time.perf_counter() - started) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if calls <= HEAD_START_CALLS:
        torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    for call in range(calls):
        work(call)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def interleaved(
    contenders: Mapping[str, Work],
    device: torch.device,
    *,
    rounds: int = 5,
    seconds: float = 0.1,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Return each contender's seconds per call in every round; a round lasts `seconds` for each.

    Every other round goes backwards: nobody always follows the same neighbour.
    """
    calls = {}
    for name, work in contenders.items():
        for call in range(warmup):
            work(call)
        one = max(seconds_of(work, 1, device), 1e-9)
        calls[name] = max(1, min(MAX_CALLS, round(seconds / one)))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(seconds_of(contenders[name], calls[name], device))
    return found


def best_seconds(
    work: Work, device: torch.device, *, rounds: int = 5, seconds: float = 0.1
) -> float:
    """Return the seconds per call in the best round: what the machine can do undisturbed."""
    return min(interleaved({"": work}, device, rounds=rounds, seconds=seconds)[""])


def times_as_fast(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over rounds of other / own: how many times as fast as the other."""
    return statistics.median(theirs / mine for mine, theirs in zip(own, other, strict=True))
