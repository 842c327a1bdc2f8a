"""A study: one folder that holds everything about one question.

Enters: a folder. Leaves: its settings (`study.toml`), the path of each of its parts, and a lock
that lets one command at a time write to it. Trains, fits and draws nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regmix.config import as_table, build, read_toml, write_toml
from regmix.data.groups import Groups
from regmix.data.pools import check_pools
from regmix.errors import ConfigError, StudyError, nearest
from regmix.files import storage_errors
from regmix.lease import held
from regmix.model.optim_config import OptimConfig
from regmix.model.presets import ModelShape

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet

STUDY_VERSION = 1
LOCK_PATIENCE_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: one for all proxies of a study, one for each large model.

    shape: the model; optim: the optimizer and its schedule.
    batch_size: sequences in a step; num_steps: optimizer steps.
    eval_tokens: tokens of each validation set that are read, as evenly spaced windows;
        None reads them all. The same windows for every model.
    eval_every: steps between evaluations along the way; None evaluates at the end only.
    eval_steps: further steps after which to evaluate, as where schedules change their mixture.
    """

    shape: ModelShape
    optim: OptimConfig
    batch_size: int
    num_steps: int
    eval_tokens: int | None = None
    eval_every: int | None = None
    eval_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_steps", "eval_tokens", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", cure="Give a whole number above 0")

    def evaluates_at(self, step: int) -> bool:
        """Return whether a model is evaluated along the way after so many steps."""
        every = self.eval_every is not None and step % self.eval_every == 0
        return every or step in (self.eval_steps or ())

    @property
    def tokens(self) -> int:
        """Tokens that one model is trained on."""
        return self.batch_size * self.shape.seq_len * self.num_steps


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The settings of a study, as `study.toml` holds them.

    shards: folder of the packed corpus, relative to the study's folder or absolute.
    shards_checksum: the corpus's checksum when the study was made.
    train_domains: domains that a mixture weighs; targets: validation sets whose loss is measured.
    objective: target -> weight, what `optimize` minimises unless told otherwise.
    prior: domain -> weight, the natural mixture (share of training tokens).
    available_tokens: domain -> training tokens that exist.
    data_seed, init_seed: order of the data and initial weights, the same for all proxies.
    proxy: how a proxy is trained. swarm: how the mixtures were drawn, for the record.
    target_tokens, pools: the run that proxies repeat their data like, and for that the sequences
        of each domain that a proxy may read; None where proxies read all there is.
    frozen: the ratios, among themselves, of domains that are kept from another study.
    """

    shards: str
    shards_checksum: str
    train_domains: tuple[str, ...]
    targets: tuple[str, ...]
    objective: dict[str, float]
    prior: dict[str, float]
    available_tokens: dict[str, int]
    proxy: Training
    data_seed: int = 0
    init_seed: int = 0
    version: int = STUDY_VERSION
    swarm: dict[str, str] = field(default_factory=dict)
    target_tokens: int | None = None
    pools: dict[str, int] | None = None
    frozen: dict[str, float] | None = None

    def __post_init__(self) -> None:
        for target in self.objective:
            if target not in self.targets:
                raise ConfigError(
                    f"unknown target '{target}' in the objective ({nearest(target, self.targets)})",
                    cure="Name a validation set of the corpus",
                )
        if not self.objective:
            raise ConfigError("the objective is empty", cure="Name at least one target")
        weights = self.objective.values()
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ConfigError(
                f"the objective's weights are {dict(self.objective)}",
                cure="Give weights of 0 or more, at least one of them above 0",
            )
        for name in ("data_seed", "init_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", cure="Give a whole number of 0 or more"
                )
        if not all(0 <= share < math.inf for share in self.prior.values()):
            raise ConfigError(
                "the prior has a share below 0 or not finite", cure="Restore study.toml"
            )
        if any(tokens < 0 for tokens in self.available_tokens.values()):
            raise ConfigError("available_tokens has a number below 0", cure="Restore study.toml")
        if (self.pools is None) != (self.target_tokens is None):
            raise ConfigError(
                "pools and target_tokens belong together, and one of them is missing",
                cure="Restore study.toml, or draw a new study with --target-tokens",
            )
        if self.pools is not None:
            seq_len = self.proxy.shape.seq_len
            sequences = {d: (n - 1) // seq_len for d, n in self.available_tokens.items()}
            check_pools(self.pools, domains=self.train_domains, available=sequences)
        if self.frozen is not None:
            Groups(self.train_domains, self.frozen)  # raises where these are no ratios

    @property
    def groups(self) -> Groups | None:
        """The frozen domains as one, and the free ones; None where every domain is free."""
        return None if self.frozen is None else Groups(self.train_domains, self.frozen)


class Study:
    """An opened study: `.config` and the paths of its parts."""

    def __init__(self, path: Path, config: StudyConfig) -> None:
        self.path, self.config = path, config
        self.mixtures_path = path / "mixtures.csv"
        self.losses_path = path / "losses.csv"
        self.schedules_path = path / "schedules.csv"
        self.trajectories_path = path / "trajectories.csv"
        self.ledger_path = path / "ledger.sqlite"
        self.ledger_copy_path = path / "ledger.backup.sqlite"
        self.lock_path = path / ".lock"
        self.lease_path = path / ".lease"
        self.progress_path = path / "progress.json"
        self.stop_path = path / ".stop"
        self.surrogate_path = path / "surrogate"
        self.optimum_path = path / "optimum.yaml"
        self.reused_path = path / "reused.yaml"
        self.report_path = path / "report.html"
        self.logs_path = path / "logs"
        self.stacks_path = path / "stacks"
        self.steps_path = path / "steps"
        self.models_path = path / "models"

    @classmethod
    def create(cls, path: Path | str, config: StudyConfig) -> Study:
        """Write `study.toml` into a new folder; `StudyError` where a study is there already."""
        path = Path(path).absolute()
        cls.refuse_existing(path)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        write_toml(path / "study.toml", as_table(config))
        return cls(path, config)

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise `StudyError` where `path` holds a study."""
        if (path / "study.toml").exists():
            raise StudyError(f"{path} holds a study already", cure="Name another folder")

    @classmethod
    def open(cls, path: Path | str) -> Study:
        """Read a study; `StudyError` where there is none or it is of a newer version."""
        path = Path(path).absolute()
        settings = path / "study.toml"
        if not settings.is_file():
            raise StudyError(
                f"{path} holds no study (no study.toml)",
                cure=f"Make one with: regmix-fast mixtures {path.name} --shards SHARDS --num 64",
            )
        table = read_toml(settings)
        version = table.get("version", STUDY_VERSION)
        if version != STUDY_VERSION:
            raise StudyError(
                f"{settings}: made by another version of regmix-fast (format {version!r}, "
                f"this one reads {STUDY_VERSION})",
                cure="Use the version of regmix-fast that made it, or draw a new study",
            )
        return cls(path, build(StudyConfig, table, where=str(settings)))

    @property
    def shards_path(self) -> Path:
        """Folder of the packed corpus."""
        return (self.path / self.config.shards).resolve()

    def open_shards(self) -> ShardSet:
        """Open the corpus; `StudyError` where it is not the one the study was made with."""
        from regmix.data.shards import ShardSet

        shards = ShardSet.open(self.shards_path)
        if shards.checksum != self.config.shards_checksum:
            raise StudyError(
                f"{self.shards_path}: the corpus has changed since the study was made "
                f"(checksum {shards.checksum}, the study has {self.config.shards_checksum})",
                cure="Restore the corpus, or draw a new study on this one",
            )
        return shards

    @contextlib.contextmanager
    def lock(self, *, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> Iterator[int]:
        """Hold the study for training and drawing; yields a descriptor that workers inherit.

        A worker that outlives a killed coordinator still holds the lock, so a new coordinator
        waits for it. `StudyError` where another process keeps it longer than the patience, on this
        machine or on another one that shares the folder.
        """
        with held(self.lock_path, self.lease_path, patience_seconds=patience_seconds) as descriptor:
            yield descriptor

    @contextlib.contextmanager
    def decision_lock(self, *, patience_seconds: float = LOCK_PATIENCE_SECONDS) -> Iterator[None]:
        """Hold what is decided (`surrogate/`, `optimum.*`), while proxies may be in training.

        Whoever needs both locks takes `lock` first.
        """
        paths = self.path / ".decision.lock", self.path / ".decision.lease"
        with held(*paths, patience_seconds=patience_seconds):
            yield


def find_study(name: str | None) -> Path:
    """Return the folder that a command means: the one named, the current one, or `./study`."""
    if name is not None:
        return Path(name)
    return Path(".") if Path("study.toml").is_file() else Path("study")


def relative_to_study(target: Path, study: Path) -> str:
    """Return `target` as the study should store it: relative where both share a parent folder."""
    target, study = target.resolve(), study.resolve()
    common = Path(os.path.commonpath([target, study]))
    if common == Path(common.anchor):
        return str(target)
    return os.path.relpath(target, study)
