"""What a GPU could do at most, by the vendor's datasheet.

Enters: a device's name. Leaves: its peak rates; None for a device that is not in the table.
Measures nothing.

Sources: NVIDIA A100 datasheet (June 2021), H100 datasheet (2023), H200 datasheet (2024), HGX B200
page (2024). Dense rates: half of those the datasheets give with sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Peak:
    """name: in the records; bf16_flops: dense, per second; memory_bytes: of HBM, per second."""

    name: str
    bf16_flops: float
    memory_bytes: float


# (words that a device's name holds, its peak); the first row whose words are all there counts.
PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("B200",), Peak(name="B200", bf16_flops=2250e12, memory_bytes=8.0e12)),
    (("H200", "NVL"), Peak(name="H200 NVL", bf16_flops=835e12, memory_bytes=4.8e12)),
    (("H200",), Peak(name="H200 SXM", bf16_flops=989e12, memory_bytes=4.8e12)),
    (("H100", "NVL"), Peak(name="H100 NVL", bf16_flops=835e12, memory_bytes=3.9e12)),
    (("H100", "PCIe"), Peak(name="H100 PCIe", bf16_flops=756e12, memory_bytes=2.0e12)),
    (("H100",), Peak(name="H100 SXM", bf16_flops=989e12, memory_bytes=3.35e12)),
    (("A100", "40GB"), Peak(name="A100 40GB", bf16_flops=312e12, memory_bytes=1.555e12)),
    (("A100", "PCIe"), Peak(name="A100 80GB PCIe", bf16_flops=312e12, memory_bytes=1.935e12)),
    (("A100",), Peak(name="A100 80GB SXM", bf16_flops=312e12, memory_bytes=2.039e12)),
)
# Names that hold one of these are other devices: a slice of a GPU, a GPU joined with a CPU.
OTHERS = ("MIG", "GB200", "GH200")


def peak_of(device_name: str) -> Peak | None:
    """Return the peak of a device by the name its driver gives; None where it is not known."""
    if any(word.lower() in device_name.lower() for word in OTHERS):
        return None
    for words, peak in PEAKS:
        if all(word.lower() in device_name.lower() for word in words):
            return peak
    return None
