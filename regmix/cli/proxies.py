"""`regmix-fast proxies`: train the proxies of a study."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("study", required=False)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one a core.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of each process, for proxies not yet planned.",
)
@click.option(
    "--stack-size",
    type=click.IntRange(min=1),
    help="Proxies trained together; default: up to 16, the same for every worker.",
)
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs to use; default: the CPU.")
@click.option("--dry-run", is_flag=True, help="Show what it will cost and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    study: str | None,
    workers: int | None,
    threads: int,
    stack_size: int | None,
    gpus: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the proxies of STUDY; run it again to resume, or after adding mixtures.

    \b
    Example:  regmix-fast proxies study --workers 2
    """
    from regmix.display import Progress
    from regmix.errors import RegmixError
    from regmix.study import Study, find_study
    from regmix.swarm.cost import Cost
    from regmix.swarm.executors import Event
    from regmix.swarm.sweep import SweepOptions, Tally, run_sweep

    if gpus is not None:
        refuse_gpus(gpus)
    opened = Study.open(find_study(study))
    options = SweepOptions(num_workers=workers, threads=threads, stack_size=stack_size)
    progress: Progress | None = None

    def on_start(cost: Cost, tally: Tally) -> None:
        nonlocal progress
        click.echo(f"Cost: {cost} ({options.workers} workers)", err=True)
        if dry_run:
            raise click.exceptions.Exit(0)
        progress = Progress("proxies", total=tally.total_tokens, unit="tokens")
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
        result = run_sweep(opened, options, on_start=on_start, on_event=on_event)
    finally:
        if progress is not None:
            progress.__exit__(None, None, None)
    if as_json:
        click.echo(json.dumps(vars(result)))
    else:
        click.echo(f"{result.num_done} proxies have their losses: {opened.losses_path}")
        for name, why in result.failures:
            click.echo(f"  {name}: {why}", err=True)
    if result.num_failed:
        raise RegmixError(
            f"{result.num_failed} proxies failed",
            cure="`fit` leaves them out; see the reasons above and the study's logs/",
        )
    if not as_json:
        click.echo(f"Next: regmix-fast fit {study or ''}".rstrip())


def refuse_gpus(gpus: int) -> None:
    """Raise where the GPUs that were asked for cannot be used, saying how to go on."""
    import torch

    from regmix.errors import StudyError

    found = torch.cuda.device_count()
    if gpus > found:
        raise StudyError(
            f"--gpus {gpus}: this machine has {found} GPUs",
            cure="Leave --gpus out to train on the CPU" if not found else f"Use --gpus {found}",
        )
    raise StudyError(
        f"--gpus {gpus}: this version trains on the CPU only",
        cure="Leave --gpus out; the GPU engine comes with a later version",
    )
