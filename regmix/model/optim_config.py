"""The optimizer's settings, and the learning rate of each step.

Enters: numbers. Leaves: a validated `OptimConfig`. Holds no tensor and imports no torch, so that
a study's settings are read without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from regmix.errors import ConfigError

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
