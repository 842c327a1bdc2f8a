"""`regmix-fast status`: how far a study is."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("study", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
def command(study: str | None, as_json: bool) -> None:
    """Show how far STUDY is: proxies pending, done and failed, and which parts exist.

    \b
    Example:  regmix-fast status study
    """
    from regmix.data.mixtures import MixtureTable
    from regmix.data.schedules import ScheduleTable
    from regmix.study import Study, find_study
    from regmix.swarm.ledger import Ledger

    opened = Study.open(find_study(study))
    num_proxies = len(MixtureTable.read_csv(opened.mixtures_path).indices)
    if opened.schedules_path.is_file():
        num_proxies += len(ScheduleTable.read_csv(opened.schedules_path))
    counts = {"done": 0, "failed": 0}
    failures = []
    remarks: list[tuple[int, str]] = []
    if opened.ledger_path.exists():
        with Ledger(opened.ledger_path) as ledger:
            for row in ledger.proxies():
                counts[row.state] = counts.get(row.state, 0) + 1
                if row.error:
                    failures.append((row.index, row.error))
            remarks = ledger.remarks()
    counts["pending"] = num_proxies - counts["done"] - counts["failed"]
    parts = {
        "fit": (opened.surrogate_path / "fit.json").exists(),
        "optimum": opened.optimum_path.exists(),
        "report": opened.report_path.exists(),
    }
    models = sorted(p.parent.name for p in opened.models_path.glob("*/summary.json"))
    if as_json:
        proxies = {"proxies": counts, "failures": failures, "remarks": remarks}
        click.echo(json.dumps({**proxies, "models": models, **parts}))
        return
    click.echo(
        f"{num_proxies} proxies: {counts['done']} done, {counts['pending']} pending, "
        f"{counts['failed']} failed"
    )
    for index, words in [*failures, *remarks]:
        click.echo(f"  proxy {index}: {words}")
    for name, done in parts.items():
        click.echo(f"{name}: {'done' if done else 'not yet'}")
    click.echo(f"models: {', '.join(models) or 'none yet'}")
