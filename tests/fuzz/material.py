"""Valid files of every kind that the package reads, and how to sign what carries a checksum.

Enters: an empty folder. Leaves: a corpus of shards with its study, models and exports, a study
with every part of a report, token files of other programs, documents, checkpoints. All of them
small; what is trained, is trained for two steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import model_cases
import numpy as np
import report_cases
import torch
import xxhash
import zstandard
from large_cases import job_of

from regmix.data.foreign.token_set import ForeignSet, record_checksums
from regmix.data.manifest import _render, read_manifest, write_manifest
from regmix.data.mixtures import Mixture, MixtureTable, write_mixture_yaml
from regmix.data.packing import pack as packing
from regmix.data.packing.assembly import Assembler
from regmix.data.packing.replacement import REPLACEMENT, _elsewhere
from regmix.data.schedules import Schedule, ScheduleTable, Segment, write_schedule_yaml
from regmix.data.shards import ShardSet
from regmix.files import write_json
from regmix.large.distributed import checkpoint as sharded
from regmix.large.distributed.checkpoint_index import _digest as digest_of_index
from regmix.large.distributed.checkpoint_index import _text as text_of_index
from regmix.large.export import export_model
from regmix.large.scores import TaskScore, write_scores
from regmix.swarm.checkpoint import _digest as digest_of_tensors
from regmix.swarm.engine import StackTrainer, StoppedError
from regmix.swarm.jobs import Member, StackJob
from regmix.swarm.ledger import Ledger

DOCUMENTS = [f"document {number} about oranges, apples and pears" for number in range(12)]


def sign_json(tree: Any) -> bytes:
    """A manifest, or recorded checksums, with the checksum that its content asks for."""
    if not isinstance(tree, dict):
        return json.dumps(tree).encode()
    table = {key: value for key, value in tree.items() if key != "checksum"}
    try:
        digest = xxhash.xxh3_64_hexdigest(_render(table).encode())
        return _render({**table, "checksum": digest}).encode()
    except UnicodeEncodeError:
        return json.dumps(table, indent=1).encode()


def sign_index(tree: Any) -> bytes:
    """The index of a sharded checkpoint with its checksum."""
    if not isinstance(tree, dict):
        return json.dumps(tree).encode()
    table = {key: value for key, value in tree.items() if key != "checksum"}
    try:
        return text_of_index({**table, "checksum": digest_of_index(table)}).encode()
    except UnicodeEncodeError:
        return json.dumps(table).encode()


def sign_state(path: Path, tree: Any) -> bytes:
    """A stack's checkpoint whose state is `tree`, and its checksum right."""
    from safetensors.torch import load_file, save

    tensors = load_file(path)
    text = json.dumps(tree)
    record = {"state": text, "xxh3_64": digest_of_tensors(tensors, text)}
    return save(tensors, metadata={"regmix": json.dumps(record)})


