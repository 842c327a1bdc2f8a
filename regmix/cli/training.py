"""What `mixtures`, `proxies` and `train` share: how a model is trained, and the live display.

Enters: click's parameters; the sweep's cost and events. Leaves: options, a `Training`, and a
display that shows models done, tokens per second, the loss and the time that is left.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from regmix.display import Progress
    from regmix.swarm.cost import Cost
    from regmix.swarm.events import Event
    from regmix.swarm.tally import Tally

Command = TypeVar("Command", bound=Callable[..., Any])


def training_options(
    *, model: str, tokens: str, learning_rate: float
) -> Callable[[Command], Command]:
    """Add the options that say how a model is trained, with these defaults."""
    options = [
        click.option("--model", default=model, show_default=True, help="A preset, or a TOML file."),
        click.option(
            "--tokens", default=tokens, show_default=True, help="Training tokens of one model."
        ),
        click.option("--seq-len", type=click.IntRange(min=1), help="Tokens of a sequence."),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Sequences of a step.",
        ),
        click.option("--learning-rate", type=float, default=learning_rate, show_default=True),
        click.option("--warmup-steps", type=click.IntRange(min=0), default=50, show_default=True),
        click.option(
            "--schedule",
            type=click.Choice(["constant", "cosine", "wsd"]),
            default="cosine",
            show_default=True,
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def running_options(command: Command) -> Command:
    """Add the options that say how training runs; only GPUs, in bfloat16, change a result."""
    options = [
        click.option(
            "--workers", type=click.IntRange(min=1), help="Processes; default: one a core."
        ),
        click.option("--gpus", type=click.IntRange(min=1), help="GPUs to use; default: the CPU."),
        click.option(
            "--checkpoint-seconds",
            type=click.FloatRange(min=0.0),
            default=15.0,
            show_default=True,
            help="Time between checkpoints.",
        ),
        click.option("--dry-run", is_flag=True, help="Show what it will cost and stop."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


class TrainingDisplay:
    """Shows the cost, then the progress; `dry_run` ends the command after the cost."""

    def __init__(self, title: str, *, dry_run: bool, as_json: bool, remark: str) -> None:
        self.title, self.remark = title, remark
        self.dry_run, self.as_json = dry_run, as_json
        self._progress: Progress | None = None

    def on_start(self, cost: Cost, tally: Tally) -> None:
        """Show the cost; raises click's `Exit` in a dry run."""
        from regmix.display import Progress

        click.echo(f"Cost: {cost} ({self.remark})", err=True)
        for line in cost.remarks:
            click.echo(line, err=True)
        if self.dry_run:
            if self.as_json:
                click.echo(json.dumps(dataclasses.asdict(cost)))
            raise click.exceptions.Exit(0)
        self._progress = Progress(self.title, total=tally.total_tokens, unit="tokens")
        self._progress.__enter__()

    def on_event(self, event: Event, tally: Tally) -> None:
        """Show how far it is, and say what happens to workers, GPUs and machines."""
        from regmix.display import count
        from regmix.errors import printable
        from regmix.swarm.events import Joined, Left, Replaced, Requeued, Retired

        assert self._progress is not None
        if isinstance(event, Replaced):
            # Above the live line: rich takes what is printed meanwhile.
            print(printable(event.remark), file=sys.stderr, flush=True)
        elif isinstance(event, Retired | Requeued | Joined | Left):
            print(printable(str(event)), file=sys.stderr, flush=True)
        in_use = {"GPUs": tally.num_gpus} if tally.num_gpus else {}
        self._progress.update(
            tally.tokens,
            models=f"{tally.models_done}/{tally.num_models}",
            speed=f"{count(tally.tokens_per_second)} tokens/s",
            loss=f"{tally.loss_nats:.3f} nats",
            **in_use,
        )

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)
