"""The GPUs of this machine, asked by processes that end.

Enters: how many GPUs a person wants. Leaves: what each of them is and has free, and how fast a
stack trains on one. The asking process never touches CUDA itself: `probe.py` does, in a process
for each GPU, so that nothing of it stays in a GPU's memory and a broken one harms nobody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regmix.errors import StudyError

if TYPE_CHECKING:
    from regmix.swarm.jobs import StackJob

PROBE_MODULE = "regmix.swarm.probe"
ASK_SECONDS = 120.0
# The first step compiles kernels, which takes a minute or two on a slow disk.
MEASURE_SECONDS = 300.0
# Triton's matrix products in bfloat16 want an A100 or newer.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """id: what `CUDA_VISIBLE_DEVICES` calls it; free_bytes: with a CUDA context already there."""

    id: str
    name: str
    capability: tuple[int, ...]
    total_bytes: int
    free_bytes: int
    torch: str
    triton: str | None


class ProbeError(Exception):
    """A probe ended without an answer; the text says why."""


def ask(
    question: str, *, gpu: str | None = None, text: str = "", seconds: float = ASK_SECONDS
) -> dict[str, Any]:
    """Run a probe and return its answer; `ProbeError` where it has none.

    gpu: the one that it sees; None for what this process would see.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROBE_MODULE, question],
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer in {seconds:.0f} s") from error
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ProbeError(last) from None
    if not isinstance(answer, dict) or "error" in answer:
        raise ProbeError(str(answer["error"]) if isinstance(answer, dict) else lines[-1])
    return answer


def visible_ids(count: int, outer: Mapping[str, str] = os.environ) -> list[str]:
    """Return what `CUDA_VISIBLE_DEVICES` calls the `count` GPUs that torch sees here.

    A list that is set already, of numbers or UUIDs, is kept: a worker sees one entry of it.
    """
    listed = [entry.strip() for entry in outer.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    named = [entry for entry in listed if entry]
    if len(named) >= count:
        return named[:count]
    return [str(number) for number in range(count)]


def refuse_too_many(wanted: int) -> int:
    """Raise `StudyError` where fewer GPUs than wanted are visible; return how many there are."""
    try:
        answer = ask("count")
    except ProbeError as error:
        raise StudyError(
            f"--gpus {wanted}: torch cannot say which GPUs there are ({error})",
            cure="`regmix-fast doctor` looks further; leave --gpus out to train on the CPU",
        ) from error
    found = int(answer["count"])
    if wanted <= found:
        return found
    if found:
        cure = f"Use --gpus {found}"
    elif answer.get("cuda") is None:
        cure = "Leave --gpus out to train on the CPU; the torch that is installed has no CUDA"
    else:
        cure = "Leave --gpus out to train on the CPU"
    noun = "GPU" if found == 1 else "GPUs"
    raise StudyError(f"--gpus {wanted}: this machine has {found} {noun}", cure=cure)


def find_gpus(wanted: int) -> tuple[Gpu, ...]:
    """Return the first `wanted` GPUs that are visible; `StudyError` where that cannot be."""
    ids = visible_ids(refuse_too_many(wanted))[:wanted]
    with ThreadPoolExecutor(len(ids)) as pool:
        answers = list(pool.map(_describe, ids))
    for place, answer in zip(ids, answers, strict=True):
        if isinstance(answer, ProbeError):
            raise StudyError(
                f"GPU {place} does not work: {answer}",
                cure="Leave it out: name the others in CUDA_VISIBLE_DEVICES, with a smaller "
                "--gpus; `regmix-fast doctor` looks further",
            )
        if answer.capability < LEAST_CAPABILITY:
            raise StudyError(
                f"GPU {place} ({answer.name}) has compute capability "
                f"{'.'.join(map(str, answer.capability))}; the engine needs "
                f"{'.'.join(map(str, LEAST_CAPABILITY))} or more",
                cure="Leave --gpus out to train on the CPU, or use an A100 or a newer GPU",
            )
    return tuple(answer for answer in answers if isinstance(answer, Gpu))


def _describe(place: str) -> Gpu | ProbeError:
    try:
        answer = ask("describe", gpu=place)
    except ProbeError as error:
        return error
    return Gpu(id=place, **{**answer, "capability": tuple(answer["capability"])})


def measure_tokens_per_second(job: StackJob, gpu: Gpu) -> float:
    """Return how fast a GPU trains a stack, from a few steps; `ProbeError` where it does not."""
    text = json.dumps(job.to_table())
    return float(
        ask("measure", gpu=gpu.id, text=text, seconds=MEASURE_SECONDS)["tokens_per_second"]
    )
