"""The head with its loss: 85% of a proxy's work, by every way there is to compute it.

Enters: a run. Leaves: ns/token forward and backward, and of the loss alone, of ours (A chunked, C
streamed), eager cross-entropy, torch.compile and Liger-Kernel, in turns; and the errors of ours
and of eager against float64 (acceptance 1 of the loss kernel): at labels by Zipf's law and logits
of several spreads, with the signed error by the tokens' frequency.

N tokens, D width, V vocabulary; stacks of one proxy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regmix_bench import timing
from regmix_bench.gpu.run import Contender, Run, bake_off
from regmix_bench.peer_imports import missing

# Standard deviations of the logits, from a proxy's first steps to a trained one's.
SPREADS = (1.1, 2.5, 4.6)
# Acceptance 1 of a loss kernel: absolute, and for gradients as a multiple of A's error.
BOUNDS, DECILE_BOUND = {"mean loss": 2e-4, "dE": 5e-3, "dC": 5e-3}, 1e-3
TIMED_BY_A, TIMES_A = ("dE", "dC"), 1.5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tokens of a micro-batch, tokens of the comparison with float64, width, vocabulary."""

    tokens: int
    exact_tokens: int
    width: int
    vocab: int


REFERENCE = Sizes(tokens=32768, exact_tokens=2048, width=256, vocab=50432)
TINY = Sizes(tokens=32, exact_tokens=32, width=32, vocab=80)

Inputs = tuple[Tensor, Tensor, Tensor]


def zipf_labels(tokens: int, vocab: int, device: torch.device) -> Tensor:
    """Return labels whose frequency falls as 1 / rank."""
    generator = torch.Generator(device).manual_seed(5)
    weights = 1.0 / torch.arange(1, vocab + 1, device=device)
    return torch.multinomial(weights, tokens, replacement=True, generator=generator)


def inputs(sizes: Sizes, tokens: int, spread: float, seed: int, run: Run) -> Inputs:
    """Return e [N, D], head [V, D] and labels [N]; the logits have the given spread."""
    generator = torch.Generator(run.device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=run.device)
    e_ND = draw(tokens, sizes.width).to(run.dtype)
    head_VD = (draw(sizes.vocab, sizes.width) * spread * sizes.width**-0.5).to(run.dtype)
    return e_ND, head_VD, zipf_labels(tokens, sizes.vocab, run.device)


