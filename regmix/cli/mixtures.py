"""`regmix-fast mixtures`: draw the swarm."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from regmix.cli.training import training_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regmix.data.mixtures import DomainCoverage
    from regmix.study import Study


_USED_BY_DRAW = ("num", "sampler", "settings", "lower", "upper", "seed")
_USED_BY_ADD = ("study", "add", "as_json", *_USED_BY_DRAW)


@click.command()
@click.argument("study", required=False)
@click.option("--shards", type=click.Path(), help="Folder that `pack` wrote; for a new study.")
@click.option(
    "--num", type=click.IntRange(min=1), default=64, show_default=True, help="Mixtures to draw."
)
@click.option("--add", is_flag=True, help="Draw NUM more for a study that exists.")
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False),
    help="Take the mixtures from a CSV or YAML file in RegMix's format.",
)
@click.option(
    "--sampler",
    type=click.Choice(["bounded", "regmix"]),
    default="bounded",
    show_default=True,
    help="bounded keeps rare domains visible; regmix is the paper's.",
)
@click.option(
    "--sampler-option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A constant of the sampler, for example temperature=0.5; repeatable.",
)
@click.option("--lower", multiple=True, metavar="DOMAIN=W", help="Smallest weight of a domain.")
@click.option("--upper", multiple=True, metavar="DOMAIN=W", help="Largest weight of a domain.")
@click.option(
    "--target",
    "objective",
    default="mean",
    show_default=True,
    help="Objective: a target, `mean`, or a=0.5,b=0.5.",
)
@training_options(model="cpu-64", tokens="2M", learning_rate=3e-3)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=2),
    help="Padded vocabulary; default: the corpus's, up to a multiple of 64.",
)
@click.option(
    "--eval-tokens",
    default="32k",
    show_default=True,
    help="Tokens read of each validation set; `all` reads whole sets.",
)
@click.option(
    "--eval-every",
    type=click.IntRange(min=1),
    help="Steps between evaluations; default: only at the end.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the draw."
)
@click.option("--data-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--init-seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the coverage by domain as JSON.")
def command(
    study: str | None,
    shards: str | None,
    num: int,
    add: bool,
    source: str | None,
    sampler: str,
    settings: tuple[str, ...],
    lower: tuple[str, ...],
    upper: tuple[str, ...],
    objective: str,
    model: str,
    tokens: str,
    seq_len: int | None,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    schedule: str,
    vocab_size: int | None,
    eval_tokens: str,
    eval_every: int | None,
    seed: int,
    data_seed: int,
    init_seed: int,
    as_json: bool,
) -> None:
    """Make STUDY: draw mixtures of the corpus's domains to train one proxy on each.

    \b
    Example:  regmix-fast mixtures study --shards shards --num 64 --target web
    """
    from pathlib import Path

    from regmix.cli.words import parse_count, parse_objective, parse_pairs, training_from
    from regmix.data.mixtures import MixtureTable, coverage
    from regmix.data.shards import ShardSet
    from regmix.errors import StudyError
    from regmix.study import Study, find_study
    from regmix.swarm.drawing import SwarmRequest, add_mixtures, make_study

    _refuse_useless(add=add, source=source)
    request = SwarmRequest(
        num=num,
        sampler=sampler,
        seed=seed,
        lower=parse_pairs(lower),
        upper=parse_pairs(upper),
        options=parse_pairs(settings),
    )
    path = Path(study) if study else find_study(None)
    if add:
        opened = Study.open(path)
        add_mixtures(opened, request)
    else:
        if shards is None:
            raise StudyError(
                "a new study needs a corpus", cure="Name it: --shards FOLDER, as `pack` wrote it"
            )
        corpus = ShardSet.open(shards)
        training = training_from(
            model=model,
            vocab_size=vocab_size or -(-corpus.vocab_size // 64) * 64,
            seq_len=seq_len,
            batch_size=batch_size,
            tokens=parse_count(tokens),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            schedule=schedule,
            eval_tokens=None if eval_tokens == "all" else parse_count(eval_tokens),
            eval_every=eval_every,
        )
        opened = make_study(
            path,
            corpus,
            swarm=request,
            training=training,
            objective=parse_objective(objective, corpus.domains("valid")),
            mixtures_from=Path(source) if source else None,
            data_seed=data_seed,
            init_seed=init_seed,
        )
    drawn = MixtureTable.read_csv(opened.mixtures_path)
    rows = coverage(drawn, opened.config.prior)
    if as_json:
        click.echo(json.dumps({row.domain: dataclasses.asdict(row) for row in rows}))
        return
    show_coverage(opened, len(drawn), rows)
    click.echo(f"Next: regmix-fast proxies {study or ''}".rstrip())


def _refuse_useless(*, add: bool, source: str | None) -> None:
    """Raise for an option that was given and that --add or --from leaves without use."""
    from click.core import ParameterSource

    from regmix.errors import ConfigError

    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        if add and name not in _USED_BY_ADD:
            raise ConfigError(
                f"{option.opts[0]} has no use with --add: the study keeps the settings that it "
                "was made with",
                cure=f"Leave {option.opts[0]} out, or make a new study",
            )
        if source is not None and name in _USED_BY_DRAW:
            raise ConfigError(
                f"{option.opts[0]} has no use with --from: the file says which mixtures there are",
                cure=f"Leave out {option.opts[0]} or --from",
            )


def show_coverage(study: Study, num_mixtures: int, rows: Sequence[DomainCoverage]) -> None:
    """Print, by domain, how the drawn mixtures cover it."""
    from rich.table import Table

    from regmix.display import console, count

    proxy = study.config.proxy
    table = Table(
        title=f"{num_mixtures} mixtures, one proxy of {count(proxy.tokens)} tokens each",
        title_justify="left",
    )
    for heading in ("domain", "tokens", "natural", "in mixtures", "smallest", "median", "largest"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for row in rows:
        table.add_row(
            row.domain,
            count(study.config.available_tokens[row.domain]),
            f"{row.prior:.2%}",
            f"{row.present:.0%}",
            f"{row.minimum:.2%}",
            f"{row.median:.2%}",
            f"{row.maximum:.2%}",
        )
    console().print(table)
