"""`regmix-fast proxies`: train the proxies of a study."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from regmix.cli.proposing import proposal_options
from regmix.cli.training import TrainingDisplay, running_options

if TYPE_CHECKING:
    from regmix.study import Study
    from regmix.swarm.sweep import SweepOptions, SweepResult

_OF_ROUNDS = ("per_round", "rule", "seed", "target_tokens", "max_epochs")


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
    """
    from regmix.cli.proposing import request_of, show_round
    from regmix.decision.active.rounds import read_rounds, train_in_rounds
    from regmix.errors import ConfigError, RegmixError
    from regmix.study import Study, find_study
    from regmix.swarm.gpus import find_gpus
    from regmix.swarm.sweep import SweepOptions

    if micro_batch is not None and gpus is None:
        raise ConfigError(
            "--micro-batch has no use without --gpus: the CPU takes the whole batch",
            cure="Leave it out, or say how many GPUs to use: --gpus 1",
        )
    if rounds is None:
        _refuse_without_rounds()
    request = request_of(
        per_round, rule, seed=seed, target_tokens=target_tokens, max_epochs=max_epochs
    )
    opened = Study.open(find_study(study))
    options = SweepOptions(
        num_workers=workers,
        threads=threads,
        stack_size=stack_size,
        micro_batch=micro_batch,
        gpus=find_gpus(gpus) if gpus else (),
        checkpoint_seconds=checkpoint_seconds,
    )
    to_propose = max(0, (rounds or 0) - len(read_rounds(opened)))
    if to_propose:
        _announce(opened, to_propose, per_round)

    def train() -> SweepResult:
        return _train(opened, options, dry_run=dry_run, as_json=as_json)

    if dry_run:
        result = train()
    else:
        result = train_in_rounds(
            opened,
            rounds or 0,
            request,
            train=train,
            on_round=lambda made: show_round(made, as_json=as_json),
        )
    if as_json:
        made = [dataclasses.asdict(entry) for entry in read_rounds(opened)]
        click.echo(json.dumps({**vars(result), "rounds": made}))
    else:
        paths = [opened.losses_path, opened.trajectories_path]
        tables = ", ".join(str(path) for path in paths if path.is_file())
        click.echo(f"{result.num_done} proxies have their losses: {tables}")
        for line in result.remarks:
            click.echo(f"  {line}", err=True)
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
    if not options.gpus:
        return f"{options.workers} workers"
    names = sorted({gpu.name for gpu in options.gpus})
    return f"{len(options.gpus)} x {', '.join(names)}"


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


def _refuse_without_rounds() -> None:
    """Raise for an option of rounds that was given without them."""
    from click.core import ParameterSource

    from regmix.errors import ConfigError

    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is not ParameterSource.DEFAULT
        if name in _OF_ROUNDS and given:
            raise ConfigError(
                f"{option.opts[0]} has no use without --rounds",
                cure=f"Say how many rounds: --rounds 5, or leave {option.opts[0]} out",
            )
