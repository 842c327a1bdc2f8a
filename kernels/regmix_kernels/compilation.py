"""Kernels compiled ahead of time, where there is no GPU, and what the compiler made of them.

Enters: a kernel with one of its configurations. Leaves: registers, shared memory, spills and
opcodes on an A100 (sm_80) or a Hopper GPU (sm_90). Runs nothing. Needs a process in which Triton
does not interpret (TRITON_INTERPRET unset): an interpreted function cannot be compiled.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90)
# Dynamic shared memory that one block can have, CUDA C++ programming guide, table of compute
# capabilities: 163 KB, 99 KB and 227 KB.
SHARED_LIMIT_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
_WARP = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one configuration that is shipped.

    signature: the type of each argument that is no constexpr, in order: "*bf16" (pointers count as
        aligned to 16 bytes, as torch's are), "i32", "i32:16" (a multiple of 16), "i64", "fp32".
    constants: the value of each constexpr.
    is_matrix: whether it multiplies matrices, so that Hopper's own instructions are expected.
    capabilities: the GPUs for which this configuration is meant.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    is_matrix: bool = False
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the compiler made: registers of a thread, bytes of a block, and instructions by name."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    num_spills: int
    opcodes: dict[str, int]

    @property
    def matrix_instructions(self) -> int:
        """Instructions of the tensor cores, of any generation."""
        return sum(self.opcodes.get(name, 0) for name in ("HMMA", "HGMMA", "QGMMA"))

    def faults(self, case: Case, capability: int) -> list[str]:
        """Return in words what must not be: spills, too much shared memory, old matrix code."""
        found = []
        if self.stack_bytes or self.num_spills:
            found.append(f"{self.stack_bytes} bytes of stack, {self.num_spills} spills")
        if self.shared_bytes > SHARED_LIMIT_BYTES[capability]:
            found.append(
                f"{self.shared_bytes} bytes of shared memory, {SHARED_LIMIT_BYTES[capability]} are"
                " there"
            )
        if case.is_matrix and capability == 90 and self.opcodes.get("HMMA"):
            found.append(f"{self.opcodes['HMMA']} HMMA where HGMMA was meant")
        fences, products = self.opcodes.get("WARPGROUP", 0), self.opcodes.get("HGMMA", 0)
        if products and fences >= 2 * products:
            # ptxas does this silently where it cannot keep several in flight.
            found.append(f"{fences} fences for {products} HGMMA: each waits for the one before")
        return found


def compile_case(case: Case, capability: int) -> Report:
    """Compile one configuration for sm_80 or sm_90 and read the machine code.

    Raises Triton's own `CompilationError` where the kernel cannot be compiled, `RuntimeError` where
    the disassembler that Triton ships does not answer.
    """
    names = case.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        kind = case.signature.get(name, "constexpr")
        if kind.startswith("*") or kind.endswith(":16"):
            attributes[(index,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix(":16")
    unknown = (case.signature.keys() | case.constants.keys()) - set(names)
    missing = [n for n in names if n not in case.signature and n not in case.constants]
    if unknown or missing:
        raise ValueError(f"{case.name}: arguments {sorted(unknown)} unknown, {missing} missing")
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    target = GPUTarget("cuda", capability, _WARP)
    compiled = triton.compile(source, target=target, options=options)
    return _read(compiled.asm["cubin"], int(compiled.metadata.shared))


def shipped(capability: int) -> list[Case]:
    """Return every configuration of every kernel of this package that `capability` can run.

    A module with kernels has a function `cases(capability)`.
    """
    package = importlib.import_module(__package__)
    names = [f"{__package__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(name) for name in names]
    found = [case for m in modules if hasattr(m, "cases") for case in m.cases(capability)]
    return [case for case in found if capability in case.capabilities]


@functools.cache
def _disassembler() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _read(cubin: bytes, shared_bytes: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_disassemble(option, file.name) for option in ("-res-usage", "-sass"))
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    # A line of code: /*0a10*/  @!P0 LDG.E.128.CONSTANT R4, ... ;
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\w+)", code, re.M))
    return Report(
        registers=numbers["REG"],
        shared_bytes=max(shared_bytes, numbers.get("SHARED", 0)),
        stack_bytes=numbers.get("STACK", 0),
        num_spills=opcodes["STL"] + opcodes["LDL"],
        opcodes=dict(opcodes),
    )


def _disassemble(option: str, path: str) -> str:
    done = subprocess.run([_disassembler(), option, path], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout
