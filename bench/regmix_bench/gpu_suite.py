"""All that a GPU can tell about this package, in one command of at most nine minutes.

Enters: how many seconds. Leaves: a file of records, written as they are made, and a table. The
sections run in a child process, most important first; one that fails, hangs or takes the device
down leaves a record of that, and the rest goes on in another child. Needs torch, triton, NumPy and
safetensors, and nothing else that this package usually asks for; tokens are made up.

    python -m regmix_bench.gpu_suite --json gpu.jsonl
    python -m regmix_bench.gpu_suite --section agreement      # minutes: may a head be a default?
    python -m regmix_bench.gpu_suite --device cpu --tiny      # a trial of every line, no GPU
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from regmix_bench import compare
from regmix_bench.harness import Record, append

if TYPE_CHECKING:
    from regmix_bench.suites.registry import Settings

SUITE = "gpu"
SECONDS = 540.0
# What a child may take beyond its section's time: one case that was begun just before the end.
GRACE_SECONDS = 25.0
NO_GPU = "torch sees no GPU"
DEVICE_LOST, NO_DEVICE = 3, 4


@dataclass(frozen=True, kw_only=True)
class Section:
    """name; module and function that measure it; share: its part of the time that is left.

    on_request: only where it is named.
    """

    name: str
    module: str
    function: str
    share: float
    on_request: bool = False


SECTIONS = (
    Section(name="ceilings", module="gpu_suite", function="measure_limits", share=15),
    Section(name="checks", module="gpu.checks", function="check_kernels", share=80),
    Section(name="head", module="gpu.head", function="head_bake_off", share=70),
    Section(name="attention", module="gpu.attention", function="attention_bake_off", share=50),
    Section(name="pointwise", module="gpu.pointwise", function="pointwise", share=60),
    Section(name="step", module="gpu.step", function="steps", share=115),
    Section(name="proxies", module="gpu.proxies", function="end_to_end", share=105),
    Section(name="block", module="gpu.block", function="blocks", share=55),
    Section(
        name="agreement",
        module="gpu.agreement",
        function="agreement",
        share=400,
        on_request=True,
    ),
)
NAMES = tuple(section.name for section in SECTIONS)


def measure_limits(run: Any) -> None:
    """Emit the machine's limits: the first section."""
    from regmix_bench.ceilings import ceiling_records

    for record in ceiling_records(run.limits(), run.suite):
        run.emit(record)


def seconds_for(names: Sequence[str], left: float) -> float:
    """Return the seconds of the first of these sections: its share of what is left."""
    shares = [section.share for section in SECTIONS if section.name in names]
    return left * shares[0] / sum(shares)


# The child: sections one after the other, every record and every beginning as a line on stdout.


