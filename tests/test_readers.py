"""Blocks: however a file is cut into chunks and blocks, its records and their lines stay."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regmix.data.packing.documents import TOO_LONG, Refusal, line_documents
from regmix.data.packing.readers import Block, line_blocks

PIECES = st.sampled_from(
    [b"\n", b"\r\n", b"{}", b'{"text": "a"}', b'{"text": ""}', b"x", b" ", b"\xff"]
)


def documents(blocks: list[Block], max_bytes: int) -> list[tuple[int, object]]:
    """The records of blocks with their line numbers in the file."""
    found: list[tuple[int, object]] = []
    lines = 0
    for block in blocks:
        raw = b"".join(block.parts)
        if block.kind == "skipped":
            found.append((lines + 1, TOO_LONG))
        else:
            for number, text in line_documents(
                raw, first=block.first, text_field="text", max_bytes=max_bytes
            ):
                known = isinstance(text, Refusal)
                found.append((lines + number, text.reason if known else text))  # type: ignore[union-attr]
        lines += block.num_lines(raw)
    return found


def cut(raw: bytes, sizes: list[int]) -> list[bytes]:
    chunks, place = [], 0
    for size in sizes:
        chunks.append(raw[place : place + size])
        place += size
    return [chunk for chunk in [*chunks, raw[place:]] if chunk]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(PIECES, max_size=60).map(b"".join),
    st.lists(st.integers(1, 9), max_size=60),
    st.integers(1, 40),
    st.integers(1, 60),
)
def test_any_chunks_and_blocks_give_the_same_records_and_line_numbers(
    raw: bytes, sizes: list[int], block_bytes: int, max_bytes: int
) -> None:
    whole = list(line_blocks([raw] if raw else [], max_bytes=1 << 20, block_bytes=1 << 20))
    blocks = list(line_blocks(cut(raw, sizes), max_bytes=max_bytes, block_bytes=block_bytes))
    wanted = documents(whole, max_bytes)
    got = documents(blocks, max_bytes)
    assert got == wanted
    kept = b"".join(part for block in blocks for part in block.parts)
    if all(block.kind == "lines" for block in blocks):
        assert kept == raw


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 20))
def test_no_block_holds_more_than_a_record_above_its_size(lengths: list[int], size: int) -> None:
    raw = b"".join(b"x" * length + b"\n" for length in lengths)
    chunks = cut(raw, [5] * len(raw))
    for block in line_blocks(chunks, max_bytes=30, block_bytes=size):
        assert block.num_bytes <= max(31, size + 30 + 5)
        assert (block.kind == "skipped") == (block.skipped_bytes > 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_byte_order_mark_is_passed_over_however_it_is_cut(size: int) -> None:
    raw = b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'
    blocks = list(line_blocks(cut(raw, [size] * 40), max_bytes=100, block_bytes=size))
    assert documents(blocks, 100) == [(1, "a"), (2, "b")]


def test_a_line_above_the_limit_is_left_out_with_its_number_and_size() -> None:
    raw = b'{"text": "a"}\n{"text": "' + b"b" * 5000 + b'"}\n{"text": "c"}\n'
    blocks = list(line_blocks(cut(raw, [100] * 60), max_bytes=1000, block_bytes=200))
    assert [block.skipped_bytes for block in blocks if block.kind == "skipped"] == [5012]
    assert documents(blocks, 1000) == [(1, "a"), (2, TOO_LONG), (3, "c")]


@pytest.mark.parametrize("last", [b"", b"\n"])
def test_a_last_line_above_the_limit_is_left_out_with_or_without_its_end(last: bytes) -> None:
    raw = b'{"text": "a"}\n' + b"x" * 3000 + last
    blocks = list(line_blocks(cut(raw, [700] * 9), max_bytes=1000, block_bytes=200))
    assert documents(blocks, 1000) == [(1, "a"), (2, TOO_LONG)]


def test_a_line_of_exactly_the_limit_is_kept() -> None:
    line = json.dumps({"text": "x" * 100}).encode()
    for end in (b"", b"\n"):
        blocks = list(line_blocks([line + end], max_bytes=len(line), block_bytes=10))
        assert documents(blocks, len(line)) == [(1, "x" * 100)]
        assert documents(blocks, len(line) - 1) == [(1, TOO_LONG)]
