"""`regmix-fast pack`: documents in, token shards out.

Enters: paths and options. Leaves: the cost before, progress, a table per domain, or JSON.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regmix.errors import printable

if TYPE_CHECKING:
    from regmix.data.manifest import ShardStats
    from regmix.data.packing.pack import PackPlan, PackReport

NUM_SHOWN = 10  # records left out that are shown


def _globs(pairs: tuple[str, ...]) -> dict[str, str]:
    globs: dict[str, str] = {}
    for pair in pairs:
        name, equals, glob = pair.partition("=")
        if not (name and equals and glob) or name in globs:
            raise click.BadParameter(
                f"'{pair}': write NAME=GLOB, each name once", param_hint="--domain"
            )
        globs[name] = glob
    return globs


@click.command("pack")
@click.argument("corpus", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the shards.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A Hugging Face tokenizer.json.")
@click.option(
    "--train-bpe",
    type=click.IntRange(257, 1 << 20),
    metavar="TOKENS",
    help="Train a byte-level BPE of this vocabulary (257 to 1048576).",
)
@click.option("--separator", help="Token that ends every document.  [default: <|endoftext|>]")
@click.option(
    "--valid-fraction",
    type=float,
    help="Share of documents to validate on, chosen by hash; only where no folder is named valid."
    "  [default: 0.03]",
)
@click.option(
    "--domain-by",
    type=click.Choice(["prefix", "folder"]),
    default="prefix",
    show_default=True,
    help="A file's domain: its name up to the last '-', or its folder.",
)
@click.option(
    "--domain", "domains", multiple=True, metavar="NAME=GLOB", help="A domain's files; repeatable."
)
@click.option("--text-field", default="text", show_default=True, help="Field that holds the text.")
@click.option("--strict", is_flag=True, help="Stop at the first record that cannot be read.")
@click.option(
    "--dedup",
    is_flag=True,
    help="Leave out exact duplicates over the whole corpus: the first of validation files, then "
    "of domains and files by name, stays. Takes 27 to 80 bytes of memory a document.",
)
@click.option(
    "--max-document-mb",
    type=click.IntRange(1, 2000),
    default=128,
    show_default=True,
    metavar="MB",
    help="Leave out longer records (a line, a .txt file, a value of Parquet).",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "fast", "tokenizers"]),
    default="auto",
    show_default=True,
    help="What encodes. fast: fastokens, a sample of every file compared with tokenizers. "
    "auto: fast, or tokenizers for the whole corpus where they differ.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace a corpus that is there already, once the new one is complete beside it.",
)
@click.option("--workers", type=click.IntRange(1), help="Encoding processes.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    corpus: tuple[Path, ...], out: Path, domains: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Turn documents into token shards, per domain.

    CORPUS: files or folders of .jsonl, .json (lines), .txt (each also .gz or .zst) or .parquet.
    Files in a folder named train or valid (val, validation) belong to that side. Without a
    tokenizer a byte-level BPE of 8192 tokens is trained on the corpus. Run the same command again
    to go on after a stop: files that are encoded are not encoded again. What is left out, and why,
    is counted in the report and listed in dropped.jsonl (the first 1000 of each domain, split and
    reason).

    \b
    Example:
      regmix-fast pack corpus/ --out shards --tokenizer tokenizer.json
      regmix-fast pack crawl/ --out shards --tokenizer tokenizer.json --dedup
      regmix-fast pack raw/ --out shards --domain web='crawl/*' --domain code='*.py.txt'
    """
    from regmix.data.packing.pack import pack
    from regmix.display import Progress, count, size

    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def planned(plan: PackPlan) -> None:
            if not as_json:
                _show_plan(plan)
            bar = Progress("pack", total=plan.source_bytes / 1e6, unit="MB")
            bars.append(stack.enter_context(bar))

        def progressed(done: int, domain: str, tokens: int) -> None:
            bars[0].update(done / 1e6, domain=domain, tokens=count(tokens))

        report = pack(
            corpus,
            out,
            domains=_globs(domains),
            on_plan=planned,
            on_progress=progressed,
            on_message=lambda words: click.echo(words, err=True),
            **options,
        )
    if as_json:
        click.echo(json.dumps(report.as_table(), indent=2))
        return
    _show_report(report)
    click.echo(
        f"{'Already complete' if report.already_complete else 'Packed'}: {report.path}, "
        f"{size(report.disk_bytes)} as {report.dtype}, vocabulary {report.tokenizer.vocab_size}, "
        f"checksum {report.checksum}, {report.seconds:.1f} s"
    )
    click.echo(f"Next: regmix-fast mixtures STUDY --shards {out} --num 64")


