"""Training a stack against training one proxy at a time, on a CPU.

Enters: cases (a shape and a batch) and seconds to spend. Leaves: proxy-steps per second of ours
and of transformers' `LlamaForCausalLM` in a plain loop, both at their best layout, as records.
Every step is forward, backward, clip and AdamW. Does not look at losses: the tests do.

How: every contender is one or two worker processes that warm up and then wait; rounds visit the
contenders in turn, so that a change of the machine's speed meets all of them, and the ratios are
medians over rounds. First a short round picks the best of each kind; then only those run.

    python -m regmix_bench.stack --json results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from regmix_bench import harness


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape and a batch; width 64, 2 layers, 4 heads, hidden 128 (preset cpu-64)."""

    preset: str
    vocab_size: int
    sequences: int
    seq_len: int

    @property
    def name(self) -> str:
        """Name in the records."""
        return f"{self.preset} vocab {self.vocab_size} batch {self.sequences} x {self.seq_len}"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to train: `kind` "ours" or "peer", in `processes` of `threads` threads each."""

    kind: str
    variant: str
    processes: int
    threads: int
    stack: int = 1

    @property
    def name(self) -> str:
        """Name in the records."""
        layout = f"{self.processes} process{'es' * (self.processes > 1)} x {self.threads} thread"
        layout += "s" * (self.threads > 1)
        words = (
            f"stack of {self.stack}" if self.kind == "ours" else f"LlamaForCausalLM {self.variant}"
        )
        return f"{words}, {layout}"


CASES = (
    Case(preset="cpu-64", vocab_size=4096, sequences=4, seq_len=128),
    Case(preset="cpu-64", vocab_size=8192, sequences=8, seq_len=256),
)
LAYOUTS = ((1, 2), (2, 1))
PEERS = (
    "float32 sdpa",
    "float32 eager",
    "float32 sdpa foreach",
    "autocast-bf16 sdpa",
    "bf16 sdpa",
    "float32 sdpa compile",
    "bf16 sdpa compile",
)
STACKS = (8, 16)


def our_step(case: Case, stack: int) -> tuple[Callable[[], None], int]:
    """Return one step of a stack, and how many proxy-steps that is."""
    import torch

    from regmix.model.llama import StackedLlama, init_parameters
    from regmix.model.optim import OptimConfig, StackedAdamW
    from regmix.model.presets import make_shape

    shape = make_shape(case.preset, vocab_size=case.vocab_size, seq_len=case.seq_len)
    params = init_parameters(shape, range(stack))
    model, optimizer = StackedLlama(shape), StackedAdamW(params, OptimConfig())
    size = (8, stack, case.sequences, case.seq_len + 1)
    batches = torch.randint(0, case.vocab_size, size, generator=torch.Generator().manual_seed(0))
    step = 0

    def run() -> None:
        nonlocal step
        model.train_step(params, optimizer, batches[step % 8], step)
        step += 1

    return run, stack


def peer_step(case: Case, variant: str) -> tuple[Callable[[], None], int]:
    """Return one step of transformers' Llama in a plain training loop."""
    import torch

    from regmix.model.presets import make_shape
    from regmix_bench.peer_llama import make_peer

    words = variant.split()
    shape = make_shape(case.preset, vocab_size=case.vocab_size, seq_len=case.seq_len)
    model, loss_of = make_peer(shape, attention="eager" if "eager" in words else "sdpa")
    if "bf16" in words:
        model = model.to(torch.bfloat16)
    choice = {"foreach": True} if "foreach" in words else {"fused": True}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, **choice
    )
    size = (8, case.sequences, case.seq_len + 1)
    batches = torch.randint(0, case.vocab_size, size, generator=torch.Generator().manual_seed(0))

    compute = torch.compile(loss_of) if "compile" in words else loss_of
    mixed = "autocast-bf16" in words
    step = 0

    def run() -> None:
        nonlocal step
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = compute(batches[step % 8])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    return run, 1


def serve(case: Case, contender: Contender) -> None:
    """Be a worker: warm up, then run for as many seconds as each line of stdin says."""
    import torch

    torch.set_num_threads(contender.threads)
    if contender.kind == "ours":
        run, weight = our_step(case, contender.stack)
    else:
        run, weight = peer_step(case, contender.variant)
    for _ in range(3):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        limit, steps, start = float(line), 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - start < limit:
            run()
            steps += weight
        print(steps / (time.perf_counter() - start), flush=True)


