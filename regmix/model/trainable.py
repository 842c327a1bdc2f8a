"""What trains a stack, whatever the device: the interface, and the CPU's implementation.

Enters: batches of tokens, a step's number. Leaves: losses, parameters, and all the state that a
checkpoint holds, under the same names on every device. Draws no batch and writes no file.

P proxies, B sequences, T tokens of one, S steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from regmix.errors import ModelError
from regmix.model.llama import StackedLlama, init_parameters
from regmix.model.optim import OptimConfig, StackedAdamW
from regmix.model.presets import ModelShape


class TrainableStack(Protocol):
    """P models of one shape that are trained by one step; `reset` comes before anything else."""

    parameters: dict[str, Tensor]

    def reset(self, init_seeds: Sequence[int]) -> None:
        """Begin anew: initial weights from the seeds, no moments, nobody failed."""

    def buffers(self, count: int) -> list[np.ndarray] | None:
        """Return buffers for batches made ahead, [P, B, T+1]; None where that gains nothing."""

    def train_step(self, tokens_PBT1: np.ndarray, step: int) -> None:
        """Train one step; it may still run when this returns, but the tokens are read."""

    def latest_loss(self) -> tuple[int, float]:
        """Return how many steps are known to be done, and the last one's mean loss in nats.

        The loss is NaN as long as no step since `reset` or `load` is done. Waits for nothing.
        """

    def losses(self, first: int, last: int) -> np.ndarray:
        """Return the training losses of steps first to last - 1, [last - first, P] float32."""

    def evaluate(self, tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        """Return each model's sum of nats where the mask holds, [P] float64 on the CPU."""

    def state(self) -> dict[str, Tensor]:
        """Return parameters, moments, counts and failures on the CPU, as they are now."""

    def load(self, state: Mapping[str, Tensor], losses_SP: np.ndarray) -> None:
        """Go on from what `state` and `losses` returned; `ModelError` where it does not fit."""

    @property
    def failed(self) -> np.ndarray:
        """Which models are frozen, [P] bool."""


class CpuStack:
    """A stack on the CPU: float32, features first (`llama`, `optim`)."""

    def __init__(
        self, shape: ModelShape, optim: OptimConfig, *, num_proxies: int, num_steps: int
    ) -> None:
        self.model, self._optim = StackedLlama(shape), optim
        self._losses = np.zeros((num_steps, num_proxies), dtype=np.float32)

    def reset(self, init_seeds: Sequence[int]) -> None:
        self.parameters = init_parameters(self.model.shape, init_seeds)
        self.optimizer = StackedAdamW(self.parameters, self._optim)
        self._begun_at = self._num_done = 0

    def buffers(self, count: int) -> list[np.ndarray] | None:
        return None

    def train_step(self, tokens_PBT1: np.ndarray, step: int) -> None:
        tokens = torch.from_numpy(tokens_PBT1)
        losses_P, _ = self.model.train_step(self.parameters, self.optimizer, tokens, step)
        self._losses[step] = losses_P.numpy()
        self._num_done = step + 1

    def latest_loss(self) -> tuple[int, float]:
        return self._num_done, mean_of_finite(self._losses[self._begun_at : self._num_done][-1:])

    def losses(self, first: int, last: int) -> np.ndarray:
        return self._losses[first:last].copy()

    def evaluate(self, tokens_BT1: Tensor, mask_BT: Tensor) -> Tensor:
        return self.model.evaluate(self.parameters, tokens_BT1, mask_BT)

    def state(self) -> dict[str, Tensor]:
        tensors = {f"parameters.{name}": value for name, value in self.parameters.items()}
        moments = self.optimizer.state_tensors()
        return tensors | {f"optimizer.{name}": value for name, value in moments.items()}

    def load(self, state: Mapping[str, Tensor], losses_SP: np.ndarray) -> None:
        for name, value in self.parameters.items():
            value.copy_(state[f"parameters.{name}"])
        prefix = "optimizer."
        self.optimizer.load(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        self._losses[: len(losses_SP)] = losses_SP
        self._begun_at = self._num_done = len(losses_SP)

    @property
    def failed(self) -> np.ndarray:
        return self.optimizer.failed.numpy().copy()


def mean_of_finite(losses: np.ndarray) -> float:
    """Return the mean over the losses that are finite; NaN where none is."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) else float("nan")


def make_stack(
    shape: ModelShape,
    optim: OptimConfig,
    *,
    num_proxies: int,
    batch_size: int,
    num_steps: int,
    device: str = "cpu",
    micro_batch: int | None = None,
) -> TrainableStack:
    """Return a stack for a device: "cpu", or "cuda" for the first visible GPU.

    Raises `ModelError` for another device, or a GPU that is not there; `torch.OutOfMemoryError`
    where the stack does not fit into the GPU's memory.
    """
    if device == "cpu":
        return CpuStack(shape, optim, num_proxies=num_proxies, num_steps=num_steps)
    if device != "cuda":
        raise ModelError(f"device '{device}' of a stack", cure="Use 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise ModelError(
            "a stack for a GPU, and torch sees none",
            cure="Run `regmix-fast doctor` to see why",
        )
    from regmix.model.fused.stack import FusedStack

    sizes: dict[str, Any] = {"num_proxies": num_proxies, "batch_size": batch_size}
    return FusedStack(
        shape, optim, **sizes, num_steps=num_steps, micro_batch=micro_batch, device="cuda"
    )
