"""`regmix-fast pack`: documents in, token shards out.

Enters: paths and options. Leaves: the cost before, progress, a table per domain, or JSON.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.data.pack import PackPlan, PackReport


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
    "--force",
    is_flag=True,
    help="Replace a corpus that is there already, once the new one is complete beside it.",
)
@click.option("--workers", type=click.IntRange(1), help="Encoding threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    corpus: tuple[Path, ...], out: Path, domains: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Turn documents into token shards, per domain.

    CORPUS: files or folders of .jsonl, .json (lines), .txt (each also .gz or .zst) or .parquet.
    Files in a folder named train or valid (val, validation) belong to that side. Without a
    tokenizer a byte-level BPE of 8192 tokens is trained on the corpus. Run the same command again
    to go on after a stop.

    \b
    Example:
      regmix-fast pack corpus/ --out shards --tokenizer tokenizer.json
      regmix-fast pack raw/ --out shards --domain web='crawl/*' --domain code='*.py.txt'
    """
    from regmix.data.pack import pack
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
        click.echo(f"Not read, no documents of any domain: {len(plan.ignored)} files ({shown})")


def _show_report(report: PackReport) -> None:
    from rich.table import Table

    from regmix.display import console

    table = Table(title="Shards")
    for name in ("split", "domain", "documents", "tokens", "text MB", "bytes/token", "left out"):
        table.add_column(name, justify="left" if name in ("split", "domain") else "right")
    for split, domains in report.splits.items():
        for domain, stats in domains.items():
            table.add_row(
                split,
                domain,
                f"{stats.documents:,}",
                f"{stats.tokens:,}",
                f"{stats.utf8_bytes / 1e6:,.2f}",
                f"{stats.utf8_bytes / stats.tokens:.2f}",
                f"{stats.malformed + stats.empty:,}",
            )
    console().print(table)
    every = [stats for domains in report.splits.values() for stats in domains.values()]
    malformed, empty = sum(s.malformed for s in every), sum(s.empty for s in every)
    if malformed or empty:
        click.echo(f"Left out: {malformed:,} malformed records, {empty:,} documents without text")
    for example in report.malformed_examples:
        click.echo(f"  {example}")
    if report.resumed_domains:
        click.echo(f"Finished by an earlier run: {', '.join(report.resumed_domains)}")
