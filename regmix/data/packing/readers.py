"""A source as blocks of raw records, in bounded memory whatever the size of the file.

1. `_chunks` reads a file in steps and decompresses it, hashing what lies on disk.
2. `line_blocks` cuts the bytes between lines, about `BLOCK_BYTES` together; a longer line has a
   block of its own, and of a line above the limit nothing but its place is kept.
3. A .txt file is one record; Parquet gives the values of one column.

Enters: a `Source`. Leaves: `Block`s in file order. Parses no JSON and decodes no text: that is
documents.py's, in another process.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import xxhash

from regmix.data.packing.sources import Source
from regmix.errors import CorpusError
from regmix.files import checksum, storage_errors

CHUNK_BYTES = 1 << 18
BLOCK_BYTES = 1 << 20  # of text per block: 10 ms of work for an encoder
# Fed to zstd at once: a block of 4 bytes can hold 128 KiB, so at most 32 MiB come out.
ZSTD_STEP_BYTES = 1 << 10
PARQUET_ROWS = 64  # read at once, at most
PARQUET_BYTES = 64 << 20  # of text unpacked at once, but for a longer value
DEFAULT_MAX_BYTES = 128_000_000  # a longer record is left out
LONG_RECORD_BYTES = 16 << 20  # of which one at a time is read, whatever the number of files


@dataclass(frozen=True, kw_only=True)
class Block:
    """Raw records that follow each other in a file.

    `kind` is "lines", "text" (a whole .txt file), "values" (of Parquet, `lengths` bytes each) or
    "skipped": one record above the limit, without its bytes.
    """

    kind: str
    parts: tuple[bytes | memoryview, ...] = ()
    first: bool = False  # of its file, where a byte-order mark may stand
    lengths: tuple[int, ...] = ()
    refused: Mapping[int, str] = field(default_factory=dict)  # values that are none, and why
    skipped_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """The bytes of the records in the block."""
        return sum(len(part) for part in self.parts)

    def num_lines(self, raw: bytes | bytearray) -> int:
        """Return how many lines, or rows, the block with the bytes `raw` moves the file on."""
        if self.kind == "lines":
            return raw.count(b"\n")
        return len(self.lengths) if self.kind == "values" else 1


class Meter:
    """How much of a file is read, and the xxh3_64 of that as the file lies on disk."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._digest = xxhash.xxh3_64()
        self._known: str | None = None

    def add(self, raw: bytes) -> None:
        """Count bytes that were read in file order."""
        self.num_bytes += len(raw)
        self._digest.update(raw)

    def know(self, checksum: str) -> None:
        """Set the checksum of a file that is not read in order."""
        self._known = checksum

    @property
    def checksum(self) -> str:
        """The checksum of the file once it is read to its end."""
        return self._known or self._digest.hexdigest()


def read_blocks(
    source: Source,
    meter: Meter,
    *,
    text_field: str = "text",
    max_bytes: int = DEFAULT_MAX_BYTES,
    block_bytes: int | None = None,
    on_long: Callable[[], None] | None = None,
) -> Iterator[Block]:
    """Yield the records of a file as blocks; a record above `max_bytes` is never held whole.

    `on_long` is called when a record is seen to be long, before the rest of it is read.
    `CorpusError` where a compressed or Parquet file is damaged or cut short.
    """
    size = block_bytes or BLOCK_BYTES
    if source.format == "parquet":
        meter.know(checksum(source.path))
        yield from _parquet_blocks(source, meter, text_field, max_bytes, size)
    elif source.format == "text":
        yield _text_block(_chunks(source, meter), max_bytes, on_long)
    else:
        yield from line_blocks(
            _chunks(source, meter), max_bytes=max_bytes, block_bytes=size, on_long=on_long
        )


