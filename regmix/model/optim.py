"""AdamW over a stack: every proxy has its own clip, and its own failure.

Enters: parameters and gradients [P, ...] by name, and the step. Leaves: parameters updated in
place, each proxy's gradient norm, and the optimizer's state as tensors to save. A proxy whose
gradient norm is not finite is frozen from that step on: its parameters and its state stay as
they were, and its neighbours do not notice. Computes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from regmix.errors import ModelError
from regmix.model.optim_config import OptimConfig

__all__ = ["OptimConfig", "StackedAdamW"]


class StackedAdamW:
    """AdamW with decoupled decay; P proxies, one learning rate, a clip and a fate for each.

    `failed` [P] bool says which proxies are frozen. The update is torch's fused kernel, called
    once per proxy, so that a proxy's numbers do not depend on its neighbours.
    """

    def __init__(self, params: Mapping[str, Tensor], config: OptimConfig) -> None:
        if not params:
            raise ModelError("No parameters to optimize", cure="Give the model's parameters")
        self.params = dict(params)
        self.config = config
        first = next(iter(self.params.values()))
        self.num_proxies = first.shape[0]
        self.failed = torch.zeros(self.num_proxies, dtype=torch.bool)
        self.num_steps = torch.zeros(self.num_proxies, dtype=torch.int64)
        self._mean = {name: torch.zeros_like(value) for name, value in self.params.items()}
        self._square = {name: torch.zeros_like(value) for name, value in self.params.items()}

    def step(self, grads: Mapping[str, Tensor], step: int) -> Tensor:
        """Update every proxy that has not failed; return the gradient norms before the clip, [P].

        `step` counts from 0 and sets the learning rate. A failed proxy's norm is reported as it
        is; gradients may be overwritten (scaled by the clip).
        """
        return self.update(slice(0, self.num_proxies), grads, step)

    def update(self, rows: slice, grads: Mapping[str, Tensor], step: int) -> Tensor:
        """As `step`, for the proxies of `rows` only: `grads` and the norms are [G]."""
        lr = self.config.lr_at(step)
        indices = range(self.num_proxies)[rows]
        norms_G = torch.empty(len(indices), dtype=torch.float32)
        for place, row in enumerate(indices):
            views = [grads[name][place] for name in self.params]
            norm = _global_norm(views)
            norms_G[place] = norm
            if not math.isfinite(norm):
                self.failed[row] = True
            if not self.failed[row]:
                self._update(row, views, norm, lr)
        return norms_G

    def _update(self, row: int, grads: list[Tensor], norm: float, lr: float) -> None:
        config = self.config
        self.num_steps[row] += 1
        clip = config.clip_norm
        scale = None
        if clip is not None and norm > clip:
            # The kernel divides by it, in the pass that it makes anyway.
            scale = torch.tensor(norm / clip, dtype=torch.float32, device=grads[0].device)
        count = torch.tensor(float(self.num_steps[row]), device=grads[0].device)
        torch._fused_adamw_(
            [value[row] for value in self.params.values()],
            grads,
            [value[row] for value in self._mean.values()],
            [value[row] for value in self._square.values()],
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

    def state_tensors(self) -> dict[str, Tensor]:
        """Return everything to save beside the parameters: moments, counts and failures."""
        state = {f"mean.{name}": value for name, value in self._mean.items()}
        state |= {f"square.{name}": value for name, value in self._square.items()}
        return state | {"failed": self.failed, "num_steps": self.num_steps}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned; `ModelError` where it does not fit."""
        own = self.state_tensors()
        if set(state) != set(own):
            odd = sorted(set(state) ^ set(own))[0]
            raise ModelError(
                f"Optimizer state: '{odd}' is on one side only",
                cure="Resume with the model's shape that wrote the checkpoint",
            )
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ModelError(
                    f"Optimizer state '{name}' is {list(state[name].shape)}, "
                    f"expected {list(value.shape)}",
                    cure="Resume with the number of proxies and the shape that wrote it",
                )
        for name, value in own.items():
            value.copy_(state[name])


def _global_norm(grads: list[Tensor]) -> float:
    # Norms of tensors in float32, their sum in Python: one fixed order whatever P is.
    norms = torch.stack(torch._foreach_norm(grads)).tolist()
    return math.sqrt(math.fsum(norm * norm for norm in norms))
