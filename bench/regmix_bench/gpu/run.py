"""One run of the GPU suite, as its sections see it: device, time left, what is tried, what is said.

Enters: cases, each a function. Leaves: records, one at a time as they are made. A case that raises
becomes a record of its failure and the rest goes on; where the device itself is lost, `DeviceLost`
ends the process, and `gpu_suite` starts another one at the next case. Measures nothing itself.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from regmix_bench import timing
from regmix_bench.ceilings import Ceilings, measure_ceilings
from regmix_bench.harness import Record

SUITE = "gpu"


class DeviceLostError(Exception):
    """The device answers no more; a new process may find it well."""


@dataclass
class Run:
    """device; tiny: sizes for a trial without a GPU; seconds: until `left` is 0.

    emit, say: take records and words; started: is told of every case before it runs.
    skipped: cases that an earlier process tried.
    """

    device: torch.device
    seconds: float
    emit: Callable[[Record], None]
    say: Callable[[str], None]
    tiny: bool = False
    suite: str = SUITE
    started: Callable[[str], None] = lambda case: None
    skipped: Collection[str] = ()
    ceilings: Ceilings | None = None
    _begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds left."""
        return self.seconds - (time.monotonic() - self._begin)

    def limits(self) -> Ceilings:
        """Return the machine's limits, measured once."""
        if self.ceilings is None:
            sizes: dict[str, Any] = {"gemm_size": 64, "copy_bytes": 1 << 16} if self.tiny else {}
            effort = 0.005 if self.tiny else 0.1
            self.ceilings = measure_ceilings(self.device, seconds=effort, **sizes)
        return self.ceilings

    @property
    def dtype(self) -> torch.dtype:
        """What models are computed in: bf16, and fp32 where there is no GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is worth its time."""
        return self.device.type == "cuda" and not self.tiny

    def record(self, case: str, metric: str, value: float, unit: str, **against: Any) -> None:
        """Emit a record of this suite."""
        self.emit(
            Record(
                suite=self.suite, case=case, metric=metric, value=float(value), unit=unit, **against
            )
        )

    def attempt(
        self,
        case: str,
        work: Callable[[], object],
        *,
        needs: float = 2.0,
        has_contenders: bool = False,
    ) -> bool:
        """Do a case of ours; False where it was left out or failed, which is recorded.

        needs: seconds below which it is not begun. has_contenders: each of them counts as a case
        (`prepare`), so another process comes back to those that were not tried.
        """
        if case in self.skipped:
            return False
        if self.left() < needs:
            self.say(f"left out: {case} (no time left)")
            return False
        if not has_contenders:
            self.started(case)
        try:
            work()
            timing.synchronize(self.device)
        except DeviceLostError:
            raise
        except Exception as error:
            self.fail(case, error)
            self._check_device()
            return False
        finally:
            self.free()
        return True

    def take_turns(
        self, contenders: Mapping[str, timing.Work], *, rounds: int, seconds: float
    ) -> dict[str, list[float]]:
        """Return the seconds per call of each contender in every round; all have run before."""
        if self.tiny:
            return timing.interleaved(contenders, self.device, rounds=1, seconds=0, warmup=0)
        return timing.interleaved(contenders, self.device, rounds=rounds, seconds=seconds, warmup=1)

    def fail(self, case: str, error: BaseException) -> None:
        """Record that a case failed, and why."""
        reason = _reason(error)
        self.say(f"FAILED: {case}: {type(error).__name__}: {reason}")
        self.record(case, f"failed: {type(error).__name__}: {reason}", 1, "failures")

    def free(self) -> None:
        """Give back what the last case held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_device(self) -> None:
        try:
            timing.synchronize(self.device)
            torch.zeros(1, device=self.device).add_(1).item()
        except Exception as error:
            raise DeviceLostError(str(error)) from error


def _reason(error: BaseException) -> str:
    """Return the first line of an error, without paths: it goes into records."""
    line = (str(error).strip().splitlines() or ["no word"])[0]
    return re.sub(r"\(?/[^\s)]*\)?", "", line)[:160].strip()


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to do the same work. ours: its failure is one; others are named and left out.

    make: prepares it and returns one call; needs: seconds below which that is not begun, for
    what is compiled first.
    """

    make: Callable[[], timing.Work]
    ours: bool = False
    needs: float = 0.0


def prepare(run: Run, case: str, contenders: Mapping[str, Contender]) -> dict[str, timing.Work]:
    """Return those contenders that run here, each having run once."""
    there: dict[str, timing.Work] = {}
    for name, contender in contenders.items():
        label = f"{case}; {name}"
        if label in run.skipped:
            continue
        if run.left() < contender.needs:
            run.say(f"left out: {label} (no time left to compile)")
            continue
        run.started(label)
        try:
            work = contender.make()
            work(0)
            timing.synchronize(run.device)
        except Exception as error:
            if contender.ours:
                run.fail(label, error)
            else:
                run.say(f"left out: {label} ({type(error).__name__}: {_reason(error)})")
            run._check_device()
            run.free()
            continue
        there[name] = work
    return there


def bake_off(
    run: Run,
    case: str,
    metric: str,
    contenders: Mapping[str, Contender],
    *,
    tokens: int,
    least_seconds: float,
    ceiling: str,
    rounds: int = 5,
) -> dict[str, float]:
    """Time contenders in turns; emit ns/token of each, ours against every other one.

    least_seconds: what the work takes at the ceiling. Returns the median seconds by name.
    """
    there = prepare(run, f"{case}, {metric}", contenders)
    found = run.take_turns(there, rounds=rounds, seconds=0.06)
    for name, times in found.items():
        value, label = statistics.median(times), f"{case}; {name}"
        ns = 1e9 * value / tokens
        ratio = least_seconds / value
        run.record(label, metric, ns, "ns/token", ceiling=ceiling, ratio_to_ceiling=ratio)
        if contenders[name].ours:
            for other, theirs in found.items():
                if other != name:
                    faster = timing.times_as_fast(times, theirs)
                    run.record(label, metric, ns, "ns/token", peer=other, ratio_to_peer=faster)
    return {name: statistics.median(times) for name, times in found.items()}