def line_blocks(
    chunks: Iterable[bytes],
    *,
    max_bytes: int,
    block_bytes: int,
    on_long: Callable[[], None] | None = None,
) -> Iterator[Block]:
    """Cut a stream of bytes into blocks of whole lines; the last line may lack its newline.

    A line is passed over from the chunk in which it is seen to be above `max_bytes`.
    """
    whole: list[bytes | memoryview] = []  # lines that are ended
    tail: list[bytes | memoryview] = []  # the line that is not
    whole_size = tail_size = skipped = 0
    first = True
    for chunk in chunks:
        start = 0
        if skipped:
            start = chunk.find(b"\n") + 1
            if not start:
                skipped += len(chunk)
                continue
            yield Block(kind="skipped", skipped_bytes=skipped + start - 1)
            skipped = 0
        view = memoryview(chunk)
        last = chunk.rfind(b"\n", start) + 1
        if last:
            if tail_size > block_bytes:
                end = chunk.find(b"\n", start) + 1
                if whole:
                    yield Block(kind="lines", parts=tuple(whole), first=first)
                    first = False
                yield Block(kind="lines", parts=(*tail, view[start:end]), first=first)
                first, whole, whole_size, tail, tail_size = False, [], 0, [], 0
                start = end
            whole += [*tail, view[start:last]]
            whole_size += tail_size + last - start
            tail, tail_size = [], 0
        rest = view[last or start :]
        tail.append(rest)
        tail_size += len(rest)
        if whole_size >= block_bytes or (whole_size and tail_size > max_bytes):
            yield Block(kind="lines", parts=tuple(whole), first=first)
            first, whole, whole_size = False, [], 0
        if on_long is not None and tail_size > LONG_RECORD_BYTES:
            on_long()
        if tail_size > max_bytes:
            first, skipped, tail, tail_size = False, tail_size, [], 0
    if skipped:
        yield Block(kind="skipped", skipped_bytes=skipped)
    elif whole_size + tail_size:
        yield Block(kind="lines", parts=(*whole, *tail), first=first)


def _text_block(
    chunks: Iterable[bytes], max_bytes: int, on_long: Callable[[], None] | None
) -> Block:
    parts: list[bytes | memoryview] = []
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            parts = []
        else:
            parts.append(chunk)
        if on_long is not None and size > LONG_RECORD_BYTES:
            on_long()
    if size > max_bytes:
        return Block(kind="skipped", skipped_bytes=size)
    return Block(kind="text", parts=tuple(parts), first=True)


def _parquet_blocks(
    source: Source, meter: Meter, text_field: str, max_bytes: int, block_bytes: int
) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    gathered = _Values(max_bytes)
    try:
        # Pages are read one by one: a row group as a whole may be larger than memory.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=CHUNK_BYTES) as file:
            if text_field not in file.schema_arrow.names:
                raise CorpusError(
                    f"{source.path}: no column '{text_field}' "
                    f"(columns: {', '.join(file.schema_arrow.names)})",
                    cure="Name the column with --text-field",
                )
            rows = max(1, file.metadata.num_rows)
            at_once = _rows_at_once(file.metadata, text_field)
            for batch in file.iter_batches(at_once, columns=[text_field], use_threads=False):
                meter.num_bytes += source.num_bytes * len(batch) // rows
                yield from gathered.add(batch.column(0), block_bytes)
        yield from gathered.flush()
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(source, error) from error


