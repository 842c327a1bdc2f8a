"""Make a study: draw the swarm's mixtures on a corpus, or take them from a file.

Enters: a corpus of shards, how many mixtures, how a proxy is trained. Leaves: a study with
`study.toml` and `mixtures.csv`. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from regmix.config import build
from regmix.data.draws import BoundedOptions, RegmixOptions
from regmix.data.groups import Groups
from regmix.data.mixtures import MixtureTable, draw_swarm, read_mixture_yaml, write_mixture_yaml
from regmix.data.pools import matched_pools
from regmix.data.shards import ShardSet
from regmix.errors import MixtureError, StudyError, nearest
from regmix.study import Study, StudyConfig, Training, relative_to_study
from regmix.swarm.reuse import Reuse
from regmix.swarm.schedules import ScheduleRequest

_OPTIONS: dict[str, type[BoundedOptions] | type[RegmixOptions]] = {
    "bounded": BoundedOptions,
    "regmix": RegmixOptions,
}


@dataclass(frozen=True, kw_only=True)
class SwarmRequest:
    """sampler: `bounded` or `regmix`; seed: of the draw; lower, upper: bounds by domain.

    options: the sampler's constants by name, as `BoundedOptions` or `RegmixOptions` has them.
    """

    num: int
    sampler: str = "bounded"
    seed: int = 0
    lower: Mapping[str, float] | None = None
    upper: Mapping[str, float] | None = None
    options: Mapping[str, float] | None = None

    def draw(
        self,
        prior: Mapping[str, float],
        existing: MixtureTable | None = None,
        groups: Groups | None = None,
    ) -> MixtureTable:
        """Return the mixtures asked for, unlike any of `existing`, with the ratios of `groups`."""
        if groups is not None:
            return self._draw_within(groups, prior, existing)
        options: BoundedOptions | RegmixOptions | None = None
        if self.options is not None:
            kind = _OPTIONS.get(self.sampler)
            if kind is not None:
                # Constants come from the command line as numbers: whole ones are counts.
                values = {
                    k: int(v) if float(v).is_integer() else v for k, v in self.options.items()
                }
                options = build(kind, values, where="sampler option")
        return draw_swarm(
            prior,
            self.num,
            sampler=self.sampler,
            seed=self.seed,
            lower=self.lower,
            upper=self.upper,
            options=options,
            existing=existing,
        )

    def _draw_within(
        self, groups: Groups, prior: Mapping[str, float], existing: MixtureTable | None
    ) -> MixtureTable:
        """Draw in the short space, where the frozen domains are one, and expand."""
        shares = groups.totals(np.array([[prior[name] for name in groups.domains]]))[0]
        known = None
        if existing is not None:
            columns = [existing.domains.index(name) for name in groups.domains]
            reduced = groups.reduce(existing.weights[:, columns], existing.indices)
            known = MixtureTable(groups.names, existing.indices, reduced)
        short = replace(
            self,
            lower=self.lower and groups.reduce_lower(self.lower),
            upper=self.upper and groups.reduce_upper(self.upper),
        )
        drawn = short.draw(dict(zip(groups.names, shares.tolist(), strict=True)), known)
        columns = [drawn.domains.index(name) for name in groups.names]
        return MixtureTable(groups.domains, drawn.indices, groups.expand(drawn.weights[:, columns]))


def natural_mixture(shards: ShardSet) -> dict[str, float]:
    """Return each training domain's share of the training tokens."""
    tokens = {domain: shards.stats("train", domain).tokens for domain in shards.domains("train")}
    total = sum(tokens.values())
    return {domain: number / total for domain, number in tokens.items()}


def make_study(
    path: Path | str,
    shards: ShardSet,
    *,
    swarm: SwarmRequest | None,
    training: Training,
    objective: Mapping[str, float],
    mixtures_from: Path | None = None,
    data_seed: int = 0,
    init_seed: int = 0,
    target_tokens: int | None = None,
    reuse: Reuse | None = None,
    schedules: ScheduleRequest | None = None,
) -> Study:
    """Create a study with its mixtures, drawn as `swarm` asks or read from a CSV or YAML file.

    target_tokens: the run that proxies are to repeat their data like; None for no pools.
    reuse: what is kept of another study; its optimum is the first mixture, whatever the bounds.
    schedules: further proxies, whose mixture changes on the way; drawn as `swarm` asks.
    """
    check_trainable(shards, training.shape.seq_len)
    prior = natural_mixture(shards)
    targets = shards.domains("valid")
    for target in objective:
        if target not in targets:
            raise StudyError(
                f"{shards.path}: no validation set '{target}' ({nearest(target, targets)})",
                cure="Name a validation set of the corpus as the target",
            )
    table, record = _mixtures(prior, swarm, reuse, mixtures_from)
    changing = None
    if schedules is not None:
        if swarm is None or reuse is not None:
            raise StudyError(
                "schedules are drawn over all domains of a swarm that is drawn",
                cure="Leave the schedules out, or the frozen ratios or the file of mixtures",
            )
        changing = schedules.draw(swarm, prior, training)
        training = schedules.trained(training)
    path = Path(path).absolute()
    available = {domain: shards.stats("train", domain).tokens for domain in prior}
    pools = None
    if target_tokens is not None:
        matched = matched_pools(
            available,
            seq_len=training.shape.seq_len,
            proxy_tokens=training.tokens,
            target_tokens=target_tokens,
        )
        pools = {domain: pool.sequences for domain, pool in matched.items()}
    config = StudyConfig(
        shards=relative_to_study(shards.path, path),
        shards_checksum=shards.checksum,
        train_domains=tuple(prior),
        targets=targets,
        objective=dict(objective),
        prior=prior,
        available_tokens=available,
        proxy=training,
        data_seed=data_seed,
        init_seed=init_seed,
        swarm=record,
        target_tokens=target_tokens,
        pools=pools,
        frozen=None if reuse is None else reuse.groups.ratios,
    )
    # study.toml comes last: a folder that has it is a whole study.
    Study.refuse_existing(path)
    study = Study(path, config)
    table.write_csv(study.mixtures_path)
    if changing is not None:
        changing.write_csv(study.schedules_path)
    if reuse is not None:
        write_mixture_yaml(study.reused_path, reuse.carried)
    return Study.create(path, config)