class Runner:
    """The worker processes of one contender."""

    def __init__(self, case: Case, contender: Contender) -> None:
        self.contender = contender
        request = json.dumps({"case": asdict(case), "contender": asdict(contender)})
        environment = dict(os.environ, OMP_NUM_THREADS=str(contender.threads))
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-m", "regmix_bench.stack", "--worker", request],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
            for _ in range(contender.processes)
        ]

    def ready(self) -> bool:
        """Wait until every worker is warm; False where one could not start."""
        return all(self._read(worker) == "ready" for worker in self._workers)

    def measure(self, seconds: float) -> float:
        """Run all workers at once for `seconds`; return proxy-steps per second together."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{seconds}\n")
            worker.stdin.flush()
        return sum(float(self._read(worker)) for worker in self._workers)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()

    @staticmethod
    def _read(worker: subprocess.Popen[str]) -> str:
        assert worker.stdout is not None
        return worker.stdout.readline().strip()


def contenders(peers: tuple[str, ...] = PEERS) -> list[Contender]:
    """Return everything that is tried."""
    found = []
    for processes, threads in LAYOUTS:
        for stack in STACKS:
            layout: dict[str, int] = {"processes": processes, "threads": threads}
            found.append(Contender(kind="ours", variant="", stack=stack, **layout))
        found += [Contender(kind="peer", variant=variant, **layout) for variant in peers]
    return found


def run_case(
    case: Case, *, seconds: float, rounds: int, peers: tuple[str, ...]
) -> list[harness.Record]:
    """Measure one case: pick the best of each kind and layout, then compare them in rounds."""
    best: dict[tuple[str, int], tuple[float, Contender]] = {}
    for contender in contenders(peers):
        runner = Runner(case, contender)
        ready = runner.ready()
        rate = runner.measure(seconds / 2) if ready else 0.0
        runner.close()
        words = f"{rate:.1f} proxy-steps/s" if ready else "does not start here"
        print(f"  {contender.name}: {words}", file=sys.stderr, flush=True)
        key = (contender.kind, contender.processes)
        if key not in best or rate > best[key][0]:
            best[key] = (rate, contender)
    runners = [Runner(case, contender) for _, contender in best.values()]
    if not all(runner.ready() for runner in runners):
        raise RuntimeError("A worker that ran before did not start again")
    rates: dict[str, list[float]] = {runner.contender.name: [] for runner in runners}
    for _ in range(rounds):
        for runner in runners:
            rates[runner.contender.name].append(runner.measure(seconds))
    for runner in runners:
        runner.close()
    return _records(case, [contender for _, contender in best.values()], rates)


def _records(
    case: Case, measured: list[Contender], rates: dict[str, list[float]]
) -> list[harness.Record]:
    def record(contender: Contender, peer: Contender | None) -> harness.Record:
        own = rates[contender.name]
        ratio = None
        if peer is not None:
            pairs = zip(own, rates[peer.name], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        return harness.Record(
            suite="stack",
            case=f"{case.name}; {contender.name}",
            metric="training speed",
            value=statistics.median(own),
            unit="proxy-steps/s",
            peer=None if peer is None else peer.name,
            ratio_to_peer=ratio,
        )

    peers = [contender for contender in measured if contender.kind == "peer"]
    ours = [contender for contender in measured if contender.kind == "ours"]
    top = max(ours, key=lambda contender: statistics.median(rates[contender.name]))
    records = [record(peer, None) for peer in peers]
    records += [record(contender, None) for contender in ours if contender is not top]
    return records + [record(top, peer) for peer in peers]


def main() -> None:
    """Run all cases and print their table; with --json, append their records to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="append records to FILE")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds per measurement")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--case", type=int, help="only this case (0, 1)")
    parser.add_argument("--peer", action="append", help="only this variant of the peer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        request = json.loads(arguments.worker)
        serve(Case(**request["case"]), Contender(**request["contender"]))
        return
    records = []
    cases = CASES if arguments.case is None else CASES[arguments.case : arguments.case + 1]
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        peers = tuple(arguments.peer or PEERS)
        records += run_case(case, seconds=arguments.seconds, rounds=arguments.rounds, peers=peers)
    print(harness.table(records))
    if arguments.json:
        harness.append(arguments.json, records)


if __name__ == "__main__":
    main()