def _show_plan(plan: PackPlan) -> None:
    from regmix.display import size

    click.echo(
        f"Packing {plan.num_files} files, {len(plan.domains)} domains: reads "
        f"{size(plan.source_bytes)} (about {size(plan.text_bytes)} of text), "
        f"writes about {size(plan.disk_bytes)}; {size(plan.free_bytes)} free"
    )
    if plan.valid_fraction is not None:
        click.echo(f"Validation: {plan.valid_fraction:.1%} of the documents, chosen by their hash")
    if plan.ignored:
        shown = ", ".join(plan.ignored[:5]) + (", ..." if len(plan.ignored) > 5 else "")
        words = f"{len(plan.ignored)} files ({printable(shown)})"
        click.echo(f"Not read, no documents of any domain: {words}")


def _show_report(report: PackReport) -> None:
    from rich.table import Table

    from regmix.display import console, size

    table = Table(title="Shards")
    for name in ("split", "domain", "documents", "tokens", "text MB", "bytes/token", "left out"):
        table.add_column(name, justify="left" if name in ("split", "domain") else "right")
    for split, domains in report.splits.items():
        for domain, stats in domains.items():
            text = stats.utf8_bytes
            table.add_row(
                split,
                domain,
                f"{stats.documents:,}",
                f"{stats.tokens:,}",
                "" if text is None else f"{text / 1e6:,.2f}",
                "" if text is None else f"{text / stats.tokens:.2f}",
                f"{sum(_dropped(stats).values()):,}",
            )
    console().print(table)
    _show_dropped(report)
    verified = f"{report.verified_documents:,} documents, {size(report.verified_bytes)} of text"
    if report.engine != "tokenizers":
        click.echo(
            f"Encoded by {report.engine} {report.engine_version}; compared with tokenizers, "
            f"no difference: {verified}"
        )
    elif report.engine_reason != "asked for":
        click.echo(f"Encoded by tokenizers {report.engine_version}: {report.engine_reason}")
    if report.resumed_files:
        click.echo(f"Encoded by an earlier run: {report.resumed_files:,} files")


def _dropped(stats: ShardStats) -> dict[str, int]:
    return {
        "malformed": stats.malformed,
        "without text": stats.empty,
        "too long": stats.too_long,
        "without a token": stats.no_token,
        "duplicates": stats.duplicate,
    }


def _show_dropped(report: PackReport) -> None:
    every = [stats for domains in report.splits.values() for stats in domains.values()]
    sums: dict[str, int] = {}
    for stats in every:
        for reason, number in _dropped(stats).items():
            sums[reason] = sums.get(reason, 0) + number
    if report.records is not None:
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in sums.items() if number)
        packed = sum(stats.documents for stats in every)
        click.echo(
            f"Records: {report.records:,} read = {packed:,} packed + "
            f"{sum(sums.values()):,} left out{f' ({left_out})' if left_out else ''}"
        )
    for example in report.dropped_examples[:NUM_SHOWN]:
        click.echo(f"  {printable(example)}")
    if report.dropped_list:
        click.echo(f"All (at most 1000 of a domain, split and reason): {report.dropped_list}")
