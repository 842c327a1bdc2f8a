"""`regmix-fast proxies`: train the proxies of a study."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regmix.cli.engines import engine_options
from regmix.cli.proposing import proposal_options
from regmix.cli.proxy_selection import selection_options
from regmix.cli.training import TrainingDisplay, running_options

if TYPE_CHECKING:
    from regmix.decision.active.proposals import ProposalRequest
    from regmix.study import Study
    from regmix.swarm.sweep import SweepOptions, SweepResult


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
    help="Proxies trained together; default: up to 16, the same for every worker; on GPUs as "
    "many as fill one.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    help="Sequences of a proxy that a GPU takes at a time; default: what fills it.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="Then propose and train more, until the study has had this many rounds.",
)
@click.option(
    "--per-round", type=click.IntRange(min=1), default=8, show_default=True, help="Proxies a round."
)
@proposal_options
@click.option(
    "--target-tokens",
    metavar="TOKENS",
    help="Tokens of the large run, which limit its epochs.  [default: the study's, if any]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of proposals."
)
@selection_options
@engine_options
@running_options
def command(
    study: str | None,
    threads: int,
    stack_size: int | None,
    micro_batch: int | None,
    rounds: int | None,
    per_round: int,
    rule: str | None,
    max_epochs: float,
    target_tokens: str | None,
    seed: int,
    only: str | None,
    retry_failed: bool,
    cancel: bool,
    engine: str,
    address: str | None,
    shard_cache: Path | None,
    scratch: Path | None,
    workers: int | None,
    gpus: int | None,
    checkpoint_seconds: float,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train the proxies of STUDY; run it again to resume, or after adding mixtures.

    \b
    Examples:
      regmix-fast proxies study --workers 2
      regmix-fast proxies study --gpus 8
      regmix-fast proxies study --rounds 5 --per-round 8
      regmix-fast proxies study --retry-failed
      regmix-fast proxies study --cancel
    """
    from regmix.cli import proxy_selection
    from regmix.cli.engines import open_engine
    from regmix.cli.proposing import request_of
    from regmix.study import Study, find_study
    from regmix.swarm.sweep import SweepOptions

    proxy_selection.refuse_contradictions()
    request = request_of(
        per_round, rule, seed=seed, target_tokens=target_tokens, max_epochs=max_epochs
    )
    chosen = proxy_selection.parse_indices(only)
    opened = Study.open(find_study(study))
    if cancel:
        proxy_selection.cancel(opened, chosen, name=study, as_json=as_json)
        return
    machines = open_engine(
        engine,
        address,
        shard_cache,
        scratch,
        workers=workers,
        gpus=gpus,
        threads=threads,
        logs=opened.logs_path,
    )
    with machines as parts:
        options = SweepOptions(
            threads=threads,
            stack_size=stack_size,
            micro_batch=micro_batch,
            checkpoint_seconds=checkpoint_seconds,
            only=chosen,
            retry_failed=retry_failed,
            **parts,
        )
        result = _run(opened, options, rounds or 0, request, dry_run=dry_run, as_json=as_json)
    _tell(opened, result, study, as_json=as_json)


def _run(
    study: Study,
    options: SweepOptions,
    rounds: int,
    request: ProposalRequest,
    *,
    dry_run: bool,
    as_json: bool,
) -> SweepResult:
    """Train what is asked for, then the rounds that are missing."""
    from regmix.cli.proposing import show_round
    from regmix.decision.active.rounds import read_rounds, train_in_rounds

    to_propose = max(0, rounds - len(read_rounds(study)))
    if to_propose:
        _announce(study, to_propose, request.num)

    def train() -> SweepResult:
        return _train(study, options, dry_run=dry_run, as_json=as_json)

    if dry_run:
        return train()
    return train_in_rounds(
        study,
        rounds,
        request,
        train=train,
        on_round=lambda made: show_round(made, as_json=as_json),
    )


def _tell(study: Study, result: SweepResult, name: str | None, *, as_json: bool) -> None:
    """Say what the study now has; raises `RegmixError` where that is not all that was asked."""
    from regmix.decision.active.rounds import read_rounds
    from regmix.errors import RegmixError

    if as_json:
        made = [dataclasses.asdict(entry) for entry in read_rounds(study)]
        click.echo(json.dumps({**vars(result), "rounds": made}))
    else:
        paths = [study.losses_path, study.trajectories_path]
        tables = ", ".join(str(path) for path in paths if path.is_file())
        click.echo(f"{result.num_done} proxies have their losses: {tables}")
        for line in result.remarks:
            click.echo(f"  {line}", err=True)
        for what, why in result.failures:
            click.echo(f"  {what}: {why}", err=True)
    if result.num_pending:
        raise RegmixError(
            f"{result.num_pending} proxies could not be trained",
            cure="Cure the reasons above, then run the same command again",
        )
    if result.num_failed:
        raise RegmixError(
            f"{result.num_failed} proxies failed",
            cure="`proxies --retry-failed` trains them again, `fit --partial` goes on without "
            "them; the reasons are above and in logs/",
        )
    if as_json:
        return
    command = f"proxies {name or ''}" if result.num_left else f"fit {name or ''}"
    if result.num_left:
        click.echo(f"{result.num_left} proxies wait that were not asked for")
    elif result.num_cancelled:
        click.echo(f"{result.num_cancelled} proxies are taken out: fit goes on with --partial")
        command = f"{command.rstrip()} --partial"
    click.echo(f"Next: regmix-fast {command}".rstrip())


def _train(study: Study, options: SweepOptions, *, dry_run: bool, as_json: bool) -> SweepResult:
    """Train what is pending, with its cost and its progress on the screen."""
    from regmix.display import count
    from regmix.swarm.sweep import run_sweep

    remark = _words(options)
    if study.config.target_tokens is not None:
        remark += f", pools as of a run of {count(study.config.target_tokens)} tokens"
    with TrainingDisplay("proxies", dry_run=dry_run, as_json=as_json, remark=remark) as display:
        return run_sweep(study, options, on_start=display.on_start, on_event=display.on_event)


def _words(options: SweepOptions) -> str:
    """Return where proxies are trained, in words."""
    where = " of the Ray cluster" if options.is_remote else ""
    if not options.gpus:
        return f"{options.workers} workers{where}"
    names = sorted({gpu.name for gpu in options.gpus})
    return f"{len(options.gpus)} x {', '.join(names)}{where}"


def _announce(study: Study, num_rounds: int, per_round: int) -> None:
    """Say what the rounds will cost, beyond what is pending."""
    from regmix.display import count

    tokens = num_rounds * per_round * study.config.proxy.tokens
    words = "1 round" if num_rounds == 1 else f"{num_rounds} rounds"
    click.echo(
        f"Then {words} of {per_round} proxies: {count(tokens)} tokens more, on mixtures proposed "
        "from the proxies before",
        err=True,
    )
