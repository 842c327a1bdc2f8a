"""`regmix-fast report`: the study's report, one HTML file."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("study", required=False)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write; default: report.html in the study.",
)
def command(study: str | None, out: Path | None) -> None:
    """Write the report of STUDY: one HTML file that opens without a network.

    It shows what exists so far; run it again as the study grows.

    \b
    Example:  regmix-fast report study --out report.html
    """
    from datetime import datetime

    from regmix.display import size
    from regmix.files import write_text
    from regmix.report.page import render_report
    from regmix.study import Study, find_study

    opened = Study.open(find_study(study))
    target = out or opened.report_path
    text = render_report(opened, made=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")
    write_text(target, text)
    click.echo(f"{target} ({size(len(text.encode()))}): open it in any browser")
    click.echo(f"Next: regmix-fast export {study or ''} --format megatron --out blend.txt")
