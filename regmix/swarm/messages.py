"""What a worker may say, checked before it is believed.

Enters: one message of a worker, as it came out of JSON, and the job that the worker has. Leaves:
None, or in words what is wrong with it. Acts on nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regmix.swarm.jobs import StackJob

# Kind of a message -> what else it must hold. The kind's own value is the job's name, but for
# `ready` (a process id), `beat` (a count) and `preempted` (None where no job had begun).
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "ready": {},
    "beat": {},
    "started": {"step": int},
    "progress": {
        "step": int,
        "loss_nats": (int, float, type(None)),
        "tokens_per_second": (int, float),
    },
    "checkpoint": {"step": int},
    "done": {"result": dict},
    "failed": {"what": str, "cure": str},
    "stopped": {},
    "preempted": {},
    "out_of_memory": {},
    "broken": {"what": str, "lost": bool},
}
_NOT_OF_A_JOB = ("ready", "beat", "preempted")


def kind_of(message: dict[str, Any]) -> str | None:
    """Return what kind of message it is; None for one that no worker of this version says."""
    return next((kind for kind in _FIELDS if kind in message), None)


def is_of_another_job(message: dict[str, Any], job: StackJob) -> bool:
    """Whether a message is about another job than the one the worker has, as a late one may be."""
    kind = kind_of(message)
    return kind is not None and kind not in _NOT_OF_A_JOB and message[kind] != job.name


def message_problem(message: dict[str, Any], job: StackJob | None) -> str | None:
    """Return what is wrong with a message; None where it can be acted on."""
    kind = kind_of(message)
    if kind is None:
        return None
    if kind == "beat" and not isinstance(message["beat"], int):
        return f"its heartbeat was {message['beat']!r:.60}"
    for name, types in _FIELDS[kind].items():
        if not isinstance(message.get(name), types):
            return f"'{kind}' came without a proper '{name}'"
    if kind == "done" and job is not None and message["done"] == job.name:
        return result_problem(message["result"], job)
    return None


def result_problem(result: dict[str, Any], job: StackJob) -> str | None:
    """Return what is wrong with a stack's result, as `worker.train_job` describes it."""
    num_proxies, num_targets = len(job.members), len(job.targets)
    losses, failed = result.get("losses"), result.get("failed")
    if not _is_table(losses, num_proxies, num_targets):
        return f"its losses are not {num_proxies} x {num_targets} numbers"
    if not _is_list(failed, num_proxies, lambda value: isinstance(value, bool)):
        return f"it does not say which of {num_proxies} proxies failed"
    evaluations = result.get("evaluations")
    if not isinstance(evaluations, list) or not all(
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], int)
        and _is_table(entry[1], num_proxies, num_targets)
        for entry in evaluations
    ):
        return "its evaluations are not steps and losses"
    if not isinstance(result.get("seconds"), int | float) or not isinstance(
        result.get("tokens"), int
    ):
        return "its seconds or its tokens are missing"
    return None


def _is_table(value: object, num_rows: int, num_columns: int) -> bool:
    return _is_list(value, num_rows, lambda row: _is_list(row, num_columns, _is_loss))


def _is_list(value: object, length: int, is_entry: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(is_entry, value))


def _is_loss(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
