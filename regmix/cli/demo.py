"""`regmix-fast demo`: the whole pipeline on text found on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for all that it makes.")
@click.option("--mixtures", "num_mixtures", type=click.IntRange(min=4), help="Proxies to train.")
@click.option("--proxy-tokens", help="Training tokens of a proxy.")
@click.option("--final-tokens", help="Training tokens of a final model.")
@click.option("--seeds", type=click.IntRange(min=1), help="Final models of each mixture.")
def command(
    out: str,
    num_mixtures: int | None,
    proxy_tokens: str | None,
    final_tokens: str | None,
    seeds: int | None,
) -> None:
    """Find a better mixture of text found on this machine; run it again to go on.

    \b
    Example:  regmix-fast demo
    """
    import time
    from pathlib import Path

    from regmix.cli import cli
    from regmix.cli.words import parse_count
    from regmix.demo import DemoSize, run_demo
    from regmix.display import duration

    default = DemoSize()
    size = dataclasses.replace(
        default,
        num_mixtures=num_mixtures or default.num_mixtures,
        proxy_tokens=parse_count(proxy_tokens) if proxy_tokens else default.proxy_tokens,
        final_tokens=parse_count(final_tokens) if final_tokens else default.final_tokens,
        seeds=seeds or default.seeds,
    )

    def run(words: Sequence[str]) -> None:
        cli.main(args=list(words), standalone_mode=False)

    def say(line: str) -> None:
        click.secho(line, bold=not line.startswith(" "))

    started = time.monotonic()
    result = run_demo(Path(out), size, run=run, say=say)
    show_models(result.results)
    say(result.verdict)
    click.echo(f"All of it took {duration(time.monotonic() - started)}.")
    click.echo(f"Open the report in a browser: {result.study / 'report.html'}")
    click.echo("Next: regmix-fast pack YOUR_CORPUS --out shards --train-bpe 8192")


def show_models(results: object) -> None:
    """Print the final models, best mixture first."""
    from rich.table import Table

    from regmix.display import console
    from regmix.large.comparison import MixtureResult

    assert isinstance(results, list)
    table = Table(title="Final models: loss on the objective, nats/token", title_justify="left")
    for heading in ("mixture", "mean", "spread", "seeds"):
        table.add_column(heading, justify="left" if heading == "mixture" else "right")
    for result in results:
        assert isinstance(result, MixtureResult)
        spread = "-" if result.spread is None else f"{result.spread:.4f}"
        seeds = " ".join(f"{loss:.4f}" for loss in result.losses)
        table.add_row(result.mixture, f"{result.mean:.4f}", spread, seeds)
    console().print(table)
