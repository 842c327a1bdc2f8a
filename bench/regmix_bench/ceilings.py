"""The limits of this machine, measured on the spot: copying memory, multiplying matrices.

Enters: a device. Leaves: bytes and FLOPs per second, as numbers and as records, beside the
datasheet's where the device is in `peaks`. Every ratio to a ceiling in a run is to these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regmix.model.peaks import Peak, peak_of
from regmix_bench.harness import Record
from regmix_bench.timing import best_seconds

GEMM_SIZE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2_000_000_000, "cpu": 256_000_000}
WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """copy_bytes: read and written, per second; gemm_flops: per second, by dtype."""

    device: torch.device
    copy_bytes: float
    gemm_flops: Mapping[torch.dtype, float]
    peak: Peak | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models are computed in on this device."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def flops(self) -> float:
        """The rate of matrix products in that dtype, per second."""
        return self.gemm_flops[self.dtype]

    @property
    def gemm_words(self) -> str:
        """The rate of matrix products, in the words of a record."""
        return f"{WORDS[self.dtype]} GEMM measured here"


def measure_copy(device: torch.device, num_bytes: int | None = None, seconds: float = 0.1) -> float:
    """Return the bytes per second that are read and written while a tensor is copied."""
    size = (num_bytes or COPY_BYTES[device.type]) // 4
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    taken = best_seconds(lambda _: target.copy_(source), device, seconds=seconds)
    return 2 * 4 * size / taken


def measure_gemm(
    device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.1
) -> float:
    """Return the FLOPs per second of a square product of normal numbers.

    Zeros would flatter: a GPU's clock falls with the bits that change.
    """
    size = size or GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    taken = best_seconds(lambda _: torch.mm(a, b, out=out), device, seconds=seconds)
    return 2.0 * size**3 / taken


def measure_ceilings(
    device: torch.device,
    *,
    gemm_size: int | None = None,
    copy_bytes: int | None = None,
    seconds: float = 0.1,
) -> Ceilings:
    """Measure this device's limits; on a GPU in bf16 and fp32, on a CPU in fp32."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    dtypes = [torch.bfloat16, torch.float32] if device.type == "cuda" else [torch.float32]
    gemm = {dtype: measure_gemm(device, dtype, gemm_size, seconds) for dtype in dtypes}
    return Ceilings(
        device=device,
        copy_bytes=measure_copy(device, copy_bytes, seconds),
        gemm_flops=gemm,
        peak=peak_of(name),
    )


def highest(first: Ceilings, second: Ceilings) -> Ceilings:
    """Return the higher of two measurements of one device, rate by rate.

    On a machine that others use, one of them may have met its neighbours.
    """
    gemm = {dtype: max(rate, second.gemm_flops[dtype]) for dtype, rate in first.gemm_flops.items()}
    return dataclasses.replace(
        first, copy_bytes=max(first.copy_bytes, second.copy_bytes), gemm_flops=gemm
    )


def ceiling_records(ceilings: Ceilings, suite: str) -> list[Record]:
    """Return the limits as records, against the datasheet where there is one."""
    peak, kind = ceilings.peak, ceilings.device.type
    records = []
    for dtype, flops in ceilings.gemm_flops.items():
        known = peak is not None and dtype is torch.bfloat16
        records.append(
            Record(
                suite=suite,
                case=f"{kind}, square product",
                metric=f"{WORDS[dtype]} GEMM",
                value=flops / 1e12,
                unit="TFLOP/s",
                ceiling=f"{peak.name} datasheet" if peak and known else None,
                ratio_to_ceiling=flops / peak.bf16_flops if peak and known else None,
            )
        )
    records.append(
        Record(
            suite=suite,
            case=f"{kind}, one tensor to another",
            metric="copy, read and written",
            value=ceilings.copy_bytes / 1e9,
            unit="GB/s",
            ceiling=f"{peak.name} datasheet" if peak else None,
            ratio_to_ceiling=ceilings.copy_bytes / peak.memory_bytes if peak else None,
        )
    )
    return records
