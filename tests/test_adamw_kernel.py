"""AdamW in flat buffers: against torch's own in float64, clip, failure, norms, stacks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from interpreted import run_interpreted
from kernel_checks import assert_close, assert_same_bits, normal, poison_new_memory, poisoned
from regmix_kernels import reference
from torch import Tensor

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}
# More than one block of the update and of the norm, and no multiple of either.
SIZE = 33_123


def test_every_property_holds_in_the_interpreter() -> None:
    """One process for all, each named for its property: starting Triton takes seconds."""
    run_interpreted(everything)


def everything() -> None:
    poison_new_memory()
    norms_are_right_or_not_finite()
    updates_are_those_of_torch()
    updates_are_those_of_the_reference_at_other_settings()
    a_failed_proxy_is_frozen_bit_for_bit()
    a_stack_learns_like_single_proxies()


@dataclass
class Buffers:
    """Everything that an update changes."""

    params: Tensor
    grads: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor
    counts: Tensor
    failed: Tensor

    @staticmethod
    def start(params: Tensor) -> Buffers:
        rows = params.shape[0]
        return Buffers(
            params=params.clone(),
            grads=torch.zeros_like(params),
            mean=torch.zeros_like(params),
            square=torch.zeros_like(params),
            copy=poisoned(*params.shape, dtype=torch.float16),
            counts=torch.zeros(rows, dtype=torch.int32),
            failed=torch.zeros(rows, dtype=torch.bool),
        )

    def step(self, grads: Tensor, lr: float, **changed: object) -> Tensor:
        from regmix_kernels import adamw

        self.grads.copy_(grads)
        norms = adamw.gradient_norms(self.grads)
        adamw.update(
            self.params,
            self.grads,
            self.mean,
            self.square,
            self.copy,
            norms,
            torch.tensor([lr]),
            self.counts,
            self.failed,
            **{**SETTINGS, **changed},
        )
        assert not self.grads.any(), "gradients are left for the next step"
        return norms

    def kept(self) -> list[Tensor]:
        return [self.params, self.mean, self.square, self.copy, self.counts]


def norms_are_right_or_not_finite() -> None:
    from regmix_kernels import adamw

    for size in (1, 1000, 16_384, SIZE):
        grads = normal(3, size, seed=size)
        wanted = grads.double().norm(dim=-1)
        assert_close(adamw.gradient_norms(grads), wanted, torch.float32, f"norm of {size}")
    for planted in (math.nan, math.inf, -math.inf, 1e20, -3e38):
        for place in (0, 20_000, SIZE - 1):
            grads = normal(3, SIZE, seed=0)
            grads[1, place] = planted
            norms = adamw.gradient_norms(grads)
            assert norms.isfinite().tolist() == [True, False, True], (planted, place)
    tiny = adamw.gradient_norms(torch.full((1, 100), 1e-18))
    assert_close(tiny, torch.full((1,), 1e-17, dtype=torch.float64), torch.float32, "tiny")


def updates_are_those_of_torch() -> None:
    params = normal(2, 5000, seed=1)
    buffers = Buffers.start(params)
    own = [torch.nn.Parameter(row.double()) for row in params]
    kinds = {"betas": SETTINGS["betas"], "eps": SETTINGS["eps"], "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([param], lr=1.0, **kinds) for param in own]
    for step in range(6):
        lr = 1e-2 * (step + 1)
        # Norms of about 0.07 and of 70: one below the limit, one above.
        grads = normal(2, 5000, seed=10 + step) * torch.tensor([[1e-3], [1.0]])
        norms = buffers.step(grads, lr)
        for p, (param, optimizer) in enumerate(zip(own, optimizers, strict=True)):
            param.grad = grads[p].double()
            norm = torch.nn.utils.clip_grad_norm_([param], SETTINGS["clip_norm"])
            assert_close(norms[p], norm, torch.float32, "norm")
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            state = optimizer.state[param]
            assert_close(buffers.params[p], param.detach(), torch.float32, f"step {step}")
            assert_close(buffers.mean[p], state["exp_avg"], torch.float32, f"step {step}")
            assert_close(buffers.square[p], state["exp_avg_sq"], torch.float32, f"step {step}")
    assert buffers.counts.tolist() == [6, 6]
    assert_same_bits(buffers.copy, buffers.params.to(torch.float16), "working copy")


def updates_are_those_of_the_reference_at_other_settings() -> None:
    """Slow second moments, no first one, no limit, and a count far from the start."""
    for betas, count in (((0.9, 0.999), 0), ((0.0, 0.99), 3), ((0.9, 0.999), 4999)):
        params, grads = (normal(1, 300, seed=seed) for seed in (1, 2))
        buffers = Buffers.start(params)
        buffers.counts += count
        buffers.mean.copy_(normal(1, 300, seed=3))
        buffers.square.copy_(normal(1, 300, seed=4).square())
        settings = {"betas": betas, "eps": 1e-6, "weight_decay": 0.0}
        wanted = reference.adamw(
            *(value.double() for value in (params, grads, buffers.mean, buffers.square)),
            count + 1,
            lr=float(torch.tensor(3e-3)),
            **settings,
        )
        buffers.step(grads, 3e-3, clip_norm=None, **settings)
        for got, value in zip((buffers.params, buffers.mean, buffers.square), wanted, strict=True):
            # The change is what is looked at, so that a small step cannot hide an error.
            assert_close(got, value, torch.float32, f"{betas}")
        moved = (wanted[0] - params.double()).abs().max()
        error = ((buffers.params - params).double() - (wanted[0] - params.double())).abs().max()
        # Parameters near 3 are rounded to 2.4e-7.
        assert error <= 2e-6 * moved + 3e-7, (betas, count)


def a_failed_proxy_is_frozen_bit_for_bit() -> None:
    buffers = Buffers.start(normal(4, 2000, seed=5))
    buffers.failed[3] = True
    buffers.step(normal(4, 2000, seed=6), 1e-2)
    assert buffers.counts.tolist() == [1, 1, 1, 0]
    assert buffers.copy[3].isnan().all()
    before = [value.clone() for value in buffers.kept()]
    bad = normal(4, 2000, seed=7)
    bad[1, 1999], bad[2, 0] = math.nan, 1e30
    buffers.step(bad, 1e-2)
    assert buffers.failed.tolist() == [False, True, True, True]
    # A failure stays, also when the gradients are fine again.
    buffers.step(normal(4, 2000, seed=8), 1e-2)
    assert buffers.failed.tolist() == [False, True, True, True]
    assert buffers.counts.tolist() == [3, 1, 1, 0]
    for now, then in zip(buffers.kept(), before, strict=True):
        assert_same_bits(now[1:], then[1:], "frozen")
    assert buffers.params[0].isfinite().all()
    assert not torch.equal(buffers.params[0], before[0][0])


def a_stack_learns_like_single_proxies() -> None:
    params = normal(3, SIZE, seed=9)
    together = Buffers.start(params)
    alone = [Buffers.start(params[p : p + 1]) for p in range(3)]
    for step in range(3):
        grads = normal(3, SIZE, seed=20 + step)
        if step == 1:
            grads[1, 77] = math.nan
        norms = together.step(grads, 1e-2)
        for p, buffers in enumerate(alone):
            norm = buffers.step(grads[p : p + 1].clone(), 1e-2)
            assert_same_bits(norm[0], norms[p], f"norm of proxy {p}")
    for p, buffers in enumerate(alone):
        for got, single in zip(together.kept(), buffers.kept(), strict=True):
            assert_same_bits(got[p], single[0], f"proxy {p}")
