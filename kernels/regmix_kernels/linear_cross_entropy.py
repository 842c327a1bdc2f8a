"""Loss of the head and its gradients: nats of each label under softmax(e head^T).

Enters: embeddings [P, N, D] in bf16 (any float dtype where it says so), the head [P, V, D] in the
same dtype, strided over P if need be, labels [P, N]. Leaves: nats in float32, the embeddings'
gradient in their dtype, and the head's gradient added to a float32 tensor. Computes no mean and
moves no embedding: the caller divides by `scale` and gathers.

Three ways, one meaning (`reference.linear_cross_entropy`):
`chunked` makes logits by library products, a chunk of tokens at a time: any width; the oracle.
`fused` never makes the gradient of the logits: with p = exp(logit) and l = sum p,
    de = scale * (p head / l - head[label]),  dhead = p^T (scale e / l) - scale * sum of e by label.
One kernel (`head_kernels.stream`) walks over the vocabulary as attention walks over keys, another
brings in the labels, exactly, and the library multiplies p^T. Rows of p are as long as the
vocabulary: 2 N V bytes of scratch in bf16, 3.3 GB for 32k tokens of 50k words.
`loss` walks without keeping p, for evaluation.

A label outside [0, V), IGNORED among them, has 0 nats and no gradient. A proxy's numbers follow
from its own alone, whatever it is stacked with.

P proxies, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from regmix_kernels import head_kernels, launches, products, segment_sum
from regmix_kernels.compilation import Case
from regmix_kernels.reference import IGNORED

__all__ = ["IGNORED", "cases", "chunked", "fused", "loss"]


def chunked(
    e_PND: Tensor,
    head_PVD: Tensor,
    labels_PN: Tensor,
    *,
    scale: float,
    dhead_PVD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return nats [P, N] and the gradient of scale * sum(nats) by the embeddings, [P, N, D].

    The gradient by the head is added to `dhead_PVD`, float32, where it is given. Any float dtype,
    any width; logits are rounded to the embeddings' dtype. In float16 choose `scale` so that
    scale * softmax does not vanish. After Liger-Kernel's fused linear cross-entropy.
    """
    _check(e_PND, head_PVD, labels_PN, dhead_PVD)
    num_proxies, num_tokens, _ = e_PND.shape
    vocab_size = head_PVD.shape[1]
    nats_PN = e_PND.new_empty(num_proxies, num_tokens, dtype=torch.float32)
    de_PND = torch.empty_like(e_PND)
    chunk = min(num_tokens, launches.head_chunk(vocab_size))
    # Whole lines for every row, whatever the vocabulary.
    logits_1NV = e_PND.new_empty(1, chunk, triton.cdiv(vocab_size, 64) * 64)
    launch = launches.logits_row(vocab_size)
    for proxy in range(num_proxies):
        head_1VD = head_PVD[proxy : proxy + 1]
        for start in range(0, num_tokens, chunk):
            place = (slice(proxy, proxy + 1), slice(start, min(start + chunk, num_tokens)))
            e_1ND = e_PND[place]
            dlogits_1NV = logits_1NV[:, : e_1ND.shape[1], :vocab_size]
            products.matmul(e_1ND, head_1VD.mT, out=dlogits_1NV)
            head_kernels.cross_entropy[(e_1ND.shape[1],)](
                dlogits_1NV,
                labels_PN[place],
                nats_PN[place],
                scale,
                VOCAB=vocab_size,
                PITCH=logits_1NV.shape[2],
                BLOCK_V=launch.width,
                num_warps=launch.num_warps,
            )
            products.matmul(dlogits_1NV, head_1VD, out=de_PND[place])
            if dhead_PVD is not None:
                dhead_1VD = dhead_PVD[proxy : proxy + 1]
                products.matmul(dlogits_1NV.mT, e_1ND, out=dhead_1VD, accumulate=True)
    return nats_PN, de_PND


