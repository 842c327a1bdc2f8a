"""P models trained together on a GPU: the buffers, the step, and the graph captured of it.

1. Tokens go from pinned memory to one of two staging buffers on a stream of their own, two bytes
   each, and from there to the buffer that the step reads; so the copy of a step runs beside the one
   before it.
2. The step: micro-batches forward and backward, gradients added in float32; then norms, clip and
   AdamW for every proxy. It is captured as one graph when the stack is made, and replayed. The
   host decides nothing in it: the learning rate is read from a table, by a step that is counted
   there.
3. Losses return to pinned memory behind the step; the host looks at those of steps that are done.

Enters: batches [P, B, T+1], a step. Leaves: what `TrainableStack` says. On a CPU (tests) the same
without streams and graph. No number of a proxy depends on its neighbours: `regmix_kernels` and
`products` see to that.

P proxies, B sequences of a step, M sequences of a micro-batch, T tokens of a sequence, S steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from regmix_kernels.reference import IGNORED
from torch import Tensor

from regmix.errors import ModelError
from regmix.model.fused.flat import FlatParameters
from regmix.model.fused.llama import FusedLlama
from regmix.model.fused.operations import Operations, choose, operations
from regmix.model.optim import OptimConfig
from regmix.model.parameters import init_parameters
from regmix.model.presets import ModelShape
from regmix.model.trainable import mean_of_finite

# Steps that the host may be ahead of the device: one runs, the tokens of the next are there.
_STAGING = 2
# torch cannot compute with unsigned 16 bits; ids travel as the same bits, signed.
_LARGEST_SHORT_VOCABULARY = 1 << 16


class FusedStack:
    """A `TrainableStack` over the fused operations.

    micro_batch: sequences of each proxy that go through forward and backward at a time; divides
        the batch, None for all of it. device: "cuda" or, for tests, "cpu".
    dtype: of the working copy and the activations; bf16 on a GPU unless told otherwise.
    kernels: operation -> implementation, instead of the device's default (`operations.choose`).
    capture: whether to capture the step as a graph; None does so on a GPU.
    """

    def __init__(
        self,
        shape: ModelShape,
        optim: OptimConfig,
        *,
        num_proxies: int,
        batch_size: int,
        num_steps: int,
        micro_batch: int | None = None,
        device: str | torch.device = "cuda",
        dtype: torch.dtype | None = None,
        kernels: Mapping[str, str] | None = None,
        capture: bool | None = None,
    ) -> None:
        self.shape, self.optim = shape, optim
        self.num_proxies, self.batch_size, self.num_steps = num_proxies, batch_size, num_steps
        self.micro_batch = micro_batch or batch_size
        if batch_size % self.micro_batch:
            raise ModelError(
                f"micro-batches of {self.micro_batch} sequences in a batch of {batch_size}",
                cure="Use a divisor of the batch",
            )
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if dtype is None:
            dtype = torch.bfloat16 if on_gpu else torch.float32
        self.ops: Operations = operations(choose(shape, self.device.type, kernels))
        self.flat = FlatParameters(shape, num_proxies, device=self.device, dtype=dtype)
        self.parameters = self.flat.values
        self.model = FusedLlama(shape, self.ops, self.device)
        self._allocate_state()
        self._streams = _Streams(self.device) if on_gpu else None
        self._graph: torch.cuda.CUDAGraph | None = None
        if on_gpu if capture is None else capture:
            self._capture()

    def _allocate_state(self) -> None:
        num_proxies, device, on_gpu = self.num_proxies, self.device, self.device.type == "cuda"
        short = self.shape.vocab_size <= _LARGEST_SHORT_VOCABULARY
        self._token_dtype = np.dtype(np.uint16 if short else np.int32)
        size = (num_proxies, self.batch_size, self.shape.seq_len + 1)
        wire = torch.int16 if short else torch.int32
        self._tokens = torch.zeros(size, dtype=wire, device=device)
        self._staging = [torch.zeros_like(self._tokens) for _ in range(_STAGING if on_gpu else 0)]
        rates = [self.optim.lr_at(step) for step in range(self.num_steps)]
        self._rates_S = torch.tensor(rates, dtype=torch.float32, device=device)
        self._step_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._counts_P = torch.zeros(num_proxies, dtype=torch.int32, device=device)
        self._failed_P = torch.zeros(num_proxies, dtype=torch.uint8, device=device)
        self._nats_P = torch.zeros(num_proxies, dtype=torch.float64, device=device)
        self._loss_P = torch.zeros(num_proxies, dtype=torch.float32, device=device)
        self._losses_SP = torch.zeros(self.num_steps, num_proxies, pin_memory=on_gpu)
        # Where the next step is, and how many steps the host knows to be done.
        self._next_step = self._num_done = self._begun_at = 0

    def reset(self, init_seeds: Sequence[int]) -> None:
        self._wait()
        for row, seed in enumerate(init_seeds):
            # One model at a time: a stack of them need not fit into the host's memory twice.
            for name, value in init_parameters(self.shape, [seed]).items():
                self.parameters[name][row].copy_(value[0])
        self.flat.refresh_copy()
        for zeroed in (self.flat.grads_PS, self.flat.mean_PS, self.flat.square_PS):
            zeroed.zero_()
        self._counts_P.zero_()
        self._failed_P.zero_()
        self._begin_at(0)

    def buffers(self, count: int) -> list[np.ndarray]:
        size, pinned = tuple(self._tokens.shape), self.device.type == "cuda"
        kind = self._tokens.dtype
        made = [torch.empty(size, dtype=kind, pin_memory=pinned) for _ in range(count)]
        return [buffer.numpy().view(self._token_dtype) for buffer in made]

    def train_step(self, tokens_PBT1: np.ndarray, step: int) -> None:
        if tokens_PBT1.shape != tuple(self._tokens.shape):
            raise ModelError(
                f"Tokens of shape {list(tokens_PBT1.shape)}, {list(self._tokens.shape)} are meant",
                cure="Give [proxies, sequences, tokens and label]",
            )
        if step != self._next_step:
            self._wait()
            self._begin_at(step)
        wire = tokens_PBT1.astype(self._token_dtype, copy=False)
        tokens = torch.from_numpy(wire.view(np.int16) if wire.dtype == np.uint16 else wire)
        if self._streams is None:
            self._tokens.copy_(tokens)
            self._step()
            self._losses_SP[step].copy_(self._loss_P)
            self._num_done = step + 1
        else:
            staging = self._staging[step % _STAGING]
            with self._streams.sending(step, staging, tokens, self._tokens):
                if self._graph is None:
                    self._step()
                else:
                    self._graph.replay()
                self._losses_SP[step].copy_(self._loss_P, non_blocking=True)
            # The tokens of this step were sent after those of the step before last were read, and
            # that was after the step before that one had ended.
            self._num_done = max(self._num_done, step - _STAGING)
        self._next_step = step + 1

    def latest_loss(self) -> tuple[int, float]:
        since = self._losses_SP[self._begun_at : self._num_done]
        return self._num_done, mean_of_finite(since[-1:].numpy())

    def losses(self, first: int, last: int) -> np.ndarray:
        self._wait()
        return self._losses_SP[first:last].numpy().copy()

    def evaluate(self, tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        sums_P = torch.zeros(self.num_proxies, dtype=torch.float64, device=self.device)
        rows = max(1, self.micro_batch)
        for tokens, mask in zip(tokens_BT1.split(rows), mask_BT.split(rows), strict=True):
            labels = torch.where(mask.bool(), tokens[:, 1:], IGNORED)
            inputs_PN, labels_PN = (
                part.reshape(1, -1).to(self.device, torch.int32).repeat(self.num_proxies, 1)
                for part in (tokens[:, :-1], labels)
            )
            self.ops.add_row_sums(self.model.loss(self.flat, inputs_PN, labels_PN), sums_P)
        return sums_P.cpu()

    def _stored(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by its name there."""
        groups = (
            ("parameters.", self.flat.values),
            ("optimizer.mean.", self.flat.mean),
            ("optimizer.square.", self.flat.square),
        )
        named = {prefix + name: value for prefix, group in groups for name, value in group.items()}
        return named | {
            "optimizer.failed": self._failed_P,
            "optimizer.num_steps": self._counts_P,
        }

    def state(self) -> dict[str, Tensor]:
        self._wait()
        # Copies, on a CPU too: the next steps write on while these are stored. The types are those
        # of the CPU's optimizer.
        types = {"optimizer.failed": torch.bool, "optimizer.num_steps": torch.int64}
        return {
            name: torch.empty(value.shape, dtype=types.get(name, value.dtype)).copy_(value)
            for name, value in self._stored().items()
        }

    def load(self, state: Mapping[str, Tensor], losses_SP: np.ndarray) -> None:
        self._wait()
        stored = self._stored()
        for name, value in stored.items():
            if name not in state or state[name].shape != value.shape:
                raise ModelError(
                    f"'{name}' of a checkpoint does not fit the stack",
                    cure="Resume with the number of proxies and the shape that wrote it",
                )
        for name, value in stored.items():
            value.copy_(state[name])
        self.flat.refresh_copy()
        self.flat.grads_PS.zero_()
        self._losses_SP[: len(losses_SP)] = torch.from_numpy(losses_SP)
        self._begin_at(len(losses_SP))

    @property
    def failed(self) -> np.ndarray:
        self._wait()
        return self._failed_P.bool().cpu().numpy()

    def _begin_at(self, step: int) -> None:
        self._step_1.fill_(step)
        self._next_step = self._num_done = self._begun_at = step
        if self._streams is not None:
            torch.cuda.synchronize(self.device)

    def _wait(self) -> None:
        if self._streams is not None:
            torch.cuda.synchronize(self.device)
        self._num_done = self._next_step

    def _step(self) -> None:
        """Enqueue one training step on the tokens that lie in the step's buffer."""
        batch, seq_len = self.batch_size, self.shape.seq_len
        scale = 1.0 / (batch * seq_len)
        self._nats_P.zero_()
        for first in range(0, batch, self.micro_batch):
            ids = self._tokens[:, first : first + self.micro_batch].to(torch.int32)
            if self._tokens.dtype == torch.int16:
                ids = ids.bitwise_and(0xFFFF)
            # Copies in every case: one sequence of one proxy would stay a view, its labels 4 bytes
            # off the alignment for which the kernels are compiled otherwise.
            inputs_PN, labels_PN = (
                part.clone(memory_format=torch.contiguous_format).view(self.num_proxies, -1)
                for part in (ids[..., :-1], ids[..., 1:])
            )
            nats_PN = self.model.forward_backward(self.flat, inputs_PN, labels_PN, scale)
            self.ops.add_row_sums(nats_PN, self._nats_P)
        self._loss_P.copy_(self._nats_P * scale)
        lr_1 = self._rates_S.index_select(0, self._step_1)
        flat, optim = self.flat, self.optim
        self.ops.update(
            *(flat.values_PS, flat.grads_PS, flat.mean_PS, flat.square_PS, flat.copy_PS),
            *(self.ops.gradient_norms(flat.grads_PS), lr_1, self._counts_P, self._failed_P),
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_norm=optim.clip_norm,
        )
        self._step_1.add_(1)

    def _capture(self) -> None:
        """Run the step twice, so that all is compiled and chosen, then capture it.

        What the runs leave behind is undone by `reset`.
        """
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step_1.zero_()
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        # The warm-up's memory is of no use to the graph, which has a pool of its own.
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()
        self._step_1.zero_()


class _Streams:
    """The order of copies and steps on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        # Who waits for it sleeps: a waiting core is one that the sampler's threads could have.
        self._sent = torch.cuda.Event(blocking=True)
        self._read = [torch.cuda.Event() for _ in range(_STAGING)]

    @contextlib.contextmanager
    def sending(self, step: int, staging: Tensor, tokens: Tensor, target: Tensor) -> Iterator[None]:
        """Send tokens; the body then enqueues the step; return once the tokens have arrived."""
        compute = torch.cuda.current_stream(self._device)
        read = self._read[step % _STAGING]
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(read)
            staging.copy_(tokens, non_blocking=True)
            self._sent.record(self._copies)
        compute.wait_event(self._sent)
        target.copy_(staging, non_blocking=True)
        read.record(compute)
        yield
        # Who made the batch may overwrite it from here on.
        self._sent.synchronize()
