"""Exports: what transformers loads is the model that was trained; the command refuses bad input."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from model_cases import OPTIMUM, SHAPES, add_model, make_study, random_parameters
from safetensors import safe_open
from test_formats import TEXTS

from regmix.cli.export import FORMATS as CHOICES
from regmix.cli.export import command
from regmix.data.formats import FORMATS
from regmix.data.mixtures import read_mixture_yaml, write_mixture_yaml
from regmix.data.tokenizer import train_bpe
from regmix.errors import ConfigError, MixtureError, ModelError, RegmixError, StorageError
from regmix.files import write_json
from regmix.large.export import export_model, hugging_face_weights, model_card
from regmix.model.llama import StackedLlama
from regmix.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same_logits(study: Study, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    export_model(study, name.replace(" ", "-"), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (3, shape.seq_len), generator=generator)
    expected = StackedLlama(shape).logits(random_parameters(shape), tokens[None])[0]
    with torch.no_grad():
        found = theirs(tokens).logits
    assert found.dtype == torch.float32
    largest = float(expected.abs().max())
    assert largest > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_measures_the_same_loss(study: Study, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    from regmix.data.validation import Windows
    from regmix.swarm.engine import mean_losses

    shape = SHAPES[name]
    export_model(study, name.replace(" ", "-"), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    num_tokens = 4 * shape.seq_len + shape.seq_len // 2 + 1
    stream = np.random.default_rng(1).integers(0, shape.vocab_size, num_tokens)
    windows = Windows([stream], np.arange(5) * shape.seq_len, shape.seq_len)
    ((batch, inside),) = windows.batches(5)
    tokens, mask = torch.from_numpy(batch), torch.from_numpy(inside)
    with torch.no_grad():
        logits = theirs(tokens[:, :-1]).logits[mask]
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][mask])
    evaluate = functools.partial(StackedLlama(shape).evaluate, random_parameters(shape))
    (ours,) = mean_losses(evaluate, windows)
    assert ours == pytest.approx(float(loss), rel=1e-5)


def test_transformers_loads_every_weight_and_no_other(study: Study, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    for name in SHAPES:
        folder = tmp_path / name
        export_model(study, name.replace(" ", "-"), folder)
        model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert sum(p.numel() for p in model.parameters()) == SHAPES[name].num_parameters


def test_transformers_tokenizes_as_the_corpus_was(study: Study, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_model(study, "plain", tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    shards = study.open_shards()
    start, end = shards.document_offsets("train", "web")[:2].astype(int)
    ids = shards.arrays("train", "web")[0][start:end].tolist()
    text = TEXTS["web"][0]
    assert [*theirs(text)["input_ids"], theirs.eos_token_id] == ids
    assert theirs.decode(ids[:-1]) == text
    assert theirs.eos_token_id == shards.separator_id


def test_the_model_generates_from_its_own_settings(study: Study, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    export_model(study, "plain", tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").do_sample is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    out = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    assert 3 <= out.shape[1] <= 5


def test_transformers_generates_without_a_warning(
    study: Study,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import warning_once

    export_model(study, "plain", tmp_path / "model")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    warning_once.cache_clear()  # said once a process, and another test may have heard it
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=3)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 60_000])
def test_several_files_of_weights_are_read_as_one(
    study: Study, tmp_path: Path, max_shard_bytes: int
) -> None:
    from transformers import LlamaForCausalLM

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export_model(study, "plain", whole)
    export_model(study, "plain", parts, max_shard_bytes=max_shard_bytes)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * SHAPES["plain"].num_parameters
    one, many = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, parts))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    for file in files:
        with safe_open(parts / file, framework="pt") as stream:
            sizes = [stream.get_tensor(name).nbytes for name in stream.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= max_shard_bytes


def test_the_card_names_mixture_data_and_losses(study: Study, tmp_path: Path) -> None:
    export_model(study, "plain", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| code | 70 % | 700 | 1.25 | 40 |" in card
    assert "| web | 3.2500 | 1.5000 |" in card
    assert study.config.shards_checksum in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_a_name_cannot_break_out_of_the_cards_table(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    member = {"weights": OPTIMUM, "data_seed": 0, "init_seed": 0}
    summary = {"name": "a | b\n# <script>", "mixture": "x", "tokens": 1, "member": member}
    write_json(folder / "summary.json", summary)
    card = model_card(study, study.open_shards(), folder, SHAPES["plain"])
    assert "# a \\| b # &lt;script>" in card


def test_a_tied_head_is_exported_once() -> None:
    shape = SHAPES["grouped and tied"]
    assert "lm_head.weight" not in hugging_face_weights(random_parameters(shape), shape)


def test_an_export_appears_whole_or_not_at_all(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regmix.large.export.model_card", fail)
    with pytest.raises(StorageError, match="No space left"):
        export_model(study, "plain", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_is_not_overwritten(study: Study, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        export_model(study, "plain", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_model_names_the_nearest(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'plain'"):
        export_model(study, "plane", tmp_path / "model")


def test_a_model_of_another_tokenizer_is_refused(study: Study, tmp_path: Path) -> None:
    shards = study.open_shards()
    add_model(study, shards, "foreign", SHAPES["plain"])
    path = study.models_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "tokenizer": {"file": "x", "hash": "0" * 16}})
    with pytest.raises(ModelError, match="another tokenizer"):
        export_model(study, "foreign", tmp_path / "model")


def run(*words: object) -> dict[str, object]:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output) if "--json" in words else {"output": result.output}


def test_the_command_offers_every_format() -> None:
    assert list(CHOICES) == list(FORMATS)


def test_the_command_writes_the_optimum_with_its_epochs(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "mixture.yaml"
    answer = run(study.path, "--format", "regmix", "--out", out, "--json")
    assert dict(read_mixture_yaml(out)) == OPTIMUM
    assert yaml.safe_load(out.read_text())["epochs"] == {"code": 2.5, "web": 0.5}
    assert answer["files"] == [str(out)]


def test_another_mixture_has_epochs_of_its_own(study: Study, tmp_path: Path) -> None:
    answer = run(
        study.path, "--format", "olmo", "--mixture", "natural", "--out", tmp_path / "m", "--json"
    )
    available = study.config.available_tokens
    expected = {"code": 250 / available["code"], "web": 750 / available["web"]}
    assert answer["epochs"] == pytest.approx(expected)


def test_a_mixture_file_is_exported_with_the_given_location(study: Study, tmp_path: Path) -> None:
    write_mixture_yaml(tmp_path / "mine.yaml", {"code": 1.0, "web": 0.0})
    out = tmp_path / "blend.txt"
    shown = run(
        study.path,
        "--format",
        "megatron",
        "--mixture",
        tmp_path / "mine.yaml",
        "--location",
        "/d/{domain}_text_document",
        "--out",
        out,
    )["output"]
    assert out.read_text() == "1.0 /d/code_text_document\n"
    assert "web: weight 0, left out" in str(shown)
    assert "Next: Megatron-LM: --data-args-path FILE" in str(shown)


def test_weights_are_restated_for_another_tokenizer(study: Study, tmp_path: Path) -> None:
    # It knows code, so code takes fewer of its tokens than of ours, and web more.
    (tmp_path / "other.json").write_text(train_bpe(TEXTS["code"], 300).text, encoding="utf-8")
    out = tmp_path / "mixture.yaml"
    shown = run(
        study.path, "--format", "regmix", "--tokenizer", tmp_path / "other.json", "--out", out
    )["output"]
    assert read_mixture_yaml(out)["code"] < OPTIMUM["code"]
    assert "bytes a token" in str(shown)
    assert "restated for other.json" in yaml.safe_load(out.read_text())["origin"]


def test_the_command_exports_a_model(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "model"
    answer = run(study.path, "--model", "plain", "--out", out, "--json")
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in out.iterdir()} == expected
    assert answer["files"] == sorted(str(path) for path in out.iterdir())


def test_the_command_limits_the_size_of_files(study: Study, tmp_path: Path) -> None:
    answer = run(
        study.path,
        "--model",
        "plain",
        "--max-shard-size",
        "0.06MB",
        "--out",
        tmp_path / "m",
        "--json",
    )
    sizes = [Path(file).stat().st_size for file in answer["files"] if "safetensors" in file]
    assert len(sizes) > 2
    assert max(sizes) < 70_000


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ((), ConfigError, "needs either --format or --model"),
        (("--format", "olmo", "--model", "plain"), ConfigError, "either --format or --model"),
        (("--format", "olmo", "--mixture", "optimun"), MixtureError, "did you mean 'optimum'"),
        (("--format", "olmo", "--location", "data"), MixtureError, "same for every domain"),
        (("--format", "olmo", "--tokenizer", "absent.json"), StorageError, "absent.json"),
        (("--format", "olmo", "--max-shard-size", "1GB"), ConfigError, "a model's weights"),
        (("--model", "plain", "--max-shard-size", "big"), ConfigError, "not a number"),
    ],
)
def test_bad_words_are_refused_with_a_cure(
    study: Study, tmp_path: Path, words: tuple[str, ...], error: type[RegmixError], says: str
) -> None:
    with pytest.raises(error, match=says):
        CliRunner().invoke(
            command,
            [str(study.path), "--out", str(tmp_path / "out"), *words],
            catch_exceptions=False,
        )
    assert not (tmp_path / "out").exists()
