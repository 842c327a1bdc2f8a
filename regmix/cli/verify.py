"""`regmix-fast verify`: is every byte of the shards as it was written?"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet
    from regmix.data.stored_file import Damage

_SHOWN = 50  # problems printed; --json has all


@click.command()
@click.argument("shards", type=click.Path())
@click.option("--threads", type=click.IntRange(min=1), help="Reading threads.  [default: up to 8]")
@click.option(
    "--record",
    is_flag=True,
    help="Token files of another program: write their checksums beside them, replacing older ones.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(shards: str, threads: int | None, record: bool, as_json: bool) -> None:
    """Check every block of every file of SHARDS; name all damage, and fail where there is any.

    SHARDS is a folder that `pack` wrote, or token files of another program: a folder of them, or
    a tokens.toml. Their formats hold no checksums, so only sizes, headers and ids can be checked,
    until --record has written some.

    \b
    Example:  regmix-fast verify shards
              regmix-fast verify lit_dataset_regmix --record
    """
    from regmix.data.foreign.token_set import ForeignSet, record_checksums
    from regmix.data.shards import ShardSet
    from regmix.errors import ConfigError

    opened = ShardSet.read(shards)
    foreign = opened if isinstance(opened, ForeignSet) else None
    if record and foreign is None:
        raise ConfigError(
            f"{shards}: shards that `pack` wrote have checksums", cure="Leave --record out"
        )
    if foreign is not None and record:
        opened = foreign = foreign.without_checksums()
    started = time.monotonic()
    damage = _check(opened, threads, started)
    answer = _answer(opened, damage, time.monotonic() - started)
    answer["not_checked"] = "" if foreign is None or record else foreign.not_verified
    written = record_checksums(foreign) if foreign and record and not damage else None
    answer["recorded"] = None if written is None else str(written)
    if as_json:
        click.echo(json.dumps(answer))
    else:
        _show(answer, shards, damage)
    if damage:
        sys.exit(1)


def _check(shards: ShardSet, threads: int | None, started: float) -> list[Damage]:
    """Return all damage, with progress on stderr."""
    from regmix.display import Progress

    total = sum(shards.token_bytes(s, d) for s in shards.splits for d in shards.domains(s))
    with Progress("verify", total=total / 1e6, unit="MB") as bar:

        def show(done: int) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            bar.update(done / 1e6, speed=f"{done / 1e6 / seconds:,.0f} MB/s")

        return shards.damage(threads=threads, on_bytes=show)


def _answer(shards: ShardSet, damage: list[Damage], seconds: float) -> dict[str, Any]:
    unread = {item.path for item in damage if item.block is None}
    files = [file for file in shards.every_file() if str(file.path) not in unread]
    num_bytes = sum(file.tokens * file.dtype.itemsize for file in files)
    return {
        "shards": str(shards.path),
        "checksum": shards.checksum,
        "files": len(files),
        "token_bytes": num_bytes,
        "seconds": seconds,
        "megabytes_per_second": num_bytes / 1e6 / max(seconds, 1e-9),
        "damage": [dataclasses.asdict(item) for item in damage],
    }


def _show(answer: dict[str, Any], shards: str, damage: list[Damage]) -> None:
    from regmix.display import size

    for item in damage[:_SHOWN]:
        click.echo(f"Damaged: {item}")
    if len(damage) > _SHOWN:
        click.echo(f"... and {len(damage) - _SHOWN:,} more: see --json")
    for cure in sorted({item.cure for item in damage}):
        click.echo(f"Cure: {cure}")
    done = (
        f"{answer['files']:,} files, {size(answer['token_bytes'])} of tokens, "
        f"{answer['seconds']:.1f} s, {answer['megabytes_per_second']:,.0f} MB/s"
    )
    if damage:
        problems, paths = len(damage), len({item.path for item in damage})
        click.echo(
            f"Damage: {problems:,} {'problem' if problems == 1 else 'problems'} in {paths:,} "
            f"{'file' if paths == 1 else 'files'}; checked {done}"
        )
        return
    if answer["not_checked"]:
        click.echo(answer["not_checked"])
    if recorded := answer["recorded"]:
        click.echo(f"Recorded: {recorded}")
    click.echo(f"Whole: {done}, checksum {answer['checksum']}")
    click.echo(f"Next: regmix-fast inspect {shards}")
