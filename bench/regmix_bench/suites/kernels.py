"""The model's operations, forward and backward, against other ways to compute them here.

Enters: settings. Leaves: ns/token of each operation as records, against the machine's copy and
GEMM rates and against eager PyTorch, `torch.compile` and SDPA side by side. On a CPU these are the
operations of `regmix.model.ops`; the Triton kernels need a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from regmix.model import ops
from regmix_bench import timing
from regmix_bench.ceilings import Ceilings, ceiling_records, highest, measure_ceilings
from regmix_bench.harness import Record
from regmix_bench.suites.registry import Settings

SUITE = "kernels"
# Width 64, 4 heads of 16, hidden 128, vocabulary 4096, 8 sequences of 256: preset cpu-64.
WIDTH, HEADS, HIDDEN, VOCAB, SEQUENCES, SEQ_LEN = 64, 4, 128, 4096, 8, 256
TOKENS = SEQUENCES * SEQ_LEN


@dataclass(frozen=True, kw_only=True)
class Operation:
    """ours and peers: one forward and backward each; flops, num_bytes: the least that one needs.

    The bytes are those of inputs and results, each once; None where FLOPs are the limit.
    """

    name: str
    ours: timing.Work
    peers: dict[str, timing.Work]
    flops: float | None = None
    num_bytes: float | None = None


def measure(settings: Settings) -> list[Record]:
    """Measure the operations on this device."""
    if settings.device == "cuda":
        from regmix_bench import gpu_suite

        return gpu_suite.kernel_records(settings)
    settings.say("left out: the Triton kernels (they need a GPU); these are the CPU's operations")
    if settings.quick:
        settings.say("left out in a quick run: torch.compile")
    settings.say("one thread, as a worker that trains proxies has by default")
    torch.set_num_threads(1)
    device, effort = torch.device("cpu"), 0.03 if settings.quick else 0.3
    before = measure_ceilings(device, seconds=effort)
    measured = []
    for make in (head, attention, swiglu, norm):
        operation = make(compiled=not settings.quick)
        contenders = {"ours": operation.ours, **operation.peers}
        rounds = 3 if settings.quick else 7
        found = timing.interleaved(
            _those_that_run(contenders, settings.say), device, rounds=rounds, seconds=effort
        )
        measured.append((operation, found))
    ceilings = highest(before, measure_ceilings(device, seconds=effort))
    records = ceiling_records(ceilings, SUITE)
    for operation, found in measured:
        records += operation_records(operation, found, ceilings)
    return records


def _those_that_run(
    contenders: dict[str, timing.Work], say: Callable[[str], None]
) -> dict[str, timing.Work]:
    there = {}
    for name, work in contenders.items():
        try:
            work(0)
        except Exception as error:
            if name == "ours":
                raise
            say(f"left out: {name} ({type(error).__name__}: {str(error).splitlines()[0][:120]})")
        else:
            there[name] = work
    return there


def operation_records(
    operation: Operation, found: dict[str, list[float]], ceilings: Ceilings
) -> list[Record]:
    """Return ns/token of ours against the ceiling and every peer, and what the peers took."""
    taken = statistics.median(found["ours"])
    if operation.flops is not None:
        least, words = operation.flops / ceilings.flops, ceilings.gemm_words
    else:
        least, words = (operation.num_bytes or 0) / ceilings.copy_bytes, "copy measured here"

    def record(case: str, seconds: float, **against: object) -> Record:
        return Record(
            suite=SUITE,
            case=case,
            metric="forward and backward",
            value=1e9 * seconds / TOKENS,
            unit="ns/token",
            **against,  # type: ignore[arg-type]
        )

    case = f"{operation.name}; ours"
    records = [record(case, taken, ceiling=words, ratio_to_ceiling=least / taken)]
    peers = {name: times for name, times in found.items() if name != "ours"}
    for name, times in peers.items():
        ratio = timing.times_as_fast(found["ours"], times)
        records.append(record(case, taken, peer=name, ratio_to_peer=ratio))
    return records + [
        record(f"{operation.name}; {name}", statistics.median(times))
        for name, times in peers.items()
    ]


def normal(*size: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _with_gradient(function: Callable[..., Tensor], *inputs: Tensor) -> timing.Work:
    leaves = [value.clone().requires_grad_() for value in inputs]
    seed = torch.ones_like(function(*leaves).detach())

    def run(_: int) -> object:
        return torch.autograd.grad(function(*leaves), leaves, seed)

    return run


def _peers(
    name: str, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], compiled: bool
) -> dict[str, timing.Work]:
    found = {name: _with_gradient(function, *inputs)}
    if compiled:
        late: list[timing.Work] = []

        def run(call: int) -> object:
            # Compiled at its first call: one that cannot be is left out there.
            if not late:
                late.append(_with_gradient(torch.compile(function), *inputs))
            return late[0](call)

        found["torch.compile"] = run
    return found


def head(*, compiled: bool) -> Operation:
    """Linear layer and cross-entropy."""
    e_DN, head_VD = normal(WIDTH, TOKENS), normal(VOCAB, WIDTH, seed=1) / 8
    labels_N = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))
    de_DN, dhead_VD, spare = torch.empty_like(e_DN), torch.empty_like(head_VD), ops.Workspace()

    def loss(e_ND: Tensor, head_VD: Tensor) -> Tensor:
        return functional.cross_entropy(e_ND @ head_VD.T, labels_N)

    return Operation(
        name=f"head and loss, {TOKENS} tokens, width {WIDTH}, vocabulary {VOCAB}",
        ours=lambda _: ops.head_loss(e_DN, head_VD, labels_N, spare, de_DN, dhead_VD),
        peers=_peers("eager cross_entropy", loss, (e_DN.t().contiguous(), head_VD), compiled),
        flops=6.0 * TOKENS * WIDTH * VOCAB,
    )


def attention(*, compiled: bool) -> Operation:
    """Causal attention, queries and keys already rotated."""
    size = (SEQUENCES, 1, HEADS, WIDTH // HEADS, SEQ_LEN)
    q, k, v, dout = (normal(*size, seed=seed) for seed in range(4))
    scores = torch.empty(SEQUENCES, 1, HEADS, SEQ_LEN, SEQ_LEN)
    inverse = torch.empty(SEQUENCES, 1, HEADS, 1, SEQ_LEN)
    state = ops.AttentionState(q, k, v, scores, inverse, torch.empty(size))
    mask, spare, out = ops.causal_mask(SEQ_LEN, q), ops.Workspace(), torch.empty(size)
    dq, dk, dv = (torch.empty(size) for _ in range(3))

    def ours(_: int) -> object:
        ops.attend(state, mask, out)
        ops.attend_backward(state, dout, dq, dk, dv, spare)
        return dq

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = tuple(x[:, 0].transpose(-1, -2).contiguous() for x in (q, k, v))
    return Operation(
        name=f"causal attention, {SEQUENCES} x {SEQ_LEN}, {HEADS} heads of {WIDTH // HEADS}",
        ours=ours,
        # A compiled SDPA is the same call.
        peers=_peers("SDPA", sdpa, inputs, False),
        flops=6.0 * TOKENS * WIDTH * (SEQ_LEN + 1),
    )


def swiglu(*, compiled: bool) -> Operation:
    """SwiGLU's gate."""
    gate_up, dout = normal(1, 2 * HIDDEN, TOKENS), normal(1, HIDDEN, TOKENS, seed=1)
    silu, out = torch.empty_like(dout), torch.empty_like(dout)
    spare, gradient = torch.empty_like(dout), torch.empty_like(gate_up)

    def ours(_: int) -> object:
        ops.swiglu(gate_up, silu, out)
        spare.copy_(dout)  # the backward overwrites it
        ops.swiglu_backward(spare, gate_up, silu, gradient)
        return gradient

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    gate, up = gate_up[0].chunk(2)
    return Operation(
        name=f"SwiGLU, {TOKENS} tokens, hidden {HIDDEN}",
        ours=ours,
        peers=_peers("eager silu", eager, (gate, up), compiled),
        num_bytes=4.0 * TOKENS * HIDDEN * (2 + 1 + 1 + 2 + 2),
    )


def norm(*, compiled: bool) -> Operation:
    """RMSNorm; ours leaves its weight to the matrix that follows."""
    x, dy = normal(1, WIDTH, TOKENS), normal(1, WIDTH, TOKENS, seed=1)
    y, dx, scratch = torch.empty_like(x), torch.zeros_like(x), torch.empty_like(x)
    rstd = torch.empty(1, 1, TOKENS)

    def ours(_: int) -> object:
        ops.normalize(x, y, rstd, 1e-5)
        ops.normalize_backward(dy, y, rstd, dx, scratch)
        return dx

    def eager(x: Tensor) -> Tensor:
        return functional.rms_norm(x, (WIDTH,), eps=1e-5)

    return Operation(
        name=f"RMSNorm, {TOKENS} tokens, width {WIDTH}",
        ours=ours,
        peers=_peers("eager rms_norm", eager, (x[0].t().contiguous(),), compiled),
        num_bytes=4.0 * TOKENS * WIDTH * (1 + 1 + 1 + 1 + 1),
    )
