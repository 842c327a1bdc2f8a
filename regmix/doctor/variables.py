"""Environment variables that get in the way.

Enters: the environment. Leaves: a finding for each variable that slows or changes the work.
Sets none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PINS = "ties every process that is started to the same cores"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The environment, the cores that may be used, and whether torch sees a GPU."""

    values: Mapping[str, str]
    cores: int
    gpu: bool


@dataclass(frozen=True)
class Rule:
    """A variable, the values that hurt, what they do, and whether that stops work on a GPU."""

    name: str
    hurts: Callable[[str], bool]
    effect: str
    serious_on_gpu: bool = False


def _is_set(value: str) -> bool:
    return value != ""


def _is_on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "off", "false", "no", "n")


RULES = (
    Rule("OMP_PROC_BIND", _is_on, _PINS),
    Rule("GOMP_CPU_AFFINITY", _is_set, _PINS),
    Rule("KMP_AFFINITY", lambda value: _is_set(value) and "none" not in value, _PINS),
    Rule("OMP_WAIT_POLICY", lambda v: v.lower() == "active", "lets waiting threads take cores"),
    Rule("CUDA_LAUNCH_BLOCKING", _is_on, "makes every kernel wait for the one before", True),
    Rule("PYTORCH_NO_CUDA_MEMORY_CACHING", _is_on, "keeps CUDA graphs from being recorded", True),
    Rule("TRITON_INTERPRET", _is_on, "runs Triton kernels in Python, thousands slower", True),
    Rule("TRITON_ALWAYS_COMPILE", _is_on, "compiles every kernel anew in every process"),
    Rule("TRITON_DEBUG", _is_on, "adds checks to kernels"),
    Rule("NVIDIA_TF32_OVERRIDE", _is_set, "changes the precision of float32 products"),
    Rule("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", _is_on, "lowers the precision of float32 products"),
    Rule("LD_PRELOAD", _is_set, "puts a library before those that torch was built with"),
    Rule("PYTHONPATH", _is_set, "is searched for modules before what is installed"),
)


def gather(request: Request) -> Facts:
    """Return the variables that a rule names."""
    from regmix.provenance import available_cores

    names = {*THREADS, *(rule.name for rule in RULES)}
    return Facts(
        values={name: os.environ[name] for name in sorted(names) if name in os.environ},
        cores=available_cores(),
        gpu=bool(request.answer("torch").get("num_devices")),
    )


def check_threads(facts: Facts) -> list[Finding]:
    """Do variables ask for a number of threads that does not fit the machine?"""
    found = []
    for name in THREADS:
        value = facts.values.get(name, "").strip()
        if not value:
            continue
        cure = f"unset {name}; a sweep's workers are given their number of threads anyway"
        if not value.isdecimal() or int(value) < 1:
            found.append(note(f"{name}={value} is not a number of threads", cure))
        elif int(value) > facts.cores:
            found.append(note(f"{name}={value} on {facts.cores} cores: threads wait in turn", cure))
        elif int(value) < facts.cores:
            found.append(
                note(f"{name}={value} holds each process to {value} of {facts.cores} cores", cure)
            )
    return found


def check_rules(facts: Facts) -> list[Finding]:
    """Is a variable set that slows the work or changes its numbers?"""
    found = []
    for rule in RULES:
        value = facts.values.get(rule.name, "")
        if not rule.hurts(value):
            continue
        level = problem if rule.serious_on_gpu and facts.gpu else note
        found.append(level(f"{rule.name}={value} {rule.effect}", f"unset {rule.name}"))
    return found


def check_none(facts: Facts) -> list[Finding]:
    """Is nothing in the way?"""
    if check_threads(facts) or check_rules(facts):
        return []
    return [ok("no environment variable gets in the way")]


SUBJECT = Subject("variables", gather, (check_threads, check_rules, check_none))
