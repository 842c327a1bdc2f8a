"""Checkpoints of a stack in training: one file each, checked before it is used.

Enters: tensors, and a small JSON state. Leaves: `step-<n>.safetensors` by atomic rename, the
newest two kept; the newest undamaged one back. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from regmix.files import atomic_open, storage_errors

KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.safetensors")
logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `KEPT`."""
    path = folder / f"step-{step:08d}.safetensors"
    write_tensors(path, tensors, {"step": step, **state})
    for old in checkpoints(folder)[KEPT:]:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


class CheckpointWriter:
    """Writes checkpoints, one at a time, in the background where the caller need not wait."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        *,
        wait: bool,
        then: Callable[[int], None] = lambda _step: None,
    ) -> None:
        """Write a checkpoint; without `wait` the tensors must stay as they are until it is there.

        then: called with the step once it is on disk. Raises what the one before failed with.
        """
        self.close()
        if wait:
            save_checkpoint(self._folder, step, tensors, state)
            then(step)
            return

        def save() -> None:
            try:
                save_checkpoint(self._folder, step, tensors, state)
                then(step)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=save)
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being written; raise what it failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def write_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON state to one safetensors file that carries its own checksum."""
    text = json.dumps(state, sort_keys=True)
    # One key: safetensors writes several in no fixed order, and equal files must be equal bytes.
    record = json.dumps({"state": text, "xxh3_64": _digest(tensors, text)})
    with atomic_open(path) as stream:
        stream.write(save(tensors, metadata={"regmix": record}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; `ValueError` where the file is damaged."""
    try:
        with storage_errors(path), safetensors.safe_open(path, framework="pt") as stream:
            record = json.loads((stream.metadata() or {})["regmix"])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        text = record["state"]
        state = json.loads(text)
        found = record["xxh3_64"]
        if not isinstance(state, dict):
            raise TypeError("its state is not a table")
    except (
        *(safetensors.SafetensorError, AttributeError, KeyError, RecursionError),
        *(TypeError, ValueError),
    ) as error:
        raise ValueError(f"{path}: not a complete checkpoint ({error})") from error
    if found != _digest(tensors, text):
        raise ValueError(f"{path}: its content does not match its checksum")
    return tensors, state


def load_newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest undamaged checkpoint's tensors and state; a damaged one is named."""
    for path in checkpoints(folder):
        try:
            return read_tensors(path)
        except ValueError as error:
            logger.warning("%s; the checkpoint before it is used", error)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = xxhash.xxh3_64(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
