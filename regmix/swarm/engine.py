"""Train one stack of models from its first step, or from where it stopped, to its last.

1. The job names the members (mixture and seeds each), how they are trained, and the corpus.
2. Every member's batches come from its own sampler; parameters are stacked [P, ...].
3. One optimizer step trains all members; a member whose gradient is not finite is frozen.
4. Checkpoints are written by the clock; their times never change a result, because the data
   order is a pure function and a checkpoint holds all state.
5. At the end each member is evaluated on every target, on the same windows.

Leaves: losses [P, M] in nats per token, training losses [S, P], and the final parameters in the
job's folder. Schedules nothing and knows no study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regmix.data.sampling.ring import BatchRing
from regmix.data.sampling.sampler import MixtureSampler, StackSampler
from regmix.data.shards import ShardSet
from regmix.data.validation import Windows, read_windows
from regmix.errors import ModelError
from regmix.model.trainable import TrainableStack, make_stack
from regmix.swarm.checkpoint import CheckpointWriter, load_newest
from regmix.swarm.jobs import CHECKPOINT_SECONDS, StackJob
from regmix.swarm.resuming import refuse_another_job, refusing_another_checkpoint

REPORT_SECONDS = 0.5
EVAL_SEQUENCES = 16
BUFFERS_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class StackResult:
    """losses [P, M] float64 nats per token; train_losses [S, P] float32; failed [P] bool.

    evaluations: (step, losses [P, M]) along the way, the final one included.
    seconds: time spent training in this process; tokens: tokens trained in it, over all members.
    """

    losses: np.ndarray
    train_losses: np.ndarray
    failed: np.ndarray
    evaluations: list[tuple[int, np.ndarray]]
    parameters: dict[str, Tensor]
    seconds: float
    tokens: int


@dataclass(frozen=True)
class StepReport:
    """How far a stack is: `loss_nats` is the mean training loss of the members at `step`."""

    step: int
    loss_nats: float
    tokens_per_second: float


class StoppedError(Exception):
    """The stack was asked to stop; its checkpoint is written."""


def _ignore(_: object) -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What is called while a stack trains; by default nothing listens.

    started: with the step that it begins or goes on at; report: now and then; saved: with a
    checkpoint's step, once it is on disk, perhaps from another thread; pulse: after every step
    and every part of an evaluation, so that one that hangs is told from one that works.
    """

    started: Callable[[int], None] = _ignore
    report: Callable[[StepReport], None] = _ignore
    saved: Callable[[int], None] = _ignore
    pulse: Callable[[], None] = lambda: None