def fused(
    e_PND: Tensor,
    head_PVD: Tensor,
    labels_PN: Tensor,
    *,
    scale: float,
    dhead_PVD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return nats [P, N] and the gradient of scale * sum(nats) by the embeddings, [P, N, D].

    The gradient by the head is added to `dhead_PVD`, float32, where it is given. bfloat16 or
    float32 (exp of a logit leaves float16's range), D at most 256. The classifier plays both keys
    and values of attention (arXiv 2205.14135); p is kept, unlike in cut cross-entropy
    (arXiv 2411.09009), because writing it costs less than computing it again.
    """
    _check(e_PND, head_PVD, labels_PN, dhead_PVD)
    num_tokens, width = e_PND.shape[1:]
    vocab_size = head_PVD.shape[1]
    if e_PND.dtype == torch.float16 or width > launches.MAX_FUSED_WIDTH:
        raise ValueError(
            f"fused takes bfloat16 or float32 and widths up to {launches.MAX_FUSED_WIDTH}, not"
            f" {e_PND.dtype} and {width}: use chunked"
        )
    store = dhead_PVD is not None
    sums_PN, shifts_PN, means_PND, probs_PNV = _walk(e_PND, head_PVD, store)
    nats_PN, de_PND, weighted_PND = _finish(
        e_PND, head_PVD, labels_PN, sums_PN, shifts_PN, means_PND, scale, store
    )
    if dhead_PVD is not None:
        p_PVN = probs_PNV[:, :num_tokens, :vocab_size].mT
        chunk = launches.head_product(probs_PNV.shape[2])
        for start in range(0, num_tokens, chunk):
            part = slice(start, start + chunk)
            products.matmul(
                p_PVN[:, :, part], weighted_PND[:, part], out=dhead_PVD, accumulate=True
            )
        plan = segment_sum.plan(labels_PN, vocab_size)
        segment_sum.add_rows(e_PND, plan, dhead_PVD, scale=-scale)
    return nats_PN, de_PND


def _walk(e_PND: Tensor, head_PVD: Tensor, store: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sums and shifts [P, N], the softmax's mean rows [P, N, D] and, where `store`, p."""
    num_proxies, num_tokens, width = e_PND.shape
    vocab_size = head_PVD.shape[1]
    gpu = launches.capability(e_PND.device)
    tile = launches.head_stream(width, e_PND.element_size(), gpu)
    num_tiles, pitch = _probs_shape(tile, num_tokens, vocab_size)
    sums_PN, shifts_PN = _new_floats(e_PND, 2)
    means_PND = torch.empty_like(e_PND, dtype=torch.float32)
    # Rows beyond the last token belong to no one, and are written so that no mask is needed.
    num_rows = num_tiles * tile.tokens if store else 0
    probs_PNV = e_PND.new_empty(num_proxies, num_rows, pitch)
    for rescue in (False, True):
        tile = launches.head_stream(width, e_PND.element_size(), gpu, rescue=rescue)
        head_kernels.stream[(num_tiles, num_proxies)](
            e_PND,
            head_PVD,
            sums_PN,
            shifts_PN,
            means_PND,
            probs_PNV,
            num_tokens,
            head_PVD.stride(0),
            WIDEN=_widens(e_PND),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **_stream_constants(tile, vocab_size, width, pitch, store, rescue),
        )
    return sums_PN, shifts_PN, means_PND, probs_PNV


def loss(e_PND: Tensor, head_PVD: Tensor, labels_PN: Tensor) -> Tensor:
    """Return nats [P, N] without any gradient; any float dtype, any width, exact logits."""
    _check(e_PND, head_PVD, labels_PN, None)
    num_proxies, num_tokens, width = e_PND.shape
    vocab_size = head_PVD.shape[1]
    sums_PN, shifts_PN = _new_floats(e_PND, 2)
    tile = launches.head_sums(width, e_PND.element_size(), launches.capability(e_PND.device))
    head_kernels.log_sum_exp[(triton.cdiv(num_tokens, tile.tokens), num_proxies)](
        e_PND,
        head_PVD,
        sums_PN,
        shifts_PN,
        num_tokens,
        head_PVD.stride(0),
        WIDEN=_widens(e_PND),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **_sums_constants(tile, vocab_size, width),
    )
    return _finish(e_PND, head_PVD, labels_PN, sums_PN, shifts_PN, None, 0.0, False)[0]


def _finish(
    e_PND: Tensor,
    head_PVD: Tensor,
    labels_PN: Tensor,
    sums_PN: Tensor,
    shifts_PN: Tensor,
    means_PND: Tensor | None,
    scale: float,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats; the embeddings' gradient where there are means; scale * e / sum if `store`."""
    num_proxies, num_tokens, width = e_PND.shape
    launch = launches.head_labels(width)
    (nats_PN,) = _new_floats(e_PND, 1)
    de_PND = e_PND if means_PND is None else torch.empty_like(e_PND)
    weighted_PND = torch.empty_like(e_PND) if store else e_PND
    head_kernels.finish[(triton.cdiv(num_tokens, launch.rows), num_proxies)](
        e_PND,
        head_PVD,
        labels_PN,
        sums_PN,
        shifts_PN,
        nats_PN,
        sums_PN if means_PND is None else means_PND,
        de_PND,
        weighted_PND,
        scale,
        num_tokens,
        head_PVD.stride(0),
        num_warps=launch.num_warps,
        **_finish_constants(launch, head_PVD.shape[1], width, means_PND is not None, store),
    )
    return nats_PN, de_PND, weighted_PND


def _new_floats(e_PND: Tensor, count: int) -> list[Tensor]:
    return [e_PND.new_empty(e_PND.shape[:2], dtype=torch.float32) for _ in range(count)]


def _check(e_PND: Tensor, head_PVD: Tensor, labels_PN: Tensor, dhead_PVD: Tensor | None) -> None:
    num_proxies, num_tokens, width = e_PND.shape
    assert head_PVD.shape[0] == num_proxies, (head_PVD.shape, e_PND.shape)
    assert head_PVD.shape[2] == width, (head_PVD.shape, e_PND.shape)
    assert head_PVD.dtype == e_PND.dtype, (head_PVD.dtype, e_PND.dtype)
    assert labels_PN.shape == (num_proxies, num_tokens), labels_PN.shape
    assert e_PND.is_contiguous()
    assert labels_PN.is_contiguous()
    assert head_PVD[0].is_contiguous(), "each [V, D] must be contiguous"
    assert head_PVD[0].numel() < 2**31, "offsets inside one head are 32 bits wide"
    if dhead_PVD is not None:
        assert dhead_PVD.dtype == torch.float32, dhead_PVD.dtype
        assert dhead_PVD.shape == head_PVD.shape, dhead_PVD.shape


def _widens(x: Tensor) -> bool:
    # A tensor of the CPU reaches a kernel only in the interpreter.
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _probs_shape(tile: launches.HeadTile, num_tokens: int, vocab_size: int) -> tuple[int, int]:
    """Return the number of token tiles and the length of a row of p, whole tiles both."""
    num_columns = triton.cdiv(vocab_size, tile.vocabulary) * tile.vocabulary
    return triton.cdiv(num_tokens, tile.tokens), num_columns


def _stream_constants(
    tile: launches.HeadTile, vocab_size: int, width: int, pitch: int, store: bool, rescue: bool
) -> dict[str, int | bool]:
    return {
        "VOCAB": vocab_size,
        "WIDTH": width,
        "PITCH": pitch,
        "STORE": store,
        "RESCUE": rescue,
        "BLOCK_N": tile.tokens,
        "BLOCK_V": tile.vocabulary,
        "BLOCK_D": tile.width,
        "HALVES": tile.parts,
        "DEAL": tile.dealt,
    }


def _sums_constants(tile: launches.HeadTile, vocab_size: int, width: int) -> dict[str, int | bool]:
    return {
        "VOCAB": vocab_size,
        "WIDTH": width,
        "BLOCK_N": tile.tokens,
        "BLOCK_V": tile.vocabulary,
        "BLOCK_D": tile.width,
    }


def _finish_constants(
    tile: launches.Tile, vocab_size: int, width: int, gradient: bool, store: bool
) -> dict[str, int | bool]:
    return {
        "VOCAB": vocab_size,
        "WIDTH": width,
        "GRADIENT": gradient,
        "STORE": store,
        "BLOCK_N": tile.rows,
        "BLOCK_D": tile.width,
    }


def cases(capability: int) -> list[Case]:
    """Return every kernel at every configuration that the presets use, in bfloat16."""
    found = []
    for width, vocab_size in launches.HEAD_SHAPES:
        found.append(_sums_case(capability, width, vocab_size))
        gradients = (False, True) if width <= launches.MAX_FUSED_WIDTH else (False,)
        for gradient in gradients:
            found.append(_finish_case(width, vocab_size, gradient))
        if width <= launches.MAX_FUSED_WIDTH:
            for rescue in (False, True):
                found.append(_stream_case(capability, width, vocab_size, rescue))
    for vocab_size in sorted({vocab_size for _, vocab_size in launches.HEAD_SHAPES}):
        launch = launches.logits_row(vocab_size)
        found.append(
            Case(
                name=f"head.cross_entropy V{vocab_size}",
                kernel=head_kernels.cross_entropy,
                signature={"logits": "*bf16", "labels": "*i32", "nats": "*fp32", "scale": "fp32"},
                constants={"VOCAB": vocab_size, "PITCH": vocab_size, "BLOCK_V": launch.width},
                num_warps=launch.num_warps,
            )
        )
    return found


_SUMS = {"e": "*bf16", "head": "*bf16", "sums": "*fp32", "shifts": "*fp32"}
_SIZES = {"num_tokens": "i32:16", "head_stride": "i32:16"}


def _stream_case(gpu: int, width: int, vocab_size: int, rescue: bool) -> Case:
    tile = launches.head_stream(width, 2, gpu, rescue=rescue)
    _, pitch = _probs_shape(launches.head_stream(width, 2, gpu), tile.tokens, vocab_size)
    constants = _stream_constants(tile, vocab_size, width, pitch, True, rescue)
    return Case(
        name=f"head.stream D{width} V{vocab_size}" + " rescue" * rescue,
        kernel=head_kernels.stream,
        signature={**_SUMS, "means": "*fp32", "probs": "*bf16", **_SIZES},
        constants={**constants, "WIDEN": False},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        is_matrix=True,
        capabilities=(gpu,),
    )


def _sums_case(gpu: int, width: int, vocab_size: int) -> Case:
    tile = launches.head_sums(width, 2, gpu)
    return Case(
        name=f"head.log_sum_exp D{width} V{vocab_size}",
        kernel=head_kernels.log_sum_exp,
        signature={**_SUMS, **_SIZES},
        constants={**_sums_constants(tile, vocab_size, width), "WIDEN": False},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        is_matrix=True,
        capabilities=(gpu,),
    )


def _finish_case(width: int, vocab_size: int, gradient: bool) -> Case:
    launch = launches.head_labels(width)
    return Case(
        name=f"head.finish D{width} V{vocab_size}" + " gradient" * gradient,
        kernel=head_kernels.finish,
        signature={
            "e": "*bf16",
            "head": "*bf16",
            "labels": "*i32",
            "sums": "*fp32",
            "shifts": "*fp32",
            "nats": "*fp32",
            "means": "*fp32",
            "de": "*bf16",
            "weighted": "*bf16",
            "scale": "fp32",
            **_SIZES,
        },
        constants=_finish_constants(launch, vocab_size, width, gradient, gradient),
        num_warps=launch.num_warps,
    )
