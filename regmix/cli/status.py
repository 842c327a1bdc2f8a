"""`regmix-fast status`: how far a study is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    from regmix.study import Study
    from regmix.swarm.state import SweepState

WATCH_SECONDS = 2.0
# Where lines stay, as in a log.
PLAIN_WATCH_SECONDS = 10.0
# Of each kind of failure; --json has all.
SHOWN = 20


@click.command()
@click.argument("study", required=False)
@click.option("--watch", is_flag=True, help="Show it again and again, until the sweep ends.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write a row for each proxy to this .csv or .parquet file: state, weights, losses, "
    "attempts, where it was trained.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
def command(study: str | None, watch: bool, out: Path | None, as_json: bool) -> None:
    """Show how far STUDY is: its proxies, what runs now, what failed and why, and its parts.

    It only reads, so it works while a sweep runs, and on a copy of a study.

    \b
    Examples:
      regmix-fast status study
      regmix-fast status study --watch
      regmix-fast status study --out proxies.parquet
    """
    from regmix.errors import ConfigError
    from regmix.study import Study, find_study
    from regmix.swarm.state import read_state

    if watch and as_json:
        raise ConfigError(
            "--watch and --json contradict each other", cure="Run it with --json now and then"
        )
    opened = Study.open(find_study(study))
    if out is not None:
        _write_rows(opened, out, as_json=as_json)
        return
    if watch:
        _watch(opened)
    state = read_state(opened)
    if as_json:
        click.echo(json.dumps({**state.record(), **_parts(opened)}))
        return
    if not watch:
        _print(state)
    for name, done in _parts(opened).items():
        if name != "models":
            click.echo(f"{name}: {'done' if done else 'not yet'}")
    click.echo(f"models: {', '.join(_parts(opened)['models']) or 'none yet'}")
    click.echo(f"Next: {_next(opened, state, study)}")


def _parts(study: Study) -> dict[str, Any]:
    return {
        "fit": (study.surrogate_path / "fit.json").exists(),
        "optimum": study.optimum_path.exists(),
        "report": study.report_path.exists(),
        "models": sorted(path.parent.name for path in study.models_path.glob("*/summary.json")),
    }


def _next(study: Study, state: SweepState, name: str | None) -> str:
    words = f" {name}" if name else ""
    if state.is_running is not False:
        return f"regmix-fast status{words} --watch, or proxies{words} --cancel to stop it"
    left = state.num_proxies - state.counts["done"] - state.counts["cancelled"]
    if left > len(state.failures):
        return f"regmix-fast proxies{words}"
    if not (study.surrogate_path / "fit.json").exists():
        return f"regmix-fast fit{words}{' --partial' if left or state.counts['cancelled'] else ''}"
    return f"regmix-fast {'report' if study.optimum_path.exists() else 'optimize'}{words}"


def _write_rows(study: Study, out: Path, *, as_json: bool) -> None:
    from regmix.swarm.export import write_proxies

    number = write_proxies(study, out)
    if as_json:
        click.echo(json.dumps({"rows": number, "file": str(out)}))
    else:
        click.echo(f"Written: {out}, {number} proxies")


def _watch(study: Study) -> None:
    """Show the state until no sweep runs: live on a terminal, a line now and then elsewhere."""
    import sys

    if sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        from regmix.display import console

        with Live(console=console(), refresh_per_second=2) as live:
            for state in _states(study, WATCH_SECONDS):
                live.update(Text("\n".join(_lines(state))))
        return
    for state in _states(study, PLAIN_WATCH_SECONDS):
        if state.progress is None:
            _print(state)
        else:
            # Numbers only: nothing that others wrote.
            click.echo(f"{_summary(state)}; {_speed(state)}")


def _states(study: Study, seconds: float) -> Iterator[SweepState]:
    """Yield the state now and then, until no sweep runs, or its machine has long said nothing."""
    from regmix.lease import LEASE_SECONDS
    from regmix.swarm.state import read_state

    last, silent_seconds = None, 0.0
    while True:
        state = read_state(study)
        yield state
        silent_seconds = silent_seconds + seconds if state.renewals == last else 0.0
        last = state.renewals
        if state.is_running is False or (
            state.is_running is None and silent_seconds > 2 * LEASE_SECONDS
        ):
            return
        time.sleep(seconds)


def _print(state: SweepState) -> None:
    for line in _lines(state):
        click.echo(line)


def _lines(state: SweepState) -> list[str]:
    """Return what a person sees; what others wrote into the study steers no terminal."""
    from regmix.errors import printable

    return [printable(line) for line in _told(state)]


def _told(state: SweepState) -> Iterator[str]:
    from regmix.display import duration

    yield _summary(state)
    if state.problem:
        yield f"  {state.problem}"
    if state.progress is not None:
        yield from _running_lines(state)
    elif state.expected_seconds:
        yield f"No sweep runs. What is left took about {duration(state.expected_seconds)} before"
    for stack, proxies, why in state.untrained[:SHOWN]:
        yield f"  {stack} ({_named(proxies)}) could not be trained: {why}"
    yield from _rest(len(state.untrained), "stacks")
    for index, why in state.failures[:SHOWN]:
        yield f"  proxy {index}: {why}"
    yield from _rest(len(state.failures), "failed proxies")
    if state.failures:
        yield (
            "  Train failed proxies again: regmix-fast proxies --retry-failed; or go on without "
            "them: fit --partial"
        )
    if state.broken_off:
        yield "Attempts that broke off; their stacks went on from the last checkpoint:"
    for outcome, why, number, where in state.broken_off[:SHOWN]:
        times = "once" if number == 1 else f"{number} times"
        yield f"  {outcome} {times}{f' ({why})' if why else ''}, last {where}"
    yield from _rest(len(state.broken_off), "kinds")
    for index, remark in state.remarks[:SHOWN]:
        yield f"  proxy {index}: {remark}"
    yield from _rest(len(state.remarks), "remarks")


def _summary(state: SweepState) -> str:
    counts = state.counts
    shown = [f"{counts['done']} done", f"{counts['pending']} pending", f"{counts['failed']} failed"]
    shown += [
        f"{counts[name]} {words}"
        for name, words in (
            ("running", "running"),
            ("retried", "waiting again"),
            ("cancelled", "taken out"),
        )
        if counts[name]
    ]
    return f"{state.num_proxies} proxies: {', '.join(shown)}"


def _speed(state: SweepState) -> str:
    from regmix.display import count, duration

    progress = state.progress
    assert progress is not None
    words = f"{count(progress.tokens)} of {count(progress.total_tokens)} tokens"
    words += f", {count(progress.tokens_per_second)} tokens/s"
    if progress.expected_seconds is not None:
        words += f", {duration(progress.expected_seconds)} left"
    return words


def _running_lines(state: SweepState) -> Iterator[str]:
    from regmix.display import count

    progress = state.progress
    assert progress is not None
    whose = f"{state.holder}, said at {progress.updated}"
    if state.is_running is None:
        whose += "; whether it still runs cannot be seen from this machine"
    yield f"Sweep ({whose}): {_speed(state)}"
    if progress.expected_end is not None:
        yield f"  expected to end at {progress.expected_end}"
    for stack in progress.running[:SHOWN]:
        loss = "no step yet" if stack.loss_nats is None else f"{stack.loss_nats:.3f} nats"
        yield (
            f"  {stack.stack} ({_named(stack.proxies)}): step {stack.step} of {stack.num_steps}, "
            f"{loss}, {count(stack.tokens_per_second)} tokens/s, {stack.worker} on {stack.machine}"
        )
    yield from _rest(len(progress.running), "stacks in training")


def _named(proxies: tuple[int, ...] | list[int]) -> str:
    if len(proxies) == 1:
        return f"proxy {proxies[0]}"
    shown = ", ".join(str(index) for index in proxies[:8])
    return f"proxies {shown}{', ...' if len(proxies) > 8 else ''}"


def _rest(number: int, what: str) -> Iterator[str]:
    if number > SHOWN:
        yield f"  and {number - SHOWN} more {what}: --json has all"