def child(request: dict[str, Any]) -> int:
    """Run sections as the parent asks; return an exit code."""
    import torch

    from regmix_bench.gpu.run import DeviceLostError, Run

    def send(kind: str, value: Any) -> None:
        print(json.dumps({"kind": kind, "value": value}), flush=True)

    device = torch.device(request["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        return NO_DEVICE
    names, deadline = request["sections"], time.monotonic() + request["seconds"]
    limits = None
    for place, name in enumerate(names):
        section = SECTIONS[NAMES.index(name)]
        seconds = seconds_for(names[place:], deadline - time.monotonic())
        send("section", {"name": name, "seconds": seconds})
        run = Run(
            device,
            seconds,
            lambda record: send("record", record.line()),
            lambda words: send("say", words),
            tiny=request["tiny"],
            started=lambda case: send("case", case),
            skipped=request["skipped"],
            ceilings=limits,
        )
        try:
            module = importlib.import_module(f"regmix_bench.{section.module}")
            getattr(module, section.function)(run)
        except DeviceLostError as error:
            send("say", f"the device is lost: {error}")
            return DEVICE_LOST
        except Exception as error:
            run.fail(f"section {name}", error)
        limits = run.ceilings
        send("done", name)
    return 0


# The parent: starts children, collects what they say, ends those that hang.


@dataclass
class Suite:
    """What the parent knows: until when, what is to do, what was tried.

    grace_seconds: what a child may take beyond its section's time. command: starts a child.
    """

    device: str
    tiny: bool
    deadline: float
    sections: list[str]
    path: Path | None = None
    grace_seconds: float = GRACE_SECONDS
    command: tuple[str, ...] = (sys.executable, "-m", "regmix_bench.gpu_suite")

    def __post_init__(self) -> None:
        self.records: list[Record] = []
        self.tried: list[str] = []
        self.current = ""
        self._shown = 0

    def run(self) -> list[Record]:
        """Run all sections, with as many children as that takes."""
        while self.sections and time.monotonic() < self.deadline:
            before = (list(self.sections), len(self.tried))
            reason = self._one_child()
            if not reason:
                continue
            if reason == NO_GPU:
                self.sections.clear()
            case = self.tried[-1] if self.tried else "the suite"
            self._keep(_failure(case, reason, self.records))
            if self.sections and before == (self.sections, len(self.tried)):
                # It ended before it tried anything: that section cannot be had here.
                self.sections.pop(0)
        for name in self.sections:
            self._keep(_failure(f"section {name}", "no time left", self.records))
        return self.records

    def _one_child(self) -> str:
        """Run a child to its end; return why it ended, empty where all is done."""
        left = self.deadline - time.monotonic()
        request = {
            "device": self.device,
            "tiny": self.tiny,
            "seconds": left,
            "sections": self.sections,
            "skipped": self.tried,
        }
        environment = dict(os.environ)
        if self.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        process = subprocess.Popen(
            [*self.command, "--child", json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        end = time.monotonic() + left
        while True:
            limit = min(end, self.deadline) + self.grace_seconds - time.monotonic()
            try:
                line = lines.get(timeout=max(0.1, limit))
            except queue.Empty:
                process.kill()
                process.wait()
                return "took too long"
            if line is None:
                break
            end = self._take(line, end)
        code = process.wait()
        if code == NO_DEVICE:
            return NO_GPU
        return "" if code == 0 else f"the process ended with code {code}"

    def _take(self, line: str, end: float) -> float:
        """Take one line of the child; return by when its section should be done."""
        try:
            message = json.loads(line)
            kind, value = message["kind"], message["value"]
        except (ValueError, TypeError, KeyError):
            print(line, end="", flush=True)
            return end
        if kind == "section":
            print(f"\n{value['name']}: at most {value['seconds']:.0f} s", flush=True)
            return time.monotonic() + float(value["seconds"])
        if kind == "say":
            print(f"  {value}", flush=True)
        elif kind == "case":
            self.tried.append(value)
        elif kind == "record":
            self._keep(Record(**json.loads(value)))
        elif kind == "done":
            self.sections.remove(value)
            self._show()
        return end

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if self.path is not None:
            append(self.path, [record])

    def _show(self) -> None:
        if len(self.records) > self._shown:
            print(compare.wide_table(self.records[self._shown :]), flush=True)
        self._shown = len(self.records)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _failure(case: str, reason: str, records: list[Record]) -> Record:
    made = Record(suite=SUITE, case=case, metric=f"failed: {reason}", value=1, unit="failures")
    # This process has not asked the GPU for its name; a child's records have it.
    return dataclasses.replace(made, machine=records[0].machine) if records else made


def failures(records: Sequence[Record]) -> list[str]:
    """Return what failed, was out of its bound or not equal, in words."""
    found = []
    for record in records:
        ratio, words = record.ratio_to_ceiling, record.ceiling or ""
        if record.unit == "failures":
            found.append(f"{record.case}: {record.metric}")
        elif record.unit == "equal" and record.value != 1:
            found.append(f"{record.case}: NOT {record.metric}")
        elif words.startswith("bound") and ratio is not None and not ratio <= 1:
            found.append(f"{record.case}: {record.metric} {record.value:.3g}, {words}")
    return found


def kernel_records(settings: Settings) -> list[Record]:
    """Return the records of `regmix-fast bench kernels` on a GPU: ceilings and bake-offs."""
    import torch

    from regmix_bench.gpu.run import Run

    records: list[Record] = []
    seconds = 90.0 if settings.quick else 300.0
    run = Run(torch.device("cuda"), seconds, records.append, settings.say, suite="kernels")
    for name in ("ceilings", "head", "attention", "pointwise"):
        section = SECTIONS[NAMES.index(name)]
        module = importlib.import_module(f"regmix_bench.{section.module}")
        getattr(module, section.function)(run)
    return records


def main() -> int:
    """Run the suite; 0 where nothing failed and every check held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="append records to FILE")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all of it")
    parser.add_argument("--section", action="append", choices=NAMES, help="only this section")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: a trial, no figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child))
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is a trial of the suite: give --tiny with it")
    usual = [section.name for section in SECTIONS if not section.on_request]
    chosen = [name for name in NAMES if name in (options.section or usual)]
    started = time.monotonic()
    suite = Suite(
        device=options.device,
        tiny=options.tiny,
        deadline=started + options.seconds - GRACE_SECONDS,
        sections=chosen,
        path=options.json,
    )
    records = suite.run()
    found = failures(records)
    print(f"\n{len(records)} records in {time.monotonic() - started:.0f} s")
    if options.tiny:
        print("A trial at the smallest sizes: none of its times means anything.")
    for words in found:
        print(f"FAILED: {words}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
