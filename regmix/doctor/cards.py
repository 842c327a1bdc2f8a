"""What nvidia-smi and the driver's own files say of the GPUs.

Enters: answers of nvidia-smi to queries, names below /proc and /dev. Leaves: `CardFacts`. Uses no
GPU itself and judges nothing: `gpu` does.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
FIELDS = (
    *("index", "uuid", "name", "driver_version", "memory.total", "memory.used"),
    *("ecc.mode.current", "mig.mode.current", "compute_mode", "persistence_mode"),
    "ecc.errors.uncorrected.volatile.total",
)
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
FORMAT = "--format=csv,noheader,nounits"

Ask = Callable[[Sequence[str]], tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as nvidia-smi counts them; a mode that it does not have is "". Memory in bytes."""

    index: int
    uuid: str
    name: str
    driver: str
    total_bytes: int | None
    used_bytes: int | None
    ecc: str
    mig: str
    compute_mode: str
    persistence: str
    uncorrected: int | None


@dataclass(frozen=True, kw_only=True)
class Process:
    """Another program on a GPU; its memory is None where the driver does not tell."""

    uuid: str
    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """All cards and their programs; nodes: device files; on_bus: NVIDIA display devices on PCI."""

    has_smi: bool
    error: str
    cards: tuple[Card, ...]
    processes: tuple[Process, ...]
    nodes: int
    on_bus: int


def look_at_cards(ask: Ask | None = None, root: Path = Path("/")) -> CardFacts:
    """Return what is known of the cards without using any."""
    if ask is None:
        from regmix.doctor.asking import ask_smi

        ask = ask_smi if shutil.which("nvidia-smi") else None
    text = said = error = ""
    if ask is not None:
        text, error = ask([f"--query-gpu={','.join(FIELDS)}", FORMAT])
        said, _ = ask([f"--query-compute-apps={','.join(PROCESS_FIELDS)}", FORMAT])
    return CardFacts(
        has_smi=ask is not None,
        error=error,
        cards=tuple(read_cards(text)),
        processes=tuple(read_processes(said)),
        nodes=sum(p.name[6:].isdecimal() for p in (root / "dev").glob("nvidia[0-9]*")),
        on_bus=_count_on_bus(root / "sys" / "bus" / "pci" / "devices"),
    )


def _count_on_bus(folder: Path) -> int:
    found = 0
    for device in folder.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        found += vendor.strip() == "0x10de" and kind.startswith("0x03")
    return found


def _rows(text: str, num_fields: int) -> list[list[str]]:
    rows = ([word.strip() for word in row] for row in csv.reader(text.splitlines()))
    return [row for row in rows if len(row) == num_fields]


def _mode(word: str) -> str:
    return "" if word.startswith("[") or word == "N/A" else word


def _number(word: str) -> int | None:
    return int(word) if word.isdecimal() else None


def _mebibytes(word: str) -> int | None:
    number = _number(word)
    return None if number is None else number * MIB


def read_cards(text: str) -> list[Card]:
    """Return the cards of a query for `FIELDS`."""
    return [
        Card(
            index=int(row[0]),
            uuid=row[1],
            name=row[2],
            driver=row[3],
            total_bytes=_mebibytes(row[4]),
            used_bytes=_mebibytes(row[5]),
            ecc=_mode(row[6]),
            mig=_mode(row[7]),
            compute_mode=_mode(row[8]),
            persistence=_mode(row[9]),
            uncorrected=_number(row[10]),
        )
        for row in _rows(text, len(FIELDS))
        if row[0].isdecimal()
    ]


def read_processes(text: str) -> list[Process]:
    """Return the programs of a query for `PROCESS_FIELDS`."""
    return [
        Process(uuid=row[0], pid=int(row[1]), name=row[2], used_bytes=_mebibytes(row[3]))
        for row in _rows(text, len(PROCESS_FIELDS))
        if row[1].isdecimal()
    ]
