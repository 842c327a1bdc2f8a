"""How each kernel is launched: tiles, warps and pipeline stages, apart from the kernels.

Enters: an operation's sizes and the GPU's compute capability. Leaves: a frozen table entry. No
entry depends on the number of proxies, so a proxy's sums have one order whatever it is stacked
with; nothing is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

AMPERE, ADA, HOPPER = 80, 89, 90


def capability(device: torch.device) -> int:
    """Return the table to use on `device`.

    80: A100. 89: every other GPU before and after Hopper and its kin (8.6, 8.9, 12.0), which has
    less shared memory, 99 KB a block, and not Hopper's matrix instructions. 90: H100, H200, B200.
    The interpreter's device, the CPU, takes Hopper's, so that tests run what Hopper runs.
    """
    if device.type != "cuda":
        return HOPPER
    found = torch.cuda.get_device_capability(device)
    if (9, 0) <= found < (12, 0):
        return HOPPER
    return AMPERE if found == (8, 0) else ADA


# ---- attention and the rotary embedding

# (heads, key-value heads, head size) that `cases` compile: the presets', and a group of heads.
ATTENTION_SHAPES = ((2, 2, 16), (8, 8, 32), (8, 2, 32), (8, 8, 64), (8, 8, 96), (16, 16, 128))


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """rows: pairs (token, head) of one program."""

    rows: int
    num_warps: int


def rotation(head_dim: int) -> Rotation:
    """Return tiles of about 4,096 numbers, 32 a thread: two loads of 16 bytes from each half."""
    return Rotation(rows=4096 // _power_of_2(head_dim), num_warps=4)


@dataclass(frozen=True, kw_only=True)
class AttentionTile:
    """queries, keys: rows of a tile of scores, and its columns."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def constants(self, num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
        """Return the constexprs of attention's kernels."""
        return {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "PADDED": max(16, _power_of_2(head_dim)),
            "QUERIES": self.queries,
            "KEYS": self.keys,
        }


@dataclass(frozen=True, kw_only=True)
class Attention:
    """forward; by_queries: the backward pass that makes dq; by_keys: that makes dk and dv."""

    forward: AttentionTile
    by_queries: AttentionTile
    by_keys: AttentionTile


def _attention(*rows: tuple[int, int, int, int]) -> Attention:
    names = ("queries", "keys", "num_warps", "num_stages")
    tiles = [AttentionTile(**dict(zip(names, row, strict=True))) for row in rows]
    return Attention(forward=tiles[0], by_queries=tiles[1], by_keys=tiles[2])


