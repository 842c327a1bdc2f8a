"""Rows of the table: corpora, token files of other programs, documents."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import material
import xxhash
from material import Material
from readers import Read, reader

from regmix.errors import StorageError


def read_whole_corpus(path: Path) -> None:
    """Read a corpus in all the ways that commands do."""
    from regmix.data.inventory import domain_rows, sample_texts
    from regmix.data.sampling.sampler import MixtureSampler
    from regmix.data.shards import ShardSet
    from regmix.data.validation import read_windows

    shards = ShardSet.open(path)
    for split in shards.splits:
        for domain in shards.domains(split):
            shards.lazy_arrays(split, domain)
    if shards.damage():
        return
    list(domain_rows(shards))
    for split in shards.splits:
        for domain in shards.domains(split):
            shards.arrays(split, domain)
            shards.document_offsets(split, domain)
            shards.bytes_per_token(split, domain)
            sample_texts(shards, split, domain, num=1, seq_len=4)
    trained = shards.domains("train")
    if not trained:
        return
    sampler = MixtureSampler(
        shards, dict.fromkeys(trained, 1 / len(trained)), seq_len=4, batch_size=2
    )
    sampler.batch(0)
    for target in shards.domains("valid"):
        list(read_windows(shards, target, seq_len=8).batches(4))


# Corpora


@reader("manifest", "shards/manifest.json", "json", sign=lambda _, t: material.sign_json(t))
def _manifest(files: Material) -> None:
    read_whole_corpus(files.shards)


@reader("shard", "shards/train/web-0.tokens", "bytes")
def _shard(files: Material) -> None:
    read_whole_corpus(files.shards)


@reader("corpus tokenizer", "shards/tokenizer.json", "json")
def _corpus_tokenizer(files: Material) -> None:
    from regmix.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(files.shards / "tokenizer.json")
    ids, _ = tokenizer.encode(["any text: ü", "<|endoftext|>"])
    tokenizer.decode(ids.tolist())
    tokenizer.backend_text()


@reader("bytes of tokens", "foreign/tokenizer.json", "json")
def _bytes_of_tokens(files: Material) -> None:
    from regmix.data.foreign.description import describe

    read_whole_corpus(files.foreign)
    (files.foreign / "tokens.toml").rename(files.foreign / "aside")
    try:
        describe(files.foreign)
    finally:
        (files.foreign / "aside").rename(files.foreign / "tokens.toml")


@reader("tokenizer of another trainer", "export/tokenizer.json", "json")
def _other_tokenizer(files: Material) -> None:
    from regmix.data.formats import measure_bytes_per_token
    from regmix.data.shards import ShardSet

    measure_bytes_per_token(ShardSet.open(files.shards), files.export / "tokenizer.json")


@reader("packing.json", "shards/packing.json", "json")
def _packing(files: Material) -> None:
    from regmix.data.packing.plan import PackPlan
    from regmix.data.packing.report import make_report
    from regmix.data.shards import ShardSet

    sizes = dict.fromkeys(("source_bytes", "text_bytes", "disk_bytes", "working_bytes"), 1)
    plan = PackPlan(
        num_files=1, domains=("web",), **sizes, free_bytes=9, valid_fraction=None, ignored=()
    )
    make_report(ShardSet.open(files.shards), plan, 0.0).as_table()


# Token files of other programs


@reader("tokens.toml", "foreign/tokens.toml", "toml")
def _description(files: Material) -> None:
    from regmix.data.foreign.description import read_description, render

    render(read_description(files.foreign / "tokens.toml"))
    read_whole_corpus(files.foreign)


@reader("litpkds", "foreign/train_web_0000000000.bin", "bytes")
@reader("megatron index", "foreign/code_text_document.idx", "bytes")
@reader("megatron ids", "foreign/code_text_document.bin", "bytes")
@reader("npy", "foreign/legal.npy", "bytes")
@reader("raw ids", "foreign/plain.tokens", "bytes")
def _foreign(files: Material) -> None:
    read_whole_corpus(files.foreign)


@reader(
    "recorded checksums",
    "foreign-recorded/tokens.checksums.json",
    "json",
    sign=lambda _, t: material.sign_json(t),
)
def _checksums(files: Material) -> None:
    read_whole_corpus(files.sums)


# Documents


def _blocks_of(name: str) -> Read:
    def read(files: Material) -> None:
        from regmix.data.packing.documents import block_documents
        from regmix.data.packing.long_texts import LongText
        from regmix.data.packing.readers import Meter, read_blocks
        from regmix.data.packing.sources import find_sources

        (source,) = find_sources([files.documents / name]).files
        for block in read_blocks(source, Meter(), max_bytes=100_000):
            raw = b"".join(block.parts)
            for _, document in block_documents(block, raw, text_field="text", max_bytes=100_000):
                if isinstance(document, LongText):
                    list(document.chunks())

    return read


def _long_lines(files: Material) -> None:
    """JSON lines where 64 bytes are long, so that the way of long texts is taken."""
    from regmix.data.packing import documents, long_texts

    read = _blocks_of("web-0.jsonl")
    with (
        mock.patch.object(documents, "LONG_BYTES", 24),
        mock.patch.multiple(long_texts, LONG_BYTES=24, STEP_BYTES=16),
    ):
        read(files)


reader("long JSON lines", "documents/web-0.jsonl", "bytes")(_long_lines)
reader("JSON lines", "documents/web-0.jsonl", "bytes")(_blocks_of("web-0.jsonl"))
reader("text", "documents/web-0.txt", "bytes")(_blocks_of("web-0.txt"))
reader("gzip", "documents/web-0.jsonl.gz", "bytes")(_blocks_of("web-0.jsonl.gz"))
reader("zstd", "documents/web-0.jsonl.zst", "bytes")(_blocks_of("web-0.jsonl.zst"))
reader("parquet", "documents/web-0.parquet", "bytes")(_blocks_of("web-0.parquet"))


# What a stopped run of `pack` leaves


def _resumed(name: str) -> Read:
    """Go on with a copy of the folder, so that the stopped run stays as it is."""

    def read(files: Material) -> None:
        from regmix.data.packing.pack import pack

        folder = files.root / "packed-again"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(files.root / name, folder)
        options: dict[str, Any] = {"engine": "tokenizers", "workers": 1, "valid_fraction": 0.3}
        with contextlib.suppress(StorageError):  # a damaged unit is removed; run it again
            pack([files.root / "input"], folder, tokenizer=files.tokenizer, **options)
        pack([files.root / "input"], folder, tokenizer=files.tokenizer, **options)
        read_whole_corpus(folder)

    return read


# The name of a unit is that of domain, side and file.
UNIT = xxhash.xxh3_64_hexdigest(json.dumps(["code", "", "code-0.jsonl", 1]).encode())
reader("run.json of pack", "stopped/.packing/run.json", "json", slow=True)(_resumed("stopped"))
reader("note of pack", "stopped/.packing/web.split.json", "json", slow=True)(_resumed("stopped"))
reader("unit of pack", f"halfway/.packing/{UNIT}.unit", "bytes", slow=True)(_resumed("halfway"))


@reader(
    "half-done replacement",
    "replaced/.replacement/manifest.json",
    "json",
    sign=lambda _, t: material.sign_json(t),
)
def _replacement(files: Material) -> None:
    from regmix.data.packing.replacement import heal

    folder = files.root / "replaced-again"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files.replaced, folder)
    heal(folder)
    read_whole_corpus(folder)
