"""What a distributed run leaves: a model's folder in the format that every model has.

Enters: a trained job on every rank. Leaves, by the first rank, `models/<name>/` with its
`summary.json` last; then the run's folder goes. Trains and evaluates nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from regmix.config import as_table
from regmix.data.shards import ShardSet
from regmix.errors import StorageError
from regmix.files import read_text, write_json, write_text
from regmix.large.distributed.job import TrainJob
from regmix.large.distributed.loop import LargeResult
from regmix.large.distributed.metrics import FILE
from regmix.large.distributed.parallel import ParallelModel, Place
from regmix.large.evaluate import evaluation_table
from regmix.large.train import model_config, model_summary
from regmix.study import Study
from regmix.swarm.checkpoint import write_tensors


def write_model(
    job: TrainJob, shards: ShardSet, place: Place, model: ParallelModel, result: LargeResult
) -> None:
    """Write the model of a finished run into its study; every rank calls it."""
    whole = {}
    for name, value in model.whole_parameters():
        # The others take part in gathering a parameter, and let it go.
        if place.rank == 0:
            whole[name] = value
    if place.rank != 0:
        return
    study = Study.open(job.study)
    folder = study.models_path / job.name
    text = read_text(Path(job.folder) / FILE)
    curve = _curve(job, text)
    config = model_config(shards, job.training)
    if job.within_documents:
        config["within_documents"] = True
    write_json(folder / "config.json", config)
    write_json(folder / "evaluation.json", evaluation_table(study, shards, result.losses))
    write_text(folder / "metrics.jsonl", text)
    record = {"name": job.name, "step": job.training.num_steps}
    write_tensors(folder / "model.safetensors", whole, record)
    write_json(folder / "summary.json", _summary(job, shards, place, result, curve))
    shutil.rmtree(job.folder, ignore_errors=True)


def _summary(
    job: TrainJob, shards: ShardSet, place: Place, result: LargeResult, curve: np.ndarray
) -> dict[str, Any]:
    measured = {"seconds": result.seconds, "tokens": result.tokens}
    summary = model_summary(shards, result.member, job.training, measured, curve)
    if result.member != job.member:
        # The mixture was changed on the way: `member` is what was read, this what was asked for.
        summary["asked"] = as_table(job.member)
    summary["distributed"] = {
        "num_ranks": place.num_ranks,
        "parallel": job.parallel,
        "device": job.device,
        "dtype": job.dtype,
        "within_documents": job.within_documents,
        "start": job.start,
        "evaluations": [[step, losses] for step, losses in result.evaluations],
    }
    return summary


def _curve(job: TrainJob, text: str) -> np.ndarray:
    try:
        losses = [float(json.loads(line)["loss_nats"]) for line in text.splitlines()]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StorageError(
            f"{job.folder}/{FILE}: not the losses of a run's steps ({error!r})",
            cure="Restore the file, or remove that folder to train again",
        ) from error
    if len(losses) != job.training.num_steps:
        raise StorageError(
            f"{job.folder}/{FILE}: {len(losses)} steps, where the run has {job.training.num_steps}",
            cure="Restore the file, or remove that folder to train again",
        )
    return np.array(losses)
