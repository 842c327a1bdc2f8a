"""One corpus in the place of another, in one step.

1. The new corpus is complete in the folder `.replacement` inside the old one.
2. The step: a manifest that names the new files where they lie takes the place of the old one.
3. The new files get their usual names as further links, then the usual manifest takes the place of
   that of step 2, then `.replacement` goes.

A reader finds a whole corpus at every instant, the old one or the new one; a run that is killed in
step 3 is ended by the next one (`heal`). On a file system without hard links step 3 moves the
files instead, and a reader may meet an error until it is done.

Enters: a folder. Leaves: the folder with one corpus in it. Packs nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

from regmix.data.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from regmix.errors import ShardError
from regmix.files import atomic_open, storage_errors, sync_directory

REPLACEMENT = ".replacement"
TOKENIZER = "tokenizer.json"
DROPPED = "dropped.jsonl"
PACKING = "packing.json"


def put_in_place(folder: Path) -> None:
    """Make the complete corpus in `.replacement` the corpus of the folder."""
    manifest, _ = read_manifest(folder / REPLACEMENT)
    write_manifest(folder, _elsewhere(manifest))
    _settle(folder)


def is_half_done(folder: Path) -> bool:
    """Return whether a replacement was stopped half way, or is under way; changes nothing."""
    manifest, checksum = read_manifest(folder)
    if manifest.tokenizer.file.startswith(f"{REPLACEMENT}/"):
        return True
    with contextlib.suppress(ShardError):
        return read_manifest(folder / REPLACEMENT)[1] == checksum
    return False


def heal(folder: Path) -> bool:
    """End a replacement that was stopped half way; return whether there was one."""
    if not is_half_done(folder):
        return False
    manifest, _ = read_manifest(folder)
    if manifest.tokenizer.file.startswith(f"{REPLACEMENT}/"):
        _settle(folder)
    else:
        _clean(folder, manifest)
    return True


def _elsewhere(manifest: Manifest) -> Manifest:
    """Return the manifest with every file where it lies before it is moved."""
    splits = {
        split: {
            domain: replace(
                stats,
                files=tuple(
                    replace(file, path=f"{REPLACEMENT}/{file.path}") for file in stats.files
                ),
            )
            for domain, stats in domains.items()
        }
        for split, domains in manifest.splits.items()
    }
    tokenizer = replace(manifest.tokenizer, file=f"{REPLACEMENT}/{manifest.tokenizer.file}")
    return replace(manifest, splits=splits, tokenizer=tokenizer)


def _files(manifest: Manifest) -> list[str]:
    shards = [
        file.path
        for domains in manifest.splits.values()
        for stats in domains.values()
        for file in stats.files
    ]
    return [manifest.tokenizer.file, *shards]


def _settle(folder: Path) -> None:
    new = folder / REPLACEMENT
    manifest, _ = read_manifest(new)
    with storage_errors(folder):
        for name in _files(manifest):
            _link(new / name, folder / name)
        for name in (DROPPED, PACKING):
            if (new / name).exists():
                _link(new / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        for side in ("train", "valid"):
            if (folder / side).is_dir():
                sync_directory(folder / side)
        with atomic_open(folder / MANIFEST) as stream:
            stream.write((new / MANIFEST).read_bytes())
    _clean(folder, manifest)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, which may be taken; move it where links are not known."""
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except FileNotFoundError:
        if not target.exists():  # else it was moved by a run that was stopped
            raise
        return
    except OSError:
        os.replace(source, target)
        return
    os.replace(temporary, target)
    # A rename to another name of the same file leaves both names.
    temporary.unlink(missing_ok=True)


def _clean(folder: Path, manifest: Manifest) -> None:
    """Remove what does not belong to the corpus of this manifest."""
    remove_others(folder, manifest)
    with storage_errors(folder):
        shutil.rmtree(folder / REPLACEMENT, ignore_errors=True)


def remove_others(folder: Path, manifest: Manifest) -> None:
    """Remove shards that the manifest does not name."""
    kept = set(_files(manifest))
    with storage_errors(folder):
        for side in ("train", "valid"):
            for path in (folder / side).glob("*.tokens"):
                if f"{side}/{path.name}" not in kept:
                    path.unlink()
