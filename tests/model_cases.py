"""A study with finished models of random weights, for tests of what is done with a model."""

from __future__ import annotations

from pathlib import Path

import torch
from test_formats import TEXTS, pack

from regmix.data.mixtures import Mixture, write_mixture_yaml
from regmix.data.shards import ShardSet
from regmix.data.tokenizer import train_bpe
from regmix.files import write_json
from regmix.model.llama import init_parameters
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.provenance import environment_record
from regmix.study import Study, StudyConfig, Training, as_table
from regmix.swarm.checkpoint import write_tensors

OPTIMUM = {"code": 0.7, "web": 0.3}
SHAPES = {
    "plain": ModelShape(num_layers=2, width=48, num_heads=3, hidden=80, vocab_size=300, seq_len=32),
    "grouped and tied": ModelShape(
        num_layers=1,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        hidden=72,
        vocab_size=300,
        seq_len=24,
        rope_base=500.0,
        norm_eps=1e-3,
        tied=True,
    ),
}


def random_parameters(shape: ModelShape) -> dict[str, torch.Tensor]:
    # Norms start at one; a swapped or forgotten norm would not show.
    generator = torch.Generator().manual_seed(7)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in init_parameters(shape, [3]).items()
    }


def add_model(study: Study, shards: ShardSet, name: str, shape: ModelShape) -> None:
    folder = study.models_path / name
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", random_parameters(shape), {})
    tokenizer = {"file": str(shards.tokenizer_path), "hash": shards.tokenizer_hash}
    write_json(folder / "config.json", {"shape": as_table(shape), "tokenizer": tokenizer})
    row = {"loss_nats": 3.25, "bits_per_byte": 1.5, "tokens": 10, "utf8_bytes": 40}
    write_json(
        folder / "evaluation.json", {"targets": {"web": row}, "objective": {"loss_nats": 3.25}}
    )
    member = {"name": name, "weights": OPTIMUM, "data_seed": 5, "init_seed": 6}
    summary = {"name": name, "mixture": "optimum", "replicate": 0, "member": member}
    extra = {"tokens": 1000, "epochs": {"code": 1.25}, "environment": environment_record()}
    write_json(folder / "summary.json", {**summary, **extra})


def make_study(root: Path) -> Study:
    """A corpus, its tokenizer, an optimum, and a model of every shape under its name."""
    tokenizer = train_bpe((text for texts in TEXTS.values() for text in texts), 300)
    shards = pack(root / "shards", tokenizer, ("train", "valid"))
    optim = OptimConfig(lr=1e-3, warmup_steps=1, schedule="constant")
    proxy = Training(shape=SHAPES["plain"], optim=optim, batch_size=2, num_steps=4)
    config = StudyConfig(
        shards="../shards",
        shards_checksum=shards.checksum,
        train_domains=("code", "web"),
        targets=("code", "web"),
        objective={"web": 1.0},
        prior={"code": 0.25, "web": 0.75},
        available_tokens={d: shards.stats("train", d).tokens for d in TEXTS},
        proxy=proxy,
    )
    made = Study.create(root / "study", config)
    write_mixture_yaml(made.optimum_path, Mixture(OPTIMUM))
    write_json(
        made.path / "optimum.json",
        {
            "domains": list(OPTIMUM),
            "weights": list(OPTIMUM.values()),
            "epochs": {"code": 2.5, "web": 0.5},
            "budget_tokens": 1000,
        },
    )
    for name, shape in SHAPES.items():
        add_model(made, shards, name.replace(" ", "-"), shape)
    return made
