"""One question about GPUs, answered by a process of its own: `python -m regmix.swarm.probe`.

Enters: the question (`count`, `describe` or `measure`), and for `measure` a stack's job as JSON
on stdin. Leaves: one line of JSON on stdout, `{"error": ...}` where there is no answer. Uses the
first GPU that it sees, and leaves nothing on it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import time
from typing import Any

MEASURED_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def count() -> dict[str, Any]:
    """Return how many GPUs torch sees, and the CUDA that it was built for, if any."""
    import torch

    return {"count": torch.cuda.device_count(), "cuda": torch.version.cuda}


def describe() -> dict[str, Any]:
    """Return what the first visible GPU is and has free, after it has computed something."""
    import torch

    # A product that comes out right says more of a GPU than its name does.
    ones = torch.ones(64, 64, device="cuda")
    if float((ones @ ones).sum()) != 64.0**3:
        raise RuntimeError("a product of two matrices came out wrong")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "name": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "total_bytes": total_bytes,
        "free_bytes": free_bytes,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def measure(table: dict[str, Any]) -> dict[str, Any]:
    """Train a job's stack for a few steps after the first; nothing of it is kept."""
    import torch

    from regmix.data.shards import ShardSet
    from regmix.swarm.engine import StackTrainer
    from regmix.swarm.jobs import StackJob

    job = StackJob.from_table(table)
    training = dataclasses.replace(job.training, eval_every=None, eval_steps=None)
    trainer = StackTrainer(dataclasses.replace(job, training=training), ShardSet.open(job.shards))
    synchronize = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    try:
        trainer.train_step()
        synchronize()
        started, first = time.monotonic(), trainer.step
        while time.monotonic() - started < MEASURED_SECONDS and trainer.step < training.num_steps:
            trainer.train_step()
            synchronize()
        elapsed = max(time.monotonic() - started, 1e-6)
    finally:
        trainer.close()
    steps = trainer.step - first
    if steps == 0:
        raise RuntimeError("the run has one step only, so there is nothing to measure")
    tokens = len(job.members) * training.batch_size * training.shape.seq_len
    return {"tokens_per_second": steps * tokens / elapsed}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Answer the question in the arguments."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # What libraries and compilers print must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        question = sys.argv[1]
        if question == "measure":
            answer = measure(json.load(sys.stdin))
        else:
            answer = {"count": count, "describe": describe}[question]()
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        answer = {"error": words[0]}
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
