"""`regmix-fast inspect`: what shards hold, and what a budget means in epochs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regmix.data.inventory import BudgetRow, DomainRow
    from regmix.data.shards import ShardSet


@click.command()
@click.argument("shards", type=click.Path())
@click.option("--sample", type=click.IntRange(min=1), help="Print N sequences of --domain as text.")
@click.option("--domain", help="Domain of the sample.  [default: the first]")
@click.option("--split", default="train", show_default=True, help="Split of the sample.")
@click.option(
    "--seq-len", type=click.IntRange(min=1), help="Tokens of a sequence.  [default: 2048]"
)
@click.option("--budget-tokens", help="Tokens of a run, such as 25B: show epochs by domain.")
@click.option(
    "--mixture", default="natural", show_default=True, help="natural, uniform, or a mixture's file."
)
@click.option("--describe", is_flag=True, help="Print the tokens.toml of another program's files.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(
    shards: str,
    sample: int | None,
    domain: str | None,
    split: str,
    seq_len: int | None,
    budget_tokens: str | None,
    mixture: str,
    describe: bool,
    as_json: bool,
) -> None:
    """Show what SHARDS hold: domains, documents, tokens, tokenizer, settings and sources.

    SHARDS is a folder that `pack` wrote, or token files of another program: a folder of them, or
    a tokens.toml. --sample shows the first sequences that a run would read; --budget-tokens shows
    how often a run passes over each domain, exactly as the sampler deals them.

    \b
    Examples:
      regmix-fast inspect shards
      regmix-fast inspect shards --sample 3 --domain web --seq-len 256
      regmix-fast inspect shards --budget-tokens 25B --mixture optimum.yaml
      regmix-fast inspect lit_dataset_regmix --describe > lit_dataset_regmix/tokens.toml
    """
    from regmix.data.inventory import budget_rows, sample_texts
    from regmix.data.shards import ShardSet

    _refuse_unused()
    if describe:
        click.echo(_description(shards), nl=False)
        return
    opened = ShardSet.open(shards)
    length = seq_len or 2048
    answer: dict[str, Any] = {"path": str(opened.path), "checksum": opened.checksum}
    if sample is not None:
        chosen = domain if domain is not None else _first_domain(opened, split)
        texts = sample_texts(opened, split, chosen, num=sample, seq_len=length)
        answer.update(split=split, domain=chosen, seq_len=length)
        answer["sample"] = [{"sequence": number, "text": text} for number, text in texts]
    elif budget_tokens is not None:
        weights, budget = _mixture(opened, mixture), _count(budget_tokens)
        answer.update(budget_tokens=budget, seq_len=length, mixture=mixture)
        answer["plan"] = budget_rows(opened, weights, budget_tokens=budget, seq_len=length)
    else:
        answer.update(_facts(opened), domains=_rows(opened))
    if as_json:
        click.echo(json.dumps(answer, default=dataclasses.asdict))
        return
    if sample is not None:
        _show_sample(texts, answer, sample)
    elif budget_tokens is not None:
        _show_budget(answer["plan"], answer["budget_tokens"], mixture, length)
    else:
        _show_domains(answer["domains"])
        _show_facts(answer)
    click.echo(f"Next: regmix-fast mixtures STUDY --shards {shards} --num 64")


_VIEWS = ("sample", "budget_tokens", "describe")  # one at a time
_SERVES = {
    "domain": ("sample",),
    "split": ("sample",),
    "seq_len": ("sample", "budget_tokens"),
    "mixture": ("budget_tokens",),
}


def _refuse_unused() -> None:
    """Raise `ConfigError` where an option would have no effect."""
    from click.core import ParameterSource

    from regmix.errors import ConfigError

    context = click.get_current_context()
    unset = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    given = [name for name in context.params if context.get_parameter_source(name) not in unset]
    word = {str(option.name): option.opts[0] for option in context.command.params}
    views = [name for name in _VIEWS if name in given]
    if len(views) > 1:
        raise ConfigError(
            f"{' and '.join(word[name] for name in views)} show different things",
            cure="Ask for one at a time",
        )
    if {"describe", "as_json"} <= set(given):
        raise ConfigError("--describe prints TOML, not JSON", cure="Leave --json out")
    for name in given:
        served = _SERVES.get(name)
        if served is not None and not set(views) & set(served):
            cure = f"Give {' or '.join(word[use] for use in served)}, or leave it out"
            raise ConfigError(f"{word[name]} has no effect here", cure=cure)


def _first_domain(shards: ShardSet, split: str) -> str:
    from regmix.errors import ShardError, nearest

    if not shards.domains(split):
        raise ShardError(
            f"{shards.path}: no split '{split}' ({nearest(split, shards.splits)})",
            cure="Name a split that is there",
        )
    return shards.domains(split)[0]


def _description(path: str) -> str:
    from pathlib import Path

    from regmix.data.foreign.description import DESCRIPTION, describe, read_description, render
    from regmix.errors import ShardError

    given = Path(path)
    for place in (given, given / DESCRIPTION):
        if place.suffix == ".toml" and place.is_file():
            return render(read_description(place))
    description = describe(given) if given.is_dir() else None
    if description is None:
        raise ShardError(
            f"{path}: no token files of another program in a layout that is known",
            cure=f"Write {given / DESCRIPTION} by hand: docs/formats.md shows one",
        )
    return render(description)


def _count(text: str) -> int:
    from regmix.cli.words import parse_count

    return parse_count(text)


def _mixture(shards: ShardSet, name: str) -> Mapping[str, float]:
    """Return the mixture that a name or a file says."""
    from pathlib import Path

    from regmix.errors import MixtureError
    from regmix.swarm.drawing import natural_mixture, read_mixtures

    domains = shards.domains("train")
    if name == "natural":
        return natural_mixture(shards)
    if name == "uniform":
        return {domain: 1 / len(domains) for domain in domains}
    if not Path(name).is_file():
        raise MixtureError(
            f"no mixture '{name}': neither a file nor natural or uniform",
            cure="Name a mixture or a YAML file",
        )
    table = read_mixtures(Path(name), domains)
    if len(table) != 1:
        raise MixtureError(
            f"{name}: holds {len(table)} mixtures", cure="Name a file with one mixture"
        )
    return table.mixture(0)


def _rows(shards: ShardSet) -> list[DomainRow]:
    from regmix.data.inventory import domain_rows
    from regmix.display import Progress, count

    total = sum(shards.stats(s, d).tokens for s in shards.splits for d in shards.domains(s))
    rows, done = [], 0
    with Progress("inspect", total=total / 1e6, unit="M tokens") as bar:
        for row in domain_rows(shards):
            rows.append(row)
            done += row.tokens
            bar.update(done / 1e6, domain=row.domain, documents=count(row.documents))
    return rows


def _facts(shards: ShardSet) -> dict[str, Any]:
    from regmix.data.foreign.token_set import ForeignSet

    manifest = shards.manifest
    sources = [dataclasses.asdict(source) for source in manifest.sources]
    facts = {
        "dtype": shards.dtype,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "settings": dict(manifest.settings),
        "sources": sources,
        "remarks": [],
    }
    if isinstance(shards, ForeignSet):
        facts["remarks"] = shards.remarks()
    return facts


def _show_domains(rows: Sequence[DomainRow]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from regmix.display import console, count, size

    for split in dict.fromkeys(row.split for row in rows):
        table = Table(
            title=f"{split}, documents' lengths in tokens",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("domain", no_wrap=True)
        for name in ("documents", "tokens", "bytes per token", "mean", "median", "files", "size"):
            table.add_column(name, justify="right")
        for row in rows:
            if row.split != split:
                continue
            table.add_row(
                row.domain,
                f"{row.documents:,}",
                count(row.tokens),
                "unknown" if row.bytes_per_token is None else f"{row.bytes_per_token:.2f}",
                count(row.mean_tokens),
                count(row.median_tokens),
                f"{row.files:,}",
                size(row.file_bytes),
            )
        console().print(table)


def _show_facts(answer: dict[str, Any]) -> None:
    from regmix.display import size

    tokenizer, rows = answer["tokenizer"], answer["domains"]
    click.echo(
        f"Corpus: {answer['path']}, {sum(row.tokens for row in rows):,} tokens as "
        f"{answer['dtype']}, checksum {answer['checksum']}"
    )
    click.echo(
        f"Tokenizer: {tokenizer['file']}, {tokenizer['vocab_size']:,} ids, separator "
        f"'{tokenizer['separator']}' ({tokenizer['separator_id']}), checksum {tokenizer['xxh3']}"
    )
    if answer["settings"]:
        pairs = ", ".join(f"{name} {value}" for name, value in answer["settings"].items())
        click.echo(f"Packed with: {pairs}")
    if sources := answer["sources"]:
        total = sum(source["bytes"] for source in sources)
        names = ", ".join(source["path"] for source in sources[:3])
        more = ", ..." if len(sources) > 3 else ""
        click.echo(f"Sources: {len(sources):,} files, {size(total)} ({names}{more})")
        reasons: dict[str, int] = {}
        for row in rows:
            for reason, number in row.left_out.items():
                reasons[reason] = reasons.get(reason, 0) + number
        words = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in reasons.items())
        click.echo(f"Left out: {words or 'no record'}")
    for remark in answer["remarks"]:
        click.echo(remark)


def _show_budget(plan: Sequence[BudgetRow], budget: int, mixture: str, seq_len: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from regmix.data.inventory import MOST_EPOCHS
    from regmix.display import console, count

    dealt = sum(row.sequences for row in plan)
    table = Table(
        title=f"{count(budget)} tokens of the mixture '{mixture}': {dealt:,} "
        f"{'sequence' if dealt == 1 else 'sequences'} of {seq_len:,} tokens",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = ("weight", "tokens", "sequences", "there are", "epochs", "tail tokens")
    table.add_column("domain", no_wrap=True)
    for name in headings:
        table.add_column(name, justify="right")
    for row in plan:
        mark = " !" if row.epochs > MOST_EPOCHS else ""
        table.add_row(
            row.domain + mark,
            f"{row.weight:.2%}",
            count(row.tokens),
            f"{row.sequences:,}",
            f"{row.available_sequences:,}",
            "<0.01" if 0 < row.epochs < 0.005 else f"{row.epochs:,.2f}",
            f"{row.tail_tokens:,}",
        )
    console().print(table)
    many = [row.domain for row in plan if row.epochs > MOST_EPOCHS]
    if many:
        click.echo(f"! above {MOST_EPOCHS} epochs: {', '.join(many)}")
    click.echo(
        f"Tail tokens: {sum(row.tail_tokens for row in plan):,}, at the ends of the domains, "
        "are not trained at this length"
    )


def _show_sample(texts: Sequence[tuple[int, str]], answer: Mapping[str, Any], asked: int) -> None:
    from regmix.data.inventory import escape

    whose, length = f"{answer['domain']} ({answer['split']})", f"{answer['seq_len']:,} tokens"
    for number, text in texts:
        click.echo(f"--- {whose}, sequence {number:,}, {length} ---")
        click.echo(escape(text))
    click.echo("---")
    if len(texts) < asked:
        click.echo(f"{whose} has {len(texts):,} of {length}: all are shown")
