"""How each kernel is launched: tiles, warps and pipeline stages, apart from the kernels.

Enters: an operation's sizes and the GPU's compute capability. Leaves: a frozen table entry. No
entry depends on the number of proxies, so a proxy's sums have one order whatever it is stacked
with; nothing is tuned at run time.
"""

from __future__ import annotations

import torch

AMPERE, HOPPER = 80, 90


def capability(device: torch.device) -> int:
    """Return the table to use on `device`: 80 (A100) or 90 (H100, H200 and newer).

    The interpreter's device, the CPU, takes Hopper's, so that tests run what Hopper runs.
    """
    if device.type != "cuda":
        return HOPPER
    return HOPPER if torch.cuda.get_device_capability(device) >= (9, 0) else AMPERE
