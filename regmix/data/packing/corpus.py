"""Documents per domain, from the files people have.

1. sources.py lists the files and gives each its domain and its side.
2. readers.py cuts a file into blocks of raw records, documents.py makes documents of them.
3. `read_documents` does both for one file in this process, counting in a `Tally` what it leaves
   out; packing does the same in many processes (encoder.py).

Enters: JSON lines, Parquet or plain text, compressed or not. Leaves: texts. Does not tokenize,
clean or deduplicate. Lines that hold nothing are no documents and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from regmix.data.packing.documents import EMPTY, TOO_LONG, Refusal, block_documents, side_of
from regmix.data.packing.long_texts import LongText
from regmix.data.packing.readers import DEFAULT_MAX_BYTES, Meter, read_blocks
from regmix.data.packing.sources import (
    DEFAULT_VALID_FRACTION,
    Source,
    Sources,
    check_domain,
    choose_sides,
    find_sources,
)
from regmix.errors import CorpusError

__all__ = [
    "DEFAULT_VALID_FRACTION",
    "Source",
    "Sources",
    "Tally",
    "check_domain",
    "choose_sides",
    "find_sources",
    "read_documents",
    "side_of",
]

NUM_EXAMPLES = 20


@dataclass
class Tally:
    """What reading has met so far; `examples` are the first records that could not be read."""

    num_bytes: int = 0  # of files as they lie on disk
    malformed: int = 0
    empty: int = 0
    too_long: int = 0
    examples: list[str] = field(default_factory=list)


def read_documents(
    source: Source,
    tally: Tally,
    *,
    text_field: str = "text",
    strict: bool = False,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Iterator[tuple[str, bytes]]:
    """Yield (text, its UTF-8 bytes) of each document, in file order.

    With `strict` the first record that cannot be read raises `CorpusError`.
    """
    meter = Meter()
    before, lines = tally.num_bytes, 0
    for block in read_blocks(source, meter, text_field=text_field, max_bytes=max_bytes):
        tally.num_bytes = before + meter.num_bytes
        raw = b"".join(block.parts)
        for number, text in block_documents(block, raw, text_field=text_field, max_bytes=max_bytes):
            if isinstance(text, Refusal):
                _count(tally, text, f"{source.path}, line {lines + number}: {text.words}", strict)
                continue
            whole = "".join(text.chunks()) if isinstance(text, LongText) else text
            yield whole, whole.encode()
        lines += block.num_lines(raw)
    tally.num_bytes = before + meter.num_bytes


def _count(tally: Tally, refusal: Refusal, what: str, strict: bool) -> None:
    if refusal.reason == EMPTY:
        tally.empty += 1
        return
    if strict:
        raise CorpusError(what, cure="Correct the line, or pack without --strict")
    if refusal.reason == TOO_LONG:
        tally.too_long += 1
    else:
        tally.malformed += 1
    if len(tally.examples) < NUM_EXAMPLES:
        tally.examples.append(what)
