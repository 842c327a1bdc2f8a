"""A stack's parameters in flat buffers: one row a proxy, all tensors of a model in it.

Enters: a shape, the number of proxies, a device. Leaves: float32 values, gradients and moments
[P, S], a working copy in the dtype that the products take, and views of each by name, [P, ...].
One launch can then update all of a proxy. Initialises and updates nothing.

P proxies, S floats of one proxy, padding included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regmix.model.parameters import parameter_shapes
from regmix.model.presets import ModelShape

# Every tensor and every proxy begins at a multiple of 512 bytes in bf16, as a tensor of its own
# would: the library may choose another product for a pointer that is less aligned.
_ALIGNED = 256


class FlatParameters:
    """Values, gradients, moments and the working copy of a stack; names as `parameter_shapes`."""

    def __init__(
        self, shape: ModelShape, num_proxies: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.shapes = parameter_shapes(shape)
        self._starts: dict[str, int] = {}
        size = 0
        for name, lengths in self.shapes.items():
            self._starts[name] = size
            size += -(-math.prod(lengths) // _ALIGNED) * _ALIGNED
        self.values_PS = torch.zeros(num_proxies, size, device=device)
        self.grads_PS = torch.zeros_like(self.values_PS)
        self.mean_PS = torch.zeros_like(self.values_PS)
        self.square_PS = torch.zeros_like(self.values_PS)
        rounded = dtype != torch.float32
        self.copy_PS = torch.zeros_like(self.values_PS, dtype=dtype) if rounded else None
        self.values = self.views(self.values_PS)
        self.grads = self.views(self.grads_PS)
        self.mean = self.views(self.mean_PS)
        self.square = self.views(self.square_PS)
        # What the products take.
        self.weights = self.values if self.copy_PS is None else self.views(self.copy_PS)

    def views(self, flat_PS: Tensor) -> dict[str, Tensor]:
        """Return each tensor's part of a flat buffer, [P, ...] by name."""
        num_proxies, size = flat_PS.shape
        found = {}
        for name, start in self._starts.items():
            lengths = self.shapes[name]
            # `view` would make up another stride over the proxies where there is one of them, and
            # Triton compiles a kernel by what its arguments' strides can be divided by.
            strides = (size, *(math.prod(lengths[axis + 1 :]) for axis in range(len(lengths))))
            found[name] = flat_PS.as_strided((num_proxies, *lengths), strides, start)
        return found

    def refresh_copy(self) -> None:
        """Round the values into the working copy, after they were set from outside."""
        if self.copy_PS is not None:
            self.copy_PS.copy_(self.values_PS)