class StackKeeper:
    """Keeps the stack that was trained last, so that the next of its kind need not be built.

    On a GPU that saves allocation, warm-up and the capture of the graph.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._stack: TrainableStack | None = None

    def stack_for(self, job: StackJob) -> TrainableStack:
        """Return a stack for the job, with its initial weights."""
        training, members = job.training, job.members
        sizes = (len(members), training.batch_size, training.num_steps)
        key = (training.shape, training.optim, *sizes, job.device, job.micro_batch)
        if self._stack is None or key != self._key:
            # The old one goes first: there may be no room for both.
            self._key, self._stack = None, None
            self._stack = make_stack(
                training.shape,
                training.optim,
                num_proxies=len(members),
                batch_size=training.batch_size,
                num_steps=training.num_steps,
                device=job.device,
                micro_batch=job.micro_batch,
            )
            self._key = key
        self._stack.reset([member.init_seed for member in members])
        return self._stack


class StackTrainer:
    """Trains the stack of one job; `run` returns its result.

    stack: what trains, made for the job where it is None; `keeper` then keeps it for the next job.
    """

    def __init__(
        self,
        job: StackJob,
        shards: ShardSet,
        *,
        keeper: StackKeeper | None = None,
        stack: TrainableStack | None = None,
    ) -> None:
        self.job, self.shards = job, shards
        self.folder = Path(job.folder)
        training = job.training
        if training.shape.vocab_size < shards.vocab_size:
            raise ModelError(
                f"the model's vocabulary ({training.shape.vocab_size}) is smaller than the "
                f"corpus's ({shards.vocab_size})",
                cure="Draw the study again on this corpus",
            )
        self.stack = stack or (keeper or StackKeeper()).stack_for(job)
        self.samplers = [
            MixtureSampler(
                shards,
                member.dealt,
                seq_len=training.shape.seq_len,
                batch_size=training.batch_size,
                data_seed=member.data_seed,
                pool=job.pools,
            )
            for member in job.members
        ]
        self.step = 0
        self.evaluations: list[tuple[int, np.ndarray]] = []
        self._windows: dict[str, Windows] = {}
        self._batches: Generator[np.ndarray, None, None] | None = None
        self._writer = CheckpointWriter(self.folder)
        self._listener = Listener()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters as they are, [P, ...] by name."""
        return self.stack.parameters

    def run(
        self,
        *,
        listener: Listener | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> StackResult:
        """Train to the last step and evaluate; `StoppedError` once `should_stop` says so."""
        listener = self._listener = listener or Listener()
        self._resume()
        listener.started(self.step)
        training = self.job.training
        tokens_per_step = len(self.job.members) * training.batch_size * training.shape.seq_len
        started = saved = reported = time.monotonic()
        first = reported_step = self.step
        try:
            while self.step < training.num_steps:
                self.train_step()
                now = time.monotonic()
                if now - reported >= REPORT_SECONDS:
                    done, loss = self.stack.latest_loss()
                    rate = (done - reported_step) * tokens_per_step / (now - reported)
                    listener.report(StepReport(done, loss, max(rate, 0.0)))
                    reported, reported_step = now, done
                stop = should_stop()
                if stop or now - saved >= checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
                if stop:
                    raise StoppedError
            if not self.evaluations or self.evaluations[-1][0] != self.step:
                self._save()
                self.evaluations.append((self.step, self._evaluate()))
            self.shards.refuse_changes()
        finally:
            self.close()
        return StackResult(
            losses=self.evaluations[-1][1],
            train_losses=self.stack.losses(0, self.step),
            failed=self.stack.failed,
            evaluations=self.evaluations,
            parameters=self.stack.parameters,
            seconds=time.monotonic() - started,
            tokens=(self.step - first) * tokens_per_step,
        )

    def train_step(self) -> None:
        """Train every member for one step."""
        if self._batches is None:
            self._batches = self._make_batches()
        self.stack.train_step(next(self._batches), self.step)
        self.step += 1
        self._listener.pulse()
        if self.job.training.evaluates_at(self.step):
            self.evaluations.append((self.step, self._evaluate()))

    def close(self) -> None:
        """Stop what makes batches ahead, and wait until the last checkpoint is written."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
        self._writer.close()

    def _make_batches(self) -> Generator[np.ndarray, None, None]:
        """Yield the batches from `step` on; where the stack has buffers, made ahead into those."""
        stack_sampler = StackSampler(self.samplers)
        last = self.job.training.num_steps
        buffers = self.stack.buffers(BUFFERS_AHEAD)
        if buffers is None:
            for step in range(self.step, last):
                yield stack_sampler.batch(step)
            return
        with BatchRing(stack_sampler, start=self.step, stop=last, buffers=buffers) as ring:
            for _, batch in ring:
                yield batch

    def _evaluate(self) -> np.ndarray:
        training = self.job.training
        losses = np.zeros((len(self.job.members), len(self.job.targets)))
        for column, target in enumerate(self.job.targets):
            windows = self._windows.get(target)
            if windows is None:
                windows = self._windows[target] = read_windows(
                    self.shards,
                    target,
                    seq_len=training.shape.seq_len,
                    max_tokens=training.eval_tokens,
                )
            losses[:, column] = mean_losses(self._evaluate_part, windows, self._windows_at_once())
        return losses

    def _evaluate_part(self, tokens: Tensor, mask: Tensor) -> Tensor:
        sums = self.stack.evaluate(tokens, mask)
        self._listener.pulse()
        return sums

    def _windows_at_once(self) -> int:
        job = self.job
        if job.device == "cpu":
            return EVAL_SEQUENCES
        return max(EVAL_SEQUENCES, job.micro_batch or job.training.batch_size)

    def _save(self) -> None:
        # Before it is stored: what was trained on tokens that changed must not be resumed.
        self.shards.refuse_changes()
        tensors = self.stack.state()
        tensors["train_losses"] = torch.from_numpy(self.stack.losses(0, self.step).copy())
        for step, losses in self.evaluations:
            tensors[f"evaluation.{step}"] = torch.from_numpy(losses)
        state = {
            "job": self.job.identity(),
            "samplers": [sampler.state(self.step) for sampler in self.samplers],
        }
        # On a GPU the steps go on while the file is written; on a CPU they would share its cores.
        wait, then = self.job.device == "cpu", self._listener.saved
        self._writer.write(self.step, tensors, state, wait=wait, then=then)

    def _resume(self) -> None:
        found = load_newest(self.folder)
        if found is None:
            return
        tensors, state = found
        with refusing_another_checkpoint(self.job):
            refuse_another_job(self.job, state["job"])
            self.step = state["step"]
            self.stack.load(tensors, tensors["train_losses"].numpy())
            for sampler, saved in zip(self.samplers, state["samplers"], strict=True):
                sampler.restore(saved)
            steps = sorted(int(k.split(".")[1]) for k in tensors if k.startswith("evaluation."))
            self.evaluations = [(step, tensors[f"evaluation.{step}"].numpy()) for step in steps]


def mean_losses(
    evaluate: Callable[[Tensor, Tensor], Tensor],
    windows: Windows,
    num_sequences: int = EVAL_SEQUENCES,
) -> np.ndarray:
    """Return each member's mean loss over the windows [P], float64 nats per token.

    evaluate: from tokens [B, T+1] and a mask [B, T] to sums of nats [P]; it gets `num_sequences`
    windows at a time.
    """
    total: Tensor | float = 0.0
    for tokens, mask in windows.batches(num_sequences):
        total = total + evaluate(torch.from_numpy(tokens), torch.from_numpy(mask))
    assert isinstance(total, Tensor)
    return (total / windows.num_tokens).numpy()


def member_parameters(parameters: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """Return one member's parameters as a stack of one, [1, ...], copied to the CPU."""
    # Not by a copy on the device: a GPU that a stack fills has no room for another model.
    return {
        name: value[position : position + 1].to("cpu", copy=True)
        for name, value in parameters.items()
    }


def failed_names(job: StackJob, failed: np.ndarray) -> Sequence[str]:
    """Return the names of the members that were frozen."""
    return [member.name for member, bad in zip(job.members, failed, strict=True) if bad]
