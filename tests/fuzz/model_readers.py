"""Rows of the table: stacks and runs in training, models, records of the bench."""

from __future__ import annotations

import contextlib

import material
from material import Material
from readers import reader

from regmix.errors import RegmixError

# Stacks


@reader(
    "checkpoint",
    "study/stacks/stack/step-00000002.safetensors",
    "json",
    sign=lambda files, tree: material.sign_state(files.checkpoint_copy, tree),
    tree=lambda files: material.state_of(files.checkpoint_copy),
)
def _checkpoint(files: Material) -> None:
    from regmix.data.shards import ShardSet
    from regmix.swarm.engine import StackTrainer

    trainer = StackTrainer(files.job, ShardSet.open(files.shards))
    trainer._resume()
    trainer.close()


@reader("result.json", "result/result.json", "json")
def _result(files: Material) -> None:
    import dataclasses

    from regmix.swarm.ledger import Ledger
    from regmix.swarm.worker import train_job

    job = dataclasses.replace(files.job, folder=str(files.root / "result"))
    table = train_job(job)
    path = files.root / "kept.sqlite"
    path.unlink(missing_ok=True)
    with Ledger(path) as ledger:
        ledger.add_stacks([job])
        ledger.finish_stack(job, table)


@reader("job.json", "study/stacks/train-x/job.json", "json")
def _job(files: Material) -> None:
    from regmix.large.train import _unfinished_jobs

    members = files.job.members
    _unfinished_jobs(files.study, members, members, files.job.training)


@reader("job.json of a large model", "large/job.json", "json")
def _large_job(files: Material) -> None:
    from regmix.files import read_table
    from regmix.large.distributed.job import TrainJob

    TrainJob.from_table(read_table(files.root / "large" / "job.json")).identity()


@reader("curve of a worker", "told/steps/1.npy", "bytes")
def _curve_of_worker(files: Material) -> None:
    from regmix.large.train import _read_losses

    _read_losses(files.report.steps_path / "1.npy")


@reader("outcome.json", "large/outcome.json", "json")
def _outcome(files: Material) -> None:
    from regmix.large.distributed.rank import outcome

    told = outcome(files.root / "large") or {}
    if "failed" in told:
        assert isinstance(told["failed"]["what"] + told["failed"]["cure"], str)


@reader("metrics of a run", "large/metrics.jsonl", "bytes")
def _metrics(files: Material) -> None:
    from regmix.files import read_text
    from regmix.large.distributed.finish import _curve
    from regmix.large.distributed.launch import _Follower
    from regmix.large.distributed.metrics import MetricsLog

    path = files.root / "large" / "metrics.jsonl"
    list(_Follower(path).new_lines())
    with contextlib.suppress(RegmixError):
        _curve(files.large_job, read_text(path))
    MetricsLog(path.parent, 3).close()


@reader(
    "sharded index",
    "sharded/step-00000003/index.json",
    "json",
    sign=lambda _, tree: material.sign_index(tree),
)
@reader("sharded tensors", "sharded/step-00000003/shard-00000-of-00001.safetensors", "bytes")
def _sharded(files: Material) -> None:
    import torch

    from regmix.large.distributed.checkpoint import keep_last, load_newest

    load_newest(files.root / "sharded", {n: torch.zeros_like(t) for n, t in files.tensors.items()})
    keep_last(files.root / "sharded", 1)


# Models


@reader("config.json", "study/models/plain/config.json", "json")
@reader("model.safetensors", "study/models/plain/model.safetensors", "bytes")
@reader("summary.json of export", "study/models/plain/summary.json", "json")
@reader("evaluation.json of export", "study/models/plain/evaluation.json", "json")
def _model(files: Material) -> None:
    from regmix.data.shards import ShardSet
    from regmix.large.evaluate import load_model
    from regmix.large.export import model_card
    from regmix.large.train import is_trained
    from regmix.large.vocabulary import check_own_tokens

    folder = files.study.models_path / "plain"
    shards = ShardSet.open(files.shards)
    shape, _, config = load_model(folder)
    check_own_tokens(folder, config, shards)
    model_card(files.study, shards, folder, shape).encode()
    with contextlib.suppress(RegmixError):
        member = files.job.members[0]
        is_trained(files.study, member, files.job.training)


@reader("config.json of Hugging Face", "export/config.json", "json", slow=True)
@reader("generation_config.json", "export/generation_config.json", "json", slow=True)
@reader("safetensors of Hugging Face", "export/model.safetensors", "bytes", slow=True)
@reader("tokenizer of Hugging Face", "export/tokenizer.json", "json", slow=True)
def _hugging_face(files: Material) -> None:
    from regmix.data.shards import ShardSet
    from regmix.large.generate import Choice, Writer
    from regmix.large.vocabulary import check_same_tokens

    writer = Writer.of_checkpoint(files.export)
    check_same_tokens(files.export, ShardSet.open(files.shards))
    list(writer.write(writer.encode("a b"), 2, Choice(temperature=0.0)))
    list(writer.write(writer.encode(None), 2, Choice(temperature=0.0)))


@reader("safetensors index", "export-parts/model.safetensors.index.json", "json")
def _index(files: Material) -> None:
    from regmix.large.importing import load_hugging_face

    load_hugging_face(files.parts)


# Records and the machine


@reader("bench records", "records.jsonl", "bytes")
def _records(files: Material) -> None:
    from regmix_bench.compare import comparison, read_records, wide_table

    path = files.root / "records.jsonl"
    records = read_records(path)
    wide_table(records)
    comparison(records, records)


@reader("doctor", "study/study.toml", "toml")
@reader("doctor's manifest", "shards/manifest.json", "json")
def _doctor(files: Material) -> None:
    from regmix.doctor.storage import shards_folder, study_settings, tokenizer_words

    for folder in (files.study.path, files.shards):
        study_settings(folder)
        shards_folder(folder)
        tokenizer_words(folder)
