"""The evaluate command: models and checkpoints side by side, means over seeds, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from model_cases import SHAPES, make_study
from test_importing import change

from regmix.cli.evaluate import command
from regmix.errors import ConfigError, ModelError, RegmixError
from regmix.large.evaluate import load_model
from regmix.large.export import export_model
from regmix.study import Study
from regmix.swarm.checkpoint import write_tensors


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two seeds of two mixtures, each with weights of its own."""
    made = make_study(tmp_path_factory.mktemp("evaluate"))
    shutil.rmtree(made.models_path / "grouped-and-tied")
    plain = made.models_path / "plain"
    for number, name in enumerate(("natural-0", "natural-1", "optimum-0", "optimum-1")):
        folder = made.models_path / name
        shutil.copytree(plain, folder)
        mixture, replicate = name.split("-")
        change(folder / "summary.json", name=name, mixture=mixture, replicate=int(replicate))
        _, parameters, _ = load_model(folder)
        parameters["norm"] *= 1 + 0.1 * number
        write_tensors(folder / "model.safetensors", parameters, {})
    shutil.rmtree(plain)
    return made


@pytest.fixture(scope="module")
def exported(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_model(study, "optimum-1", folder)
    return folder


def run(study: Study, *words: object) -> Any:
    result = CliRunner().invoke(
        command, [str(study.path), *map(str, words)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in words else result.stdout


def test_every_model_is_measured_and_its_table_kept(study: Study) -> None:
    answer = run(study, "--json")
    assert list(answer["models"]) == ["natural-0", "natural-1", "optimum-0", "optimum-1"]
    for name, table in answer["models"].items():
        stored = json.loads((study.models_path / name / "evaluation.json").read_text())
        assert table == stored
        assert (table["seq_len"], table["computed_in"]) == (32, "float32")
        assert table["objective"]["loss_nats"] == table["targets"]["web"]["loss_nats"]


def test_mixtures_are_compared_with_standard_errors_over_seeds(study: Study) -> None:
    answer = run(study, "--json")
    losses = {name: t["objective"]["loss_nats"] for name, t in answer["models"].items()}
    found = answer["mixtures"]["natural"]
    one, other = losses["natural-0"], losses["natural-1"]
    assert found["seeds"] == [0, 1]
    assert found["objective"]["mean_nats"] == pytest.approx((one + other) / 2)
    # Of two values: the spread is their distance / sqrt 2, the error that / sqrt 2.
    assert found["objective"]["error_nats"] == pytest.approx(abs(one - other) / 2)
    pairs = [losses[f"natural-{n}"] - losses[f"optimum-{n}"] for n in (0, 1)]
    assert answer["gains"]["natural"]["mean_nats"] == pytest.approx(sum(pairs) / 2)
    shown = run(study)
    assert "standard error over seeds" in shown
    assert (
        f"{found['objective']['mean_nats']:.4f} ± {found['objective']['error_nats']:.4f}" in shown
    )
    assert "The optimum is" in shown


def test_a_checkpoint_stands_beside_the_model_that_it_is(study: Study, exported: Path) -> None:
    answer = run(study, "--model", "optimum-1", "--hf", exported, "--json")["models"]
    assert answer["optimum-1"] == answer[str(exported)]
    alone = run(study, "--hf", exported, "--json")
    assert list(alone["models"]) == [str(exported)]
    assert alone["mixtures"] == {}


def test_windows_of_another_length_are_told(study: Study, exported: Path) -> None:
    shown = run(study, "--model", "optimum-1", "--hf", exported, "--seq-len", 16)
    assert "Compare with care" in shown
    assert "16 tokens, float32" in shown
    assert "Compare with care" not in run(study, "--model", "optimum-1", "--hf", exported)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--model", "optimun-0"), ModelError, "did you mean 'optimum-0'"),
        (("--seq-len", "16"), ConfigError, "--seq-len is the length"),
        (("--shots", "5"), ConfigError, "about tasks"),
        (("--limit", "5"), ConfigError, "about tasks"),
        (("--task-folder", "x"), ConfigError, "about tasks"),
        (("--hf", "absent"), ModelError, "no Hugging Face checkpoint"),
        (("--tasks", "piqa", "--shots", "many"), ConfigError, "--shots is 'many'"),
    ],
)
def test_bad_words_are_refused_with_a_cure(
    study: Study, words: tuple[str, ...], error: type[RegmixError], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(study, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(study: Study, exported: Path) -> None:
    with pytest.raises(ModelError, match="no GPU"):
        run(study, "--gpu")


def test_a_vocabulary_smaller_than_the_corpuss_is_refused(study: Study, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export_model(study, "optimum-0", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:290].clone()
    save_file(weights, path)
    change(tmp_path / "hf" / "config.json", vocab_size=290)
    with pytest.raises(ModelError, match="a vocabulary of 290"):
        run(study, "--hf", tmp_path / "hf")
    assert SHAPES["plain"].vocab_size == 300
