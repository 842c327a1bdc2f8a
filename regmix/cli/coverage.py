"""What `mixtures` shows of a study: how its mixtures cover the domains, and the proxies' pools.

Enters: a study and the coverage of its mixtures. Leaves: tables on the screen, or as plain values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regmix.data.mixtures import DomainCoverage
    from regmix.data.pools import PoolUse
    from regmix.study import Study


def coverage_table(
    rows: Sequence[DomainCoverage], uses: Mapping[str, PoolUse]
) -> dict[str, dict[str, object]]:
    """Return domain -> its coverage, and its `pool` where proxies have pools."""
    table: dict[str, dict[str, object]] = {row.domain: dataclasses.asdict(row) for row in rows}
    for domain, use in uses.items():
        table[domain]["pool"] = dataclasses.asdict(use)
    return table


def show_coverage(study: Study, num_mixtures: int, rows: Sequence[DomainCoverage]) -> None:
    """Print, by domain, how the drawn mixtures cover it."""
    from rich.table import Table

    from regmix.display import console, count

    proxy = study.config.proxy
    table = Table(
        title=f"{num_mixtures} mixtures, one proxy of {count(proxy.tokens)} tokens each",
        title_justify="left",
    )
    for heading in ("domain", "tokens", "natural", "in mixtures", "smallest", "median", "largest"):
        table.add_column(heading, justify="left" if heading == "domain" else "right")
    for row in rows:
        table.add_row(
            row.domain,
            count(study.config.available_tokens[row.domain]),
            f"{row.prior:.2%}",
            f"{row.present:.0%}",
            f"{row.minimum:.2%}",
            f"{row.median:.2%}",
            f"{row.maximum:.2%}",
        )
    console().print(table)


def pools_in_use(study: Study, rows: Sequence[DomainCoverage]) -> dict[str, PoolUse]:
    """Return domain -> pool and epochs; empty where the proxies read all there is."""
    from regmix.data.pools import pool_use

    config = study.config
    if config.pools is None or config.target_tokens is None:
        return {}
    return pool_use(
        config.pools,
        rows,
        config.available_tokens,
        seq_len=config.proxy.shape.seq_len,
        proxy_tokens=config.proxy.tokens,
        target_tokens=config.target_tokens,
    )


def pools_remarks(study: Study) -> list[str]:
    """Return a sentence for each domain that proxies repeat more or less often than the run."""
    from regmix.data.pools import matched_pools, pool_remarks

    config = study.config
    if config.pools is None or config.target_tokens is None:
        return []
    matched = matched_pools(
        config.available_tokens,
        seq_len=config.proxy.shape.seq_len,
        proxy_tokens=config.proxy.tokens,
        target_tokens=config.target_tokens,
    )
    stored = {
        domain: dataclasses.replace(pool, sequences=config.pools[domain])
        for domain, pool in matched.items()
    }
    return pool_remarks(stored)


def show_pools(study: Study, uses: Mapping[str, PoolUse]) -> None:
    """Print, by domain, what proxies read of it and how often, beside the epochs of the run."""
    from rich.table import Table

    from regmix.display import console, count

    run = f"a run of {count(study.config.target_tokens or 0)} tokens"
    table = Table(title=f"Pools: proxies repeat each domain as {run} would", title_justify="left")
    table.add_column("domain")
    for heading in ("pool, tokens", "epochs: median", "largest", "largest of the run"):
        table.add_column(heading, justify="right")
    for domain, use in uses.items():
        table.add_row(
            domain,
            count(use.tokens),
            f"{use.median_epochs:.2f}",
            f"{use.largest_epochs:.2f}",
            f"{use.largest_epochs_of_run:.2f}",
        )
    console().print(table)
