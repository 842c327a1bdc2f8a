"""`regmix-fast doctor`: is this machine fit for the work, and what would mend it?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from regmix.doctor.examination import Examination
    from regmix.doctor.findings import Finding

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@click.command()
@click.argument("path", required=False, type=click.Path())
@click.option(
    "--gpus", type=click.IntRange(min=0), help="Fail where fewer GPUs than this can be used."
)
@click.option("--json", "as_json", is_flag=True, help="Print findings and facts as JSON.")
def command(path: str | None, gpus: int | None, as_json: bool) -> None:
    """Examine this machine: Python, torch, Triton, GPUs, compiled parts, disk, limits.

    PATH is a study, shards or any folder whose disk is to be examined.  [default: the study that
    commands would take, else the current folder]

    Each finding is ok, a note, or a problem with its cure. Exit code 1 where there is a problem.
    Changes no setting, uses no network. To time the disk it may write 32 MB that are gone at once;
    on each GPU it runs one small product and one tiny kernel.

    \b
    Examples:  regmix-fast doctor
               regmix-fast doctor study --gpus 8
               regmix-fast doctor --json > machine.json
    """
    from regmix.doctor.examination import examine

    folder = Path(path) if path is not None else _default_folder()
    if sys.stderr.isatty():
        from regmix.display import console

        with console(stderr=True).status("examining this machine"):
            examination = examine(folder, gpus=gpus)
    else:
        examination = examine(folder, gpus=gpus)
    if as_json:
        click.echo(json.dumps(examination.as_table()))
    else:
        _show(examination)
        if examination.healthy:
            click.echo(f"Next: {_next_command(folder, path)}")
    if not examination.healthy:
        sys.exit(1)


def _default_folder() -> Path:
    here = Path(".")
    if (here / "study.toml").is_file() or not (here / "study" / "study.toml").is_file():
        return here
    return here / "study"


def _next_command(folder: Path, given: str | None) -> str:
    if (folder / "study.toml").is_file():
        return " ".join(["regmix-fast proxies", *([given] if given else [])])
    if (folder / "manifest.json").is_file():
        return f"regmix-fast mixtures STUDY --shards {folder} --num 64"
    return "regmix-fast demo"


def _show(examination: Examination) -> None:
    subjects: dict[str, list[Finding]] = {}
    for finding in examination.findings:
        subjects.setdefault(finding.subject, []).append(finding)
    for subject, findings in subjects.items():
        if sys.stdout.isatty():
            _show_table(subject, findings)
        else:
            _show_lines(subject, findings)
    notes, problems = examination.count("note"), examination.count("problem")
    click.echo(
        f"{examination.count('ok')} ok, {notes} {'note' if notes == 1 else 'notes'}, "
        f"{problems or 'no'} {'problem' if problems == 1 else 'problems'}"
    )


def _show_table(subject: str, findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from regmix.display import console

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=len("problem"))
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.what))
        if finding.cure:
            table.add_row("", Text(f"Cure: {finding.cure}", "dim"))
    console().print(Text(subject, "bold"))
    console().print(table)


def _show_lines(subject: str, findings: list[Finding]) -> None:
    for finding in findings:
        click.echo(f"{finding.level:<7}  {subject}: {finding.what}")
        if finding.cure:
            click.echo(f"         Cure: {finding.cure}")
