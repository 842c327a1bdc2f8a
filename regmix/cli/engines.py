"""Where proxies are trained: the options `--engine`, `--address`, `--shard-cache`, `--scratch`.

Enters: click's parameters. Leaves: the parts of `SweepOptions` that follow from them. Ray is
connected to while the sweep lasts, and only where it was asked for.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from regmix.swarm.cluster.connection import Cluster

Command = TypeVar("Command", bound=Callable[..., Any])


def engine_options(command: Command) -> Command:
    """Add the options that say which machines train; on one kind of them no result changes."""
    options = [
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="This machine, or all of a Ray cluster.",
        ),
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="The cluster's head, with --engine ray.  [default: RAY_ADDRESS, or the cluster "
            "of this machine]",
        ),
        click.option(
            "--shard-cache",
            type=click.Path(file_okay=False, path_type=Path),
            help="A folder on each machine's own disk: the corpus is copied there once, checked, "
            "and read from there.",
        ),
        click.option(
            "--scratch",
            type=click.Path(file_okay=False, path_type=Path),
            help="A folder for machines that do not see the study, with --engine ray.  [default: "
            "in their temporary folder]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextlib.contextmanager
def open_engine(
    engine: str,
    address: str | None,
    shard_cache: Path | None,
    scratch: Path | None,
    *,
    workers: int | None,
    gpus: int | None,
    threads: int,
    logs: Path,
) -> Iterator[dict[str, Any]]:
    """Yield `num_workers`, `gpus`, `make_executor` and `is_remote` for `SweepOptions`.

    workers, gpus: how many a person asked for; threads: of each worker; logs: the study's folder
    of logs. Raises `RegmixError` where options contradict each other or no cluster answers.
    """
    if engine == "ray":
        from regmix.swarm.cluster.connection import connect

        cluster = connect(address, log=logs / "ray.log")
        try:
            yield _of_cluster(
                cluster, shard_cache, scratch, workers=workers, gpus=gpus, threads=threads
            )
        finally:
            cluster.close()
        return
    _refuse_without_ray(address, scratch)
    from regmix.swarm.caching import CachingExecutor
    from regmix.swarm.gpus import find_gpus

    make = None
    if shard_cache is not None:
        make = functools.partial(CachingExecutor, shard_cache=shard_cache.absolute())
    yield {
        "num_workers": workers,
        "gpus": find_gpus(gpus) if gpus else (),
        "make_executor": make,
        "is_remote": False,
    }


def _of_cluster(
    cluster: Cluster,
    shard_cache: Path | None,
    scratch: Path | None,
    *,
    workers: int | None,
    gpus: int | None,
    threads: int,
) -> dict[str, Any]:
    from regmix.swarm.cluster.executor import RayExecutor, num_cpu_places
    from regmix.swarm.cluster.gpus import find_ray_gpus

    return {
        "num_workers": num_cpu_places(cluster, workers, threads) if not gpus else workers or 1,
        "gpus": find_ray_gpus(cluster, gpus) if gpus else (),
        "make_executor": functools.partial(
            RayExecutor,
            cluster,
            uses_all=workers is None,
            shard_cache=None if shard_cache is None else shard_cache.absolute(),
            scratch=None if scratch is None else scratch.absolute(),
            on_remark=_show,
        ),
        "is_remote": True,
    }


def _refuse_without_ray(address: str | None, scratch: Path | None) -> None:
    from regmix.errors import ConfigError

    for name, value in (("--address", address), ("--scratch", scratch)):
        if value is not None:
            raise ConfigError(
                f"{name} has no use without --engine ray",
                cure=f"Give --engine ray, or leave {name} out",
            )


def _show(remark: str) -> None:
    # Above the live line: rich takes what is printed meanwhile.
    print(remark, file=sys.stderr, flush=True)
