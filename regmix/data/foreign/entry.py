"""One file of another program, as blocks.py checks and maps it.

Enters: its layout, and its recorded checksums where there are any. Leaves: what is wrong with its
ends or with a block of its ids, and Megatron's documents. Knows nothing of the corpus around it.
"""

from __future__ import annotations

import numpy as np
import xxhash

from regmix.data.blocks import BLOCK_BYTES
from regmix.data.foreign.checksums import FileSums, ends_digest
from regmix.data.foreign.megatron import read_offsets
from regmix.data.foreign.token_file import TokenFile, TokenFileError
from regmix.data.stored_file import size_of


class ForeignFile:
    """One file of another program; a `StoredFile`."""

    def __init__(
        self,
        layout: TokenFile,
        split: str,
        domain: str,
        *,
        file_format: str,
        vocab_size: int,
        sums: FileSums | None,
    ) -> None:
        self.layout, self.path = layout, layout.path
        self.split, self.domain, self.format = split, domain, file_format
        self.dtype, self.start, self.tokens = layout.dtype, layout.start, layout.tokens
        self.offsets = np.empty(0, np.uint64)
        self.digests = None  # ids are compared with the vocabulary, recorded checksums or not
        self._limit = min(vocab_size - 1, layout.largest)
        self._sums = sums
        key = sums.digest if sums is not None else f"ids up to {self._limit}"
        self.stamp = f"{layout.stored} from {self.start}, {self.tokens} ids, {key}"
        self.cure = "Restore the file, or write it again with the program that made it"

    def ends_problem(self) -> str | None:
        """See `StoredFile.ends_problem`."""
        size = size_of(self.path)
        if isinstance(size, str):
            return size
        sums = self._sums
        expected = self.layout.bytes if sums is None else sums.bytes
        if size != expected:
            return f"{size} bytes where {expected} were: cut short or changed"
        if sums is not None and self.tokens != sums.tokens:
            return f"{self.tokens} ids where {sums.tokens} were recorded: damaged or changed"
        return None

    def load(self) -> str | None:
        """See `StoredFile.load`: reads Megatron's index."""
        if self._sums is not None and ends_digest(self.layout) != self._sums.ends:
            return "its header or index is damaged: not what was recorded"
        if self.format == "megatron":
            try:
                self.offsets = read_offsets(self.layout)
            except TokenFileError as error:
                return f"its index {error.path.name}: {error.reason}"
        return None

    def block_problem(self, number: int, block: memoryview) -> str | None:
        """See `StoredFile.block_problem`."""
        if self._sums is not None and xxhash.xxh3_64_hexdigest(block) != self._sums.block(number):
            return (
                f"block {number} is damaged: not what was recorded "
                f"(1 MiB from byte {self.start + number * BLOCK_BYTES})"
            )
        ids = np.frombuffer(block, self.dtype)
        largest = int(ids.max())
        if largest <= self._limit:
            return None
        place = number * BLOCK_BYTES // self.dtype.itemsize + int(np.argmax(ids))
        shown = int(ids.max().astype(self.layout.stored))
        return (
            f"block {number}: token id {shown} at position {place} is outside the vocabulary "
            f"of {self._limit + 1}: damaged, or made with another tokenizer"
        )
