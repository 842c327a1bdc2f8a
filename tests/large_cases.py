"""What the tests of the large model share: jobs on the tiny corpus, and ranks as processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regmix.data.shards import ShardSet
from regmix.large.distributed.job import TrainJob
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.study import Training
from regmix.swarm.engine import StackTrainer
from regmix.swarm.jobs import Member, StackJob

NUM_STEPS = 50
# A program, the jobs it gets, and what else.
Call = tuple[str, Sequence[TrainJob], dict[str, Any]]
WEIGHTS = {"animals": 0.5, "colours": 0.3, "numbers": 0.2}


def training_of(num_steps: int = NUM_STEPS, **shape: Any) -> Training:
    """A training of a model of width 32 with grouped queries; the batch fits 1, 2, 3 ranks."""
    sizes: dict[str, Any] = {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"hidden": 48, "vocab_size": 320, "seq_len": 32}
    return Training(
        shape=ModelShape(**(sizes | shape)),
        optim=OptimConfig(lr=3e-3, warmup_steps=5, schedule="cosine", total_steps=num_steps),
        batch_size=12,
        num_steps=num_steps,
    )


def job_of(shards: ShardSet, folder: Path, **changes: Any) -> TrainJob:
    """A job on the tiny corpus whose checkpoints go to `folder`."""
    job = TrainJob(
        name="optimum-0",
        member=Member(name="optimum-0", weights=WEIGHTS, data_seed=3, init_seed=4),
        training=training_of(),
        targets=("animals", "numbers"),
        study=str(folder.parent),
        shards=str(shards.path),
        shards_checksum=shards.checksum,
        folder=str(folder),
    )
    return dataclasses.replace(job, **changes)


def engine_losses(job: TrainJob, shards: ShardSet) -> tuple[np.ndarray, list[float]]:
    """Training losses [S] and final losses by target of the proxies' engine on the same job."""
    stack = StackJob(
        name="stack",
        members=(job.member,),
        training=job.training,
        targets=job.targets,
        shards=job.shards,
        shards_checksum=job.shards_checksum,
        folder=job.folder + "-stack",
    )
    result = StackTrainer(stack, shards).run(checkpoint_seconds=1e9)
    return result.train_losses[:, 0], result.losses[0].tolist()


def losses_in(folder: Path | str) -> list[float]:
    """The losses by step that a run has recorded in its folder."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss_nats"] for row in rows]


def run_ranks(num_ranks: int, calls: Sequence[Call], tmp_path: Path) -> list[list[Any]]:
    """Run programs of `large_programs.py` one after the other on ranks; return [rank][call]."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tmp_path.mkdir(parents=True, exist_ok=True)
    given = tmp_path / f"calls-{num_ranks}.json"
    listed = [[name, [job.to_table() for job in jobs], options] for name, jobs, options in calls]
    given.write_text(json.dumps(listed))
    script = Path(__file__).with_name("large_programs.py")
    processes = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), str(given)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    answers = [process.communicate(timeout=180) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]
