"""One token file of another program: its header says what it holds, or it is refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from regmix.data.foreign.litpkds import missing_chunk, read_litpkds
from regmix.data.foreign.megatron import read_megatron, read_offsets
from regmix.data.foreign.raw_tokens import read_npy, read_raw
from regmix.data.foreign.token_bytes import token_byte_lengths
from regmix.errors import ShardError

# Documents [5 6 7 0], [8 9 10 | 11 12 0] (two sequences) and [13 0] as IndexedDatasetBuilder of
# megatron_core 0.16.1 wrote them: ids as uint16, ids as int32, and the index of the uint16 file.
BIN_UINT16 = "0500060007000000080009000a000b000c0000000d000000"
BIN_INT32 = (
    "0500000006000000070000000000000008000000090000000a0000000b0000000c000000000000000d000000"
    "00000000"
)
IDX_UINT16 = (
    "4d4d494449445800000100000000000000080400000000000000040000000000000004000000030000000300"
    "0000020000000000000000000000"
    "08000000000000000e00000000000000140000000000000000000000000000000100000000000000030000"
    "00000000000400000000000000"
)
IDX_INT32 = (
    "4d4d494449445800000100000000000000040400000000000000040000000000000004000000030000000300"
    "0000020000000000000000000000"
    "10000000000000001c00000000000000280000000000000000000000000000000100000000000000030000"
    "00000000000400000000000000"
)
TOKENS = [5, 6, 7, 0, 8, 9, 10, 11, 12, 0, 13, 0]


def pair(folder: Path, ids: str = BIN_UINT16, index: str = IDX_UINT16) -> Path:
    path = folder / "web_text_document.bin"
    path.write_bytes(bytes.fromhex(ids))
    path.with_suffix(".idx").write_bytes(bytes.fromhex(index))
    return path


def chunk(folder: Path, ids: np.ndarray, code: int = 8, version: int = 1) -> Path:
    path = folder / "train_web_0000000000.bin"
    header = b"LITPKDS" + struct.pack("<QBQ", version, code, len(ids))
    path.write_bytes(header + ids.tobytes())
    return path


@pytest.mark.parametrize(
    ("ids", "index", "stored"),
    [(BIN_UINT16, IDX_UINT16, "uint16"), (BIN_INT32, IDX_INT32, "int32")],
)
def test_what_megatron_wrote_is_read(tmp_path: Path, ids: str, index: str, stored: str) -> None:
    layout = read_megatron(pair(tmp_path, ids, index))
    assert (layout.stored, layout.start, layout.tokens) == (stored, 0, 12)
    assert np.fromfile(layout.path, layout.dtype).tolist() == TOKENS
    assert read_offsets(layout).tolist() == [0, 4, 10]


@pytest.mark.parametrize("place", [0, 7, 9, 17, 18, 26])
def test_a_damaged_header_of_an_index_is_refused(tmp_path: Path, place: int) -> None:
    index = bytearray(bytes.fromhex(IDX_UINT16))
    index[place] ^= 0x41
    with pytest.raises(ShardError, match=r"web_text_document\.idx: .*again"):
        read_megatron(pair(tmp_path, index=index.hex()))


@pytest.mark.parametrize("place", [34, 41, 50, 60, 74, 83, 90, 100, 108])
def test_a_damaged_body_of_an_index_is_found_on_first_touch(tmp_path: Path, place: int) -> None:
    index = bytearray(bytes.fromhex(IDX_UINT16))
    index[place] ^= 0x41
    with pytest.raises(ShardError, match=r"web_text_document\.(idx|bin)"):
        read_offsets(read_megatron(pair(tmp_path, index=index.hex())))


def test_ids_that_an_index_does_not_cover_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="26 bytes where its index says 24"):
        read_megatron(pair(tmp_path, BIN_UINT16 + "0000"))


def test_an_index_without_its_ids_is_refused(tmp_path: Path) -> None:
    path = pair(tmp_path)
    path.unlink()
    with pytest.raises(ShardError, match=r"web_text_document\.bin: the file is missing"):
        read_megatron(path)


def test_documents_without_tokens_are_no_documents(tmp_path: Path) -> None:
    index = bytearray(bytes.fromhex(IDX_UINT16))
    index[-32:] = struct.pack("<4q", 0, 0, 3, 4)
    assert read_offsets(read_megatron(pair(tmp_path, index=index.hex()))).tolist() == [0, 10]


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([1, 2, 0, 3, 0, 0, 0], 5),
        ([1, 2, 0, 3, 0], 5),
        ([1, 2, 0, 3], 4),
        ([0, 0, 0, 0], 1),
        ([0, 0, 0, 7], 4),
        ([5, *([0] * 100_000)], 2),
    ],
)
def test_padding_is_cut_to_one_separator(tmp_path: Path, ids: list[int], kept: int) -> None:
    layout = read_litpkds(chunk(tmp_path, np.array(ids, np.uint16)), 0)
    assert (layout.tokens, layout.tokens + layout.padding) == (kept, len(ids))


@pytest.mark.parametrize(
    ("code", "dtype", "as_dtype"), [(8, "<u2", "<u2"), (3, "<i2", "<u2"), (4, "<i4", "<u4")]
)
def test_two_and_four_byte_chunks_are_read_in_place(
    tmp_path: Path, code: int, dtype: str, as_dtype: str
) -> None:
    layout = read_litpkds(chunk(tmp_path, np.arange(1, 50, dtype=dtype), code), 0)
    assert layout.dtype == np.dtype(as_dtype)
    assert np.fromfile(layout.path, layout.dtype, offset=24).tolist() == list(range(1, 50))


@pytest.mark.parametrize("code", [1, 2, 5, 6, 7])
def test_a_type_that_needs_a_copy_is_refused_with_the_cure(tmp_path: Path, code: int) -> None:
    with pytest.raises(ShardError, match=r"cannot be read in place.*astype"):
        read_litpkds(chunk(tmp_path, np.zeros(8, np.int64), code), 0)


@pytest.mark.parametrize(
    ("code", "version", "message"),
    [(8, 2, "LITPKDS version 2"), (9, 1, "type code 9"), (0, 1, "type code 0")],
)
def test_an_unknown_chunk_is_refused(tmp_path: Path, code: int, version: int, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        read_litpkds(chunk(tmp_path, np.ones(8, np.uint16), code, version), 0)


def test_a_gap_in_a_row_of_chunks_is_named() -> None:
    names = [f"train_web_0_{number:010d}.bin" for number in (0, 1, 3)]
    assert missing_chunk(names) == "train_web_0_0000000002.bin"
    assert missing_chunk(names[:2]) is None
    assert missing_chunk(["notes.bin"]) is None


@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_npy_arrays_are_read_row_by_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    ids = np.arange(24, dtype=np.uint32).reshape(shape)
    np.save(tmp_path / "web.npy", ids)
    layout = read_npy(tmp_path / "web.npy")
    read = np.fromfile(layout.path, layout.dtype, offset=layout.start)
    assert read.tolist() == list(range(24))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3, 4), np.uint16),
        np.asfortranarray(np.zeros((3, 4), np.uint16)),
        np.arange(5, dtype=">u2"),
        np.arange(5, dtype=np.float32),
        np.arange(5, dtype=np.int64),
        np.array(["a", 1], dtype=object),
        np.zeros(0, np.uint16),
    ],
    ids=["3d", "fortran", "big-endian", "float", "int64", "object", "empty"],
)
def test_npy_arrays_that_cannot_be_read_in_place_are_refused(
    tmp_path: Path, array: np.ndarray
) -> None:
    np.save(tmp_path / "web.npy", array, allow_pickle=True)
    with pytest.raises(ShardError, match=r"web\.npy"):
        read_npy(tmp_path / "web.npy")


@pytest.mark.parametrize("length", [0, 5, 9, 60, 127, 129, 150])
def test_a_cut_npy_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "web.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ShardError, match=r"web\.npy"):
        read_npy(path)


def test_half_an_id_at_the_end_of_raw_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.bin"
    path.write_bytes(b"\1\0\2\0\3")
    with pytest.raises(ShardError, match=r"web\.bin: 5 bytes are no whole number of ids of 2"):
        read_raw(path, "uint16", header_bytes=0)


def test_bytes_of_tokens_are_those_of_the_text(tmp_path: Path) -> None:
    from regmix.data.tokenizer import train_bpe

    texts = ["the cat\tsat\u00e9 on the mat \U0001f600", "\u4e2d\u6587 the cat", "a\x00b\x7f\u00a0"]
    tokenizer = train_bpe(texts * 20, 300)
    lengths, why = token_byte_lengths(tokenizer.text, tokenizer.separator)
    assert why == ""
    assert lengths is not None
    for text in texts:
        ids, _ = tokenizer.encode([text])
        assert int(lengths[ids].sum()) == len(text.encode())
