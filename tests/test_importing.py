"""Hugging Face checkpoints: ours come back bit for bit, others' are read or refused with a cure."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SHAPES, make_study
from safetensors.torch import load_file, save_file
from test_formats import TEXTS

from regmix.data.tokenizer import train_bpe
from regmix.errors import ModelError
from regmix.files import write_json
from regmix.large.evaluate import evaluate_hugging_face, evaluate_model, load_model
from regmix.large.export import export_model
from regmix.large.importing import load_hugging_face
from regmix.model.llama import StackedLlama
from regmix.study import Study

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("importing"))


@pytest.fixture
def whole(study: Study, tmp_path: Path) -> Path:
    export_model(study, "plain", tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def parts(study: Study, tmp_path: Path) -> Path:
    export_model(study, "plain", tmp_path / "parts", max_shard_bytes=60_000)
    return tmp_path / "parts"


def change(path: Path, **entries: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **entries})


@pytest.mark.parametrize("max_shard_bytes", [1, 60_000, 10**9])
@pytest.mark.parametrize("name", SHAPES)
def test_an_exported_model_comes_back_bit_for_bit(
    study: Study, tmp_path: Path, name: str, max_shard_bytes: int
) -> None:
    stored = name.replace(" ", "-")
    export_model(study, stored, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    shape, parameters = load_hugging_face(tmp_path / "model")
    expected_shape, expected, _ = load_model(study.models_path / stored)
    assert shape == expected_shape == SHAPES[name]
    assert parameters.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == parameters[key].dtype == torch.float32
        assert torch.equal(value, parameters[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_saves_computes_the_same_here(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=40,
        rope_theta=700.0,
        rms_norm_eps=1e-4,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    made = LlamaForCausalLM(config).to(dtype)
    made.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert (tmp_path / "model" / INDEX).is_file()
    shape, parameters = load_hugging_face(tmp_path / "model")
    assert (shape.kv_heads, shape.rope_base, shape.norm_eps) == (2, 700.0, 1e-4)
    assert (shape.seq_len, shape.tied) == (40, tied)
    tokens = torch.randint(0, 96, (2, 40))
    found = StackedLlama(shape).logits(parameters, tokens[None])[0]
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(study: Study, tmp_path: Path) -> None:
    export_model(study, "grouped-and-tied", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, path)
    shape, parameters = load_hugging_face(tmp_path / "model")
    assert shape.tied
    assert "head" not in parameters
    head[3, 4] += 1
    save_file({**weights, "lm_head.weight": head}, path)
    with pytest.raises(ModelError, match="its head is not its embedding"):
        load_hugging_face(tmp_path / "model")


def test_an_old_checkpoint_leaves_out_what_has_a_default(whole: Path) -> None:
    path = whole / "config.json"
    table = json.loads(path.read_text())
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rope_parameters")
    optional += ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act")
    write_json(path, {key: value for key, value in table.items() if key not in optional})
    shape, _ = load_hugging_face(whole)
    assert (shape.kv_heads, shape.rope_base, shape.norm_eps) == (3, 10000.0, 1e-6)
    assert (shape.seq_len, shape.tied) == (2048, False)


def test_a_stored_buffer_of_the_rotary_embedding_is_passed_over(whole: Path) -> None:
    path = whole / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, path)
    load_hugging_face(whole)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"model_type": "mistral"}, "type 'mistral'"),
        ({"model_type": None}, "type None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary.*'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled rotary.*'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled.*'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "a part of the head",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"head_dim": 32}, "heads of size 32"),
        ({"hidden_size": 49}, "width = 49"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"num_hidden_layers": 3}, "'model.layers.2.*are missing"),
        ({"num_hidden_layers": 1}, "holds 'model.layers.1"),
        ({"num_hidden_layers": 10**12}, "num_layers = 1000000000000"),
        ({"num_hidden_layers": 9999}, "weights for 9999 layers"),
        ({"vocab_size": 10**9}, r"is \[300, 48\], where config.json says"),
        ({"tie_word_embeddings": True}, "its head is not its embedding"),
        ({"rms_norm_eps": 2.0}, "norm_eps = 2.0"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(
    whole: Path, entries: dict[str, Any], says: str
) -> None:
    change(whole / "config.json", **entries)
    with pytest.raises(ModelError, match=says):
        load_hugging_face(whole)


def with_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)


def with_double(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].double()


def with_a_hole(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][7] = float("nan")


def without_the_head(weights: dict[str, torch.Tensor]) -> None:
    del weights["lm_head.weight"]


def turned(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].t().contiguous()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (with_bias, "q_proj.bias', which our Llama does not have"),
        (with_double, "of type F64"),
        (with_a_hole, "not finite"),
        (without_the_head, "no weights 'lm_head.weight'"),
        (turned, r"up_proj.weight' is \[48, 80\], where config.json says \[80, 48\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(whole: Path, spoil: Any, says: str) -> None:
    path = whole / "model.safetensors"
    weights = load_file(path)
    spoil(weights)
    save_file(weights, path)
    with pytest.raises(ModelError, match=says):
        load_hugging_face(whole)


def test_a_missing_file_of_several_is_named(parts: Path) -> None:
    gone = sorted(parts.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name} is missing"):
        load_hugging_face(parts)


def test_a_file_cut_short_is_refused(whole: Path) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        load_hugging_face(whole)


def test_one_name_in_two_files_is_refused(parts: Path) -> None:
    one, other = sorted(parts.glob("model-*.safetensors"))[:2]
    save_file(load_file(one), other)
    with pytest.raises(ModelError, match=f"{other.name}: holds '.*', as {one.name} does"):
        load_hugging_face(parts)


@pytest.mark.parametrize("place", ["../outside.safetensors", "sub/x.safetensors", "/{}", "x.bin"])
def test_an_index_cannot_point_outside_its_folder(parts: Path, place: str) -> None:
    path = parts / INDEX
    outside = parts.parent / "outside.safetensors"
    first = sorted(parts.glob("model-*.safetensors"))[0]
    outside.write_bytes(first.read_bytes())
    name = place.format(outside.relative_to("/"))
    names = json.loads(path.read_text())["weight_map"]
    moved = {key: name if value == first.name else value for key, value in names.items()}
    change(path, weight_map=moved)
    with pytest.raises(ModelError, match="not a safetensors file of its folder"):
        load_hugging_face(parts)


@pytest.mark.parametrize("names", [{}, [1], None, {"model.norm.weight": 3}])
def test_an_index_that_is_none_is_refused(parts: Path, names: Any) -> None:
    change(parts / INDEX, weight_map=names)
    with pytest.raises(ModelError, match=INDEX):
        load_hugging_face(parts)


def test_a_folder_of_links_is_read_as_the_hubs_cache_is_one(whole: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in whole.iterdir():
        os.symlink(path, snapshot / path.name)
    shape, _ = load_hugging_face(snapshot)
    assert shape == SHAPES["plain"]


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_and_not_unpickled(
    whole: Path, tmp_path: Path, name: str
) -> None:
    (whole / "model.safetensors").unlink()
    torch.save({"weights": Bomb(tmp_path / "ran")}, whole / name)
    with pytest.raises(ModelError, match=f"only pickled weights \\({name}\\)") as refused:
        load_hugging_face(whole)
    assert "safe_serialization=True" in refused.value.cure
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_checkpoint_is_refused(whole: Path, missing: str) -> None:
    (whole / missing).unlink()
    with pytest.raises(ModelError, match=f"no {missing}|no weights"):
        load_hugging_face(whole)


def test_an_export_has_the_loss_of_its_model(study: Study, whole: Path) -> None:
    ours = evaluate_model(study, study.models_path / "plain")
    theirs = evaluate_hugging_face(study, whole)
    assert theirs == ours
    assert theirs["seq_len"] == 32
    assert theirs["targets"]["web"]["bits_per_byte"] > 0
    shorter = evaluate_hugging_face(study, whole, seq_len=8)
    assert shorter["targets"]["web"]["tokens"] == ours["targets"]["web"]["tokens"]
    assert shorter["targets"]["web"]["loss_nats"] != ours["targets"]["web"]["loss_nats"]


def test_the_loss_of_a_checkpoint_is_that_of_the_stack(study: Study, whole: Path) -> None:
    import functools

    from regmix.data.validation import read_windows
    from regmix.swarm.engine import mean_losses

    shape, parameters = load_hugging_face(whole)
    evaluate = functools.partial(StackedLlama(shape).evaluate, parameters)
    found = evaluate_hugging_face(study, whole)["targets"]
    for target in study.config.targets:
        windows = read_windows(study.open_shards(), target, seq_len=32)
        (expected,) = mean_losses(evaluate, windows)
        assert found[target]["loss_nats"] == pytest.approx(expected, rel=1e-6)


def test_windows_longer_than_it_was_trained_for_are_refused(study: Study, whole: Path) -> None:
    with pytest.raises(ModelError, match="windows of 33 tokens"):
        evaluate_hugging_face(study, whole, seq_len=33)


def test_a_checkpoint_of_another_tokenizer_is_refused(study: Study, whole: Path) -> None:
    other = train_bpe(TEXTS["code"], 300)
    (whole / "tokenizer.json").write_text(other.text, encoding="utf-8")
    with pytest.raises(ModelError, match="tokens differ") as refused:
        evaluate_hugging_face(study, whole)
    assert "regmix-fast pack CORPUS --tokenizer" in refused.value.cure


def test_a_tokenizer_written_anew_with_more_tokens_is_the_same(study: Study, whole: Path) -> None:
    import tokenizers

    path = whole / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|pad|>"])
    path.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    evaluate_hugging_face(study, whole)


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_checkpoint_without_a_tokenizer_is_refused(
    study: Study, whole: Path, content: str | None
) -> None:
    path = whole / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        evaluate_hugging_face(study, whole)
