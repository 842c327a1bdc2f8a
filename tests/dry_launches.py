"""Triton's launches as a GPU would see them, up to the launch itself, without a GPU.

Enters: code that launches kernels on CPU tensors. Leaves: every launch with what Triton would
compile for it (types, alignment, divisibility, constants) and its grid. Compiles and computes
nothing: results are whatever lay in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Kernels are kept by device: no real one has this name.
_DEVICE = "dry"


@dataclass(frozen=True)
class Launch:
    """kernel; variant: types and specialisation of its arguments, constants, options."""

    kernel: str
    variant: str
    grid: tuple[int, int, int]


class _Driver:
    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> str:
        return _DEVICE

    def get_current_stream(self, device: str) -> int:
        return 0


class _Kernel:
    """What stands for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, kernel: str, variant: str, launches: list[Launch]) -> None:
        self._kernel, self._variant, self._launches = kernel, variant, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        self._launches.append(Launch(self._kernel, self._variant, (x, y, z)))


@contextlib.contextmanager
def recorded(capability: int = 90) -> Iterator[list[Launch]]:
    """Record the launches of the body, in order."""
    launches: list[Launch] = []

    def made(self: JITFunction, key: str, *_: Any, **__: Any) -> _Kernel:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        kernel = _Kernel(name, key, launches)
        self.device_caches[_DEVICE][0][key] = kernel
        binders.append(self)
        return kernel

    binders: list[JITFunction] = []
    compiles, active = JITFunction._do_compile, driver._active
    JITFunction._do_compile = made
    driver.set_active(_Driver(capability))
    try:
        yield launches
    finally:
        JITFunction._do_compile = compiles
        # Not by `reset_active`: it looks for a GPU.
        driver._active = active
        for each in binders:
            each.device_caches.pop(_DEVICE, None)
