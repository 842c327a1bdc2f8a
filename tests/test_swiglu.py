"""SwiGLU: values and gradients against float64, extremes, stacks."""

from __future__ import annotations

import torch
from interpreted import run_interpreted
from kernel_checks import assert_close, assert_same_bits, normal, poison_new_memory
from regmix_kernels import reference

DTYPES = (torch.float32, torch.float16)


def test_every_property_holds_in_the_interpreter() -> None:
    """One process for all, each named for its property: starting Triton takes seconds."""
    run_interpreted(everything)


def everything() -> None:
    poison_new_memory()
    values_and_gradients_are_the_references()
    large_gates_stay_finite()
    a_stack_acts_like_single_proxies()


def values_and_gradients_are_the_references() -> None:
    from regmix_kernels import swiglu

    for dtype in DTYPES:
        for num_proxies, num_rows, hidden in ((5, 123, 123), (1, 1, 1), (2, 9, 384), (1, 3, 700)):
            gate_up = normal(num_proxies, num_rows, 2 * hidden, seed=0, dtype=dtype)
            above = normal(num_proxies, num_rows, hidden, seed=1, dtype=dtype)
            wide = gate_up.double().requires_grad_()
            wanted = reference.swiglu(*wide.chunk(2, dim=-1))
            (gradient,) = torch.autograd.grad(wanted, wide, above.double())
            got = swiglu.forward(gate_up)
            assert_close(got, wanted.detach(), dtype, "forward")
            below, again = swiglu.backward(above, gate_up)
            assert_close(below, gradient, dtype, "backward")
            assert_same_bits(again, got, "recomputed")


def large_gates_stay_finite() -> None:
    from regmix_kernels import swiglu

    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    gate_up = torch.cat((gate, torch.ones(7)))[None, None]
    wide = gate_up.double().requires_grad_()
    wanted = reference.swiglu(*wide.chunk(2, dim=-1))
    (gradient,) = torch.autograd.grad(wanted.sum(), wide)
    below, again = swiglu.backward(torch.ones(1, 1, 7), gate_up)
    assert_close(again, wanted.detach(), torch.float32, "hidden")
    assert_close(below, gradient, torch.float32, "gradient")
    assert_close(below[..., :7], gradient[..., :7], torch.float32, "gate's gradient")


def a_stack_acts_like_single_proxies() -> None:
    from regmix_kernels import swiglu

    for dtype in DTYPES:
        gate_up = normal(3, 21, 246, seed=2, dtype=dtype)
        above = normal(3, 21, 123, seed=3, dtype=dtype)
        gate_up[1, 4, 5] = float("nan")
        together = (swiglu.forward(gate_up), *swiglu.backward(above, gate_up))
        assert all(value[1].isnan().any() for value in together)
        for p in (0, 2):
            own, gradient = gate_up[p : p + 1].clone(), above[p : p + 1].clone()
            alone = (swiglu.forward(own), *swiglu.backward(gradient, own))
            for got, single in zip(together, alone, strict=True):
                assert_same_bits(got[p], single[0], f"proxy {p}")
