"""A contender in a process of its own: it starts, tells how long that took, then does as asked.

Enters: a contender and the corpus as a command line, then one request a line on stdin. Leaves: one
answer a line. A process each, because these loaders start threads, workers and shared memory, and
import half of what is installed; rounds visit the processes in turn, so that a change of the
machine's speed meets all of them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regmix_bench.sampler_data import BATCH, DOMAINS, WEIGHTS, Corpus, check_rows, domain_of


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who delivers: `kind` "peer", "ours", "ring", "gather" or "copy", and its setting."""

    kind: str
    system: str
    workers: int = 0
    """DataLoader workers of a peer, threads of a ring or a gathering."""
    dtype: str = "int64"
    backend: str = "auto"
    reuse: bool = True
    """Write batches into two buffers in turn, not into new arrays."""

    @property
    def name(self) -> str:
        """Name in the records."""
        if self.kind == "peer":
            return f"{self.system}, {self.workers} workers"
        if self.kind in ("ring", "gather"):
            plural = "s" * (self.workers > 1)
            return f"{self.system}, {self.dtype}, {self.workers} thread{plural}"
        return self.system

    @property
    def unit(self) -> str:
        """Unit of its speed."""
        return "GB/s" if self.kind == "copy" else "sequences/s"


class Worker:
    """The process of one contender, with its own workers; all are stopped while another is asked.

    Loaders that look for work while nobody asks (mosaicml-streaming: 1 to 4% of a core) then wait.
    """

    def __init__(self, contender: Contender, corpus: Corpus) -> None:
        self.contender = contender
        request = {
            "contender": asdict(contender),
            "folder": str(corpus.folder),
            "num_tokens": corpus.num_tokens,
        }
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "regmix_bench.sampler_worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if "REGMIX_BENCH_LOUD" not in os.environ else None,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            start_new_session=True,
        )
        self.start = self._answer()
        self.start["process_seconds"] = time.perf_counter() - self._started

    @property
    def error(self) -> str | None:
        """Why it cannot run here, or None."""
        found = self.start.get("error")
        return None if found is None else str(found)

    def ask(self, what: str, value: float) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"what": what, "value": value}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise RuntimeError(f"{self.contender.name}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """End the process, and what it left behind."""
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=20)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # some of these packages print
                answer: dict[str, Any] = json.loads(line)
                return answer
        last = self._process.stderr.read()[-300:] if self._process.stderr else ""
        return {"error": f"its process ended: {last}"}


def sources(contender: Contender, corpus: Corpus) -> tuple[Callable[[], Any], float | None]:
    """Return a function that does a unit of work, and its size where it gives batches."""
    from regmix_bench import sampler_ours

    if contender.kind == "copy":
        return sampler_ours.copier(), None
    if contender.kind == "gather":
        return sampler_ours.gatherer(corpus, contender.dtype, contender.workers), None
    return batches(contender, corpus).__next__, float(BATCH)


def batches(contender: Contender, corpus: Corpus) -> Iterator[Any]:
    """Return the batches of a contender from its first step on."""
    from regmix_bench import sampler_ours
    from regmix_bench.sampler_peers import PEERS

    if contender.kind == "peer":
        peer = PEERS[contender.system](corpus, contender.workers)
        peer.open()
        return peer.batches()
    if contender.kind == "ring":
        sampler = sampler_ours.open_sampler(corpus)
        return sampler_ours.ring_of(sampler, contender.dtype, contender.workers)
    sampler = sampler_ours.open_sampler(corpus, contender.backend)
    return sampler_ours.batches_of(sampler, reuse=contender.reuse)


def weight_errors(
    first: Any, next_batch: Callable[[], Any], num_sequences: int
) -> list[tuple[int, float]]:
    """Return (sequences, worst error of a domain's share) at the ends of some batches.

    `first` is the first batch of the order, and `next_batch` gives the second and so on.
    """
    counts = np.zeros(len(DOMAINS), np.int64)
    errors: list[tuple[int, float]] = []
    while not errors or errors[-1][0] < num_sequences:
        batch = next_batch() if errors else first
        counts += np.bincount(domain_of(batch), minlength=len(DOMAINS))
        num = int(counts.sum())
        errors.append((num, float(np.abs(counts / num - np.array(WEIGHTS)).max())))
    places = set((np.geomspace(1, len(errors), 40).astype(int) - 1).tolist())
    places |= {10_000 // BATCH - 1, len(errors) - 1}
    return [errors[place] for place in sorted(places) if place < len(errors)]


def resume_seconds(contender: Contender, corpus: Corpus, step: int) -> float:
    """Return the seconds from a checkpoint of `step` to the first batch, the loader being open."""
    from regmix_bench import sampler_ours
    from regmix_bench.sampler_peers import PEERS

    if contender.kind != "peer":
        return sampler_ours.resume_seconds(corpus, step)
    saver, peer = (PEERS[contender.system](corpus, contender.workers) for _ in range(2))
    saver.open()
    state = saver.checkpoint(step)
    peer.open()
    started = time.perf_counter()
    next(peer.resume(state))
    return time.perf_counter() - started


def measure(work: Callable[[], Any], size: float | None, seconds: float) -> float:
    """Work for `seconds`; return units per second."""
    done, started = 0.0, time.perf_counter()
    while (now := time.perf_counter()) - started < seconds or not done:
        result = work()
        done += result if size is None else size
    return done / (now - started)


def serve(contender: Contender, corpus: Corpus) -> None:
    """Start, answer what that took, then answer requests until stdin ends."""
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    if contender.kind == "peer":
        from regmix_bench.sampler_peers import PEERS

        missing = PEERS[contender.system](corpus).missing()
        if missing:
            print(json.dumps({"error": missing}), flush=True)
            return
        import torch

        torch.set_num_threads(1)
    elif contender.kind == "ours":
        importlib.import_module("torch")
    imported = time.perf_counter()
    try:
        work, size = sources(contender, corpus)
        first = copy.copy(work())  # the place of a batch in a ring is used again
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    ready = time.perf_counter()
    if size is not None:
        check_rows(first)
    report = {"import_seconds": imported - started, "first_batch_seconds": ready - imported}
    print(json.dumps(report), flush=True)
    answers: dict[str, Callable[[float], Any]] = {
        "measure": lambda value: measure(work, size, value),
        "errors": lambda value: weight_errors(first, work, int(value)),
        "resume": lambda value: resume_seconds(contender, corpus, int(value)),
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": answers[request["what"]](request["value"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Be the worker that the command line says."""
    request = json.loads(sys.argv[1])
    corpus = Corpus(folder=Path(request["folder"]), num_tokens=request["num_tokens"])
    serve(Contender(**request["contender"]), corpus)


if __name__ == "__main__":
    main()
