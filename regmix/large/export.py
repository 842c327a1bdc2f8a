"""A trained model as a Hugging Face checkpoint, which `transformers` loads as a Llama.

Enters: a model of a study and an empty folder. Leaves: weights under `transformers`' names, in
files of a limited size, configuration, tokenizer and a model card that names the mixture and the
data. Imports no `transformers`: the formats are written out here, and the tests load them back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.errors import ModelError, StorageError, nearest, printable
from regmix.files import (
    atomic_open,
    read_json,
    storage_errors,
    sync_directory,
    write_json,
    write_text,
)
from regmix.large.importing import INDEX
from regmix.large.vocabulary import check_own_tokens
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

    from regmix.data.shards import ShardSet
    from regmix.study import Study

MAX_SHARD_BYTES = 5_000_000_000


def model_folder(study: Study, name: str) -> Path:
    """Return a trained model's folder; `ModelError` names the nearest where there is none."""
    known = [path.parent.name for path in study.models_path.glob("*/summary.json")]
    if name not in known:
        hint = nearest(name, known) if known else "none is trained"
        raise ModelError(
            f"{study.path} has no trained model '{name}' ({hint})",
            cure="Name a folder of its models/, or train one with: regmix-fast train",
        )
    return study.models_path / name


def export_model(
    study: Study, name: str, out: Path | str, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[Path, ...]:
    """Write a model of the study as a Hugging Face checkpoint; return the files.

    max_shard_bytes: the weights go into several files, none larger but for a single tensor that
    is. The folder appears whole or not at all. Raises `ModelError` for an unknown or damaged model
    or one of another tokenizer than the study's corpus, `StorageError` for a folder that holds
    files.
    """
    from regmix.large.evaluate import load_model

    out = Path(out)
    folder = model_folder(study, name)
    with storage_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StorageError(f"{out} exists and is not empty", cure="Name another folder")
    shape, parameters, config = load_model(folder)
    shards = study.open_shards()
    check_own_tokens(folder, config, shards)
    weights = hugging_face_weights(parameters, shape)
    separator = shards.manifest.tokenizer.separator
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with storage_errors(out):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write_weights(temporary, weights, max_shard_bytes)
            shutil.copyfile(shards.tokenizer_path, temporary / "tokenizer.json")
            end = shards.separator_id
            write_json(temporary / "config.json", llama_config(shape, end))
            write_json(temporary / "generation_config.json", generation_config(end))
            write_json(temporary / "tokenizer_config.json", tokenizer_config(shape, separator))
            write_text(temporary / "README.md", model_card(study, shards, folder, shape))
            os.replace(temporary, out)
            sync_directory(out.absolute().parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return tuple(sorted(out.iterdir()))


def hugging_face_weights(parameters: Mapping[str, Any], shape: ModelShape) -> dict[str, Tensor]:
    """Return a model's weights by `transformers`' names, as views; a tied head is there once."""
    from regmix.model.parameters import transformers_state

    state = transformers_state(dict(parameters), 0, shape)
    if shape.tied:
        del state["lm_head.weight"]
    return state


def write_weights(folder: Path, weights: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write weights as one safetensors file, or as several with their index, in order."""
    from safetensors.torch import save

    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        # Slices of one parameter share memory, which safetensors refuses.
        part = {name: weights[name].clone() for name in names}
        with atomic_open(folder / file) as stream:
            stream.write(save(part, metadata={"format": "pt"}))
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {
            "total_size": sum(tensor.nbytes for tensor in weights.values()),
            "total_parameters": sum(tensor.numel() for tensor in weights.values()),
        }
        write_json(folder / INDEX, {"metadata": total, "weight_map": where})


def llama_config(shape: ModelShape, end_id: int) -> dict[str, Any]:
    """Return `config.json` of a `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.seq_len,
        "rms_norm_eps": shape.norm_eps,
        # The first for transformers up to 4, the second from 5 on.
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def generation_config(end_id: int) -> dict[str, Any]:
    """Return `generation_config.json`: greedy, until the separator.

    No `max_length`: with it, `generate(max_new_tokens=...)` warns that both are set.
    """
    return {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "do_sample": False,
    }


def tokenizer_config(shape: ModelShape, separator: str) -> dict[str, Any]:
    """Return `tokenizer_config.json`: the separator begins and ends a text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.seq_len,
        "bos_token": separator,
        "eos_token": separator,
        "pad_token": separator,
        "clean_up_tokenization_spaces": False,
    }


def _cell(text: object) -> str:
    """Return text that stays inside one cell of a Markdown table."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return printable(" ".join(escaped.split()))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def model_card(study: Study, shards: ShardSet, folder: Path, shape: ModelShape) -> str:
    """Return `README.md`: what the model is, its mixture, its data and its losses.

    Raises `ModelError` where the model's summary or evaluation is not one.
    """
    try:
        return _card(study, shards, folder, shape)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"{folder}: its summary.json or evaluation.json is damaged ({error!r})",
            cure="Restore the files, or train the model again",
        ) from error


def _card(study: Study, shards: ShardSet, folder: Path, shape: ModelShape) -> str:
    from regmix.display import count

    summary = read_json(folder / "summary.json")
    member = summary["member"]
    epochs = summary.get("epochs", {})
    rows = []
    for domain, weight in sorted(member["weights"].items(), key=lambda item: (-item[1], item[0])):
        stats = shards.stats("train", domain)
        rows.append(
            (
                domain,
                f"{100 * weight:.4g} %",
                f"{weight * summary['tokens']:,.0f}",
                f"{epochs[domain]:.3g}" if domain in epochs else "0",
                f"{stats.documents:,}",
            )
        )
    header = ("domain", "weight", "tokens read", "epochs", "documents that exist")
    losses = ""
    if (folder / "evaluation.json").is_file():
        losses = _losses_section(read_json(folder / "evaluation.json"))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "regmix", "data-mixture"],
    }
    versions = summary.get("environment", {}).get("versions", {})
    made_with = ", ".join(f"{package} {version}" for package, version in versions.items())
    # JSON is YAML, and cannot be broken out of.
    return f"""---
{json.dumps(front)}
---

# {_cell(summary["name"])}

A Llama of {count(shape.num_parameters)} parameters ({shape.num_layers} layers, width
{shape.width}, {shape.num_heads} heads, vocabulary {shape.vocab_size}, sequences of
{shape.seq_len} tokens), trained from scratch by regmix-fast on {summary["tokens"]:,} tokens of
the mixture "{_cell(summary["mixture"])}". It is a research model: it has seen nothing but this
data and was not tuned to follow instructions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

## Mixture

A weight is the share of training tokens drawn from a domain.

{_table(header, rows)}
## Data and seeds

{_table(("setting", "value"), _settings(study, shards, member, made_with))}{losses}"""


def _settings(
    study: Study, shards: ShardSet, member: Mapping[str, Any], made_with: str
) -> list[tuple[str, str]]:
    return [
        ("study", study.path.name),
        ("corpus checksum", shards.checksum),
        ("tokenizer checksum", shards.tokenizer_hash),
        ("seed of the data's order", str(member.get("data_seed"))),
        ("seed of the initial weights", str(member.get("init_seed"))),
        ("made with", made_with or "unknown"),
    ]


def _losses_section(evaluation: Mapping[str, Any]) -> str:
    rows = [
        (
            target,
            f"{row['loss_nats']:.4f}",
            f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else "unknown",
        )
        for target, row in evaluation["targets"].items()
    ]
    rows.append(("objective", f"{evaluation['objective']['loss_nats']:.4f}", ""))
    table = _table(("held-out text", "nats per token", "bits per byte"), rows)
    return f"\n## Loss on held-out text\n\n{table}"
