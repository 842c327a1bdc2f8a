"""What a speed means: the utilisation of a device, and a whole sweep.

Enters: tokens per second. Leaves: the model FLOPs utilisation; proxies per hour and the time and
cost of a sweep. Measures nothing: `ceilings` does; peaks by datasheet are `regmix.model.peaks`.
"""

from __future__ import annotations

from dataclasses import dataclass


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
