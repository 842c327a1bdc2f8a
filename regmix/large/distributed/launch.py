"""Train the large models of a study on several processes, one model after the other.

Enters: a study, the mixtures, and how to train. Leaves `models/<name>/` for each model, in the
format of all models. The ranks are processes of torchrun (`agent`) on this machine, or of whatever
starts `rank` on several; this process touches no GPU: it writes the job, follows the metrics, and
starts the ranks again where they died.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.errors import ModelError
from regmix.files import storage_errors, write_json
from regmix.large.distributed.job import TrainJob
from regmix.large.distributed.metrics import FILE, numbers_of
from regmix.large.distributed.plan import Plan
from regmix.large.distributed.rank import LAUNCHED, OUTCOME_FILE, STOP_FILE, outcome
from regmix.large.train import Recipe, is_trained, model_member
from regmix.study import Study
from regmix.swarm.executors import MAX_ATTEMPTS, raise_on_sigterm
from regmix.swarm.processes import worker_environment

AGENT_MODULE = "regmix.large.distributed.agent"
RANK_MODULE = "regmix.large.distributed.rank"
JOB_FILE = "job.json"
# Whole models are written to disk meanwhile.
STOP_PATIENCE_SECONDS = 600.0
# How long torchrun waits for ranks that it has told to end; 30 s where it is not set.
_SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
_LOOK_SECONDS = 0.2

# A job and the numbers of one of its steps.
OnLine = Callable[[TrainJob, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class LargeRequest:
    """mixtures: name -> what is trained on; replicates: models of each, each with its own seeds.

    plan: how the ranks share a model; num_nodes: machines, `plan.sharing.num_ranks` over all.
    threads: of each rank. The rest as in `TrainJob`.
    """

    mixtures: Mapping[str, Recipe]
    replicates: int
    plan: Plan
    num_nodes: int = 1
    threads: int = 1
    compiled: bool = False
    within_documents: bool = False
    start: str | None = None
    keep_checkpoints: int = 2
    checkpoint_seconds: float = 600.0
    allow_changes: bool = False
    trackers: tuple[str, ...] = ()


def large_jobs(study: Study, request: LargeRequest) -> tuple[list[str], list[TrainJob]]:
    """Return the names of all models that are asked for, and the jobs of those not yet trained."""
    training, sharing, device = request.plan.training, request.plan.sharing, request.plan.device
    names, jobs = [], []
    for mixture, recipe in request.mixtures.items():
        for replicate in range(request.replicates):
            name = f"{mixture}-{replicate}"
            names.append(name)
            member = model_member(study, name, recipe, training, replicate)
            if is_trained(study, member, training):
                continue
            jobs.append(
                TrainJob(
                    name=name,
                    member=member,
                    training=training,
                    targets=study.config.targets,
                    study=str(study.path),
                    shards=str(study.shards_path),
                    shards_checksum=study.config.shards_checksum,
                    folder=str(study.stacks_path / f"large-{name}"),
                    parallel=sharing.parallel,
                    device=device.kind,
                    dtype=sharing.dtype,
                    micro_batch=sharing.micro_batch,
                    recompute=sharing.recompute,
                    compiled=request.compiled,
                    within_documents=request.within_documents,
                    start=request.start,
                    threads=request.threads,
                    keep_checkpoints=request.keep_checkpoints,
                    checkpoint_seconds=request.checkpoint_seconds,
                    allow_changes=request.allow_changes,
                    # A CPU has no peak to speak of: what was measured a moment ago is none.
                    peak_flops=device.flops if device.kind == "cuda" else None,
                    trackers=request.trackers,
                )
            )
    return names, jobs


def prepare(study: Study, request: LargeRequest) -> list[str]:
    """Write the jobs; return the command that starts each, once on every machine."""
    _, jobs = large_jobs(study, request)
    commands = []
    share = request.plan.sharing.num_ranks // request.num_nodes
    with study.lock():
        for job in jobs:
            path = _write_job(job)
            commands.append(
                f"{_SHUTDOWN}={STOP_PATIENCE_SECONDS:.0f} torchrun "
                f"--nnodes {request.num_nodes} --nproc-per-node {share} "
                "--rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 "
                f"-m {RANK_MODULE} {shlex.quote(str(path))}"
            )
    return commands


def run_large(
    study: Study, request: LargeRequest, *, on_line: OnLine = lambda _job, _line: None
) -> list[str]:
    """Train the models that are not trained; return the names of all that were asked for.

    Raises `KeyboardInterrupt` after a clean stop; `ModelError` where a run cannot go on.
    """
    previous = raise_on_sigterm()
    try:
        with study.lock() as descriptor:
            names, jobs = large_jobs(study, request)
            for job in jobs:
                _train(study, job, request.plan.sharing.num_ranks, descriptor, on_line)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
    return names


def _write_job(job: TrainJob) -> Path:
    folder = Path(job.folder)
    for name in (STOP_FILE, OUTCOME_FILE):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    path = folder / JOB_FILE
    write_json(path, job.to_table())
    return path


def _train(study: Study, job: TrainJob, num_ranks: int, descriptor: int, on_line: OnLine) -> None:
    """Train one model; its ranks are started again where they died, at most thrice in a row."""
    attempts, reached = 0, -1
    follower = _Follower(Path(job.folder) / FILE)
    while True:
        path = _write_job(job)
        log_path = study.logs_path / f"{job.name}.log"
        code = _run(job, path, num_ranks, log_path, descriptor, follower, on_line)
        if is_trained(study, job.member, job.training):
            return
        told = outcome(Path(job.folder)) or {}
        if "failed" in told:
            raise ModelError(told["failed"]["what"], cure=told["failed"]["cure"])
        if "stopped" in told:
            raise KeyboardInterrupt
        attempts = 1 if follower.step > reached else attempts + 1
        reached = max(reached, follower.step)
        if attempts >= MAX_ATTEMPTS:
            raise ModelError(
                f"{job.name}: its processes ended with code {code}, {attempts} times in a row",
                cure=f"See {log_path}; a negative code is a signal, -9 often means memory ran out",
            )


def _run(
    job: TrainJob,
    path: Path,
    num_ranks: int,
    log_path: Path,
    descriptor: int,
    follower: _Follower,
    on_line: OnLine,
) -> int:
    """Run the ranks once and return their exit code; a stop is passed on, and waited for."""
    with storage_errors(log_path):
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = open(log_path, "ab")  # noqa: SIM115 - the child keeps it
    words = [RANK_MODULE, str(path)]
    if num_ranks > 1:
        sizes = ["--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", "0"]
        words = [AGENT_MODULE, *sizes, "-m", *words]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(job.threads),
            start_new_session=True,
            pass_fds=(descriptor,),
        )
    finally:
        log.close()

    def follow(seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        for line in follower.new_lines():
            on_line(job, line)
        return process.poll()

    try:
        while (code := follow(_LOOK_SECONDS)) is None:
            pass
        return code
    except KeyboardInterrupt:
        (Path(job.folder) / STOP_FILE).touch()
        deadline = time.monotonic() + STOP_PATIENCE_SECONDS
        while follow(_LOOK_SECONDS) is None and time.monotonic() < deadline:
            pass
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _environment(threads: int) -> dict[str, str]:
    patience = f"{STOP_PATIENCE_SECONDS:.0f}"
    return {**worker_environment(threads, None), LAUNCHED: "1", _SHUTDOWN: patience}


class _Follower:
    """Reads the lines that are added to a run's metrics; `step` is the last one's."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._place, self.step = path, 0, 0, 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the numbers of each step that came since the last call."""
        try:
            with open(self._path, "rb") as stream:
                file = _inode(self._path)
                if file != self._file:
                    # A run that is resumed writes the record anew, with the steps that count.
                    self._file, self._place = file, 0
                stream.seek(self._place)
                text = stream.read()
        except FileNotFoundError:
            return
        whole, newline, _ = text.rpartition(b"\n")
        self._place += len(whole) + len(newline)
        for line in whole.splitlines():
            numbers = numbers_of(line)
            if numbers is not None and numbers["step"] > self.step:
                self.step = numbers["step"]
                yield numbers


def _inode(path: Path) -> int:
    return path.stat().st_ino
