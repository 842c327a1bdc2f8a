"""The record of a run: a JSON line for each step, and programs that want the same numbers.

Enters: numbers of a step, on the first rank. Leaves: `metrics.jsonl`, which a resumed run goes on
with, and the numbers in TensorBoard or Weights & Biases where asked for. Judges nothing.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regmix.errors import ModelError
from regmix.files import storage_errors, write_text

FILE = "metrics.jsonl"
# Name on the command line -> the module that must be installed.
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class MetricsLog:
    """Appends lines to `folder`/metrics.jsonl, from `step` on: later lines of before are dropped.

    `sync` makes sure that what was added survives a power cut, before a checkpoint says so.
    """

    def __init__(
        self, folder: Path, step: int, *, name: str = "", trackers: Sequence[str] = ()
    ) -> None:
        self.path = folder / FILE
        kept = [line for line, at in _lines(self.path) if at <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close
        self._trackers = [_KINDS[kind](folder, name) for kind in trackers]

    def add(self, numbers: Mapping[str, Any]) -> None:
        """Write one step's numbers; who follows the file sees the line at once."""
        with storage_errors(self.path):
            self._stream.write(json.dumps(numbers) + "\n")
            self._stream.flush()
        for tracker in self._trackers:
            tracker.add(numbers)

    def sync(self) -> None:
        """Return once every line is on the disk."""
        with storage_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, and what else got the numbers."""
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()


def _lines(path: Path) -> list[tuple[str, int]]:
    """Return the whole lines of a record with their steps; a torn last line is left out."""
    if not path.is_file():
        return []
    found = []
    with storage_errors(path):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        numbers = numbers_of(line)
        if numbers is not None:
            found.append((line, int(numbers["step"])))
    return found


def numbers_of(line: str | bytes) -> dict[str, Any] | None:
    """Return the numbers of a line of a record, None where it is torn or none."""
    try:
        table = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fine = isinstance(table, dict) and type(table.get("step")) is int
    return table if fine and isinstance(table.get("loss_nats"), int | float) else None


def refuse_missing_trackers(trackers: Sequence[str]) -> None:
    """Raise `ModelError` where a program that shall get the metrics is not installed."""
    for kind in trackers:
        try:
            importlib.import_module(TRACKERS[kind])
        except ImportError as error:
            raise ModelError(
                f"--track {kind} needs the package '{kind}', which is not installed",
                cure=f"Install it with: pip install {kind}",
            ) from error


class _Wandb:
    def __init__(self, folder: Path, name: str) -> None:
        self._run = importlib.import_module(TRACKERS["wandb"]).init(
            project="regmix-fast", name=name, dir=str(folder), resume="allow"
        )

    def add(self, numbers: Mapping[str, Any]) -> None:
        self._run.log(dict(numbers), step=int(numbers["step"]))

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, name: str) -> None:
        module = importlib.import_module(TRACKERS["tensorboard"])
        # Beside the run's folder, which goes when the model is there.
        self._writer = module.SummaryWriter(str(folder.parent.parent / "tensorboard" / name))

    def add(self, numbers: Mapping[str, Any]) -> None:
        for key, value in numbers.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, int(numbers["step"]))

    def close(self) -> None:
        self._writer.close()


_KINDS: dict[str, Callable[[Path, str], _Wandb | _TensorBoard]] = {
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}
