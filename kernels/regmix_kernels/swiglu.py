"""silu(gate) * up over stacked proxies (arXiv 2002.05202), its backward without stored results.

Enters: gate and up side by side, [P, N, 2F], as one matrix product leaves them. Leaves: hidden
[P, N, F]; backward gives the gradient in the same layout and the hidden rows again, which the
output projection's gradient needs and forward therefore need not keep. Arithmetic is float32, and
every element stands for itself, so a stack changes nothing. Multiplies no matrices.

Bytes to move per token, bf16: forward 6 F, backward 12 F; at F 512 about 3 and 6 kB.

P proxies, N tokens, F hidden.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

from regmix_kernels import launches
from regmix_kernels.compilation import Case


def forward(gate_up_PN2F: Tensor) -> Tensor:
    """Return silu(gate) * up, [P, N, F]; the gate is the first F of the last dimension."""
    num_proxies, num_rows, hidden = _sizes(gate_up_PN2F)
    out_PNF = gate_up_PN2F.new_empty(num_proxies, num_rows, hidden)
    grid, tiles = _launch(num_proxies * num_rows, hidden)
    _forward[grid](gate_up_PN2F, out_PNF, num_proxies * num_rows, hidden, **tiles)
    return out_PNF


def backward(dhidden_PNF: Tensor, gate_up_PN2F: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of `gate_up_PN2F`, [P, N, 2F], and what forward returned, [P, N, F]."""
    num_proxies, num_rows, hidden = _sizes(gate_up_PN2F)
    assert dhidden_PNF.shape == (num_proxies, num_rows, hidden), dhidden_PNF.shape
    assert dhidden_PNF.is_contiguous()
    dgate_up_PN2F = gate_up_PN2F.new_empty(gate_up_PN2F.shape)
    hidden_PNF = gate_up_PN2F.new_empty(dhidden_PNF.shape)
    grid, tiles = _launch(num_proxies * num_rows, hidden)
    _backward[grid](
        dhidden_PNF,
        gate_up_PN2F,
        dgate_up_PN2F,
        hidden_PNF,
        num_proxies * num_rows,
        hidden,
        **tiles,
    )
    return dgate_up_PN2F, hidden_PNF


def _sizes(gate_up_PN2F: Tensor) -> tuple[int, int, int]:
    num_proxies, num_rows, both = gate_up_PN2F.shape
    assert both % 2 == 0, gate_up_PN2F.shape
    assert gate_up_PN2F.is_contiguous()
    return num_proxies, num_rows, both // 2


def _launch(num_rows: int, hidden: int) -> tuple[tuple[int, int], dict[str, int]]:
    launch = launches.elementwise(hidden)
    # Rows first: that axis of a grid has no practical limit.
    grid = (triton.cdiv(num_rows, launch.rows), triton.cdiv(hidden, launch.width))
    return grid, {
        "BLOCK_N": launch.rows,
        "BLOCK_F": launch.width,
        "num_warps": launch.num_warps,
    }


@triton.jit
def _forward(gate_up, out, num_rows, hidden, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (row < num_rows) & (column < hidden)
    gates = gate_up + row * (2 * hidden) + column
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + hidden, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * hidden + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dhidden,  # [PN, F]
    gate_up,  # [PN, 2F]
    dgate_up,  # [PN, 2F]
    out,  # [PN, F]
    num_rows,
    hidden,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    mask = (row < num_rows) & (column < hidden)
    place = row * (2 * hidden) + column
    single = row * hidden + column
    gate = tl.load(gate_up + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + hidden, mask=mask, other=0.0).to(tl.float32)
    above = tl.load(dhidden + single, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = above * up * (sigmoid + silu * (1.0 - sigmoid))
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(dgate_up + place, dgate.to(kind), mask=mask)
    tl.store(dgate_up + place + hidden, (above * silu).to(kind), mask=mask)
    tl.store(out + single, (silu * up).to(kind), mask=mask)


def cases(capability: int) -> list[Case]:
    """Return both kernels at the hidden sizes of the presets, in bf16 and float32."""
    found = []
    for hidden, dtype in itertools.product(launches.HIDDEN, ("bf16", "fp32")):
        launch = launches.elementwise(hidden)
        sizes = {"num_rows": "i32:16", "hidden": "i32:16"}
        pointers = {
            "forward": (_forward, ("gate_up", "out")),
            "backward": (_backward, ("dhidden", "gate_up", "dgate_up", "out")),
        }
        for direction, (kernel, names) in pointers.items():
            found.append(
                Case(
                    name=f"swiglu.{direction} f{hidden} {dtype}",
                    kernel=kernel,
                    signature={**dict.fromkeys(names, f"*{dtype}"), **sizes},
                    constants={"BLOCK_N": launch.rows, "BLOCK_F": launch.width},
                    num_warps=launch.num_warps,
                )
            )
    return found
