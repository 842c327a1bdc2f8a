"""Train one large model from its first step, or from where it stopped, to its last.

1. Every rank opens the corpus and deals the same global batches; it takes its rows of them.
2. A step adds up gradients over micro-batches and ranks, clips and updates (`parallel`,
   `optimizer`); the loss is the mean over the global batch, the same on every rank.
3. Whether to stop, and whether a checkpoint is due, is agreed in the sum that the loss is
   summed by: no rank acts alone.
4. A step without a finite loss and gradient updates nothing; too many of them, or a loss that
   jumped and stays, end the run at its last good checkpoint.
5. At the end every target is evaluated, its windows shared by the ranks.

Leaves: losses and whole parameters for who writes the model. Writes checkpoints and metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regmix.config import as_table, build
from regmix.data.sampling.ring import BatchRing
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.data.validation import Windows, read_windows
from regmix.errors import ModelError
from regmix.large.distributed import checkpoint
from regmix.large.distributed.job import (
    TrainJob,
    micro_batch_of,
    refuse_changes,
    rows_of,
    switched,
)
from regmix.large.distributed.metrics import MetricsLog
from regmix.large.distributed.optimizer import LargeAdamW
from regmix.large.distributed.parallel import ParallelModel, Place
from regmix.large.distributed.watch import LossWatch
from regmix.swarm.engine import StoppedError
from regmix.swarm.jobs import Member

BATCHES_AHEAD = 4
EVAL_SEQUENCES = 16
EPOCHS_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class LargeResult:
    """losses: by target, float nats per token; member: what was trained on, changes included.

    evaluations: (step, losses) along the way, the final one included. seconds: of training, over
    all runs; tokens: trained over all runs.
    """

    losses: dict[str, float]
    evaluations: list[tuple[int, dict[str, float]]]
    member: Member
    seconds: float
    tokens: int


class DivergedError(ModelError):
    """The run was ended because it no longer learned."""


class LargeTrainer:
    """Trains the model of a job on this rank; `run` returns its result, the same on all ranks."""

    def __init__(
        self,
        job: TrainJob,
        shards: ShardSet,
        place: Place,
        *,
        start: Callable[[], Iterator[tuple[str, Tensor]]] | None = None,
    ) -> None:
        self.job, self.shards, self.place = job, shards, place
        self.folder = Path(job.folder)
        _refuse_another_corpus(job, shards)
        training = job.training
        self.rows = rows_of(place.rank, place.num_ranks, training.batch_size)
        self.micro_batch = micro_batch_of(job, place.num_ranks)
        self.model = ParallelModel(job, place, separator=shards.separator_id)
        self.optimizer = LargeAdamW(self.model.parameters, training.optim, place)
        self.step, self.seconds, self.member = 0, 0.0, job.member
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.watch = LossWatch()
        self._windows: dict[str, Windows] = {}
        saved = self._resume()
        if saved is None:
            if start is None:
                self.model.fill(job.member.init_seed)
            else:
                self.model.fill_from(start())
        self.sampler = MixtureSampler(
            shards,
            self.member.dealt,
            seq_len=training.shape.seq_len,
            batch_size=training.batch_size,
            data_seed=job.member.data_seed,
        )
        if saved is not None:
            self.sampler.restore(saved["sampler"])
        self._saved_at: int | None = self.step if saved is not None else None
        self._writing: Any = None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.job.training.batch_size * self.job.training.shape.seq_len

    def run(self, *, should_stop: Callable[[], bool] = lambda: False) -> LargeResult:
        """Train to the last step and evaluate.

        Raises `StoppedError` once `should_stop` says so on any rank, after a checkpoint;
        `DivergedError` where the run no longer learns.
        """
        self.model.begin()
        log = None
        if self.place.rank == 0:
            trackers = self.job.trackers
            log = MetricsLog(self.folder, self.step, name=self.job.name, trackers=trackers)
        try:
            self._train(log, should_stop)
            if self._saved_at != self.step:
                self._save(log, wait=True)
            if not self.evaluations or self.evaluations[-1][0] != self.step:
                self.evaluations.append((self.step, self.evaluate()))
        finally:
            self._finish_writing()
            if log is not None:
                log.close()
        return LargeResult(
            losses=self.evaluations[-1][1],
            evaluations=self.evaluations,
            member=self.member,
            seconds=self.seconds,
            tokens=self.step * self.tokens_per_step,
        )

    def _train(self, log: MetricsLog | None, should_stop: Callable[[], bool]) -> None:
        training = self.job.training
        saved = time.monotonic()
        with self._batches() as batches:
            for step, batch in batches:
                begun = time.monotonic()
                due = begun - saved >= self.job.checkpoint_seconds
                line, stops, due = self._step(step, batch, should_stop(), due)
                self.step = step + 1
                elapsed = time.monotonic() - begun
                self.seconds += elapsed
                if log is not None:
                    log.add(self._numbers(line, elapsed))
                if self.watch.should_stop:
                    raise self._diverged(line["loss_nats"])
                if training.evaluates_at(self.step) and self.step < training.num_steps:
                    self.evaluations.append((self.step, self.evaluate()))
                if (stops or due) and not self.watch.is_troubled:
                    self._save(log, wait=stops)
                    saved = time.monotonic()
                if stops and self.step < training.num_steps:
                    raise StoppedError

    def _batches(self) -> BatchRing:
        shape = self.sampler.batch_shape(self.rows)
        pinned = self.place.device.type == "cuda"
        buffers = [
            torch.empty(shape, dtype=torch.int64, pin_memory=pinned).numpy()
            for _ in range(BATCHES_AHEAD)
        ]
        return BatchRing(
            self.sampler,
            start=self.step,
            stop=self.job.training.num_steps,
            rows=self.rows,
            buffers=buffers,
        )

    def _step(
        self, step: int, batch: np.ndarray, stops: bool, due: bool
    ) -> tuple[dict[str, Any], bool, bool]:
        """Train one step; return its numbers, and whether ranks want to stop or to save."""
        tokens_BT1 = torch.from_numpy(batch).to(self.place.device, non_blocking=True)
        parts = tokens_BT1.split(self.micro_batch)
        nats = torch.zeros((), dtype=torch.float64, device=self.place.device)
        for number, part in enumerate(parts, start=1):
            nats += self.model.backward(
                part, 1.0 / self.tokens_per_step, is_last=number == len(parts)
            )
        wishes = torch.tensor(
            [float(stops), float(due and self.place.rank == 0)], dtype=torch.float64
        )
        agreed = torch.cat([nats[None], wishes.to(self.place.device)])
        total, num_stops, num_due = self.place.sum_over_ranks(agreed).tolist()
        loss, norm = total / self.tokens_per_step, self.optimizer.gradient_norm()
        if any(step == segment.first_step for segment in self.member.segments or ()):
            self.watch.forget()
        line = {"loss_nats": loss, "gradient_norm": norm}
        if self.watch.judge(loss, norm) == "skip":
            line["skipped"] = True
        else:
            line["learning_rate"] = self.optimizer.update(norm, step)
        self.model.drop_gradients()
        return line, num_stops > 0, num_due > 0

    def _numbers(self, line: dict[str, Any], elapsed: float) -> dict[str, Any]:
        rate = self.tokens_per_step / max(elapsed, 1e-9)
        numbers = {"step": self.step, "tokens": self.step * self.tokens_per_step, **line}
        numbers["tokens_per_second"] = round(rate, 1)
        if self.job.peak_flops is not None:
            flops = self.job.training.shape.flops_per_token() * rate
            numbers["mfu"] = round(flops / (self.job.peak_flops * self.place.num_ranks), 4)
        if self.step % EPOCHS_EVERY == 0 or self.step == self.job.training.num_steps:
            counts, sizes = self.sampler.counts(self.step), self.sampler.num_sequences
            numbers["epochs"] = {d: round(n / sizes[d], 4) for d, n in counts.items()}
        return numbers

    def evaluate(self) -> dict[str, float]:
        """Return the mean loss of every target, nats per token; every rank calls it."""
        training, losses = self.job.training, {}
        for target in self.job.targets:
            windows = self._windows.get(target)
            if windows is None:
                windows = self._windows[target] = read_windows(
                    self.shards,
                    target,
                    seq_len=training.shape.seq_len,
                    max_tokens=training.eval_tokens,
                )
            losses[target] = self._mean_loss(windows)
        return losses

    def _mean_loss(self, windows: Windows) -> float:
        place, seq_len = self.place, self.job.training.shape.seq_len
        # Of the training's own shape where layers are compiled for it.
        at_once = self.micro_batch if self.job.compiled else max(EVAL_SEQUENCES, self.micro_batch)
        total = torch.zeros((), dtype=torch.float64, device=place.device)
        own = islice(windows.batches(at_once), place.rank, None, place.num_ranks)
        # As many turns on every rank, since FSDP gathers parameters from all of them.
        for _ in range(-(-len(windows) // (at_once * place.num_ranks))):
            tokens_BT1 = torch.zeros(at_once, seq_len + 1, dtype=torch.int64)
            mask_BT = torch.zeros(at_once, seq_len, dtype=torch.bool)
            for tokens, mask in islice(own, 1):
                tokens_BT1[: len(tokens)] = torch.from_numpy(tokens)
                mask_BT[: len(mask)] = torch.from_numpy(mask)
            total += self.model.nats(tokens_BT1.to(place.device), mask_BT.to(place.device))
        return place.sum_over_ranks(total).item() / windows.num_tokens

    def _tensors(self) -> dict[str, Tensor]:
        parameters = {f"parameters.{n}": v.detach() for n, v in self.model.parameters.items()}
        return parameters | {f"optimizer.{n}": v for n, v in self.optimizer.moments().items()}

    def _save(self, log: MetricsLog | None, *, wait: bool) -> None:
        self._finish_writing()
        if log is not None:
            log.sync()
        state = {
            "job": self.job.identity(),
            "member": as_table(self.member),
            "sampler": self.sampler.state(self.step),
            "num_updates": self.optimizer.num_updates,
            "recent_losses": self.watch.recent,
            "evaluations": [[step, losses] for step, losses in self.evaluations],
            "seconds": self.seconds,
        }
        # On a GPU the steps go on while the files are written; on a CPU they would share its cores.
        wait = wait or self.place.device.type == "cpu"
        self._writing = checkpoint.save(self.folder, self.step, self._tensors(), state, wait=wait)
        self._saved_at = self.step
        checkpoint.keep_last(self.folder, self.job.keep_checkpoints)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.wait()

    def _resume(self) -> dict[str, Any] | None:
        found = checkpoint.load_newest(self.folder, self._tensors())
        if found is None:
            return None
        self.step, state = found
        refuse_changes(self.job, state["job"])
        self.member = build(Member, state["member"], where=f"{self.folder}, member")
        if state["job"]["member"] != self.job.identity()["member"]:
            self.member = switched(self.member, self.job.member, self.step)
        self.optimizer.num_updates = state["num_updates"]
        self.watch = LossWatch(state["recent_losses"])
        self.evaluations = [(step, dict(losses)) for step, losses in state["evaluations"]]
        self.seconds = state["seconds"]
        return state

    def _diverged(self, loss: float) -> DivergedError:
        lower = self.job.training.optim.lr / 2
        begin = "the last good checkpoint" if self._saved_at else "the first step"
        return DivergedError(
            f"{self.job.name}: step {self.step}: {self.watch.reason()} (last loss {loss:.3f} nats)",
            cure=f"Run the same command with --learning-rate {lower:g} --allow-changes: it goes on "
            f"from {begin} (step {self._saved_at or 0})",
        )


def _refuse_another_corpus(job: TrainJob, shards: ShardSet) -> None:
    if shards.checksum != job.shards_checksum:
        raise ModelError(
            f"{shards.path}: not the corpus that '{job.name}' was planned on",
            cure="Restore the corpus, or draw the study again on this one",
        )
    if job.training.shape.vocab_size < shards.vocab_size:
        raise ModelError(
            f"the model's vocabulary ({job.training.shape.vocab_size}) is smaller than the "
            f"corpus's ({shards.vocab_size})",
            cure="Give the model's shape a vocabulary that holds the corpus's tokens",
        )
