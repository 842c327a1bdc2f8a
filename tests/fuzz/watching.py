"""A watchdog around a reader: seconds and memory that no file of a few kilobytes is worth.

Enters: a call. Leaves: its answer, or `TookTooLong` or `MemoryError` at the limit; a call into a
library that does not come back ends the process with every thread's stack. Judges no error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import re
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

SECONDS = 20.0
# Address space beyond what the process has: allocators reserve 64 MiB for each thread they meet.
ADDRESS_BYTES = 3 << 30
RESIDENT_BYTES = 256 << 20


class TookTooLong(BaseException):
    """A reader was still at work after `SECONDS`."""


class TookTooMuch(BaseException):
    """A reader held more memory than `RESIDENT_BYTES`."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Limit time, address space and resident memory of the block."""

    def late(_signal: int, _frame: object) -> None:
        raise TookTooLong(f"more than {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size, resident = _status("VmSize"), _status("VmRSS")
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _forget_peak()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
    grown = _status("VmHWM") - resident
    if _PEAKS and grown > RESIDENT_BYTES:
        raise TookTooMuch(f"{grown / 1e6:.0f} MB")


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> bool:
    """Let the peak of resident memory start anew; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


_PEAKS = _forget_peak()
