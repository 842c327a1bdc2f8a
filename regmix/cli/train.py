"""`regmix-fast train`: the large model on the chosen mixture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from regmix.cli.large import (
    batch_size_of,
    is_distributed,
    large_options,
    learning_rate_of,
    plan_for,
    show_plan,
    start_shape,
    train_shared,
)
from regmix.cli.training import TrainingDisplay, running_options, training_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from regmix.data.shards import ShardSet
    from regmix.large.train import Recipe
    from regmix.study import Study, Training


@click.command()
@click.argument("study", required=False)
@click.option(
    "--mixture",
    "mixtures",
    multiple=True,
    default=("optimum",),
    show_default=True,
    help="optimum, natural, uniform or a YAML file, also of a schedule; repeatable.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Models of each mixture, every one with seeds of its own.",
)
@training_options(model="cpu-128", tokens="10M", learning_rate=3e-3)
@running_options
@large_options
def command(
    study: str | None,
    mixtures: tuple[str, ...],
    seeds: int,
    model: str,
    tokens: str,
    seq_len: int | None,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    schedule: str,
    workers: int | None,
    gpus: int | None,
    checkpoint_seconds: float,
    dry_run: bool,
    as_json: bool,
    global_batch_tokens: str | None,
    start: str | None,
    **shared: Any,
) -> None:
    """Train the large model of STUDY on a mixture; run it again to resume.

    Without --gpus and --processes, models are trained side by side on the CPU's cores; with them,
    one after the other, each by all GPUs or processes, with a checkpoint every ten minutes.

    \b
    Example:  regmix-fast train study --model cpu-128 --mixture optimum --mixture natural --seeds 3
    Example:  regmix-fast train study --model 1b --tokens 25B --global-batch-tokens 512k --gpus 8
    """
    import dataclasses

    from regmix.cli.words import parse_count, shape_from, training_from
    from regmix.large.train import TrainRequest, resolve_recipes, run_training
    from regmix.provenance import available_cores
    from regmix.study import Study, find_study

    together = is_distributed(gpus, shared["processes"])
    opened = Study.open(find_study(study))
    shards = opened.open_shards()
    shape = None if start is None else start_shape(start, opened, seq_len)
    vocab_size = opened.config.proxy.shape.vocab_size
    asked = shape or shape_from(model, vocab_size, seq_len)
    seq_len = asked.seq_len
    if together:
        learning_rate = learning_rate_of(learning_rate, asked.num_parameters)
    training = training_from(
        model=model,
        vocab_size=vocab_size,
        seq_len=seq_len,
        batch_size=batch_size_of(global_batch_tokens, batch_size, seq_len),
        tokens=parse_count(tokens),
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule=schedule,
    )
    if shape is not None:
        training = dataclasses.replace(training, shape=shape)
    resolved = resolve_recipes(opened, mixtures)
    _show_mixtures(opened, shards, resolved, training)
    if together:
        options = {
            **shared,
            "gpus": gpus,
            "start": start,
            "checkpoint_seconds": checkpoint_seconds,
        }
        plan = plan_for(training, options, opened.stacks_path)
        show_plan(plan, dry_run=dry_run, as_json=as_json)
        names = train_shared(opened, resolved, seeds, plan, options)
        _show_models(opened, study, names, as_json)
        return
    num_models = len(resolved) * seeds
    num_workers = min(workers or available_cores(), num_models)
    request = TrainRequest(
        mixtures=resolved,
        replicates=seeds,
        training=training,
        num_workers=num_workers,
        threads=max(1, available_cores() // num_workers),
        checkpoint_seconds=checkpoint_seconds,
    )
    remark = f"{training.shape.num_parameters / 1e6:.2f}M parameters a model"
    with TrainingDisplay("train", dry_run=dry_run, as_json=as_json, remark=remark) as display:
        names = run_training(opened, request, on_start=display.on_start, on_event=display.on_event)
    _show_models(opened, study, names, as_json)


def _show_mixtures(
    study: Study, shards: ShardSet, resolved: Mapping[str, Recipe], training: Training
) -> None:
    from itertools import pairwise

    from regmix.data.schedules import Schedule
    from regmix.large.train import budget_remarks, dealt, plan_domains

    for name, recipe in resolved.items():
        uses = plan_domains(shards, dealt(recipe, training), training)
        if isinstance(recipe, Schedule):
            firsts = [first for first, _ in recipe.at_steps(training.num_steps)]
            steps = [f"{a + 1} to {b}" for a, b in pairwise([*firsts, training.num_steps])]
            click.echo(f"{name}: a mixture each for the steps {', '.join(steps)}", err=True)
        shown = ", ".join(f"{d} {use.epochs:.2f}" for d, use in sorted(uses.items()))
        click.echo(f"{name}: epochs by domain: {shown}", err=True)
    for line in budget_remarks(study, list(resolved), training):
        click.echo(line, err=True)


def _show_models(opened: Study, study: str | None, names: list[str], as_json: bool) -> None:
    folders = [str(opened.models_path / name) for name in names]
    if as_json:
        click.echo(json.dumps({"models": folders}))
        return
    click.echo("\n".join(folders))
    click.echo(f"Next: regmix-fast evaluate {study or ''}".rstrip())
