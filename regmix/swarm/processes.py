"""A worker's process as its coordinator sees it: started, sent to, read from, ended.

Enters: where it runs (threads, GPU), and messages. Leaves: its messages in the coordinator's
inbox, then None once it is gone. Decides nothing about jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.errors import StudyError
from regmix.files import storage_errors
from regmix.swarm.places import Inbox

WORKER_MODULE = "regmix.swarm.worker"
# The losses of a stack along its training take far less.
LONGEST_MESSAGE_BYTES = 1 << 26
# A process that hangs in a broken driver does not end, not even when it is killed.
EXIT_PATIENCE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What all workers of a run have in common; `inherited` is a descriptor that they keep."""

    threads: int
    logs: Path
    inherited: int | None
    module: str


def worker_environment(
    threads: int, gpu: str | None, outer: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return a worker's environment: its threads, and the one GPU that it sees, if any."""
    environment = {
        **outer,
        "PYTHONSAFEPATH": "1",
        # Threads that spin while they wait take the core of another process's thread.
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        # Without a workspace of fixed size cuBLAS does not promise the same bits twice.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return environment


class WorkerProcess:
    """One worker, and the thread that puts (worker, message) into the inbox; None at its end.

    name: of its log, without the ending.
    """

    def __init__(self, name: str, gpu: str | None, inbox: Inbox, setup: WorkerSetup) -> None:
        with storage_errors(setup.logs):
            setup.logs.mkdir(parents=True, exist_ok=True)
            self.log_path = setup.logs / f"{name}.log"
            log = open(self.log_path, "ab")  # noqa: SIM115 - the child keeps it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", setup.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=worker_environment(setup.threads, gpu),
                start_new_session=True,
                pass_fds=() if setup.inherited is None else (setup.inherited,),
            )
        except OSError as error:
            raise StudyError(
                f"a worker cannot be started: {error}",
                cure="Use fewer --workers, or raise the limits on processes and memory (ulimit), "
                "then run the same command again",
            ) from error
        finally:
            log.close()
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: Inbox) -> None:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline(LONGEST_MESSAGE_BYTES):
            if len(line) == LONGEST_MESSAGE_BYTES:
                self.process.kill()
                break
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(message, dict):
                inbox.put((self, message))
        inbox.put((self, None))

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; nothing happens where the worker is gone: its reader says so."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def wait(self, patience_seconds: float = EXIT_PATIENCE_SECONDS) -> int | None:
        """Return the exit code of a worker that ends, killed where it takes too long, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(patience_seconds)
        return self.kill()

    def kill(self) -> int | None:
        """Kill the worker and return its exit code; None where not even that ends it."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(EXIT_PATIENCE_SECONDS)
        return None


def worker_processes(coordinator: int) -> list[int]:
    """Return the process ids of a coordinator's living workers (Linux; elsewhere none)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            # pid (name) state ppid: the name may hold spaces, so count from its last bracket.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == coordinator and WORKER_MODULE.encode() in words:
            found.append(int(entry.name))
    return sorted(found)
