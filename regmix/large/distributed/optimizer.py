"""AdamW of one large model over whatever part of it a rank has.

Enters: parameters and gradients by name, whole or split over ranks. Leaves: the gradient's global
norm, parameters updated in place, moments to save. The numbers are those of the stack's AdamW
(`model.optim`): the same kernel, clip and schedule. Computes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from regmix.large.distributed.parallel import Place, local_part
from regmix.model.optim import OptimConfig


class LargeAdamW:
    """AdamW with decoupled decay and a clip; `num_updates` counts those that were made."""

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimConfig, place: Place) -> None:
        self.parameters, self.config, self._place = dict(parameters), config, place
        self.num_updates = 0
        self._mean = {n: torch.zeros_like(v.detach()) for n, v in self.parameters.items()}
        self._square = {n: torch.zeros_like(v.detach()) for n, v in self.parameters.items()}

    def gradient_norm(self) -> float:
        """Return the global norm of the gradient, the same on all ranks."""
        grads = [_gradient(value) for value in self.parameters.values()]
        norms = torch.stack(torch._foreach_norm([local_part(grad) for grad in grads]))
        squares = norms.double().square().sum()
        if any(isinstance(grad, DTensor) for grad in grads):
            squares = self._place.sum_over_ranks(squares)
        return math.sqrt(squares.item())

    @torch.no_grad()
    def update(self, norm: float, step: int) -> float:
        """Update by the gradients, clipped by their norm; return the learning rate.

        `step` counts from 0 and sets the learning rate.
        """
        config, lr = self.config, self.config.lr_at(step)
        self.num_updates += 1
        values = [local_part(value.detach()) for value in self.parameters.values()]
        grads = [local_part(_gradient(value)) for value in self.parameters.values()]
        device = values[0].device
        scale = None
        if config.clip_norm is not None and norm > config.clip_norm:
            # The kernel divides by it, in the pass that it makes anyway.
            scale = torch.tensor(norm / config.clip_norm, dtype=torch.float32, device=device)
        count = torch.tensor(float(self.num_updates), device=device)
        torch._fused_adamw_(
            values,
            grads,
            [local_part(value) for value in self._mean.values()],
            [local_part(value) for value in self._square.values()],
            [],
            [count] * len(grads),
            lr=lr,
            beta1=config.betas[0],
            beta2=config.betas[1],
            weight_decay=config.weight_decay,
            eps=config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )
        return lr

    def moments(self) -> dict[str, Tensor]:
        """Return both moments by name, split as the parameters are; they share memory."""
        state = {f"mean.{name}": value for name, value in self._mean.items()}
        return state | {f"square.{name}": value for name, value in self._square.items()}


def _gradient(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad
