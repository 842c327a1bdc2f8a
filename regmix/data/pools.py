"""Repetition-matched pools: how much of each domain a short run may read.

Enters: the tokens that exist of each domain, the tokens of a proxy and those of the run it stands
for. Leaves: for each domain a number of sequences such that the proxy, at any mixture, repeats the
domain as often as the run would. Reads no token; the sampler takes the first so many sequences of
its order, so the pools of shorter runs lie within those of longer ones.

The method is that of arXiv 2606.07597: a proxy without pools sees a small domain once where the
run repeats it ten times, so it finds the domain better than the run will.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from regmix.data.mixtures import DomainCoverage
from regmix.display import count
from regmix.errors import ConfigError

# A pool is a whole number of sequences; a repetition further off than this is named.
_TOLERATED = 0.05


@dataclass(frozen=True, kw_only=True)
class MatchedPool:
    """One domain's pool: whole sequences, at least one."""

    sequences: int
    wanted: float  # sequences that would match exactly

    @property
    def repetition(self) -> float:
        """How often a proxy repeats the domain for each time that the run does; 1 is a match."""
        return self.wanted / self.sequences


def matched_pools(
    available_tokens: Mapping[str, int], *, seq_len: int, proxy_tokens: int, target_tokens: int
) -> dict[str, MatchedPool]:
    """Return each domain's pool: its sequences times proxy_tokens / target_tokens, rounded.

    Raises `ConfigError` where the run is shorter than a proxy, or a domain is below one sequence.
    """
    if target_tokens < proxy_tokens:
        raise ConfigError(
            f"a run of {count(target_tokens)} tokens is shorter than a proxy of "
            f"{count(proxy_tokens)}, which would repeat every domain more often",
            cure="Give the tokens of the run that the mixture is for, or shorten the proxies",
        )
    pools = {}
    for domain, tokens in available_tokens.items():
        whole = (tokens - 1) // seq_len
        if whole < 1:
            raise ConfigError(
                f"domain '{domain}' has {tokens:,} tokens, fewer than one sequence of {seq_len:,} "
                "and its label",
                cure="Use shorter sequences, or leave the domain out of the corpus",
            )
        wanted = whole * proxy_tokens / target_tokens
        pools[domain] = MatchedPool(sequences=min(max(1, round(wanted)), whole), wanted=wanted)
    return pools


@dataclass(frozen=True, kw_only=True)
class PoolUse:
    """A domain's pool and how often it is read, at its median and largest weight of a swarm."""

    sequences: int
    tokens: int
    median_epochs: float
    largest_epochs: float
    largest_epochs_of_run: float  # of the run, over all there is of the domain


def pool_use(
    pools: Mapping[str, int],
    coverage: Iterable[DomainCoverage],
    available_tokens: Mapping[str, int],
    *,
    seq_len: int,
    proxy_tokens: int,
    target_tokens: int,
) -> dict[str, PoolUse]:
    """Return, by domain, its pool and the epochs of proxies over it beside those of the run."""
    uses = {}
    for row in coverage:
        sequences = pools[row.domain]
        tokens = sequences * seq_len
        uses[row.domain] = PoolUse(
            sequences=sequences,
            tokens=tokens,
            median_epochs=row.median * proxy_tokens / tokens,
            largest_epochs=row.maximum * proxy_tokens / tokens,
            largest_epochs_of_run=row.maximum * target_tokens / available_tokens[row.domain],
        )
    return uses


def pool_remarks(pools: Mapping[str, MatchedPool]) -> list[str]:
    """Return a sentence for each domain whose repetition a whole number of sequences misses."""
    remarks = []
    for domain, pool in pools.items():
        if abs(pool.repetition - 1) <= _TOLERATED:
            continue
        unit = "sequence" if pool.sequences == 1 else "sequences"
        raised = ", the least there can be" if pool.wanted < 1 else ""
        remarks.append(
            f"The pool of '{domain}' is {pool.sequences} {unit}{raised}, where {pool.wanted:.3g} "
            f"would match: proxies repeat it {pool.repetition:.3g} times as often as the run would"
        )
    return remarks


def check_pools(
    pools: Mapping[str, int], *, domains: Iterable[str], available: Mapping[str, int]
) -> None:
    """Raise `ConfigError` unless every domain has a pool of 1 to `available` sequences."""
    names = tuple(domains)
    for domain in sorted({*pools, *names}):
        if domain not in names or domain not in pools:
            fault = "names no domain of the study" if domain not in names else "is missing"
            raise ConfigError(
                f"the pool of '{domain}' {fault}", cure="Give each training domain one pool"
            )
        if not 1 <= pools[domain] <= available[domain]:
            raise ConfigError(
                f"the pool of '{domain}' is {pools[domain]:,} sequences; {available[domain]:,} "
                "are there",
                cure=f"Use a number from 1 to {available[domain]:,}",
            )
