"""One rank of a distributed run: `python -m regmix.large.distributed.rank JOB.json`.

Enters: a job's file, and the ranks as torchrun or Slurm describes them in the environment; with
neither it is one rank alone. Leaves: checkpoints and metrics in the job's folder, the model in its
study, and where the run did not come to its end `outcome.json` in the job's folder: why.

SIGTERM, SIGINT, or a file `stop` in the job's folder make all ranks write a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from regmix.errors import ModelError, RegmixError, StudyError
from regmix.files import read_table, write_json
from regmix.large.distributed.job import TrainJob

OUTCOME_FILE = "outcome.json"
STOP_FILE = "stop"
# Set by `launch`: it holds the study, and this process shall not outlive it.
LAUNCHED = "REGMIX_LAUNCHED"
_STOP_FILE_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


class StopSign:
    """Whether this rank was told to stop, by a signal or by a file in the job's folder."""

    def __init__(self, folder: Path) -> None:
        self._path, self._told, self._looked = folder / STOP_FILE, False, 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)

    def _tell(self, *_: object) -> None:
        self._told = True

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._told and now - self._looked >= _STOP_FILE_SECONDS:
            self._looked = now
            self._told = self._path.exists()
        return self._told


def describe_ranks(environment: MutableMapping[str, str]) -> None:
    """Set RANK and the like from Slurm's variables where torchrun has not set them.

    Raises `StudyError` where Slurm started several machines and none is named as the first.
    """
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", 1)) <= 1:
        return
    if "SLURM_PROCID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in environment:
        if int(environment.get("SLURM_NNODES", 1)) > 1:
            raise StudyError(
                "Slurm started processes on several machines, and MASTER_ADDR names none of them",
                cure="Before srun: export MASTER_ADDR=$(scontrol show hostnames "
                '"$SLURM_JOB_NODELIST" | head -n 1)',
            )
        environment["MASTER_ADDR"] = "127.0.0.1"
    environment.setdefault("MASTER_PORT", "29500")


def train(job: TrainJob, should_stop: Callable[[], bool]) -> None:
    """Train a job on this rank, or go on with it, and write its model."""
    import torch

    from regmix.data.shards import ShardSet
    from regmix.large.distributed.finish import write_model
    from regmix.large.distributed.loop import LargeTrainer
    from regmix.large.distributed.parallel import join

    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        # Products of float32 stay float32; those of bfloat16 add up in float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    place = join(job.device)
    shards = ShardSet.open(job.shards)
    with _study_held(job, alone=place.rank == 0 and LAUNCHED not in os.environ):
        start = None if job.start is None else lambda: _start_values(job)
        trainer = LargeTrainer(job, shards, place, start=start)
        result = trainer.run(should_stop=should_stop)
        write_model(job, shards, place, trainer.model, result)
        place.wait_for_all()


def _start_values(job: TrainJob) -> Iterator[tuple[str, Any]]:
    from regmix.large.importing import load_hugging_face

    assert job.start is not None
    shape, parameters = load_hugging_face(Path(job.start))
    if dataclasses.replace(shape, seq_len=job.training.shape.seq_len) != job.training.shape:
        raise StudyError(
            f"{job.start}: its shape is not the one that the run was planned with",
            cure="Restore the checkpoint, or plan the run again",
        )
    yield from ((name, value[0]) for name, value in parameters.items())


@contextlib.contextmanager
def _study_held(job: TrainJob, *, alone: bool) -> Iterator[None]:
    from regmix.study import Study

    if not alone:
        yield
        return
    with Study.open(job.study).lock():
        yield


def failure_of(error: BaseException) -> RegmixError | None:
    """Return what a person can do about an error; None where it is worth another try, or a defect.

    A GPU whose memory ran out would run out of it again.
    """
    import torch

    if isinstance(error, RegmixError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return StudyError(
            f"a process ran out of its GPU's memory ({str(error).splitlines()[0]})",
            cure="Run it again with a smaller --micro-batch, --activation-checkpointing or "
            "--parallel fsdp: it goes on from its last checkpoint",
        )
    return None


def outcome(folder: Path) -> Mapping[str, Any] | None:
    """Return what the ranks of a run left where it did not come to its end; None for nothing."""
    path = folder / OUTCOME_FILE
    if not path.is_file():
        return None
    table = read_table(path)
    failed = table.get("failed", {"what": "", "cure": ""})
    if not isinstance(failed, dict) or not all(
        isinstance(failed.get(name), str) for name in ("what", "cure")
    ):
        raise ModelError(f"{path}: damaged", cure="Remove it, and run the same command again")
    return table


def main() -> None:
    """Train the job that the first argument names."""
    from regmix.swarm.engine import StoppedError

    if LAUNCHED in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    code = 0
    path = Path(sys.argv[1])
    folder = path.parent
    try:
        describe_ranks(os.environ)
        job = TrainJob.from_table(read_table(path))
        folder = Path(job.folder)
        train(job, StopSign(folder))
    except StoppedError:
        print("Stopped. Start the same command again to go on.", file=sys.stderr)
        write_json(folder / OUTCOME_FILE, {"stopped": True})
    except BaseException as error:
        traceback.print_exc()
        code = 1
        told = failure_of(error)
        if told is not None:
            print(f"Error: {told}", file=sys.stderr)
            write_json(folder / OUTCOME_FILE, {"failed": {"what": told.what, "cure": told.cure}})
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's way: to leave the group, it would wait for a rank that has failed.
    os._exit(code)


if __name__ == "__main__":
    main()