def state_of(path: Path) -> Any:
    """The state in a stack's checkpoint."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as stream:
        return json.loads(json.loads(stream.metadata()["regmix"])["state"])


class Material:
    """The files; `root` is the folder of all of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.study = model_cases.make_study(root)
        self.shards = root / "shards"
        self.tokenizer = self.shards / "tokenizer.json"
        self.report = report_cases.make_study(root / "told")
        self._study_files()
        self._stacks()
        self._foreign()
        self._documents()
        self._exports()
        self._runs()
        self._stopped_packing()

    def _study_files(self) -> None:
        study = self.study
        draws = np.random.default_rng(0).dirichlet([2.0, 2.0], 6)
        table = MixtureTable(("code", "web"), tuple(range(1, 7)), draws)
        table.write_csv(study.mixtures_path)
        rows = [f"{index},{3 + index / 10!r},{2 + index / 7!r}" for index in table.indices]
        header = "index,metric/code_val_loss,metric/web_val_loss"
        study.losses_path.write_text("\n".join([header, *rows]) + "\n")
        half = Segment(share=0.5, mixture=Mixture({"code": 0.2, "web": 0.8}))
        schedule = Schedule((half, Segment(share=0.5, mixture=Mixture({"code": 0.6, "web": 0.4}))))
        write_schedule_yaml(self.root / "schedule.yaml", schedule)
        segments = tuple(
            (first, mixture.array(table.domains)) for first, mixture in schedule.at_steps(4)
        )
        ScheduleTable(table.domains, (1_000_001, 1_000_002), (segments, segments)).write_csv(
            study.schedules_path
        )
        steps = [
            f"{i},{step},{5 - step / 2},{4 - step / 3}" for i in table.indices for step in (2, 4)
        ]
        header = "index,step,metric/code_val_loss,metric/web_val_loss"
        study.trajectories_path.write_text("\n".join([header, *steps]) + "\n")
        write_mixture_yaml(self.root / "mixture.yaml", Mixture({"code": 0.25, "web": 0.75}))
        made = {
            "number": 1,
            "rule": "improvement",
            "seed": 0,
            "objective": "web",
            "num_runs": 5,
            "num_explored": 1,
            "best_nats": 2.0,
            "expected_nats": [2.1],
            "sd_nats": [0.1],
            "indices": [6],
            "domains": ["code", "web"],
            "weights": [table.weights[5].tolist()],
        }
        write_json(study.path / "rounds.json", {"version": 1, "rounds": [made]})
        shape = dataclasses.asdict(model_cases.SHAPES["plain"])
        lines = [
            f"{name} = {json.dumps(value)}" for name, value in shape.items() if value is not None
        ]
        (self.root / "shape.toml").write_text("\n".join(lines) + "\n")
        names = ("code", "docs", "legal")
        write_json(self.root / "corpus.json", dict.fromkeys(names, "12 documents"))
        (self.root / "corpus").mkdir()
        for name in names:
            (self.root / "corpus" / f"{name}-0.jsonl").touch()
        record = {"suite": "data", "case": "x", "metric": "rate", "value": 2.5, "unit": "tokens/s"}
        (self.root / "records.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
        score = TaskScore(
            task="arc",
            shots=0,
            metric="acc",
            value=0.5,
            error=0.1,
            higher_is_better=True,
            num_questions=10,
            limit=None,
            num_cut=0,
            version="0.4",
            metrics={"acc": 0.5},
        )
        write_scores(self.report.models_path / "optimum-0", [score])

    def _stacks(self) -> None:
        study = self.study
        shards = ShardSet.open(self.shards)
        shape = dataclasses.replace(
            model_cases.SHAPES["plain"], num_layers=1, width=16, num_heads=2
        )
        training = dataclasses.replace(study.config.proxy, shape=shape)
        members = tuple(
            Member(name=str(i), weights={"code": 0.5, "web": 0.5}, data_seed=i, init_seed=i)
            for i in (1, 2)
        )
        self.job = StackJob(
            name="stack",
            members=members,
            training=training,
            targets=("web",),
            shards=str(self.shards),
            shards_checksum=shards.checksum,
            folder=str(study.stacks_path / "stack"),
        )
        stops = iter((False, True))
        trainer = StackTrainer(self.job, shards)
        with contextlib.suppress(StoppedError):
            trainer.run(should_stop=lambda: next(stops), checkpoint_seconds=1e9)
        checkpoint = next((study.stacks_path / "stack").glob("step-*.safetensors"))
        self.checkpoint_copy = self.root / "checkpoint.safetensors"
        self.checkpoint_copy.write_bytes(checkpoint.read_bytes())
        table = {
            "job": self.job.identity(),
            "losses": [[3.0], [3.1]],
            "failed": [False, False],
            "evaluations": [[4, [[3.0], [3.1]]]],
            "seconds": 1.5,
            "tokens": 512,
        }
        (self.root / "result").mkdir()
        write_json(self.root / "result" / "result.json", table)
        self.tensors = {"weight": torch.arange(12.0).reshape(3, 4), "step": torch.tensor(3)}
        sharded.save(self.root / "sharded", 3, self.tensors, {"job": {"name": "x"}}, wait=True)

    def _foreign(self) -> None:
        self.foreign = folder = self.root / "foreign"
        folder.mkdir()
        tokenizer = (self.shards / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_bytes(tokenizer)
        separator = ShardSet.open(self.shards).separator_id
        ids = np.array([5, 6, 7, separator, 8, 9, separator, 10, separator], np.uint16)
        packed = b"LITPKDS" + struct.pack("<QBQ", 1, 8, len(ids)) + ids.tobytes()
        (folder / "train_web_0000000000.bin").write_bytes(packed)
        (folder / "code_text_document.bin").write_bytes(ids.tobytes())
        index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
        index += np.array([4, 3, 2], "<i4").tobytes() + np.array([0, 8, 14], "<i8").tobytes()
        index += np.array([0, 1, 2, 3], "<i8").tobytes()
        (folder / "code_text_document.idx").write_bytes(index)
        np.save(folder / "legal.npy", ids)
        (folder / "plain.tokens").write_bytes(b"head" + ids.tobytes())
        description = f"""version = 1
tokenizer = "tokenizer.json"
separator = "{ShardSet.open(self.shards).manifest.tokenizer.separator}"
[splits.train.web]
format = "litpkds"
files = ["train_web_*.bin"]
[splits.train.code]
format = "megatron"
files = ["code_text_document.bin"]
[splits.train.legal]
format = "npy"
files = ["legal.npy"]
[splits.valid.web]
format = "raw"
dtype = "uint16"
header_bytes = 4
files = ["plain.tokens"]
"""
        (folder / "tokens.toml").write_text(description)
        opened = ShardSet.open(folder)
        assert isinstance(opened, ForeignSet)
        self.sums = self.root / "foreign-recorded"
        self.sums.mkdir()
        for path in folder.iterdir():
            (self.sums / path.name).write_bytes(path.read_bytes())
        recorded = ShardSet.open(self.sums)
        assert isinstance(recorded, ForeignSet)
        record_checksums(recorded)

    def _documents(self) -> None:
        import pyarrow
        import pyarrow.parquet

        self.documents = folder = self.root / "documents"
        folder.mkdir()
        lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS).encode()
        # Escapes, halves of characters, a field of another name, and no JSON at all.
        lines += b'{"text": "a\\ud83d\\ude00 \\ud800"}\n{"texts": ["' + b"b" * 80 + b'"]}\n{\n'
        (folder / "web-0.jsonl").write_bytes(lines)
        (folder / "web-0.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        (folder / "web-0.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
        (folder / "web-0.txt").write_text("\n".join(DOCUMENTS))
        table = pyarrow.table({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))})
        pyarrow.parquet.write_table(table, folder / "web-0.parquet", row_group_size=5)

    def _exports(self) -> None:
        self.export = self.root / "export"
        export_model(self.study, "plain", self.export)
        self.parts = self.root / "export-parts"
        export_model(self.study, "plain", self.parts, max_shard_bytes=60_000)

    def _runs(self) -> None:
        """What a command finds of runs that were stopped, and their ledger."""
        shards = ShardSet.open(self.shards)
        record = {"records": 24, "engine": "tokenizers", "engine_version": "0.21"}
        rest = {"engine_reason": "", "verified_documents": 1, "verified_bytes": 2}
        write_json(self.shards / "packing.json", {**record, **rest, "dropped_examples": ["a: b"]})
        write_json(self.study.stacks_path / "train-x" / "job.json", self.job.to_table())
        folder = self.root / "large"
        self.large_job = job_of(shards, folder)
        write_json(folder / "job.json", self.large_job.to_table())
        write_json(folder / "outcome.json", {"failed": {"what": "it diverged", "cure": "Try"}})
        line = {"step": 1, "loss_nats": 3.5, "tokens_per_second": 1.0}
        lines = [json.dumps({**line, "step": step}) for step in range(1, 6)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        told = dataclasses.replace(self.job, targets=self.report.config.targets)
        result = json.loads((self.root / "result/result.json").read_text())
        rows = [[3.0, 3.1, 3.2], [3.1, 3.2, 3.3]]
        with Ledger(self.report.ledger_path) as ledger:
            ledger.add_stacks([told])
            ledger.finish_stack(told, {**result, "losses": rows, "evaluations": [[4, rows]]})
        lease = {"token": "t", "host": "h", "pid": 1, "boot": "b", "counter": 3}
        write_json(self.report.path / ".lease", lease)
        stack = {"stack": "stack", "proxies": [1, 2], "worker": "worker-0", "machine": "here"}
        stack |= {"device": "cpu", "num_steps": 4, "step": 1, "loss_nats": 3.0}
        table = {"token": "t", "updated": "2026-01-01T00:00:00", "tokens": 5, "total_tokens": 9}
        write_json(
            self.report.path / "progress.json",
            {**table, "tokens_per_second": 1.0, "running": [stack], "expected_seconds": 4.0},
        )

    def _stopped_packing(self) -> None:
        """Runs of `pack` that were stopped: before assembly, the manifest, the replacement."""
        folder = self.root / "input"
        folder.mkdir()
        for name in ("web", "code"):
            lines = [json.dumps({"text": f"{name} {text}"}) for text in DOCUMENTS * 3]
            (folder / f"{name}-0.jsonl").write_text("\n".join(lines) + "\n")
        options: dict[str, Any] = {"engine": "tokenizers", "workers": 1}
        options |= {"tokenizer": self.tokenizer, "valid_fraction": 0.3}
        self.stopped = self.root / "stopped"
        stop = mock.patch.object(packing, "write_manifest", side_effect=KeyboardInterrupt)
        with stop, contextlib.suppress(KeyboardInterrupt):
            packing.pack([folder], self.stopped, **options)
        self.halfway = self.root / "halfway"
        stop = mock.patch.object(Assembler, "assemble", side_effect=KeyboardInterrupt)
        with stop, contextlib.suppress(KeyboardInterrupt):
            packing.pack([folder], self.halfway, **options)
        self.replaced = self.root / "replaced"
        packing.pack([folder], self.replaced / REPLACEMENT, **options)
        manifest, _ = read_manifest(self.replaced / REPLACEMENT)
        write_manifest(self.replaced, _elsewhere(manifest))
