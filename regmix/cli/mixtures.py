"""`regmix-fast mixtures`: draw the swarm."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from regmix.cli.proposing import proposal_options, propose_round, request_of
from regmix.cli.training import training_options

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet
    from regmix.study import Training
    from regmix.swarm.reuse import Reuse


_USED_BY_DRAW = ("num", "sampler", "settings", "lower", "upper", "seed")
_USED_BY_ADD = ("study", "add", "as_json", *_USED_BY_DRAW)
_USED_BY_PROPOSE = (
    *("study", "propose", "rule", "max_epochs"),
    *("target_tokens", "seed", "as_json"),
)
_USED_BY_REPLICATES = ("study", "replicates", "of", "as_json")


@click.command()
@click.argument("study", required=False)
@click.option("--shards", type=click.Path(), help="Folder that `pack` wrote; for a new study.")
@click.option(
    "--num",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Mixtures to draw; with --reuse 6 for each ratio to find, at least 16.",
)
@click.option("--add", is_flag=True, help="Draw NUM more for a study that exists.")
@click.option(
    "--propose",
    type=click.IntRange(min=1),
    help="Add this many to a study, chosen by what its finished proxies have shown.",
)
@proposal_options
@click.option(
    "--replicates",
    type=click.IntRange(min=1),
    help="Train one mixture of the study this many times more, with other seeds: the noise floor.",
)
@click.option(
    "--of", type=int, help="The mixture to replicate.  [default: the nearest to the natural one]"
)
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
@click.option(
    "--reuse",
    type=click.Path(exists=True, file_okay=False),
    help="A finished study: keep the ratios of its domains that are the same in this corpus.",
)
@click.option(
    "--freeze", metavar="DOMAIN,...", help="Keep the ratios of these domains, with --reuse."
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
    "--target-tokens",
    metavar="TOKENS",
    help="Train proxies on pools, so that they repeat each domain as a run of TOKENS will.",
)
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
    "--schedules",
    type=click.IntRange(min=1),
    help="Draw this many proxies more whose mixture changes on the way: for optimize --segments.",
)
@click.option(
    "--segments",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    help="Equal parts of a run, with --schedules.",
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
    propose: int | None,
    rule: str | None,
    max_epochs: float,
    replicates: int | None,
    of: int | None,
    source: str | None,
    sampler: str,
    settings: tuple[str, ...],
    reuse: str | None,
    freeze: str | None,
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
    target_tokens: str | None,
    vocab_size: int | None,
    eval_tokens: str,
    eval_every: int | None,
    schedules: int | None,
    segments: int,
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

    from regmix.cli.coverage import (
        coverage_table,
        pools_in_use,
        pools_remarks,
        show_coverage,
        show_pools,
    )
    from regmix.cli.words import parse_count, parse_objective, parse_pairs
    from regmix.data.mixtures import MixtureTable, coverage
    from regmix.data.shards import ShardSet
    from regmix.errors import StudyError
    from regmix.study import Study, find_study
    from regmix.swarm.drawing import SwarmRequest, add_mixtures, add_replicates, make_study
    from regmix.swarm.schedules import ScheduleRequest

    _refuse_useless(
        add=add, propose=propose is not None, replicates=replicates is not None, source=source
    )
    request = SwarmRequest(
        num=num,
        sampler=sampler,
        seed=seed,
        lower=parse_pairs(lower),
        upper=parse_pairs(upper),
        options=parse_pairs(settings),
    )
    path = Path(study) if study else find_study(None)
    if replicates is not None:
        opened = Study.open(path)
        index, added = add_replicates(opened, replicates, of)
        words = f"Mixture {index} again, with other seeds, as {added[0]} to {added[-1]}"
        click.echo(words, err=as_json)
    elif propose is not None:
        opened = Study.open(path)
        wanted = request_of(
            propose, rule, seed=seed, target_tokens=target_tokens, max_epochs=max_epochs
        )
        propose_round(opened, wanted, as_json=as_json)
    elif add:
        opened = Study.open(path)
        add_mixtures(opened, request)
    else:
        if shards is None:
            raise StudyError(
                "a new study needs a corpus", cure="Name it: --shards FOLDER, as `pack` wrote it"
            )
        corpus = ShardSet.open(shards)
        kept = _kept(reuse, freeze, corpus)
        if kept is not None and _is_default("num"):
            request = dataclasses.replace(request, num=kept.num_proxies)
        training = _training(
            corpus,
            vocab_size,
            model=model,
            seq_len=seq_len,
            batch_size=batch_size,
            tokens=parse_count(tokens),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            schedule=schedule,
            eval_tokens=None if eval_tokens == "all" else parse_count(eval_tokens),
            eval_every=eval_every,
        )
        changing = None
        if schedules is not None:
            changing = ScheduleRequest(num=schedules, num_segments=segments)
        opened = make_study(
            path,
            corpus,
            swarm=request,
            training=training,
            objective=parse_objective(objective, corpus.domains("valid")),
            mixtures_from=Path(source) if source else None,
            data_seed=data_seed,
            init_seed=init_seed,
            target_tokens=parse_count(target_tokens) if target_tokens else None,
            reuse=kept,
            schedules=changing,
        )
        for remark in kept.remarks if kept else ():
            click.echo(remark, err=True)
        if changing is not None:
            words = f"{changing.num} proxies more change their mixture, in {segments} segments"
            click.echo(f"{words}: {opened.schedules_path}", err=True)
    drawn = MixtureTable.read_csv(opened.mixtures_path)
    rows = coverage(drawn, opened.config.prior)
    uses = pools_in_use(opened, rows)
    for remark in pools_remarks(opened):
        click.echo(remark, err=True)
    if as_json:
        click.echo(json.dumps(coverage_table(rows, uses)))
        return
    show_coverage(opened, len(drawn), rows)
    if uses:
        show_pools(opened, uses)
    click.echo(f"Next: regmix-fast proxies {study or ''}".rstrip())


def _training(corpus: ShardSet, vocab_size: int | None, **settings: Any) -> Training:
    from regmix.cli.words import training_from

    return training_from(vocab_size=vocab_size or -(-corpus.vocab_size // 64) * 64, **settings)


def _kept(old: str | None, freeze: str | None, corpus: ShardSet) -> Reuse | None:
    """Return what is kept of the old study, None where none is named."""
    from regmix.errors import ConfigError
    from regmix.study import Study
    from regmix.swarm.reuse import plan_reuse

    if old is None:
        if freeze is not None:
            raise ConfigError(
                "--freeze keeps the ratios of another study", cure="Name it: --reuse OLD_STUDY"
            )
        return None
    names = None if freeze is None else [part.strip() for part in freeze.split(",")]
    return plan_reuse(Study.open(old), corpus, names)


def _is_default(name: str) -> bool:
    """Return whether a parameter of the command was left at its default."""
    from click.core import ParameterSource

    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT


def _refuse_useless(*, add: bool, propose: bool, replicates: bool, source: str | None) -> None:
    """Raise for an option that was given and that another one leaves without use."""
    from regmix.errors import ConfigError

    for option in click.get_current_context().command.params:
        name = option.name or ""
        if _is_default(name):
            continue
        for given, flag, used in (
            (replicates, "--replicates", _USED_BY_REPLICATES),
            (propose, "--propose", _USED_BY_PROPOSE),
            (add, "--add", _USED_BY_ADD),
        ):
            if given and name not in used:
                raise ConfigError(
                    f"{option.opts[0]} has no use with {flag}: the study keeps the settings that "
                    "it was made with",
                    cure=f"Leave {option.opts[0]} out, or make a new study",
                )
        if name == "segments" and _is_default("schedules"):
            raise ConfigError(
                "--segments has no use without --schedules", cure="Say how many: --schedules 32"
            )
        if name in ("rule", "max_epochs") and not propose:
            raise ConfigError(
                f"{option.opts[0]} has no use without --propose", cure="Say how many: --propose 8"
            )
        if name == "of" and not replicates:
            raise ConfigError(
                "--of has no use without --replicates", cure="Say how many: --replicates 4"
            )
        if source is not None and name in _USED_BY_DRAW:
            raise ConfigError(
                f"{option.opts[0]} has no use with --from: the file says which mixtures there are",
                cure=f"Leave out {option.opts[0]} or --from",
            )
