"""AdamW over a stack: every proxy has its own clip, and its own failure.

Enters: parameters and gradients [P, ...] by name, and the step. Leaves: parameters updated in
place, each proxy's gradient norm, and the optimizer's state as tensors to save. A proxy whose
gradient norm is not finite is frozen from that step on: its parameters and its state stay as
they were, and its neighbours do not notice. Computes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regmix.errors import ConfigError, ModelError

Schedule = Literal["constant", "cosine", "wsd"]
_SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW's settings; the defaults are the paper's proxy (sail-sg/regmix, tinyllama_1M).

    lr: peak learning rate.
    warmup_steps: steps of linear warm-up; the first step takes lr / warmup_steps.
    betas: decay of the first and of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, on every parameter.
    clip_norm: limit of a proxy's global gradient norm; None means no limit.
    schedule: after warm-up, "constant", "cosine" to min_lr_ratio at total_steps, or "wsd":
        constant, then linear to min_lr_ratio over the last decay_fraction of total_steps.
    total_steps: length of the run; needed by "cosine" and "wsd".
    min_lr_ratio: the final learning rate as a fraction of lr.
    decay_fraction: the part of total_steps over which "wsd" decays.
    """

    lr: float = 4e-4
    warmup_steps: int = 100
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: str = "constant"
    total_steps: int | None = None
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        fine = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(fine, "betas", self.betas, "two numbers from 0 to below 1")
        decay = self.weight_decay
        _require(0 <= decay < math.inf, "weight_decay", decay, "at least 0")
        clip = self.clip_norm
        _require(clip is None or 0 < clip < math.inf, "clip_norm", clip, "above 0, or leave it out")
        fine = self.schedule in _SCHEDULES
        _require(fine, "schedule", self.schedule, f"one of {', '.join(_SCHEDULES)}")
        fine = self.total_steps is not None or self.schedule == "constant"
        _require(fine, "total_steps", None, f"the run's length: '{self.schedule}' needs it")
        total = self.total_steps
        _require(total is None or total >= 1, "total_steps", total, "at least 1")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        fine = 0 < self.decay_fraction <= 1
        _require(fine, "decay_fraction", self.decay_fraction, "above 0 and at most 1")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step `step`; the first step is 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.total_steps is None:
            return self.lr
        if self.schedule == "cosine":
            span = max(1, self.total_steps - self.warmup_steps)
            progress = min(1.0, (step - self.warmup_steps) / span)
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            decay_steps = max(1.0, self.decay_fraction * self.total_steps)
            remaining = min(1.0, max(0.0, (self.total_steps - step) / decay_steps))
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * remaining)


def _require(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise ConfigError(f"{name} = {value!r} of the optimizer", cure=f"Make it {wanted}")


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
