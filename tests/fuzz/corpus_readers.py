"""Rows of the table: corpora, token files of other programs, documents."""

from __future__ import annotations

from pathlib import Path

import material
from material import Material
from readers import Read, reader


def read_whole_corpus(path: Path) -> None:
    """Read a corpus in all the ways that commands do."""
    from regmix.data.inventory import domain_rows, sample_texts
    from regmix.data.sampling.sampler import MixtureSampler
    from regmix.data.shards import ShardSet
    from regmix.data.validation import read_windows

    shards = ShardSet.open(path)
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

_CORPUS = (
    "regmix.data.manifest:read_manifest",
    "regmix.data.shards:PackedFile.ends_problem",
    "regmix.data.shards:PackedFile.load",
    "regmix.data.blocks:map_blocks.run",
    "regmix.data.blocks:_map",
    "regmix.data.blocks:map_stream",
)


@reader(
    "manifest", _CORPUS[0], "shards/manifest.json", "json", sign=lambda _, t: material.sign_json(t)
)
def _manifest(files: Material) -> None:
    read_whole_corpus(files.shards)


@reader("shard", _CORPUS[1:], "shards/train/web-0.tokens", "bytes")
def _shard(files: Material) -> None:
    read_whole_corpus(files.shards)


@reader("corpus tokenizer", "regmix.data.tokenizer:load_tokenizer", "shards/tokenizer.json", "json")
def _corpus_tokenizer(files: Material) -> None:
    from regmix.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(files.shards / "tokenizer.json")
    ids, _ = tokenizer.encode(["any text: ü", "<|endoftext|>"])
    tokenizer.decode(ids.tolist())
    tokenizer.backend_text()


@reader(
    "bytes of tokens",
    (
        "regmix.data.foreign.token_bytes:token_byte_lengths",
        "regmix.data.foreign.description:_separator",
    ),
    "foreign/tokenizer.json",
    "json",
)
def _bytes_of_tokens(files: Material) -> None:
    read_whole_corpus(files.foreign)
    (files.foreign / "tokens.toml").rename(files.foreign / "aside")
    try:
        from regmix.data.foreign.description import _separator

        _separator(files.foreign / "tokenizer.json")
    finally:
        (files.foreign / "aside").rename(files.foreign / "tokens.toml")


@reader(
    "tokenizer of another trainer",
    "regmix.data.formats:_load_backend",
    "export/tokenizer.json",
    "json",
)
def _other_tokenizer(files: Material) -> None:
    from regmix.data.formats import measure_bytes_per_token
    from regmix.data.shards import ShardSet

    measure_bytes_per_token(ShardSet.open(files.shards), files.export / "tokenizer.json")


@reader("packing.json", "regmix.data.packing.report:make_report", "shards/packing.json", "json")
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


@reader(
    "tokens.toml",
    ("regmix.config:read_toml", "regmix.data.foreign.description:read_description"),
    "foreign/tokens.toml",
    "toml",
)
def _description(files: Material) -> None:
    from regmix.data.foreign.description import read_description, render

    render(read_description(files.foreign / "tokens.toml"))
    read_whole_corpus(files.foreign)


@reader(
    "litpkds",
    (
        "regmix.data.foreign.litpkds:_num_padding",
        "regmix.data.foreign.token_file:read_start",
        "regmix.data.foreign.counting:count_tokens.count",
        "regmix.data.foreign.entry:ForeignFile.block_problem",
        "regmix.data.foreign.token_set:_windows",
    ),
    "foreign/train_web_0000000000.bin",
    "bytes",
)
@reader(
    "megatron index",
    ("regmix.data.foreign.megatron:read_megatron", "regmix.data.foreign.megatron:read_offsets"),
    "foreign/code_text_document.idx",
    "bytes",
)
@reader("megatron ids", (), "foreign/code_text_document.bin", "bytes")
@reader("npy", "regmix.data.foreign.raw_tokens:read_npy", "foreign/legal.npy", "bytes")
@reader("raw ids", (), "foreign/plain.tokens", "bytes")
def _foreign(files: Material) -> None:
    read_whole_corpus(files.foreign)


@reader(
    "recorded checksums",
    (
        "regmix.data.foreign.checksums:read_checksums",
        "regmix.data.foreign.checksums:ends_digest",
    ),
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


_JSON_LINES = (
    "regmix.data.packing.documents:line_documents",
    "regmix.data.packing.documents:_read_long",
    "regmix.data.packing.documents:_read_slowly",
    "regmix.data.packing.long_texts:_json_chunks",
    "regmix.data.packing.readers:_chunks",
)
reader("JSON lines", _JSON_LINES, "documents/web-0.jsonl", "bytes")(_blocks_of("web-0.jsonl"))
reader("text", (), "documents/web-0.txt", "bytes")(_blocks_of("web-0.txt"))
reader("gzip", (), "documents/web-0.jsonl.gz", "bytes")(_blocks_of("web-0.jsonl.gz"))
reader(
    "zstd",
    ("regmix.data.packing.readers:_Zstandard.__init__",),
    "documents/web-0.jsonl.zst",
    "bytes",
)(_blocks_of("web-0.jsonl.zst"))
reader(
    "parquet",
    (
        "regmix.data.packing.readers:_parquet_blocks",
        "regmix.data.packing.readers:_raw_values",
    ),
    "documents/web-0.parquet",
    "bytes",
)(_blocks_of("web-0.parquet"))
