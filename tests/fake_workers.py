"""Workers that train nothing: what a GPU does to a job is written in a file of rules.

Enters: rules. Leaves: a module for `LocalExecutor(worker_module=...)` on the import path of its
processes, and a list of what they were given. The module imports the standard library only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MODULE = "fake_worker_of_tests"

_SOURCE = """
import json, os, sys, time

rules = json.load(open(os.environ["FAKE_RULES"]))
gpu = os.environ.get("CUDA_VISIBLE_DEVICES")


def say(**message):
    print(json.dumps(message), flush=True)


def progress(name, step=3):
    say(progress=name, step=step, loss_nats=2.0, tokens_per_second=100.0)


def result(job):
    losses = [[1.0 + int(m["name"]) for _ in job["targets"]] for m in job["members"]]
    return {
        "losses": losses, "failed": [False for _ in losses],
        "evaluations": [[job["training"]["num_steps"], losses]], "seconds": 1.0, "tokens": 10,
    }


for line in sys.stdin:
    order = json.loads(line)
    if "job" not in order:
        break
    job = order["job"]
    name, micro = job["name"], job.get("micro_batch") or job["training"]["batch_size"]
    with open(os.environ["FAKE_LOG"], "a") as log:
        entry = {"gpu": gpu, "job": name, "pid": os.getpid(), "micro_batch": micro}
        entry["environment"] = {k: os.environ.get(k) for k in rules["environment"]}
        log.write(json.dumps(entry) + "\\n")
    if gpu in rules["dying"] or name in rules["killers"]:
        os._exit(7)
    if name in rules["late_killers"]:
        progress(name)
        os._exit(8)
    if gpu in rules["lost"]:
        say(broken=name, what="CUDA error: uncorrectable ECC error encountered", lost=True)
        os._exit(1)
    if len(job["members"]) > rules["fitting_members"] or micro > rules["fitting_micro_batch"]:
        say(out_of_memory=name)
        os._exit(1)
    if gpu in rules["slow"]:
        time.sleep(rules["slow"][gpu])
    progress(name)
    say(done=name, result=result(job))
"""


@dataclass
class FakeWorkers:
    """The rules' file and the log of one test."""

    folder: Path

    def rule(self, **rules: Any) -> None:
        """Say what happens: GPUs that are lost or kill workers or are slow, jobs that kill, ..."""
        table: dict[str, Any] = {
            "lost": [],
            "dying": [],
            "slow": {},
            "killers": [],
            "late_killers": [],
            "fitting_members": 99,
            "fitting_micro_batch": 99,
            "environment": [],
        }
        (self.folder / "rules.json").write_text(json.dumps({**table, **rules}))

    @property
    def given(self) -> list[dict[str, Any]]:
        """What the workers were given, in order: `gpu`, `job`, `pid`, `micro_batch`."""
        path = self.folder / "given.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


def make_fake_workers(folder: Path, patch: pytest.MonkeyPatch) -> FakeWorkers:
    """Put the module on the path of processes that are started from now on."""
    (folder / f"{MODULE}.py").write_text(_SOURCE)
    patch.setenv("PYTHONPATH", str(folder))
    patch.setenv("FAKE_RULES", str(folder / "rules.json"))
    patch.setenv("FAKE_LOG", str(folder / "given.jsonl"))
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = FakeWorkers(folder)
    workers.rule()
    return workers
