"""A training speed in every unit that a decision needs, as records.

Enters: tokens per second of a model's shape, the limits measured, the sweep asked about. Leaves:
records of tokens/s, ns/token, MFU, proxies per hour, and the sweep's time and cost. Trains nothing.
"""

from __future__ import annotations

from typing import Any

from regmix.model.presets import ModelShape
from regmix_bench.ceilings import Ceilings
from regmix_bench.harness import Record
from regmix_bench.peaks import Sweep, mfu


def speed_records(
    suite: str,
    case: str,
    tokens_per_second: float,
    shape: ModelShape,
    ceilings: Ceilings,
    *,
    peers: dict[str, float] | None = None,
) -> list[Record]:
    """Return tokens/s (one record for each of `peers`: name -> times as fast), ns/token and MFU."""

    def record(metric: str, value: float, unit: str, **against: Any) -> Record:
        return Record(suite=suite, case=case, metric=metric, value=value, unit=unit, **against)

    flops = shape.flops_per_token()
    share = mfu(tokens_per_second, flops, ceilings.flops)
    speed = ("training speed", tokens_per_second, "tokens/s")
    records = [record(*speed, ceiling=ceilings.gemm_words, ratio_to_ceiling=share)]
    for name, ratio in (peers or {}).items():
        records.append(record(*speed, peer=name, ratio_to_peer=ratio))
    records.append(record("time per token", 1e9 / tokens_per_second, "ns/token"))
    records.append(record("MFU, of the GEMM rate measured", 100 * share, "% of peak"))
    if ceilings.peak is not None:
        known = 100 * mfu(tokens_per_second, flops, ceilings.peak.bf16_flops)
        metric = f"MFU, of the {ceilings.peak.name} datasheet"
        records.append(record(metric, known, "% of peak"))
    return records


def sweep_records(
    suite: str, case: str, tokens_per_second: float, sweep: Sweep, peers: dict[str, float]
) -> list[Record]:
    """Return proxies per hour, and the predicted time and cost of the sweep."""
    from regmix.display import count

    def record(metric: str, value: float, unit: str, **against: Any) -> Record:
        return Record(suite=suite, case=case, metric=metric, value=value, unit=unit, **against)

    size = f"proxies of {count(sweep.proxy_tokens)} tokens"
    rate = sweep.proxies_per_hour(tokens_per_second)
    records = [record(size, rate, "proxies/h")]
    records += [
        record(size, rate, "proxies/h", peer=name, ratio_to_peer=ratio)
        for name, ratio in peers.items()
    ]
    whole = f"predicted sweep of {sweep.num_proxies} {size}"
    if sweep.num_devices > 1:
        whole += f", {sweep.num_devices} devices"
    records.append(record(whole, sweep.hours(tokens_per_second), "h"))
    cost = sweep.cost(tokens_per_second)
    if cost is not None:
        words = f"{whole}, at {sweep.price_per_hour:g} an hour"
        records.append(record(words, cost, "currency"))
    return records
