"""The command line: Click only; every command's own imports happen when it runs.

Enters: words typed by a person. Leaves: a call into the library, its answer as a table or JSON,
and an exit code that is 0 only when the work is done. Computes nothing itself.
"""

from __future__ import annotations

import importlib
import sys

import click

from regmix.errors import RegmixError

# Command name -> (module, what it does). The text lives here so that --help imports nothing.
COMMANDS = {
    "demo": ("regmix.cli.demo", "The whole pipeline on text found on this machine."),
    "pack": ("regmix.cli.pack", "Turn documents into token shards, per domain."),
    "inspect": ("regmix.cli.inspect", "Show what shards hold, and what a budget means in epochs."),
    "verify": ("regmix.cli.verify", "Check every byte of the shards."),
    "mixtures": ("regmix.cli.mixtures", "Draw the swarm: the mixtures to train proxies on."),
    "proxies": ("regmix.cli.proxies", "Train the proxies; run again to resume."),
    "status": ("regmix.cli.status", "Show how far a study is."),
    "fit": ("regmix.cli.fit", "Regress loss on mixture; show the held-out error."),
    "optimize": ("regmix.cli.optimize", "Find the best mixture under constraints."),
    "train": ("regmix.cli.train", "Train the large model on a mixture."),
    "evaluate": ("regmix.cli.evaluate", "Loss of a model per domain, or its score on tasks."),
    "generate": ("regmix.cli.generate", "Let a model go on with a text."),
    "export": ("regmix.cli.export", "Write the mixture or the model for other tools."),
    "report": ("regmix.cli.report", "Write the study's report: one HTML file."),
    "bench": ("regmix.cli.bench", "Measure this machine against its limits and against peers."),
    "doctor": ("regmix.cli.doctor", "Examine this machine; say what to mend."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(COMMANDS[name][0]).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands, in the order of the pipeline"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="regmix-fast")
def cli() -> None:
    """Find the data mixture to pre-train a language model on.

    \b
    Start here:  regmix-fast demo
    """


def main() -> None:
    """Run the command line; a `RegmixError` becomes one line on stderr and exit code 1."""
    try:
        cli(standalone_mode=False)
    except RegmixError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped. Run the same command again to go on.", err=True)
        sys.exit(130)
