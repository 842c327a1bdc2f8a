"""The folders of the work: space, speed, writing, locks, network.

Enters: the folder of a study, of shards, or any other. Leaves: findings, per folder. Reads no
token and writes nothing that stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.config import read_toml
from regmix.display import size
from regmix.doctor.disk import FolderFacts, look_at
from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem
from regmix.errors import RegmixError

GB = 1_000_000_000
LEAST_BYTES, LITTLE_BYTES = GB // 2, 10 * GB
LEAST_FILES = 1000
SLOW_BYTES_PER_SECOND = 100_000_000
SKEW_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The folders; study_error: why a study's settings cannot be read."""

    folders: tuple[FolderFacts, ...]
    study_error: str = ""


def study_settings(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the table of a folder's study.toml (None: no study), and why it cannot be read."""
    path = folder / "study.toml"
    if not path.is_file():
        return None, ""
    try:
        return read_toml(path), ""
    except RegmixError as error:
        return {}, error.what


def shards_folder(folder: Path) -> Path | None:
    """Return the folder of the shards that `folder` is or that its study names."""
    settings, _ = study_settings(folder)
    if settings is not None:
        named = settings.get("shards")
        return (folder / named).resolve() if isinstance(named, str) else None
    return folder if (folder / "manifest.json").is_file() else None


def tokenizer_words(folder: Path) -> tuple[str, ...]:
    """Return the path of the shards' tokenizer and its separator, for the probe; or nothing."""
    shards = shards_folder(folder)
    if shards is None:
        return ()
    try:
        record = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
        path, separator = (shards / record["file"]).resolve(), str(record["separator"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()  # `verify` says what is wrong with a manifest
    if not path.is_relative_to(shards.resolve()) or not path.is_file():
        return ()
    return str(path), separator


def gather(request: Request) -> Facts:
    """Return the facts of the folder, and of its study's shards."""
    settings, error = study_settings(request.folder)
    shards = shards_folder(request.folder)
    if settings is None:
        role = "folder" if shards is None else "shards"
        return Facts(folders=(look_at(request.folder, role),))
    # Proxies read their shards, so these are timed; the study's disk where they are too small.
    read = [] if shards is None else [look_at(shards, "shards", writes=False)]
    study = look_at(request.folder, "study", timed=not any(folder.speed for folder in read))
    return Facts(folders=(study, *read), study_error=error)


def check_presence(facts: Facts) -> list[Finding]:
    """Are the folders there, and can the study be read?"""
    found = []
    if facts.study_error:
        found.append(problem(facts.study_error, "Restore study.toml from a copy or from git"))
    for folder in facts.folders:
        if folder.exists:
            continue
        if folder.role == "shards":
            found.append(
                problem(
                    f"the study's shards are not in {folder.asked}",
                    "Put them back, or mend `shards` in study.toml",
                )
            )
        else:
            found.append(
                note(
                    f"{folder.asked} does not exist; examined {folder.path} instead",
                    "Check the name, or go on where a command is to make it",
                )
            )
    return found


def check_space(facts: Facts) -> list[Finding]:
    """Is there space for more?"""
    found = []
    for folder in (f for f in facts.folders if f.trial is not None):
        what = f"{folder.path}: {size(folder.free_bytes)} free of {size(folder.total_bytes)}"
        cure = "Free some space, or work in a folder on another disk"
        if folder.free_bytes < LEAST_BYTES:
            found.append(problem(what, cure))
        elif folder.free_files is not None and folder.free_files < LEAST_FILES:
            files = f"{folder.path}: room for {folder.free_files:,} more files (inodes)"
            found.append(problem(files, "Delete small files, or use another disk"))
        elif folder.free_bytes < LITTLE_BYTES:
            found.append(note(what, cure))
        else:
            found.append(ok(f"{what} ({folder.mount.kind})"))
    return found


def check_writing(facts: Facts) -> list[Finding]:
    """Can files be written and locked, and do their stamps agree with the clock?"""
    found = []
    for folder in facts.folders:
        trial = folder.trial
        if trial is None:
            continue
        if trial.error:
            found.append(
                problem(
                    f"{folder.path} cannot be written: {trial.error}",
                    "Check its permissions and its mount, or name a folder that you may write",
                )
            )
            continue
        if trial.lock_error:
            found.append(
                problem(
                    f"{folder.path}: files cannot be locked ({trial.lock_error}); a study needs "
                    "locks for its ledger",
                    "Mount it with locks (lustre: -o flock; nfs: without nolock), or keep the "
                    "study on a local disk",
                )
            )
        if abs(trial.skew_seconds) > SKEW_SECONDS:
            found.append(
                note(
                    f"{folder.path}: its clock is {trial.skew_seconds:+.1f} s from this machine's",
                    "Set both clocks by the same server (chrony, ntpd)",
                )
            )
    if not found and any(folder.trial is not None for folder in facts.folders):
        found.append(ok("files can be written and locked"))
    return found


def check_kind(facts: Facts) -> list[Finding]:
    """Is a folder on a network or in memory?"""
    found = []
    for folder in facts.folders:
        kind, point = folder.mount.kind, folder.mount.point
        if folder.mount.is_memory and folder.trial is not None:
            found.append(
                note(
                    f"{folder.path} is in memory ({kind} at {point}) and gone when this machine "
                    "stops",
                    "Keep what you need on a disk",
                )
            )
        if folder.mount.is_network and folder.role == "study":
            found.append(
                note(
                    f"{folder.path} is on a network ({kind} at {point}): its SQLite ledger is "
                    "safe for one machine at a time, if the server keeps locks",
                    "Work on a study from one machine at a time, or keep it on a local disk",
                )
            )
        elif folder.mount.is_network:
            found.append(
                note(
                    f"{folder.path} is on a network ({kind} at {point}): its speed may vary",
                    "Copy shards to a local disk where training waits for data",
                )
            )
    return found


def check_speed(facts: Facts) -> list[Finding]:
    """Is it read fast enough to pack, verify and train from?"""
    found = []
    for folder in facts.folders:
        speed = folder.speed
        if speed is None or not speed.num_bytes:
            continue
        how = "perhaps from memory" if speed.cached else "past this machine's page cache"
        what = (
            f"{folder.path}: reads {size(speed.bytes_per_second)}/s "
            f"({size(speed.num_bytes)} of {speed.source}, {how})"
        )
        if speed.bytes_per_second < SLOW_BYTES_PER_SECOND:
            found.append(note(what, "Keep shards on a local SSD, or copy them there first"))
        else:
            found.append(ok(what))
    return found


SUBJECT = Subject(
    "storage", gather, (check_presence, check_space, check_writing, check_kind, check_speed)
)
