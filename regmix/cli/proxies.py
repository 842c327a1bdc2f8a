"""`regmix-fast proxies`: train the proxies of a study."""

from __future__ import annotations

import json

import click

from regmix.cli.training import TrainingDisplay, refuse_gpus, running_options


@click.command()
@click.argument("study", required=False)
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
@running_options
def command(
    study: str | None,
    threads: int,
    stack_size: int | None,
    workers: int | None,
    gpus: int | None,
    checkpoint_seconds: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the proxies of STUDY; run it again to resume, or after adding mixtures.

    \b
    Example:  regmix-fast proxies study --workers 2
    """
    from regmix.display import count
    from regmix.errors import RegmixError
    from regmix.study import Study, find_study
    from regmix.swarm.sweep import SweepOptions, run_sweep

    refuse_gpus(gpus)
    opened = Study.open(find_study(study))
    options = SweepOptions(
        num_workers=workers,
        threads=threads,
        stack_size=stack_size,
        checkpoint_seconds=checkpoint_seconds,
    )
    remark = f"{options.workers} workers"
    if opened.config.target_tokens is not None:
        remark += f", pools as of a run of {count(opened.config.target_tokens)} tokens"
    with TrainingDisplay("proxies", dry_run=dry_run, as_json=as_json, remark=remark) as display:
        result = run_sweep(opened, options, on_start=display.on_start, on_event=display.on_event)
    if as_json:
        click.echo(json.dumps(vars(result)))
    else:
        click.echo(f"{result.num_done} proxies have their losses: {opened.losses_path}")
        for name, why in result.failures:
            click.echo(f"  {name}: {why}", err=True)
    if result.num_pending:
        raise RegmixError(
            f"{result.num_pending} proxies could not be trained",
            cure="Cure the reasons above, then run the same command again",
        )
    if result.num_failed:
        raise RegmixError(
            f"{result.num_failed} proxies failed",
            cure="`fit --partial` goes on without them; the reasons are above and in logs/",
        )
    if not as_json:
        click.echo(f"Next: regmix-fast fit {study or ''}".rstrip())
