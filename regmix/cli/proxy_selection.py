"""Which proxies `proxies` trains: `--only`, `--retry-failed`, `--cancel`, and what they exclude.

Enters: click's parameters. Leaves: indices, a refusal of options that contradict each other, or a
sweep that was stopped and proxies that were taken out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from regmix.study import Study

Command = TypeVar("Command", bound=Callable[..., Any])

_OF_ROUNDS = ("per_round", "rule", "seed", "target_tokens", "max_epochs")
_OF_CANCEL = ("study", "only", "cancel", "as_json")
# A range in --only is spelled out, so a slip of the finger must not fill the memory.
MOST_INDICES = 10_000_000


def selection_options(command: Command) -> Command:
    """Add the options that say which proxies are trained."""
    options = [
        click.option(
            "--only",
            metavar="INDICES",
            help="Train these proxies only, for example 3,5-8; the others wait.",
        ),
        click.option(
            "--retry-failed",
            is_flag=True,
            help="Train again, from step 0, the proxies whose losses were not finite; with --only "
            "also those that were taken out.",
        ),
        click.option(
            "--cancel",
            is_flag=True,
            help="Stop the sweep that runs, on any machine; with --only take these proxies out.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def parse_indices(text: str | None) -> frozenset[int] | None:
    """Return the indices that `3,5-8` names, None for None; `ConfigError` where it makes none."""
    from regmix.errors import ConfigError

    if text is None:
        return None
    indices: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        words = (first, last) if dash else (first,)
        if not all(word.isascii() and word.isdigit() and len(word) < 16 for word in words):
            raise ConfigError(
                f"--only {text!r}: {part.strip()!r} is no index of a proxy",
                cure="Write indices and ranges, for example --only 3,5-8",
            )
        low, high = int(words[0]), int(words[-1])
        if high < low or high - low >= MOST_INDICES:
            raise ConfigError(
                f"--only {text!r}: {part.strip()!r} is no range of proxies",
                cure="Write the smaller index first, for example --only 5-8",
            )
        indices.update(range(low, high + 1))
    return frozenset(indices)


def refuse_contradictions() -> None:
    """Raise `ConfigError` for options of this command that have no use beside each other."""
    from regmix.errors import ConfigError

    given = _given()
    if "cancel" in given:
        for name, option in given.items():
            if name not in _OF_CANCEL:
                raise ConfigError(
                    f"{option} has no use with --cancel, which trains nothing",
                    cure=f"Leave {option} out; --only names proxies to take out",
                )
    if "micro_batch" in given and "gpus" not in given:
        raise ConfigError(
            "--micro-batch has no use without --gpus: the CPU takes the whole batch",
            cure="Leave it out, or say how many GPUs to use: --gpus 1",
        )
    if "rounds" in given:
        for name in ("only", "retry_failed"):
            if name in given:
                raise ConfigError(
                    f"{given[name]} and --rounds contradict each other: a round is proposed once "
                    "all proxies before it are trained",
                    cure=f"Run once with {given[name]}, then again with --rounds",
                )
        return
    for name in _OF_ROUNDS:
        if name in given:
            raise ConfigError(
                f"{given[name]} has no use without --rounds",
                cure=f"Say how many rounds: --rounds 5, or leave {given[name]} out",
            )


def _given() -> dict[str, str]:
    """Return parameter -> option of what stands on the command line."""
    from click.core import ParameterSource

    context = click.get_current_context()
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    }


def cancel(study: Study, only: Collection[int] | None, *, name: str | None, as_json: bool) -> None:
    """Stop the sweep of a study, or take proxies out of later ones, and say how to go on."""
    from regmix.swarm.stop_request import ask_to_stop

    go_on = f"regmix-fast proxies {name or ''}".rstrip()
    if only is None:
        words = "Asked the sweep to stop; its workers write their checkpoints ..."
        holder = ask_to_stop(study, on_asked=lambda: click.echo(words, err=True))
        if as_json:
            click.echo(json.dumps({"stopped": str(holder)}))
        else:
            click.echo(f"The sweep has stopped ({holder}). It goes on with: {go_on}")
        return
    number = _take_out(study, only, go_on)
    if as_json:
        click.echo(json.dumps({"cancelled": number}))
        return
    indices = ",".join(str(index) for index in sorted(only)[:20])
    click.echo(f"Taken out of all sweeps: {number} more.")
    click.echo(f"To train them after all: {go_on} --retry-failed --only {indices}")


def _take_out(study: Study, only: Collection[int], go_on: str) -> int:
    from regmix.errors import StudyError
    from regmix.lease import is_held
    from regmix.swarm.ledger import Ledger
    from regmix.swarm.selection import cancel_proxies
    from regmix.swarm.sweep import refuse_lost_ledger

    if is_held(study.lock_path, study.lease_path):
        raise StudyError(
            f"{study.path} is in use: proxies cannot be taken out of a sweep that runs",
            cure=f"Stop it with {go_on} --cancel, run this again, then go on with {go_on}",
        )
    with study.lock():
        refuse_lost_ledger(study)
        with Ledger(study.ledger_path) as ledger:
            return cancel_proxies(study, ledger, only)
