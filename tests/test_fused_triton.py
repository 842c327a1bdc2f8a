"""The whole stack over Triton, in the interpreter, against the stack over the reference."""

from __future__ import annotations

import pytest
import torch
from interpreted import run_interpreted

ON_TRITON = {
    "embedding": "triton",
    "rmsnorm": "triton",
    "swiglu": "triton",
    "rope": "triton",
    "attention": "triton",
    "row_sums": "triton",
    "adamw": "triton",
}
STEPS, BATCH = 3, 2


def check_training(head: str, num_proxies: int) -> None:
    import numpy as np

    from regmix.model.fused.stack import FusedStack
    from regmix.model.optim import OptimConfig
    from regmix.model.presets import ModelShape

    shape = ModelShape(
        num_layers=2,
        width=32,
        num_heads=2,
        num_kv_heads=1,
        hidden=48,
        vocab_size=75,
        seq_len=20,
    )
    optim = OptimConfig(lr=3e-3, warmup_steps=1, total_steps=STEPS, clip_norm=0.5)
    kernels = ON_TRITON | {"head": head}

    def made(kernels: dict[str, str], size: int) -> FusedStack:
        stack = FusedStack(
            shape,
            optim,
            num_proxies=size,
            batch_size=BATCH,
            micro_batch=1,
            num_steps=STEPS,
            device="cpu",
            kernels=kernels,
        )
        stack.reset(range(size))
        return stack

    fast, plain, single = made(kernels, num_proxies), made({}, num_proxies), made(kernels, 1)
    if num_proxies > 1:
        fast.parameters["head"][1, 3, 3] = float("nan")
    draw = np.random.default_rng(0)
    for step in range(STEPS):
        tokens = draw.integers(0, shape.vocab_size, (num_proxies, BATCH, shape.seq_len + 1))
        fast.train_step(tokens, step)
        plain.train_step(tokens, step)
        single.train_step(tokens[:1], step)
    np.testing.assert_allclose(fast.losses(0, STEPS)[:, 0], plain.losses(0, STEPS)[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(fast.losses(0, STEPS)[:, :1], single.losses(0, STEPS))
    for name, value in single.parameters.items():
        torch.testing.assert_close(
            fast.parameters[name][0], plain.parameters[name][0], rtol=1e-3, atol=2e-5, msg=name
        )
        assert torch.equal(fast.parameters[name][0], value[0]), name
    assert fast.failed.tolist() == [False] + [True] * (num_proxies - 1)
    mask = torch.ones(1, shape.seq_len, dtype=torch.bool)
    mask[0, 13:] = False
    held_out = torch.from_numpy(draw.integers(0, shape.vocab_size, (1, shape.seq_len + 1)))
    torch.testing.assert_close(
        fast.evaluate(held_out, mask)[:1], plain.evaluate(held_out, mask)[:1], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("head", "num_proxies"), [("streamed", 2), ("chunked", 2)])
def test_a_stack_over_triton_trains_as_over_the_reference(head: str, num_proxies: int) -> None:
    run_interpreted(check_training, head, num_proxies)
