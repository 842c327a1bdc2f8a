"""Triton kernels in the interpreter, in a process of their own.

Enters: a function of a test module that takes no argument. Leaves: nothing, or the failed process's
output as an assertion. An interpreted kernel cannot be compiled, so the process that interprets
compiles nothing, and the other way round.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_interpreted(check: Callable[..., None], *arguments: object) -> None:
    """Call `check(*arguments)` where Triton interprets; arguments are literals.

    The function is looked up by name in its module, so it must be at the module's top level.
    """
    module, name = check.__module__, check.__name__
    words = ", ".join(repr(argument) for argument in arguments)
    # Warnings of the interpreter about overflow are what some tests are about.
    program = f"import {module}; {module}.{name}({words})"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