# From the compiler's reports of Triton 3.6 and 3.7, not from timings: no spills, then as many
# blocks on an SM as give 12 to 16 warps (a warp's exponentials hide another's products), then more
# queries than keys, since at head size 32 a tile of 64 queries reads 32 bytes of keys and values a
# clock from the L2 cache at full speed, one of 128 reads 16. Rows: forward, by queries, by keys.
_ATTENTION = {
    (HOPPER, 32): _attention((128, 64, 4, 4), (128, 64, 8, 2), (64, 64, 4, 3)),
    (HOPPER, 64): _attention((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    (HOPPER, 128): _attention((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (AMPERE, 32): _attention((128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 3)),
    (AMPERE, 64): _attention((128, 64, 8, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
    (AMPERE, 128): _attention((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
}
# At this head size the keys' pass takes all the 255 registers that a thread can have.
MAX_HEAD_DIM = 128
# float32 is for checks, not for speed: its products are exact, outside the tensor cores.
_ATTENTION_FLOAT32 = _attention(*[(32, 32, 4, 1)] * 3)


def attention(head_dim: int, capability: int, element_size: int) -> Attention:
    """Return the tiles for a head size of at most `MAX_HEAD_DIM`.

    Raises `ValueError` for a larger or an odd one.
    """
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ValueError(
            f"Attention's kernels take even head sizes up to {MAX_HEAD_DIM}, not {head_dim}"
        )
    if element_size > 2:
        return _ATTENTION_FLOAT32
    table = HOPPER if capability == HOPPER else AMPERE
    return _ATTENTION[table, max(32, _power_of_2(head_dim))]


# ---- pointwise and per-row operations: rmsnorm, swiglu, embedding, segment_sum, adamw

# Widths and hidden sizes of the presets and of the paper's models: what `cases` compile.
WIDTHS = (32, 64, 128, 256, 768, 2048)
HIDDEN = (64, 128, 384, 512, 1536, 5632)


@dataclass(frozen=True, kw_only=True)
class SegmentSum:
    """rows: sorted rows of a block; parts: blocks added at a time; width: columns of a block."""

    rows: int
    parts: int
    width: int
    num_warps: int


def segment_sum(width: int, element_size: int) -> SegmentSum:
    """Return blocks of 16 rows: one program's rows are in flight together, and few cross blocks."""
    columns = min(256 if element_size == 2 else 128, max(16, _power_of_2(width)))
    return SegmentSum(rows=16, parts=16, width=columns, num_warps=4 if columns > 64 else 1)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """rows and columns (`width`) of a tile."""

    rows: int
    width: int
    num_warps: int


# The sum of a column over programs: narrow, so that a width of 256 still makes 16 programs.
COLUMN_SUM = Tile(rows=256, width=16, num_warps=4)


def elementwise(width: int) -> Tile:
    """Return tiles of 2,048 numbers; columns divide `width` where a power of 2 from 64 to 512 does.

    16 numbers a thread are two loads of 16 bytes in bf16: enough in flight at full occupancy.
    """
    columns = max((n for n in (64, 128, 256, 512) if width % n == 0), default=_power_of_2(width))
    columns = min(512, columns)
    return Tile(rows=max(1, 2048 // columns), width=columns, num_warps=4)


def rows(width: int) -> Tile:
    """Return tiles of whole rows, about 4,096 numbers, 32 a thread."""
    columns = max(16, _power_of_2(width))
    height = max(1, min(16, 4096 // columns))
    return Tile(rows=height, width=columns, num_warps=_warps(height * columns // 32))


# Rows of one program of rmsnorm's backward: its sum for the weights' gradient is one float32 row
# for 32 rows that it reads two or three times and writes once, and 8,192 tokens make 256 programs.
BACKWARD_ROWS = 32


def rows_backward(width: int) -> Tile:
    """Return tiles of whole rows, about 2,048 numbers, 16 a thread: it keeps four such tiles."""
    columns = max(16, _power_of_2(width))
    height = max(1, min(16, 2048 // columns))
    return Tile(rows=height, width=columns, num_warps=_warps(height * columns // 16))


@dataclass(frozen=True, kw_only=True)
class Span:
    """block: numbers taken at once, 8 a thread; num_blocks: blocks of one program."""

    block: int
    num_blocks: int
    num_warps: int


# 16,384 numbers a program: 27 million parameters make 1,654 partial sums, two blocks of them.
NORM = Span(block=1024, num_blocks=16, num_warps=4)
ADAMW = Span(block=1024, num_blocks=1, num_warps=4)


def _warps(num_threads: int) -> int:
    return max(1, min(8, num_threads // 32))


# ---- head: linear + cross-entropy

# Width and vocabulary of the presets and of the paper's models: what `cases` compile.
HEAD_SHAPES = (
    (32, 4096),
    (64, 4096),
    (64, 8192),
    (128, 4096),
    (256, 50432),
    (768, 50432),
    (2048, 50432),
)
# Beyond this width the sums of 128 tokens exceed the registers of 256 threads.
MAX_FUSED_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class HeadTile:
    """tokens, vocabulary: the tile; width: columns held at once; parts: that make the width.

    dealt: whether rows are dealt so that a warp stores what it computed (16-bit types only).
    """

    tokens: int
    vocabulary: int
    width: int
    parts: int = 1
    dealt: bool = True
    num_warps: int = 8
    num_stages: int = 3


def head_stream(width: int, element_size: int, gpu: int, *, rescue: bool = False) -> HeadTile:
    """Return the tile of the fused kernel: 128 tokens share each row of the head that is read.

    Width 256 on an A100 goes in two parts: only then does every warp keep its own 16 rows in both
    products, and p stays in registers. On Hopper widths up to 64 leave room for two blocks. The
    rescue walks twice in one kernel, so that it has fewer registers to give to a tile.
    """
    columns = max(16, _power_of_2(width))
    if element_size > 2:
        return HeadTile(
            tokens=16, vocabulary=32, width=columns, dealt=False, num_warps=4, num_stages=2
        )
    parts = 2 if gpu != HOPPER and columns > 128 else 1
    vocabulary = 64 // parts
    if gpu == HOPPER and columns == 128:
        vocabulary = 128
    if rescue:
        vocabulary = 32 // parts
    elif gpu == ADA and parts == 2:
        # 32 words in three stages are 1 KB more than it has, and in two they spill.
        vocabulary = 16
    return HeadTile(
        tokens=128,
        vocabulary=vocabulary,
        width=columns // parts,
        parts=parts,
        num_stages=3 if vocabulary > 16 else 4,
    )


def head_sums(width: int, element_size: int, gpu: int) -> HeadTile:
    """Return the tile of the loss alone: embeddings stay in shared memory up to a width of 256."""
    columns = max(16, _power_of_2(width))
    if element_size > 2:
        return HeadTile(tokens=16, vocabulary=32, width=min(64, columns), num_warps=4, num_stages=2)
    if columns > MAX_FUSED_WIDTH:
        return HeadTile(tokens=128, vocabulary=128, width=64)
    vocabulary = 64 if gpu != HOPPER and columns > 128 else 128
    return HeadTile(tokens=128, vocabulary=vocabulary, width=columns, num_stages=2)


def head_labels(width: int) -> Tile:
    """Return rows of about 4,096 numbers, in which the labels are brought in."""
    columns = max(16, _power_of_2(width))
    return Tile(rows=max(1, 4096 // columns), width=columns, num_warps=4)


def head_chunk(vocab_size: int) -> int:
    """Return the tokens of a chunk of logits: 2^28 of them, 0.5 GiB in bf16, and whole tiles."""
    return max(128, 2**28 // vocab_size // 128 * 128)


# Offsets inside cuBLAS have had 32 bits before (pytorch issue 17897).
LARGEST_FACTOR = 2**31 - 1


def head_product(pitch: int) -> int:
    """Return the tokens whose rows of p, `pitch` long, one product takes: whole tiles."""
    return max(128, LARGEST_FACTOR // pitch // 128 * 128)


def logits_row(vocab_size: int) -> Tile:
    """Return the piece of a row of logits that one program has in registers, 16 a thread or 32."""
    return Tile(rows=1, width=min(8192, max(16, _power_of_2(vocab_size))), num_warps=8)


def _power_of_2(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
