"""Make a study: draw the swarm's mixtures on a corpus, or take them from a file.

Enters: a corpus of shards, how many mixtures, how a proxy is trained. Leaves: a study with
`study.toml` and `mixtures.csv`. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from regmix.config import build
from regmix.data.draws import BoundedOptions, RegmixOptions
from regmix.data.mixtures import MixtureTable, draw_swarm, read_mixture_yaml
from regmix.data.shards import ShardSet
from regmix.errors import MixtureError, StudyError, nearest
from regmix.study import Study, StudyConfig, Training, relative_to_study

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
        self, prior: Mapping[str, float], existing: MixtureTable | None = None
    ) -> MixtureTable:
        """Return the mixtures asked for, unlike any of `existing`."""
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
) -> Study:
    """Create a study with its mixtures, drawn as `swarm` asks or read from a CSV or YAML file."""
    check_trainable(shards, training.shape.seq_len)
    prior = natural_mixture(shards)
    targets = shards.domains("valid")
    for target in objective:
        if target not in targets:
            raise StudyError(
                f"{shards.path}: no validation set '{target}' ({nearest(target, targets)})",
                cure="Name a validation set of the corpus as the target",
            )
    if mixtures_from is not None:
        table, record = read_mixtures(mixtures_from, tuple(prior)), {"from": mixtures_from.name}
    else:
        if swarm is None:
            raise StudyError("no mixtures", cure="Draw some, or name a file of them")
        table = swarm.draw(prior)
        record = {key: str(value) for key, value in asdict(swarm).items() if value is not None}
    path = Path(path).absolute()
    config = StudyConfig(
        shards=relative_to_study(shards.path, path),
        shards_checksum=shards.checksum,
        train_domains=tuple(prior),
        targets=targets,
        objective=dict(objective),
        prior=prior,
        available_tokens={d: shards.stats("train", d).tokens for d in prior},
        proxy=training,
        data_seed=data_seed,
        init_seed=init_seed,
        swarm=record,
    )
    # study.toml comes last: a folder that has it is a whole study.
    Study.refuse_existing(path)
    table.write_csv(Study(path, config).mixtures_path)
    return Study.create(path, config)


def add_mixtures(study: Study, swarm: SwarmRequest) -> MixtureTable:
    """Draw more mixtures for a study, unlike those it has; returns all of them."""
    with study.lock():
        table = MixtureTable.read_csv(study.mixtures_path)
        extended = table.extended(swarm.draw(study.config.prior, table))
        extended.write_csv(study.mixtures_path)
    return extended


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
