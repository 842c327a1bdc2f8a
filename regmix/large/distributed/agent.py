"""torchrun, which dies with the process that launched it.

Enters: torchrun's own arguments. Leaves: its exit code. A module of its own, so that what it
imports is torch's launcher and nothing of this package.
"""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run torchrun; on Linux the kernel ends it where its parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


if __name__ == "__main__":
    main()
