"""`regmix-fast train`: the large model on the chosen mixture."""

from __future__ import annotations

import os

import click


@click.command()
@click.argument("study", required=False)
@click.option("--model", default="cpu-128", show_default=True, help="Preset, or a TOML file.")
@click.option(
    "--mixture",
    "mixtures",
    multiple=True,
    default=("optimum",),
    show_default=True,
    help="optimum, natural, uniform or a YAML file; may be given several times.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Models of each mixture, every one with seeds of its own.",
)
@click.option("--tokens", default="10M", show_default=True, help="Training tokens of a model.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens of a sequence.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Sequences of a step.",
)
@click.option("--learning-rate", type=float, default=1e-3, show_default=True)
@click.option("--warmup-steps", type=click.IntRange(min=0), default=50, show_default=True)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine", "wsd"]),
    default="cosine",
    show_default=True,
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one a core.")
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs to use; default: the CPU.")
@click.option("--dry-run", is_flag=True, help="Show the data and the cost, and stop.")
def command(
    study: str | None,
    model: str,
    mixtures: tuple[str, ...],
    seeds: int,
    tokens: str,
    seq_len: int | None,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    schedule: str,
    workers: int | None,
    gpus: int | None,
    dry_run: bool,
) -> None:
    """Train the large model of STUDY on a mixture; run it again to resume.

    \b
    Example:  regmix-fast train study --model cpu-128 --mixture optimum --mixture natural --seeds 3
    """
    from regmix.cli.proxies import refuse_gpus
    from regmix.cli.words import parse_count, training_from
    from regmix.display import Progress
    from regmix.large.train import TrainRequest, plan_domains, resolve_mixture, run_training
    from regmix.study import Study, find_study
    from regmix.swarm.cost import Cost
    from regmix.swarm.executors import Event
    from regmix.swarm.sweep import Tally

    if gpus is not None:
        refuse_gpus(gpus)
    opened = Study.open(find_study(study))
    shards = opened.open_shards()
    training = training_from(
        model=model,
        vocab_size=opened.config.proxy.shape.vocab_size,
        seq_len=seq_len,
        batch_size=batch_size,
        tokens=parse_count(tokens),
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule=schedule,
    )
    resolved = dict(resolve_mixture(opened, name) for name in mixtures)
    num_models = len(resolved) * seeds
    num_workers = min(workers or os.cpu_count() or 1, num_models)
    request = TrainRequest(
        mixtures=resolved,
        replicates=seeds,
        training=training,
        num_workers=num_workers,
        threads=max(1, (os.cpu_count() or 1) // num_workers),
    )
    for name, mixture in resolved.items():
        uses = plan_domains(shards, mixture, training)
        shown = ", ".join(f"{d} {use.epochs:.2f}" for d, use in sorted(uses.items()))
        click.echo(f"{name}: epochs by domain: {shown}", err=True)
    progress: Progress | None = None

    def on_start(cost: Cost, tally: Tally) -> None:
        nonlocal progress
        parameters = training.shape.num_parameters
        click.echo(f"Cost: {cost}; {parameters / 1e6:.2f}M parameters a model", err=True)
        if dry_run:
            raise click.exceptions.Exit(0)
        progress = Progress("train", total=tally.total_tokens, unit="tokens")
        progress.__enter__()

    def on_event(event: Event, tally: Tally) -> None:
        assert progress is not None
        progress.update(
            tally.tokens,
            models=f"{tally.models_done}/{tally.num_models}",
            speed=f"{tally.tokens_per_second / 1000:,.0f}k tokens/s",
            loss=f"{tally.loss_nats:.3f} nats",
        )

    try:
        names = run_training(opened, request, on_start=on_start, on_event=on_event)
    finally:
        if progress is not None:
            progress.__exit__(None, None, None)
    for name in names:
        click.echo(f"{opened.models_path / name}")
    click.echo(f"Next: regmix-fast evaluate {study or ''}".rstrip())