def our_step(kind: str, given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats [N], dE [N, D] and dC [V, D] of the mean loss, by a kernel of ours."""
    from regmix_kernels import linear_cross_entropy

    e_ND, head_VD, labels_N = given
    dhead_PVD = torch.zeros(1, *head_VD.shape, device=e_ND.device)
    nats_PN, de_PND = getattr(linear_cross_entropy, kind)(
        e_ND[None], head_VD[None], labels_N[None], scale=1 / len(e_ND), dhead_PVD=dhead_PVD
    )
    return nats_PN[0], de_PND[0], dhead_PVD[0]


def cross_entropy(e_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean loss with the logits in memory, as eager PyTorch has it."""
    return functional.cross_entropy((e_ND @ head_VD.T).float(), labels_N)


def with_gradients(function: Callable[..., Tensor], given: Inputs) -> tuple[Tensor, ...]:
    """Return dE and dC of a loss by autograd."""
    e_ND, head_VD = (x.detach().requires_grad_() for x in given[:2])
    return torch.autograd.grad(function(e_ND, head_VD, given[2]), (e_ND, head_VD))


def head_bake_off(run: Run) -> None:
    """Time every way, then compare ours with float64."""
    sizes = TINY if run.tiny else REFERENCE
    case = f"head, {sizes.tokens} tokens, width {sizes.width}, vocabulary {sizes.vocab}"
    tried: dict[str, Any] = {"needs": 10.0, "has_contenders": True}
    run.attempt(f"{case}, both ways", lambda: _both_ways(run, case, sizes), **tried)
    for spread in SPREADS:
        label = f"head against float64, logits of spread {spread:g}"
        run.attempt(label, functools.partial(_errors, run, label, sizes, spread))
    run.attempt(f"{case}, loss only", lambda: _loss_only(run, case, sizes), **tried)


def _sets(run: Run, sizes: Sizes) -> timing.Rotation[Inputs]:
    num_bytes = 2.0 * (sizes.tokens + sizes.vocab) * sizes.width
    return timing.Rotation(
        lambda seed: inputs(sizes, sizes.tokens, 1.5, seed, run),
        num_bytes=num_bytes,
        device=run.device,
    )


def _both_ways(run: Run, case: str, sizes: Sizes) -> None:
    sets = _sets(run, sizes)

    def ours(kind: str) -> Contender:
        # The step keeps one gradient buffer; making and zeroing it is not the kernel's time.
        from regmix_kernels import linear_cross_entropy

        dhead = torch.zeros(1, sizes.vocab, sizes.width, device=run.device)

        def work(call: int) -> object:
            e_ND, head_VD, labels_N = sets[call]
            return getattr(linear_cross_entropy, kind)(
                e_ND[None],
                head_VD[None],
                labels_N[None],
                scale=1 / sizes.tokens,
                dhead_PVD=dhead,
            )

        return Contender(make=lambda: work, ours=True)

    contenders = {
        "A, chunked": ours("chunked"),
        "C, streamed": ours("fused"),
        "eager cross_entropy": Contender(
            make=lambda: lambda call: with_gradients(cross_entropy, sets[call])
        ),
    }
    reason = missing("liger_kernel")
    if reason is None:
        contenders["Liger-Kernel"] = Contender(make=lambda: _liger(sets), needs=25)
    else:
        run.say(f"left out: Liger-Kernel ({reason})")
    if run.compiles:
        contenders["torch.compile"] = Contender(make=lambda: _compiled(sets), needs=25)
    limits = run.limits()
    bake_off(
        run,
        case,
        "forward and backward",
        contenders,
        tokens=sizes.tokens,
        least_seconds=6.0 * sizes.tokens * sizes.width * sizes.vocab / limits.flops,
        ceiling=limits.gemm_words,
    )


def _compiled(sets: timing.Rotation[Inputs]) -> timing.Work:
    function = torch.compile(cross_entropy)
    return lambda call: with_gradients(function, sets[call])


def _liger(sets: timing.Rotation[Inputs]) -> timing.Work:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(e_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
        found = LigerFusedLinearCrossEntropyFunction.apply(e_ND, head_VD, labels_N)
        return found[0] if isinstance(found, tuple) else found

    return lambda call: with_gradients(loss, sets[call])


def _loss_only(run: Run, case: str, sizes: Sizes) -> None:
    from regmix_kernels import linear_cross_entropy

    sets = _sets(run, sizes)

    def ours(call: int) -> object:
        e_ND, head_VD, labels_N = sets[call]
        return linear_cross_entropy.loss(e_ND[None], head_VD[None], labels_N[None])

    def eager(call: int) -> object:
        with torch.no_grad():
            return cross_entropy(*sets[call])

    contenders = {
        "loss": Contender(make=lambda: ours, ours=True),
        "eager cross_entropy": Contender(make=lambda: eager),
    }
    if run.compiles:
        contenders["torch.compile"] = Contender(make=lambda: _compiled_loss(sets), needs=25)
    limits = run.limits()
    bake_off(
        run,
        case,
        "loss only",
        contenders,
        tokens=sizes.tokens,
        least_seconds=2.0 * sizes.tokens * sizes.width * sizes.vocab / limits.flops,
        ceiling=limits.gemm_words,
    )


def _compiled_loss(sets: timing.Rotation[Inputs]) -> timing.Work:
    function = torch.compile(cross_entropy)

    def work(call: int) -> object:
        with torch.no_grad():
            return function(*sets[call])

    return work


def _errors(run: Run, label: str, sizes: Sizes, spread: float) -> None:
    """Emit the errors of A, C and eager; C is held to the bounds, and to 1.5 times A's."""
    given = inputs(sizes, sizes.exact_tokens, spread, 11, run)
    wanted = _exact(given)
    of_a: dict[str, float] = {}
    for name, kind in (("A, chunked", "chunked"), ("C, streamed", "fused"), ("eager", "")):
        if kind:
            nats_N, de_ND, dhead_VD = our_step(kind, given)
        else:
            de_ND, dhead_VD = with_gradients(cross_entropy, given)
            logits_NV = (given[0] @ given[1].T).float()
            nats_N = functional.cross_entropy(logits_NV, given[2], reduction="none")
        found = {
            "mean loss": abs(float(nats_N.double().mean() - wanted[0].mean())),
            "dE": _relative(de_ND, wanted[1]),
            "dC": _relative(dhead_VD, wanted[2]),
            "dC, signed, worst decile of frequency": _worst_decile(dhead_VD, wanted[2], given[2]),
        }
        of_a = of_a or found
        for metric, error in found.items():
            bound = BOUNDS.get(metric, DECILE_BOUND)
            # Rounding in float32 is chance: no multiple of A's is asked of it.
            if kind == "fused" and metric in TIMED_BY_A and run.dtype != torch.float32:
                bound = min(bound, TIMES_A * of_a[metric])
            run.record(
                f"{label}; {name}",
                f"error of {metric}",
                error,
                "nats" if metric == "mean loss" else "relative error",
                # What is not ours to accept is shown beside the bound, not held to it.
                ceiling=f"{'bound' if kind == 'fused' else 'acceptance'} {bound:.2g}",
                ratio_to_ceiling=error / bound,
            )


def _exact(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return nats, dE and dC in float64, written out: autograd would hold it all three times."""
    e_ND, head_VD, labels_N = given[0].double(), given[1].double(), given[2]
    logits_NV = e_ND @ head_VD.T
    picked_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
    nats_N = torch.logsumexp(logits_NV, dim=1) - picked_N
    dlogits_NV = logits_NV.softmax(dim=1)
    dlogits_NV[torch.arange(len(labels_N), device=labels_N.device), labels_N] -= 1
    dlogits_NV /= len(labels_N)
    return nats_N, dlogits_NV @ head_VD, dlogits_NV.T @ e_ND


def _relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm())


def _worst_decile(dhead_VD: Tensor, wanted_VD: Tensor, labels_N: Tensor) -> float:
    """Return the largest |sum of signed errors| over tenths of the tokens by frequency.

    Relative to the norm of the whole gradient, and per root of the numbers in the tenth, so that
    chance alone stays small and a bias does not.
    """
    counts_V = torch.bincount(labels_N, minlength=len(dhead_VD))
    by_frequency = torch.argsort(counts_V, descending=True, stable=True)
    error_VD = dhead_VD.double() - wanted_VD
    worst = 0.0
    for rows in by_frequency.chunk(10):
        part = error_VD[rows]
        worst = max(worst, abs(float(part.sum())) / part.numel() ** 0.5)
    return worst / float(wanted_VD.norm())
