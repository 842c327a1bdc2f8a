"""What the tests share: the shared material's place, a tiny corpus, a tiny study."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet
    from regmix.study import Study, Training

os.environ["OMP_NUM_THREADS"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"

WORDS = {
    "animals": "cat dog horse sheep goat cow hen duck goose mouse rat fox wolf bear deer hare",
    "numbers": "one two three four five six seven eight nine ten eleven twelve twenty thirty",
    "colours": "red green blue white black grey brown pink purple orange yellow violet cyan",
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material; the test is skipped, with the reason, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared material beside the checkout ({SHARED.name}/), absent here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of generated sentences as JSON lines, 120 documents each."""
    folder = tmp_path_factory.mktemp("corpus")
    for domain, words in WORDS.items():
        draw = random.Random(domain)
        with open(folder / f"{domain}-0.jsonl", "w", encoding="utf-8") as stream:
            for number in range(120):
                # Every word leads to a few others, so that there is something to learn.
                vocabulary = words.split()
                word, sentence = draw.choice(vocabulary), []
                for _ in range(80):
                    sentence.append(word)
                    place = vocabulary.index(word)
                    word = vocabulary[(place + draw.choice((1, 1, 1, 3, 5))) % len(vocabulary)]
                text = f"{domain} {number}: " + " ".join(sentence)
                stream.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_shards_path(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, packed with a vocabulary of 320."""
    from regmix.data.packing.pack import pack

    out = tmp_path_factory.mktemp("packed") / "shards"
    pack([tiny_corpus], out, train_bpe=320, valid_fraction=0.15)
    return out


@pytest.fixture
def tiny_shards(tiny_shards_path: Path) -> ShardSet:
    """The tiny corpus's shards, opened."""
    from regmix.data.shards import ShardSet

    return ShardSet.open(tiny_shards_path)


@pytest.fixture
def tiny_training() -> Training:
    """A training of 12 steps of a model of width 32."""
    from regmix.model.optim import OptimConfig
    from regmix.model.presets import ModelShape
    from regmix.study import Training

    return Training(
        shape=ModelShape(
            num_layers=1, width=32, num_heads=2, hidden=32, vocab_size=320, seq_len=32
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, total_steps=12),
        batch_size=4,
        num_steps=12,
    )


@pytest.fixture
def study(
    tiny_shards: ShardSet,
    tiny_training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Study:
    """A study of 6 tiny proxies; its sweeps do not measure their speed first."""
    from sweep_cases import new_study

    monkeypatch.setattr("regmix.swarm.cost.measure_tokens_per_second", lambda *_: 1e5)
    return new_study(tiny_shards, tiny_training, tmp_path / "study")
