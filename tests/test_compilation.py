"""Every kernel at every shipped configuration, compiled for an A100 and a Hopper GPU."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import regmix_kernels
import triton
import triton.language as tl
from regmix_kernels.compilation import CAPABILITIES, Case, Report, compile_case, shipped

SHIPPED = [(case, capability) for capability in CAPABILITIES for case in shipped(capability)]


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        pytest.param(case, capability, id=f"sm{capability} {case.name}")
        for case, capability in SHIPPED
    ],
)
def test_a_shipped_kernel_compiles_without_spills_into_what_the_gpu_has(
    case: Case, capability: int
) -> None:
    report = compile_case(case, capability)
    assert report.faults(case, capability) == []
    if case.is_matrix:
        assert report.opcodes.get("HGMMA" if capability == 90 else "HMMA")


def test_every_kernel_has_cases() -> None:
    jitted = {}
    for info in pkgutil.iter_modules(regmix_kernels.__path__):
        module = importlib.import_module(f"regmix_kernels.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, triton.runtime.jit.JITFunction) and value.fn.__module__ == (
                module.__name__
            ):
                jitted[f"{info.name}.{name}"] = value
    compiled = {case.kernel.fn for case, _ in SHIPPED}
    called = {name for value in jitted.values() for name in value.fn.__code__.co_names}
    # What other kernels call is compiled with them.
    missing = [
        name
        for name, value in jitted.items()
        if value.fn not in compiled and value.fn.__name__ not in called
    ]
    assert not missing


def test_names_of_cases_are_unique() -> None:
    names = [(case.name, capability) for case, capability in SHIPPED]
    assert len(names) == len(set(names))


@triton.jit
def _hungry(x, out, SIZE: tl.constexpr, COUNT: tl.constexpr):
    places = tl.arange(0, SIZE)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(COUNT):
        row = tl.load(x + step * SIZE + places).to(tl.float32)
        total += row[:, None] * tl.exp(row[None, :] + total)
    tl.store(out + places[:, None] * SIZE + places[None, :], total)


def test_the_gates_see_spills() -> None:
    case = Case(
        name="hungry",
        kernel=_hungry,
        signature={"x": "*bf16", "out": "*fp32"},
        constants={"SIZE": 128, "COUNT": 4},
        num_warps=1,
    )
    report = compile_case(case, 90)
    assert report.num_spills > 0
    assert any("spills" in fault for fault in report.faults(case, 90))


def test_the_gates_see_shared_memory_and_old_matrix_code() -> None:
    report = Report(
        registers=1, shared_bytes=170_000, stack_bytes=0, num_spills=0, opcodes={"HMMA": 4}
    )
    case = Case(name="any", kernel=_hungry, signature={}, is_matrix=True)
    assert len(report.faults(case, 80)) == 1
    assert "HMMA" in report.faults(case, 90)[0]


def test_arguments_that_do_not_fit_the_kernel_are_named() -> None:
    case = Case(name="any", kernel=_hungry, signature={"y": "*fp32"})
    with pytest.raises(ValueError, match="y"):
        compile_case(case, 90)


@pytest.mark.parametrize("name", ["head.stream D256 V50432", "head.log_sum_exp D256 V50432"])
def test_the_largest_kernels_fit_a_gpu_with_less_shared_memory(name: str) -> None:
    (case,) = (case for case in shipped(89) if case.name == name)
    assert compile_case(case, 89).faults(case, 89) == []
