"""What is trained: the members of a stack, and all that its result depends on.

Enters and leaves: plain records that go through JSON. Trains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from regmix.config import as_table, build
from regmix.errors import StudyError
from regmix.study import Training

# Between two checkpoints of a stack.
CHECKPOINT_SECONDS = 15.0
# In a job's folder, written last: it is trained.
RESULT_FILE = "result.json"
_LONGEST_NAME = 200


def _check_name(name: str) -> None:
    """Raise `StudyError` for a name that cannot be a file's: stored jobs may be of others."""
    is_file_name = name not in ("", "..") and PurePath(name).name == name and name.isprintable()
    if not is_file_name or len(name) > _LONGEST_NAME:
        raise StudyError(
            f"{name!r} cannot name a stack or a model",
            cure="Do not use this study: it was made by hand",
        )


@dataclass(frozen=True, kw_only=True)
class MemberSegment:
    """The mixture of one model from `first_step` on."""

    first_step: int
    weights: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of a stack: `name` is a proxy's index or a model's name.

    segments: its mixtures one after the other, None for one mixture; then `weights` is the
    mixture over the whole run, for the record.
    """

    name: str
    weights: dict[str, float]
    data_seed: int
    init_seed: int
    segments: tuple[MemberSegment, ...] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)

    @property
    def dealt(self) -> dict[str, float] | list[tuple[int, dict[str, float]]]:
        """What a sampler deals: the mixture, or (first step, mixture) pairs."""
        if self.segments is None:
            return self.weights
        return [(segment.first_step, segment.weights) for segment in self.segments]


@dataclass(frozen=True, kw_only=True)
class StackJob:
    """All that training one stack depends on, so that a resumed stack is the same stack.

    shards, folder: absolute paths of the corpus and of the stack's checkpoints.
    shards_checksum: the corpus's, so that a checkpoint is not resumed on another one.
    threads: intra-op threads; the sums of a matrix product depend on them.
    device: "cpu", or "cuda" for the worker's GPU.
    micro_batch: sequences of a member that a GPU takes at a time; None for the whole batch.
    pools: domain -> sequences that may be read of it; None for all there are.
    """

    name: str
    members: tuple[Member, ...]
    training: Training
    targets: tuple[str, ...]
    shards: str
    shards_checksum: str
    folder: str
    threads: int = 1
    device: str = "cpu"
    micro_batch: int | None = None
    pools: dict[str, int] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)

    def to_table(self) -> dict[str, Any]:
        """Return the job as plain tables, for JSON."""
        return as_table(self)

    def identity(self) -> dict[str, Any]:
        """Return what is trained, without where its files lie: that may change between runs."""
        table = self.to_table()
        for place in ("shards", "folder"):
            table.pop(place)
        if self.device == "cpu":
            # As before there were other devices, so that older checkpoints are still resumed.
            table.pop("device")
        return table

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> StackJob:
        """Return the job that `to_table` described; ledgers of before had no checksum in it."""
        return build(cls, {"shards_checksum": "", **table}, where="stack job")