def _rows_at_once(metadata: Any, text_field: str) -> int:
    """Return how many rows may be unpacked at once: together no more than `PARQUET_BYTES`, or 1.

    A value that a dictionary holds once is unpacked for every row: 28 kB can hold 100 of 30 MB. It
    is never larger than all of its column in a row group is before compression.
    """
    largest = 1
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        sizes = (c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
        largest = max(largest, *sizes, 1)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES // largest))


class _Values:
    """Values of a column, gathered to blocks; one above the limit is a block without its bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._first = True
        self._start()

    def _start(self) -> None:
        self._parts: list[bytes | memoryview] = []
        self._lengths: list[int] = []
        self._refused: dict[int, str] = {}
        self._size = 0

    def add(self, column: Any, block_bytes: int) -> Iterator[Block]:
        """Take a batch of the column in; yields the blocks that are full."""
        for value in _raw_values(column):
            if isinstance(value, str):
                self._refused[len(self._lengths)] = value
                self._lengths.append(0)
                continue
            if len(value) > self._max_bytes:
                yield from self.flush()
                yield Block(kind="skipped", skipped_bytes=len(value))
                continue
            if self._size + len(value) > 2 * block_bytes:
                yield from self.flush()
            self._parts.append(value)
            self._lengths.append(len(value))
            self._size += len(value)
        if self._size >= block_bytes:
            yield from self.flush()

    def flush(self) -> Iterator[Block]:
        """Yield what is gathered, if anything."""
        if self._lengths:
            block = Block(
                kind="values",
                parts=tuple(self._parts),
                lengths=tuple(self._lengths),
                refused=self._refused,
            )
            self._start()
            yield block


def _raw_values(column: Any) -> Iterator[memoryview | str]:
    """Yield the bytes of each value, or in words why it is no text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    wide = pyarrow.types.is_large_string(column.type)
    if not (wide or pyarrow.types.is_string(column.type)):
        for scalar in column:
            value = scalar.as_py()
            if isinstance(value, str):
                yield memoryview(value.encode())
            else:
                yield "null" if value is None else type(value).__name__
        return
    import numpy as np

    _, offsets, data = column.buffers()
    item = np.dtype(np.int64 if wide else np.int32)
    places = np.frombuffer(
        offsets, item, len(column) + 1, offset=column.offset * item.itemsize
    ).tolist()
    raw = memoryview(data) if data is not None else memoryview(b"")
    valid = column.is_valid().to_pylist()
    for row, there in enumerate(valid):
        yield raw[places[row] : places[row + 1]] if there else "null"


def damaged(source: Source, error: object) -> CorpusError:
    """Return the error of a file that cannot be read to its end."""
    return CorpusError(
        f"{source.path} (domain '{source.domain}'): damaged or cut short "
        f"({' '.join(str(error).split())})",
        cure="Copy or download the file again",
    )


class _Metered:
    """A file whose bytes are counted and hashed as they are read, for gzip."""

    def __init__(self, stream: IO[bytes], meter: Meter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes."""
        raw = self._stream.read(size)
        self._meter.add(raw)
        return raw


def _chunks(source: Source, meter: Meter) -> Iterator[bytes]:
    """Yield the file's bytes, decompressed; `CorpusError` where the compressed stream is cut."""
    with storage_errors(source.path), open(source.path, "rb", buffering=0) as stream:
        if source.compression == ".gz":
            metered: Any = _Metered(stream, meter)
            decompressed = gzip.GzipFile(fileobj=metered)
            while True:
                try:
                    chunk = decompressed.read(CHUNK_BYTES)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise damaged(source, error) from error
                if not chunk:
                    break
                yield chunk
        zstd = _Zstandard(source) if source.compression == ".zst" else None
        while raw := stream.read(CHUNK_BYTES):
            meter.add(raw)
            if zstd:
                yield from zstd.decompress(raw)
            else:
                yield raw
        if zstd:
            zstd.finish()
        if source.compression and not meter.num_bytes:
            raise damaged(source, "no bytes")


class _Zstandard:
    """Decompress frame after frame; unlike the library's reader, notice a frame that is cut."""

    def __init__(self, source: Source) -> None:
        import zstandard

        self._source = source
        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None

    def decompress(self, raw: bytes) -> Iterator[bytes]:
        """Yield what comes out of the next bytes of the file."""
        gathered: list[bytes] = []
        size = 0
        for start in range(0, len(raw), ZSTD_STEP_BYTES):
            step = raw[start : start + ZSTD_STEP_BYTES]
            while step:
                self._frame = self._frame or self._new()
                try:
                    gathered.append(self._frame.decompress(step))
                except self._error as error:
                    raise damaged(self._source, error) from error
                size += len(gathered[-1])
                if size >= CHUNK_BYTES:
                    yield gathered[0] if len(gathered) == 1 else b"".join(gathered)
                    gathered, size = [], 0
                if not self._frame.eof:
                    break
                step, self._frame = self._frame.unused_data, None
        if size:
            yield b"".join(gathered)

    def finish(self) -> None:
        """Raise `CorpusError` if the last frame is incomplete."""
        if self._frame is not None:
            raise damaged(self._source, "the last zstd frame is incomplete")
