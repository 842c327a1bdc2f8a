"""What a distributed run of one large model is: all that its ranks need, as JSON.

Enters: a model's member, training and corpus, and how the ranks share the work. Leaves: a
`TrainJob` that goes through a file, and what of it may differ where a run is resumed. Starts
nothing and touches no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regmix.config import as_table, build
from regmix.errors import ModelError
from regmix.study import Training
from regmix.swarm.jobs import Member, MemberSegment

PARALLEL = ("ddp", "fsdp")
DTYPES = ("float32", "bfloat16")
# Other seeds, shapes, batches or data make another model, and no consent makes it this one.
_NEVER = ("name", "shards_checksum", "targets", "start")
_NEVER_OF_TRAINING = ("shape", "batch_size")
_NEVER_OF_MEMBER = ("name", "data_seed", "init_seed")


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One model, and how its ranks train it.

    study, shards, folder: absolute paths of the study, its corpus, and the run's checkpoints.
    parallel: "ddp" keeps the model on every rank, "fsdp" a part of it; on one rank both are plain.
    device: "cpu" or "cuda"; dtype: of activations and products, parameters being float32.
    micro_batch: sequences that a rank takes at a time; None for all of its own.
    recompute: activation checkpointing; compiled: torch.compile of every layer.
    within_documents: attend within documents only.
    start: a Hugging Face checkpoint to start from; None for initial weights from the seed.
    allow_changes: go on although the mixture, the schedule or the precision differ from the run's.
    peak_flops: of one device, for the utilisation that is shown; None where it is not known.
    trackers: programs that get the metrics as well.
    """

    name: str
    member: Member
    training: Training
    targets: tuple[str, ...]
    study: str
    shards: str
    shards_checksum: str
    folder: str
    parallel: str = "ddp"
    device: str = "cpu"
    dtype: str = "float32"
    micro_batch: int | None = None
    recompute: bool = False
    compiled: bool = False
    within_documents: bool = False
    start: str | None = None
    threads: int = 1
    keep_checkpoints: int = 2
    checkpoint_seconds: float = 600.0
    allow_changes: bool = False
    peak_flops: float | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name != self.member.name:  # a member's name is checked: it can be a file's
            raise ModelError(
                f"'{self.name}' cannot name a run of '{self.member.name}'",
                cure="Remove the job's file, and run the command that wrote it again",
            )
        for name, known in (("parallel", PARALLEL), ("dtype", DTYPES), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in known:
                raise ModelError(
                    f"{name} is '{getattr(self, name)}'", cure=f"Use one of {', '.join(known)}"
                )

    def to_table(self) -> dict[str, Any]:
        """Return the job as plain tables, for JSON."""
        return as_table(self)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> TrainJob:
        """Return the job that `to_table` described."""
        return build(cls, table, where="job of a large model")

    def identity(self) -> dict[str, Any]:
        """Return what the model depends on; not how many ranks train it, nor where."""
        table = self.to_table()
        names = ("name", "member", "training", "targets", "shards_checksum", "dtype", "start")
        return {name: table.get(name) for name in (*names, "within_documents")}


def refuse_changes(job: TrainJob, saved: dict[str, Any]) -> None:
    """Raise `ModelError` where a run with the identity `saved` may not go on as `job`.

    With `allow_changes` the mixture, the optimizer, the number of steps and the precision may be
    others from now on; seeds, shape, batch and corpus may not.
    """
    now = job.identity()
    differing = [name for name in ("dtype", "within_documents") if saved.get(name) != now[name]]
    never = [name for name in _NEVER if saved.get(name) != now[name]]
    for part, fixed in (("training", _NEVER_OF_TRAINING), ("member", _NEVER_OF_MEMBER)):
        ours, theirs = _flat(now[part]), _flat(saved.get(part) or {})
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                (never if name in fixed else differing).append(f"{part}.{name}")
    if never:
        raise ModelError(
            f"{job.folder}: the run that was begun there differs in {', '.join(never)}",
            cure="Train with the run's own settings, or remove that folder to begin anew",
        )
    if differing and not job.allow_changes:
        raise ModelError(
            f"{job.folder}: the run that was begun there differs in {', '.join(differing)}",
            cure="Train with its own settings, consent to the change with --allow-changes, or "
            "remove that folder to begin anew",
        )


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the optimizer's settings as entries of their own."""
    optim = table.get("optim") or {}
    own = {name: value for name, value in table.items() if name != "optim"}
    return own | {f"optim.{name}": value for name, value in optim.items()}


def switched(old: Member, new: Member, step: int) -> Member:
    """Return a member that read as `old` before `step` and reads as `new` from it on.

    Its `weights` are those of `new`; what it read is told by its segments.
    """
    before = [s for s in _segments(old) if s.first_step < step or s.first_step == 0]
    if step == 0:
        return new
    after = [s for s in _segments(new) if s.first_step > step]
    current = max((s for s in _segments(new) if s.first_step <= step), key=lambda s: s.first_step)
    turn = MemberSegment(first_step=step, weights=current.weights)
    return Member(
        name=new.name,
        weights=new.weights,
        data_seed=new.data_seed,
        init_seed=new.init_seed,
        segments=(*before, turn, *after),
    )


def _segments(member: Member) -> tuple[MemberSegment, ...]:
    return member.segments or (MemberSegment(first_step=0, weights=member.weights),)


def rows_of(rank: int, num_ranks: int, batch_size: int) -> tuple[int, int]:
    """Return the rows (first, last + 1) of the global batch that a rank takes."""
    if batch_size % num_ranks:
        near = [n for n in range(num_ranks, 0, -1) if batch_size % n == 0]
        more = -(-batch_size // num_ranks) * num_ranks
        raise ModelError(
            f"a batch of {batch_size} sequences cannot be shared by {num_ranks} processes alike",
            cure=f"Use {near[0]} processes, or a batch of {more} sequences",
        )
    share = batch_size // num_ranks
    return rank * share, (rank + 1) * share


def micro_batch_of(job: TrainJob, num_ranks: int) -> int:
    """Return the sequences that a rank takes at a time; `ModelError` where they do not divide."""
    share = job.training.batch_size // num_ranks
    micro = job.micro_batch or share
    if share % micro:
        divisors = ", ".join(str(d) for d in range(1, share + 1) if share % d == 0)
        raise ModelError(
            f"a micro-batch of {micro} sequences does not divide the {share} of a process",
            cure=f"Give a --micro-batch that does: {divisors}",
        )
    return micro
