"""`regmix-fast export`: the mixture or a model for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.data.mixtures import Mixture
    from regmix.study import Study

FORMATS = ("megatron", "huggingface", "mosaicml", "torchtitan", "olmo", "regmix")


@click.command()
@click.argument("study", required=False)
@click.option("--format", "name", type=click.Choice(FORMATS), help="Trainer to write for.")
@click.option("--model", help="Write this trained model as a Hugging Face checkpoint instead.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="File to write; with --model an empty or new folder.",
)
@click.option(
    "--mixture",
    default="optimum",
    show_default=True,
    help="optimum, natural, uniform or a YAML file.",
)
@click.option(
    "--location",
    default="data/{domain}",
    show_default=True,
    help="Where the trainer finds the data of a domain.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json of the trainer, where it is another one: weights are restated for it.",
)
@click.option("--segment", type=click.IntRange(min=1), help="The segment to write of a schedule.")
@click.option(
    "--max-shard-size",
    help="Largest file of a model's weights, as 5GB.  [default: 5GB]",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def command(
    study: str | None,
    name: str | None,
    model: str | None,
    out: Path,
    mixture: str,
    location: str,
    tokenizer: Path | None,
    segment: int | None,
    max_shard_size: str | None,
    as_json: bool,
) -> None:
    """Write the mixture of STUDY for another trainer, or one of its models for transformers.

    \b
    Examples:
      regmix-fast export study --format megatron --location '/data/{domain}_text_document' \\
          --out blend.txt
      regmix-fast export study --model optimum-0 --out my-model
    """
    from regmix.errors import ConfigError
    from regmix.study import Study, find_study

    if (name is None) == (model is None):
        raise ConfigError(
            "export needs either --format or --model",
            cure=f"Give --format with one of {', '.join(FORMATS)}, or --model with a model's name",
        )
    opened = Study.open(find_study(study))
    if model is not None:
        answer = _export_model(opened, model, out, max_shard_size or "5GB")
    elif max_shard_size is not None:
        raise ConfigError(
            "--max-shard-size is about a model's weights", cure="Give it with --model"
        )
    else:
        answer = _export_mixture(opened, str(name), out, mixture, location, tokenizer, segment)
    if as_json:
        click.echo(json.dumps(answer))
        return
    for path in answer["files"]:
        click.echo(path)
    for line in answer["remarks"]:
        click.echo(line)
    click.echo(f"Next: {answer['next']}")


def _export_model(study: Study, model: str, out: Path, max_shard_size: str) -> dict[str, Any]:
    from regmix.cli.words import parse_count
    from regmix.large.export import export_model

    # 5GB is 5G bytes.
    largest = parse_count(max_shard_size.strip().upper().removesuffix("B"))
    files = export_model(study, model, out, max_shard_bytes=largest)
    return {
        "files": [str(path) for path in files],
        "remarks": [],
        "next": f"transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})",
    }


def _export_mixture(
    study: Study,
    name: str,
    out: Path,
    mixture: str,
    location: str,
    tokenizer: Path | None,
    segment: int | None,
) -> dict[str, Any]:
    from regmix.data.formats import FORMATS as ABOUT
    from regmix.data.formats import Plan, measure_bytes_per_token, restate, write_format
    from regmix.large.train import resolve_mixture

    remarks = []
    if segment is None:
        label, weights = resolve_mixture(study, mixture)
        what, epochs = f"{label} mixture", _known_epochs(study, mixture, weights)
    else:
        weights, what, epochs = _segment_of(study, mixture, segment)
        remarks.append(f"{what}: change over to the next segment's mixture where it ends")
    origin = f"The {what} of the study {study.path.name}, corpus {study.config.shards_checksum}"
    if tokenizer is not None:
        ours, theirs = measure_bytes_per_token(study.open_shards(), tokenizer)
        before = weights
        weights = restate(before, ours, theirs)
        origin += f", restated for {tokenizer.name}"
        for domain in weights:
            remarks.append(
                f"{domain}: {ours[domain]:.3f} bytes a token, {theirs[domain]:.3f} with the other "
                f"tokenizer; weight {before[domain]:.4f} -> {weights[domain]:.4f}"
            )
    valid = study.config.objective
    plan = Plan(mixture=weights, location=location, epochs=epochs, origin=origin, valid=valid)
    files = write_format(out, plan, name)
    remarks += [f"{domain}: weight 0, left out" for domain in plan.left_out if name != "regmix"]
    return {
        "files": [str(path) for path in files],
        "weights": dict(weights),
        "epochs": epochs,
        "remarks": remarks,
        "next": ABOUT[name].about,
    }


def _segment_of(study: Study, name: str, number: int) -> tuple[Mixture, str, dict[str, float]]:
    """Return a segment's mixture, what it is in words, and its epochs where the run is known."""
    from regmix.data.schedules import Schedule
    from regmix.errors import MixtureError
    from regmix.large.train import resolve_recipe

    label, recipe = resolve_recipe(study, name)
    segments = recipe.segments if isinstance(recipe, Schedule) else ()
    if number > len(segments):
        raise MixtureError(
            f"'{label}' has no segment {number}",
            cure=f"Give one from 1 to {len(segments)}" if segments else "Leave --segment out",
        )
    chosen = segments[number - 1]
    begin = sum(segment.share for segment in segments[: number - 1])
    words = f"{label} schedule's segment {number} of {len(segments)}"
    words += f" ({begin:.1%} to {begin + chosen.share:.1%} of the run)"
    whole = _known_epochs(study, "", chosen.mixture)
    return chosen.mixture, words, {d: chosen.share * epochs for d, epochs in whole.items()}


def _known_epochs(study: Study, mixture: str, weights: Mixture) -> dict[str, float]:
    """Return epochs by domain for the budget that the optimum was found for; none before it."""
    from regmix.config import finite
    from regmix.errors import StudyError
    from regmix.files import read_table

    path = study.path / "optimum.json"
    if not path.is_file():
        return {}
    table = read_table(path)
    known = table.get("epochs") or {}
    budget, available = table.get("budget_tokens") or 0, study.config.available_tokens
    if not isinstance(known, dict) or not all(map(finite, (*known.values(), budget))):
        raise StudyError(
            f"{path}: its epochs or its budget are no numbers",
            cure="Find the optimum again: regmix-fast optimize",
        )
    if mixture == "optimum" and known:
        return {domain: float(epochs) for domain, epochs in known.items()}
    if not budget:
        return {}
    return {d: w * budget / available[d] for d, w in weights.items() if available.get(d)}
