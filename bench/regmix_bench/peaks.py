"""What a GPU could do at most, and what a speed means for a whole sweep.

Enters: a device's name; tokens per second. Leaves: its peak rates by the vendor's datasheet, None
for a device that is not in the table; the model FLOPs utilisation; proxies per hour and the time
and cost of a sweep. Measures nothing: `ceilings` does.

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


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Return the share of `peak_flops` that goes into the model's FLOPs, from 0 to 1.

    flops_per_token: of forward and backward, attention counted as causal
    (`ModelShape.flops_per_token`); so what is recomputed or padded does not count.
    """
    return tokens_per_second * flops_per_token / peak_flops


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A whole sweep: `num_proxies` of `proxy_tokens` each, on `num_devices` at `price_per_hour`.

    price_per_hour: of one device, in whatever currency; None where no cost is asked for.
    """

    num_proxies: int
    proxy_tokens: int
    num_devices: int = 1
    price_per_hour: float | None = None

    def proxies_per_hour(self, tokens_per_second: float) -> float:
        """Return the proxies that one device trains in an hour."""
        return 3600 * tokens_per_second / self.proxy_tokens

    def hours(self, tokens_per_second: float) -> float:
        """Return the hours of the sweep, its devices all at that speed."""
        rate = self.proxies_per_hour(tokens_per_second) * self.num_devices
        return self.num_proxies / rate

    def cost(self, tokens_per_second: float) -> float | None:
        """Return the price of the sweep; None without a price per hour."""
        if self.price_per_hour is None:
            return None
        return self.hours(tokens_per_second) * self.num_devices * self.price_per_hour
