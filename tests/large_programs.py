"""Programs that the tests run on every rank: `python large_programs.py CALLS.json`.

A call is [program, jobs, options]. One line of JSON at the end: what this rank found for each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from regmix.data.shards import ShardSet
from regmix.large.distributed.job import TrainJob
from regmix.large.distributed.loop import LargeTrainer
from regmix.large.distributed.parallel import Place, join, local_part
from regmix.swarm.engine import StoppedError


def train(place: Place, jobs: list[TrainJob]) -> list[dict[str, Any]]:
    """Train every job; report where it began, its final losses, and the bytes of this rank."""
    found = []
    for job in jobs:
        trainer = LargeTrainer(job, ShardSet.open(job.shards), place)
        held = [local_part(value.detach()) for value in trainer._tensors().values()]
        row: dict[str, Any] = {
            "begun_at": trainer.step,
            "bytes": sum(part.numel() * part.element_size() for part in held),
            "parameter_bytes": 4 * job.training.shape.num_parameters,
        }
        result = trainer.run()
        whole = dict(trainer.model.whole_parameters())
        row["losses"] = result.losses
        row["squares"] = sum(value.double().square().sum().item() for value in whole.values())
        found.append(row)
    return found


def stop_after(place: Place, jobs: list[TrainJob], step: int) -> list[dict[str, Any]]:
    """Train every job until its last rank asks to stop after `step` steps."""
    found, is_last = [], place.rank == place.num_ranks - 1
    for job in jobs:
        trainer = LargeTrainer(job, ShardSet.open(job.shards), place)
        try:
            trainer.run(should_stop=lambda t=trainer: is_last and t.step + 1 >= step)
        except StoppedError:
            found.append({"stopped_at": trainer.step})
    return found


def batches(place: Place, jobs: list[TrainJob], first: int) -> list[list[list[list[int]]]]:
    """This rank's rows of the three batches from `first` on, where every run must be."""
    found = []
    for job in jobs:
        trainer = LargeTrainer(job, ShardSet.open(job.shards), place)
        assert trainer.step == first
        with trainer._batches() as ring:
            found.append([batch.tolist() for _, batch in islice(ring, 3)])
    return found


def main() -> None:
    torch.set_num_threads(1)
    argument = json.loads(Path(sys.argv[1]).read_text())
    place = join("cpu")
    programs: dict[str, Callable[..., Any]] = {
        "train": train,
        "stop_after": stop_after,
        "batches": batches,
    }
    found = [
        programs[name](place, [TrainJob.from_table(table) for table in jobs], **options)
        for name, jobs, options in argument
    ]
    if place.num_ranks > 1:
        dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
