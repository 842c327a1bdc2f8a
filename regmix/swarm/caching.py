"""The local executor with its corpus copied to a local disk first: `--shard-cache`.

Enters: what `LocalExecutor` takes, and the cache's folder. Leaves: the same events; workers read
the copy and not the corpus itself, which may lie on a slow or a shared file system. Results do not
depend on which of the two is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regmix.data.shards import ShardSet
from regmix.swarm.dispatch import Replace
from regmix.swarm.events import Event, Failed, Requeued
from regmix.swarm.executors import LocalExecutor
from regmix.swarm.jobs import StackJob
from regmix.swarm.places import Place, Worker
from regmix.swarm.processes import WorkerProcess
from regmix.swarm.shard_cache import copy_corpus, doubt


class CachingExecutor(LocalExecutor):
    """Workers on this machine that read a copy of the corpus in `shard_cache`."""

    def __init__(self, *, shard_cache: Path, **options: Any) -> None:
        super().__init__(**options)
        self._shard_cache = shard_cache
        self._copy = shard_cache

    def run(
        self,
        jobs: Sequence[StackJob],
        on_event: Callable[[Event], None],
        replace: Replace | None = None,
    ) -> None:
        """See `Executor.run`; raises what `copy_corpus` does."""
        if not jobs:
            return
        self._copy = copy_corpus(ShardSet.open(jobs[0].shards), self._shard_cache)

        def tell(event: Event) -> None:
            said = ""
            if isinstance(event, Failed):
                said = event.what
            elif isinstance(event, Requeued):
                said = event.why
            if str(self._copy) in said:
                doubt(self._copy)
            on_event(event)

        if replace is None:
            super().run(jobs, tell)
        else:
            super().run(jobs, tell, replace)

    def start(self, place: Place) -> Worker:
        """See `Executor.start`."""
        worker = _CopyReader(place.id, place.gpu, self._inbox, self._setup)
        worker.shards = self._copy
        return worker


class _CopyReader(WorkerProcess):
    """A worker that is told to read its corpus in another place than its jobs name."""

    shards: Path

    def send(self, message: dict[str, Any]) -> None:
        """See `WorkerProcess.send`."""
        if "job" in message:
            message = {**message, "job": {**message["job"], "shards": str(self.shards)}}
        super().send(message)
