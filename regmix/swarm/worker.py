"""A worker: a long-lived process that trains one stack after another.

Enters, one JSON object a line on stdin: `{"job": ...}`, `{"stop": true}`. Leaves, one JSON object
a line on stdout: `{"ready": ...}` once; of a job `{"started": ...}`, `{"progress": ...}`,
`{"checkpoint": ...}`, then `{"done": ...}`, `{"stopped": ...}` or `{"failed": ...}`; all the while
`{"beat": n}`, where n counts what the training has done; and, as the last thing before it ends,
`{"preempted": ...}` where it was sent SIGTERM, `{"out_of_memory": ...}` or `{"broken": ...,
"lost": ...}` of its GPU. Results are written as files into the job's folder before `done` is said.
It writes to no ledger, and it dies with its coordinator.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

from regmix.data.sampling.sampler import ORDER_VERSION
from regmix.data.shards import ShardSet
from regmix.errors import ModelError, RegmixError
from regmix.files import atomic_open, read_table
from regmix.provenance import environment_record, processor
from regmix.swarm.checkpoint import checkpoints, read_tensors, write_tensors
from regmix.swarm.engine import (
    Listener,
    StackKeeper,
    StackResult,
    StackTrainer,
    StoppedError,
    member_parameters,
)
from regmix.swarm.jobs import CHECKPOINT_SECONDS, RESULT_FILE, StackJob
from regmix.swarm.messages import result_problem
from regmix.swarm.resuming import refuse_another_job

BEAT_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_MEMORY_RAN_OUT = {
    "kind": "MemoryError",
    "what": "its worker ran out of memory",
    "cure": "Use fewer --workers or a smaller --stack-size, or free some memory, then run the "
    "same command again",
}
_CUDA_ERRORS = ("CUDA error", "Triton Error [CUDA]", "CUDA driver error")
_OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# What CUDA says where no other process will do better on this GPU. After any other error, as an
# illegal access, a new one may: only a second death in a row is held against the GPU.
_LOST = (
    *("no GPU can be used", "no CUDA-capable device", "busy or unavailable"),
    *("initialization error", "unknown error", "hardware", "ECC error", "NVLink error"),
)


def train_job(
    job: StackJob,
    *,
    shards: ShardSet | None = None,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    keeper: StackKeeper | None = None,
) -> dict[str, Any]:
    """Train a job, or read the result of one that is trained, and return its result table.

    keeper: keeps what was compiled for the next job of the same shape.
    The table holds `losses` [P, M], `failed` [P], `evaluations`, `seconds` and `tokens`; beside
    it lie `<member>.safetensors` (parameters [1, ...]) and `<member>.npy` (losses by step).
    """
    folder = Path(job.folder)
    done = folder / RESULT_FILE
    if done.is_file():
        table = read_table(done, "job", "losses", "failed", "evaluations", "seconds", "tokens")
        refuse_another_job(job, table["job"])
        if problem := result_problem(table, job):
            raise ModelError(
                f"{done}: {problem}", cure="Remove that file to train the stack from its checkpoint"
            )
        return table
    if shards is None:
        shards = ShardSet.open(job.shards)
    result = StackTrainer(job, shards, keeper=keeper).run(
        listener=listener or Listener(),
        should_stop=should_stop,
        checkpoint_seconds=checkpoint_seconds,
    )
    table = _write_result(job, result)
    for old in checkpoints(folder):
        # A worker on a machine that was given up may just have done the same.
        with contextlib.suppress(OSError):
            old.unlink()
    return table


def _write_result(job: StackJob, result: StackResult) -> dict[str, Any]:
    folder = Path(job.folder)
    for position, member in enumerate(job.members):
        write_tensors(
            folder / f"{member.name}.safetensors",
            member_parameters(result.parameters, position),
            {"name": member.name, "step": job.training.num_steps},
        )
        with atomic_open(folder / f"{member.name}.npy") as stream:
            np.save(stream, result.train_losses[:, position], allow_pickle=False)
    table: dict[str, Any] = {
        "job": job.identity(),
        "losses": result.losses.tolist(),
        "failed": result.failed.tolist(),
        "evaluations": [[step, losses.tolist()] for step, losses in result.evaluations],
        "seconds": result.seconds,
        "tokens": result.tokens,
    }
    # JSON has no NaN that every reader takes: a failed member's losses are null.
    table = _without_nan(table)
    with atomic_open(folder / RESULT_FILE, "w") as stream:
        json.dump(table, stream)
    return table


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def read_parameters(path: Path) -> dict[str, Any]:
    """Read the parameters [1, ...] that a trained member left; `ValueError` where damaged."""
    return read_tensors(path)[0]


class _Worker:
    """The state of this process; its main thread trains, others listen and say that it lives."""

    def __init__(self) -> None:
        # A simple queue: it may be put into by a signal's handler while the same thread reads.
        self.jobs: queue.SimpleQueue[tuple[StackJob, float] | None] = queue.SimpleQueue()
        self.is_stopping = False
        self.is_preempted = False
        self.pulses = 0
        self._keeper = StackKeeper()
        self._shards: dict[str, ShardSet] = {}

    def listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if message.get("stop"):
                self._end()
            else:
                job = StackJob.from_table(message["job"])
                self.jobs.put((job, float(message["checkpoint_seconds"])))
        # The coordinator is gone: nobody would read a result.
        os._exit(1)

    def _end(self) -> None:
        self.is_stopping = True
        self.jobs.put(None)

    def preempt(self, _number: int, _frame: object) -> None:
        """Handle SIGTERM: somebody else ends this process, and gives it a moment before."""
        self.is_preempted = True
        self._end()

    def beat(self) -> None:
        while True:
            say({"beat": self.pulses})
            time.sleep(BEAT_SECONDS)

    def work(self) -> None:
        while (order := self.jobs.get()) is not None and not self.is_stopping:
            job, checkpoint_seconds = order
            try:
                self._train(job, checkpoint_seconds)
            except StoppedError:
                if not self.is_preempted:
                    say({"stopped": job.name})
            except RegmixError as error:
                kind = type(error).__name__
                say({"failed": job.name, "kind": kind, "what": error.what, "cure": error.cure})
            except Exception as error:
                if _is_out_of_memory(error):
                    traceback.print_exc()
                    say({"failed": job.name, **_MEMORY_RAN_OUT})
                    continue
                if job.device != "cpu":
                    leave_where_the_gpu_failed(job, error)
                # A defect in one stack must not take the others: it is reported, its trace logged.
                traceback.print_exc()
                last = traceback.format_exc().strip().splitlines()[-1]
                cure = "See the trace in the study's logs/"
                # Another machine may reach the file that this one does not.
                kind = "StorageError" if isinstance(error, OSError) else type(error).__name__
                what = f"stack {job.name}: {last}"
                say({"failed": job.name, "kind": kind, "what": what, "cure": cure})
        if self.is_preempted:
            # Also of a job that it was sent and has not begun.
            say({"preempted": None})

    def _train(self, job: StackJob, checkpoint_seconds: float) -> None:
        import torch

        torch.set_num_threads(job.threads)
        if job.device != "cpu" and not torch.cuda.is_available():
            raise RuntimeError("CUDA error: no GPU can be used")
        if job.shards not in self._shards:
            self._shards[job.shards] = ShardSet.open(job.shards)
        table = train_job(
            job,
            shards=self._shards[job.shards],
            listener=Listener(
                started=lambda step: say({"started": job.name, "step": step}),
                report=lambda step: say({"progress": job.name, **vars(step)}),
                saved=lambda step: say({"checkpoint": job.name, "step": step}),
                pulse=self._pulse,
            ),
            should_stop=lambda: self.is_stopping,
            checkpoint_seconds=checkpoint_seconds,
            keeper=self._keeper,
        )
        say({"done": job.name, "result": table})

    def _pulse(self) -> None:
        self.pulses += 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the machine's own memory, not a GPU's, ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def leave_where_the_gpu_failed(job: StackJob, error: Exception) -> None:
    """End this process, after saying why, where an error is the GPU's; else return.

    After either kind the process is of no more use: memory stays taken, or every further call
    fails. The coordinator starts another one.
    """
    import torch

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 8:
        # Memory that runs out while a graph is captured comes back as an error of the capture.
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    texts = [str(link) for link in chain]
    of_cuda = [text for text in texts if any(words in text for words in _CUDA_ERRORS)]
    if any(isinstance(link, torch.OutOfMemoryError) for link in chain) or any(
        words in text for text in of_cuda for words in _OUT_OF_MEMORY
    ):
        _say_last({"out_of_memory": job.name})
    if of_cuda or isinstance(error, torch.AcceleratorError):
        what = (of_cuda or texts)[0].strip().splitlines()[0]
        lost = any(words in text for text in of_cuda for words in _LOST)
        _say_last({"broken": job.name, "what": what, "lost": lost})


def _say_last(message: dict[str, Any]) -> NoReturn:
    traceback.print_exc()
    say(message)
    sys.stderr.flush()
    # Not by the interpreter's way: its last calls to CUDA could hang on a broken GPU.
    os._exit(1)


_to_coordinator: list[TextIO] = []
_saying = threading.Lock()


def say(message: dict[str, Any]) -> None:
    """Write one message to the coordinator; any thread may."""
    line = json.dumps(_without_nan(message))
    with _saying:
        print(line, file=_to_coordinator[-1], flush=True)


def describe_machine() -> dict[str, Any]:
    """Return what this process computes with: versions, system, processor or GPU, data order."""
    import torch

    record = {**environment_record(), "order_version": ORDER_VERSION, "processor": processor()}
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
    return record


def main() -> None:
    """Serve jobs from stdin until told to stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # What anything else prints goes to the log: the pipe holds messages only.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    _to_coordinator.append(messages)
    worker = _Worker()
    signal.signal(signal.SIGTERM, worker.preempt)
    say({"ready": os.getpid(), "environment": describe_machine()})
    for task in (worker.listen, worker.beat):
        threading.Thread(target=task, daemon=True).start()
    worker.work()
    sys.stderr.flush()
    # Not by the interpreter's way: a thread that speaks then would bring it down with an error.
    os._exit(0)


if __name__ == "__main__":
    main()
