"""What of a finished study a new one keeps, when domains were added, removed or split.

Enters: the old study with its optimum, the new corpus. Leaves: the ratios of the domains that are
the same in both, frozen; which domains are free; the old optimum over the new domains; and in
words what was decided. Draws nothing (`drawing.py` does).

The old runs are not carried over: they varied the ratios that are frozen now, so all but those at
the old optimum lie outside the new study's mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regmix.data.groups import Groups
from regmix.data.mixtures import Mixture, read_mixture_yaml
from regmix.data.shards import ShardSet, ShardStats
from regmix.errors import RegmixError, StudyError, nearest, printable
from regmix.files import read_table
from regmix.study import Study

# Proxies for a new study: 64 to 128 find 17 ratios, some 6 for each.
_FEWEST_PROXIES = 16
_PROXIES_PER_GROUP = 6


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What is kept of the study `source`.

    groups: the frozen ratios in the new study's domains; gone: weights in the old optimum of
    domains that the new corpus does not have; carried: the old optimum over the new domains;
    remarks: what a person should know.
    """

    source: str
    groups: Groups
    gone: dict[str, float]
    carried: Mixture
    remarks: tuple[str, ...]

    @property
    def num_proxies(self) -> int:
        """Proxies that should do for the ratios that are still to be found."""
        return max(_FEWEST_PROXIES, _PROXIES_PER_GROUP * len(self.groups.names))


def plan_reuse(old: Study, shards: ShardSet, freeze: Sequence[str] | None = None) -> Reuse:
    """Return what a study on `shards` keeps of `old`: its domains with the same data.

    freeze: the domains to keep instead, whatever their data. Raises `StudyError` where nothing can
    be kept, or nothing is left to find.
    """
    optimum = _old_optimum(old)
    domains = shards.domains("train")
    same, how = _same_data(old, shards)
    if freeze is None:
        frozen = [name for name in domains if same.get(name)]
    else:
        frozen = _named(freeze, domains, optimum, old)
    _refuse_useless(frozen, domains, optimum, old, how)
    total = math.fsum(optimum[name] for name in frozen)
    ratios = dict(Mixture({n: optimum[n] / total for n in frozen}, normalise=True))
    gone = {name: weight for name, weight in optimum.items() if name not in domains}
    left = {name: optimum.get(name, 0.0) for name in domains}
    groups = Groups(domains, ratios)
    remarks = [f"Kept of {old.path.name}, {how}: {_shares(ratios)} (their ratios are frozen)"]
    remarks.append(f"Free: {', '.join(groups.free)}")
    remarks += _remarks(ratios, gone, same if freeze is not None else {})
    remarks += _verdict(old)
    return Reuse(
        source=old.path.name,
        groups=groups,
        gone=gone,
        carried=Mixture(left, normalise=True),
        remarks=tuple(remarks),
    )


def _old_optimum(old: Study) -> Mixture:
    if not old.optimum_path.is_file():
        raise StudyError(
            f"{old.path} has no optimum to reuse",
            cure=f"Find it first: regmix-fast optimize {old.path.name}",
        )
    mixture = read_mixture_yaml(old.optimum_path)
    if unknown := sorted(set(mixture) - set(old.config.train_domains)):
        raise StudyError(
            f"{old.optimum_path}: '{unknown[0]}' is no domain of that study",
            cure="Find the optimum again: regmix-fast optimize",
        )
    return Mixture({name: mixture.get(name, 0.0) for name in old.config.train_domains})


def _named(
    freeze: Sequence[str], domains: Sequence[str], optimum: Mapping[str, float], old: Study
) -> list[str]:
    for name in freeze:
        for known, where in ((domains, "the new corpus"), (tuple(optimum), f"{old.path.name}")):
            if name not in known:
                raise StudyError(
                    f"'{name}' cannot be frozen: {where} has no such domain "
                    f"({nearest(name, known)})",
                    cure="Name domains that the old study and the new corpus share",
                )
    return [name for name in domains if name in freeze]


def _same_data(old: Study, shards: ShardSet) -> tuple[dict[str, bool], str]:
    """Return which domains of both have the same training data, and how that was told."""
    shared = [name for name in shards.domains("train") if name in old.config.train_domains]
    try:
        before = old.open_shards()
    except RegmixError:
        tokens = old.config.available_tokens
        how = "by name and number of tokens (its corpus is gone or changed)"
        return {n: shards.stats("train", n).tokens == tokens[n] for n in shared}, how
    if before.tokenizer_hash != shards.tokenizer_hash:
        return dict.fromkeys(shared, False), "by checksum: the tokenizer is another"
    pairs = {n: (before.stats("train", n), shards.stats("train", n)) for n in shared}
    if all(stats.files for pair in pairs.values() for stats in pair):
        same = {
            name: _checksums(left) == _checksums(right) for name, (left, right) in pairs.items()
        }
        return same, "by checksum"
    # Token files of other programs have one checksum for a whole corpus.
    how = "by name, tokenizer and number of tokens"
    return {name: left.tokens == right.tokens for name, (left, right) in pairs.items()}, how


def _checksums(stats: ShardStats) -> list[tuple[int, str]]:
    # A file's checksum covers its header (tokenizer, domain) and those of all its blocks.
    return [(file.tokens, file.checksum) for file in stats.files]


def _refuse_useless(
    frozen: Sequence[str],
    domains: Sequence[str],
    optimum: Mapping[str, float],
    old: Study,
    how: str,
) -> None:
    if not frozen:
        raise StudyError(
            f"no domain of {old.path.name} is the same in the new corpus ({how})",
            cure="Pack it with the old study's tokenizer.json, or name domains to keep: --freeze",
        )
    total = math.fsum(optimum[name] for name in frozen)
    if total <= 0:
        raise StudyError(
            f"the optimum of {old.path.name} has no weight on {', '.join(frozen)}, so there is no "
            "ratio to keep",
            cure="Draw a study without --reuse, or keep other domains: --freeze",
        )
    if len(frozen) == len(domains):
        shares = _shares({name: optimum[name] / total for name in frozen})
        raise StudyError(
            f"every domain is kept as it is in {old.path.name}, so nothing is left to find: the "
            f"mixture is {shares}",
            cure="Train with that mixture, or name fewer domains to keep: --freeze",
        )


def _remarks(
    ratios: Mapping[str, float], gone: Mapping[str, float], same: Mapping[str, bool]
) -> list[str]:
    remarks = [
        f"'{name}' is gone: the {weight:.2%} that it had is spread over the others in proportion"
        for name, weight in gone.items()
    ]
    remarks += [
        f"'{name}' has no weight in the old optimum, so it has none in any mixture; leave it out "
        "of --freeze to try it again"
        for name, ratio in ratios.items()
        if ratio == 0
    ]
    remarks += [
        f"'{name}' is frozen as asked, and its data differs from the old study's"
        for name in ratios
        if same.get(name) is False
    ]
    return remarks


def _verdict(old: Study) -> list[str]:
    path = old.optimum_path.with_suffix(".json")
    verdict = read_table(path).get("verdict") if path.is_file() else None
    if isinstance(verdict, str) and verdict.startswith("keep"):
        return [f"The verdict on the old optimum was: {printable(verdict)}"]
    return []


def _shares(ratios: Mapping[str, float]) -> str:
    ordered = sorted(ratios.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {ratio:.2%}" for name, ratio in ordered)
