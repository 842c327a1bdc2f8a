"""A request to a sweep that runs, on this machine or another one, to stop.

Enters: a study. Leaves: a file that names the lease whose holder is meant; and on the sweep's
side, an interrupt as from Ctrl-C, so that every worker writes a checkpoint first.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from regmix.errors import StudyError
from regmix.files import atomic_open
from regmix.lease import LEASE_SECONDS, Lease, is_held, read_lease
from regmix.study import Study
from regmix.swarm.progress import read_progress

POLL_SECONDS = 1.0
# Workers have a minute to write a checkpoint; a request is seen after some seconds.
STOP_PATIENCE_SECONDS = 120.0


def ask_to_stop(
    study: Study,
    *,
    on_asked: Callable[[], None] = lambda: None,
    patience_seconds: float = STOP_PATIENCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Ask the sweep of a study to stop and wait until it has; returns whose it was.

    `StudyError` where none runs, where another command has the study, or where it does not stop.
    """
    holder = read_lease(study.lease_path)
    if holder is None or is_held(study.lock_path, study.lease_path) is False:
        raise StudyError(
            f"{study.path}: no sweep runs on it",
            cure="Nothing is to be stopped; regmix-fast status says how far it is",
        )
    progress = read_progress(study.progress_path)
    if progress is None or progress.token != holder.token:
        raise StudyError(
            f"{study.path} is in use by another command ({holder}), which trains no proxies yet",
            cure="Try again in a while, or stop that command itself",
        )
    with atomic_open(study.stop_path, "w", durable=False) as stream:
        stream.write(holder.token)
    on_asked()
    started = renewed = clock()
    found: Lease | None = holder
    while found is not None and found.token == holder.token:
        if found.is_of_this_machine and not is_held(study.lock_path, study.lease_path):
            break
        last, found = found, read_lease(study.lease_path)
        if found != last:
            renewed = clock()
        if clock() - renewed > 2 * LEASE_SECONDS and not holder.is_of_this_machine:
            raise StudyError(
                f"{study.path}: the sweep ({holder}) is gone without having stopped",
                cure="Run regmix-fast proxies again: it goes on from the last checkpoints",
            )
        if clock() - started > patience_seconds:
            raise StudyError(
                f"{study.path}: the sweep ({holder}) has not stopped in {patience_seconds:.0f} s",
                cure="Wait for it, or end that process; nothing that is trained is lost",
            )
        sleep(0.2)
    return holder


class StopWatch:
    """Interrupts the main thread, as Ctrl-C does, when a request for this sweep appears.

    Where the sweep runs in another thread, `raise_if_asked` has to be called now and then.
    """

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._ended = threading.Event()
        self._is_asked = self._is_raised = False
        self._is_main = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def raise_if_asked(self) -> None:
        """Raise `KeyboardInterrupt`, once, where the interrupt has no way to this thread."""
        if self._is_asked and not self._is_raised and not self._is_main:
            self._is_raised = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                # Opened each time: on a network file system that is what shows a change.
                with open(self._path, encoding="ascii") as stream:
                    is_asked = stream.read(64) == self._token
                if is_asked and self._interrupted():
                    self._is_asked = True
                    return

    def _interrupted(self) -> bool:
        """Interrupt the main thread if the sweep runs there; False where it is not ready yet."""
        if not self._is_main:
            return True
        # The shell may have made a process in the background deaf to SIGINT.
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                signal.pthread_kill(threading.main_thread().ident or 0, number)
                return True
        return False

    def __enter__(self) -> StopWatch:
        with atomic_open(self._path, "w", durable=False) as stream:
            stream.write("")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
