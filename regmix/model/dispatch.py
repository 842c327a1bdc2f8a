"""Which implementation serves the model's operations on a device, in words.

Enters: a device. Leaves: operation -> implementation, for `doctor` and for reports. Chooses nothing
itself: `fused.operations` does for a GPU, and the CPU has one implementation.
"""

from __future__ import annotations

from regmix_kernels.launches import MAX_FUSED_WIDTH, MAX_HEAD_DIM

from regmix.model import ops
from regmix.model.fused.operations import IMPLEMENTATIONS


def describe(device: str) -> dict[str, str]:
    """Return what serves each operation on "cpu" or "cuda"."""
    if device == "cpu":
        return {op: ops.path("cpu") for op in IMPLEMENTATIONS}
    served = {op: kinds[0] for op, kinds in IMPLEMENTATIONS.items()}
    served["head"] = f"streamed up to width {MAX_FUSED_WIDTH}, chunked above"
    served["attention"] = f"triton up to head size {MAX_HEAD_DIM}, sdpa above"
    served["matrix products"] = "cublas, one call a proxy unless proven equal"
    return served
