"""How proxies are laid on a GPU: how many a stack holds, and how many sequences a micro-step.

Enters: a model's shape, its batch, the numbers of proxies and GPUs, and the GPU's free bytes.
Leaves: a `Placement`, chosen before the first step and stored in the stack's job; or what it
needs of a GPU's memory. Pure arithmetic: asks no GPU and knows no study.

1. The micro-batch is the largest divisor of the batch, in steps of about a half, that gives one
   proxy at most 34k tokens: these fill a GPU at the reference proxy (2 layers of width 256,
   vocabulary 50432), which is why a stack of one is right there.
2. A stack holds as many proxies as make a micro-step of the reference's work, but at most four
   times its tokens (each product then has some 1,000 tiles, eight for every processor of the
   GPU: nothing is left to fill), at most 16, and never so many that a GPU would be idle.
3. What does not fit the free memory gets fewer proxies first, then a smaller micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regmix_kernels.launches import MAX_FUSED_WIDTH

from regmix.display import size
from regmix.errors import StudyError
from regmix.model.presets import PRESETS, ModelShape

MICRO_STEP_TOKENS = 34_000
LARGEST_GPU_STACK = 16
_MOST_TOKENS = 4 * 32_768
_FULL_FLOPS = MICRO_STEP_TOKENS * PRESETS["1m"].flops_per_token()

# Float32 parameters, gradients and two moments, and the bfloat16 copy that products read.
BYTES_PER_PARAMETER = 4 + 4 + 8 + 2
# The chunked head's logits: 2^28 of them at a time, in bfloat16.
_HEAD_CHUNK_BYTES = 1 << 29
# Tokens, labels, the sorted order of the embedding's gradient and the sort's own buffers.
_INDEX_BYTES_PER_TOKEN = 128
# CUDA's context, the libraries' workspaces, loaded kernels. An estimate, not measured.
RESERVE_BYTES = 2_000_000_000
# Part of the free memory that is planned with: the allocator rounds up and fragments.
_USABLE = 0.9


@dataclass(frozen=True, kw_only=True)
class Placement:
    """stack_size: the most proxies of a stack; micro_batch: sequences of each in a micro-step."""

    stack_size: int
    micro_batch: int


def place(
    shape: ModelShape,
    batch_size: int,
    *,
    num_proxies: int,
    num_gpus: int,
    free_bytes: int,
    stack_size: int | None = None,
    micro_batch: int | None = None,
) -> Placement:
    """Return how proxies of a shape are laid on GPUs with `free_bytes` each.

    stack_size, micro_batch: what the user chose, kept as they are; None to choose. `StudyError`
    where the micro-batch does not divide the batch, or where nothing allowed fits the memory.
    """
    refuse_no_divisor(micro_batch, batch_size)
    micro = micro_batch or _filling_micro_batch(shape, batch_size)
    stack = stack_size or _filling_stack(shape, micro, num_proxies, num_gpus)
    while gpu_memory_bytes(shape, stack, micro) > _USABLE * free_bytes:
        smaller = None if micro_batch else smaller_micro_batch(micro, batch_size)
        if stack_size is None and stack > 1:
            stack -= 1
        elif smaller is not None:
            micro = smaller
        else:
            raise StudyError(
                f"a stack of {stack} with a micro-batch of {micro} sequences needs about "
                f"{size(gpu_memory_bytes(shape, stack, micro))} of a GPU's memory and "
                f"{size(_USABLE * free_bytes)} can be planned with ({size(free_bytes)} free)",
                cure="Free the GPU of other programs, give a smaller --stack-size or "
                "--micro-batch, or draw the study with a smaller model or --seq-len",
            )
    return Placement(stack_size=stack, micro_batch=micro)


def _filling_micro_batch(shape: ModelShape, batch_size: int) -> int:
    smallest = batch_size
    for smallest in micro_batches(batch_size):
        if smallest * shape.seq_len <= MICRO_STEP_TOKENS:
            break
    return smallest


def _filling_stack(shape: ModelShape, micro_batch: int, num_proxies: int, num_gpus: int) -> int:
    tokens = micro_batch * shape.seq_len
    filling = min(_FULL_FLOPS / (shape.flops_per_token() * tokens), _MOST_TOKENS / tokens)
    share = -(-num_proxies // num_gpus)
    return max(1, min(int(filling), LARGEST_GPU_STACK, share))


def micro_batches(batch_size: int) -> Iterator[int]:
    """Yield the micro-batches that are tried, largest first: the batch, then about half, to 1."""
    micro: int | None = batch_size
    while micro is not None:
        yield micro
        micro = smaller_micro_batch(micro, batch_size)


def smaller_micro_batch(micro_batch: int, batch_size: int) -> int | None:
    """Return the largest divisor of the batch that is at most half of a micro-batch, or None."""
    for size_ in range(micro_batch // 2, 0, -1):
        if batch_size % size_ == 0:
            return size_
    return None


def refuse_no_divisor(micro_batch: int | None, batch_size: int) -> None:
    """Raise `StudyError` where a micro-batch does not divide the batch."""
    if micro_batch is not None and batch_size % micro_batch:
        divisors = ", ".join(str(d) for d in range(1, batch_size + 1) if batch_size % d == 0)
        raise StudyError(
            f"a micro-batch of {micro_batch} sequences does not divide the batch of {batch_size}",
            cure=f"Give a --micro-batch that does: {divisors}",
        )


def gpu_memory_bytes(shape: ModelShape, stack_size: int, micro_batch: int) -> int:
    """Return what training a stack takes of one GPU's memory; an estimate on the safe side.

    18 bytes a parameter; what every token keeps for the backward (`_kept_bytes_per_token`) and
    what one layer's backward takes on top; the head's probabilities [tokens, V] in bfloat16, kept
    whole by the streamed head and half a GiB at a time by the chunked one; one float32 gradient of
    the head; one layer's forward for the evaluation, beside the captured step, which keeps its
    memory; for a stack of several, the trial by which products are found to be the same in it; the
    reserve.
    """
    tokens = stack_size * micro_batch * shape.seq_len
    probabilities = 2 * tokens * shape.vocab_size
    if shape.width > MAX_FUSED_WIDTH:
        probabilities = min(probabilities, _HEAD_CHUNK_BYTES)
    per_token = _kept_bytes_per_token(shape) + _passing_bytes_per_token(shape)
    per_token += 2 * _kept_bytes_per_token(shape) // shape.num_layers
    if stack_size > 1:
        per_token += _tried_bytes_per_token(shape)
    return (
        RESERVE_BYTES
        + BYTES_PER_PARAMETER * stack_size * shape.num_parameters
        + tokens * (per_token + _INDEX_BYTES_PER_TOKEN)
        + probabilities
        + 4 * shape.vocab_size * shape.width
    )


def _kept_bytes_per_token(shape: ModelShape) -> int:
    # A layer keeps in bfloat16 its residual stream twice, both normed, the attention's output,
    # queries, keys and values, and SwiGLU's two inputs; in float32 a sum per head and two norms.
    qkv = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim
    halves = 5 * shape.width + qkv + 2 * shape.hidden
    return shape.num_layers * (2 * halves + 4 * (shape.num_heads + 2)) + 4 * shape.width


def _passing_bytes_per_token(shape: ModelShape) -> int:
    # Gradients of one layer and of the head's input: they go before the next layer's come.
    qkv = (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim
    return 2 * (5 * shape.width + qkv + 3 * shape.hidden)


def _tried_bytes_per_token(shape: ModelShape) -> int:
    # Two operands as float32 numbers and in bfloat16, and the result four times, of the widest.
    widest = max(2 * shape.hidden, (shape.num_heads + 2 * shape.kv_heads) * shape.head_dim)
    return 20 * widest