def _mixtures(
    prior: Mapping[str, float],
    swarm: SwarmRequest | None,
    reuse: Reuse | None,
    mixtures_from: Path | None,
) -> tuple[MixtureTable, dict[str, str]]:
    """Return the mixtures of a new study, and for the record how they came about."""
    if mixtures_from is not None:
        table = read_mixtures(mixtures_from, tuple(prior))
        if reuse is not None:
            reuse.groups.reduce(table.weights, table.indices)  # raises for other ratios
        return table, {"from": mixtures_from.name}
    if swarm is None:
        raise StudyError("no mixtures", cure="Draw some, or name a file of them")
    record = {key: str(value) for key, value in asdict(swarm).items() if value is not None}
    if reuse is None:
        return swarm.draw(prior), record
    return _drawn_around(reuse, swarm, prior), {**record, "reuse": reuse.source}


def _drawn_around(reuse: Reuse, swarm: SwarmRequest, prior: Mapping[str, float]) -> MixtureTable:
    """Return the old optimum as mixture 1 and after it the others that are drawn."""
    if swarm.num < 2:
        raise StudyError(
            "1 mixture is the old optimum alone", cure="Draw at least 2 mixtures: --num 16"
        )
    names = reuse.groups.domains
    first = MixtureTable(names, (1,), reuse.carried.array(names)[None])
    return first.extended(replace(swarm, num=swarm.num - 1).draw(prior, first, reuse.groups))


def add_mixtures(study: Study, swarm: SwarmRequest) -> MixtureTable:
    """Draw more mixtures for a study, unlike those it has; returns all of them."""
    with study.lock():
        table = MixtureTable.read_csv(study.mixtures_path)
        extended = table.extended(swarm.draw(study.config.prior, table, study.config.groups))
        extended.write_csv(study.mixtures_path)
    return extended


def add_replicates(study: Study, num: int, of: int | None = None) -> tuple[int, tuple[int, ...]]:
    """Add `num` rows of one mixture, to train it with other seeds; returns its index and theirs.

    of: the mixture's index, by default the one nearest to the natural mixture. What replicates
    differ by is the noise floor of the study.
    """
    with study.lock():
        table = MixtureTable.read_csv(study.mixtures_path)
        if of is not None and of not in table.indices:
            raise MixtureError(
                f"{study.mixtures_path}: no mixture {of}",
                cure=f"Name one from {min(table.indices)} to {max(table.indices)}",
            )
        natural = np.array([study.config.prior.get(domain, 0.0) for domain in table.domains])
        distance = ((np.sqrt(table.weights) - np.sqrt(natural)) ** 2).sum(1)
        row = int(distance.argmin()) if of is None else table.indices.index(of)
        first = max(table.indices) + 1
        added = tuple(range(first, first + num))
        rows = np.repeat(table.weights[[row]], num, axis=0)
        table.extended(MixtureTable(table.domains, added, rows)).write_csv(study.mixtures_path)
    return table.indices[row], added


def read_mixtures(path: Path, domains: tuple[str, ...]) -> MixtureTable:
    """Read mixtures of `domains` from a CSV table or from one YAML file."""
    if path.suffix not in (".yaml", ".yml"):
        return MixtureTable.read_csv(path, domains)
    mixture = read_mixture_yaml(path)
    if unknown := sorted(set(mixture) - set(domains)):
        raise MixtureError(
            f"{path}: unknown domain '{unknown[0]}' ({nearest(unknown[0], domains)})",
            cure="Name the domains as the corpus does",
        )
    return MixtureTable(domains, (1,), np.array([[mixture.get(d, 0.0) for d in domains]]))


def check_trainable(shards: ShardSet, seq_len: int) -> None:
    """Raise where a training domain cannot fill one sequence."""
    for domain in shards.domains("train"):
        tokens = shards.stats("train", domain).tokens
        if tokens < seq_len + 1:
            raise StudyError(
                f"{shards.path}: domain '{domain}' has {tokens} training tokens, fewer than one "
                f"sequence of {seq_len} and its label",
                cure="Use a smaller --seq-len, or leave the domain out of the corpus",
            )
