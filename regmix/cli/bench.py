"""`regmix-fast bench`: how fast this machine does each part, and how far from its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from regmix_bench.harness import Record
    from regmix_bench.suites.registry import Settings


@click.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append the records to this file, one JSON object a line.",
)
@click.option(
    "--compare",
    "old_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Show this run beside the records of an earlier one.",
)
@click.option(
    "--profile",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for traces of a few steps (Perfetto); prints the operations by time.",
)
@click.option("--quick", is_flag=True, help="Moments instead of minutes: a first look.")
@click.option("--list", "list_only", is_flag=True, help="List the suites and stop.")
@click.option(
    "--proxies",
    "num_proxies",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Proxies of the sweep whose time is predicted.",
)
@click.option(
    "--tokens", help="Training tokens of such a proxy.  [default: 2M on a CPU, 0.25B on a GPU]"
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(min=0.0),
    help="Price of this machine (of one GPU): adds the cost of the sweep.",
)
def command(
    suites: tuple[str, ...],
    json_path: Path | None,
    old_path: Path | None,
    profile: Path | None,
    quick: bool,
    list_only: bool,
    num_proxies: int,
    tokens: str | None,
    price_per_hour: float | None,
) -> None:
    """Measure SUITEs on this machine; without any, a short tour of all.

    Ceilings are measured on the spot, and peers that are installed run side by side.

    \b
    Example:  regmix-fast bench
              regmix-fast bench proxies --json new.jsonl --compare old.jsonl
    """
    from regmix_bench import compare
    from regmix_bench.suites.registry import SUITES, Settings, check_names

    from regmix.cli.words import parse_count
    from regmix.errors import RegmixError

    if list_only:
        for name, suite in SUITES.items():
            click.echo(f"{name:<9} {suite.text}")
        return
    names = check_names(suites)
    old = [] if old_path is None else compare.read_records(old_path)
    if json_path is not None:
        _check_writable(json_path)
    if not suites:
        click.echo("A short tour of all suites; name one to measure it at length.", err=True)
    settings = Settings(
        quick=quick or not suites,
        device=_device(),
        num_proxies=num_proxies,
        proxy_tokens=parse_count(tokens) if tokens else None,
        price_per_hour=price_per_hour,
        profile=profile,
        say=lambda words: click.echo(f"  {words}", err=True),
    )
    if profile is not None and not {"proxies", "train"} & set(names):
        settings.say("no trace: only the suites proxies and train are profiled")
    measured = _run(names, settings, json_path)
    if old_path is not None:
        click.echo(f"\nBeside {old_path}, where a ratio is new / old:")
        click.echo(compare.comparison(old, measured))
    if json_path is not None:
        click.echo(f"{len(measured)} records appended to {json_path}", err=True)
    failed = [f"{record.case}: {record.metric}" for record in measured if record.unit == "failures"]
    if failed:
        raise RegmixError(
            f"{len(failed)} measurements failed, the first: {failed[0]}",
            cure="Run `regmix-fast doctor`; the others are valid",
        )
    _say_next(json_path, names)


def _device() -> str:
    # torch comes first, too, because a record names the GPU only where torch is there to ask.
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(names: Sequence[str], settings: Settings, json_path: Path | None) -> list[Record]:
    """Run the suites; what one measured is on the screen and in the file before the next begins."""
    from regmix_bench import compare, harness
    from regmix_bench.suites.registry import SUITES, run_suite

    from regmix.files import storage_errors

    measured: list[Record] = []
    for name in names:
        click.secho(f"\n{name}: {SUITES[name].text}", bold=True)
        records = run_suite(name, settings)
        click.echo(compare.wide_table(records))
        if json_path is not None:
            with storage_errors(json_path):
                harness.append(json_path, records)
        measured += records
    return measured


def _check_writable(path: Path) -> None:
    """Raise before anything is measured where the file cannot be appended to."""
    from regmix.files import storage_errors

    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass


def _say_next(json_path: Path | None, names: Sequence[str]) -> None:
    words = " ".join(names) if len(names) < 6 else ""
    if json_path is None:
        click.echo(f"Next: regmix-fast bench {words}".rstrip() + " --json bench.jsonl", err=True)
    else:
        command = f"regmix-fast bench {words}".rstrip()
        click.echo(f"Next: {command} --compare {json_path}", err=True)
