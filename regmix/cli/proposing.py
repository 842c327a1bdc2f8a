"""What `mixtures --propose` and `proxies --rounds` share: options, and the telling of a round.

Enters: click's parameters. Leaves: options, a `ProposalRequest`, and lines about a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from regmix.decision.active.proposals import ProposalRequest
    from regmix.decision.active.rounds import Round
    from regmix.study import Study

Command = TypeVar("Command", bound=Callable[..., Any])


def proposal_options(command: Command) -> Command:
    """Add the options that say how mixtures are proposed."""
    options = [
        click.option(
            "--rule",
            help="How mixtures are proposed: precision+lcb, precision, lcb, promise, "
            "promise+distance, disagreement, thompson, distance or random.  "
            "[default: precision+lcb]",
        ),
        click.option(
            "--max-epochs",
            type=click.FloatRange(min=0, min_open=True),
            default=4,
            show_default=True,
            help="Propose no more epochs of a domain, in a run of --target-tokens.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def request_of(
    num: int, rule: str | None, *, seed: int, target_tokens: str | None, max_epochs: float
) -> ProposalRequest:
    """Return what is asked for; `ConfigError` for an unknown rule."""
    from regmix.cli.words import parse_count
    from regmix.decision.active.acquisition import DEFAULT_RULE
    from regmix.decision.active.proposals import ProposalRequest

    return ProposalRequest(
        num=num,
        rule=rule or DEFAULT_RULE,
        seed=seed,
        target_tokens=parse_count(target_tokens) if target_tokens else None,
        max_epochs=max_epochs,
    )


def propose_round(study: Study, request: ProposalRequest, *, as_json: bool) -> Round:
    """Add a round to the study and say what it is."""
    from regmix.decision.active.rounds import add_round

    made = add_round(study, request)
    show_round(made, as_json=as_json)
    return made


def show_round(made: Round, *, as_json: bool) -> None:
    """Say what a round is; beside JSON on stderr."""
    from regmix.decision.active.rounds import told

    for line in told(made):
        click.echo(line, err=as_json)
