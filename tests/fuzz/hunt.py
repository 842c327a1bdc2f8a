"""The long hunt: thousands of changed files for each reader, and a table of what they met.

    PYTHONPATH=tests python tests/fuzz/hunt.py --examples 3000 [--seed N] [NAME ...]

Enters: how many files, and perhaps the names of readers. Leaves: a line for each reader on stdout
(files, refused, answered, slowest), and each kind of failure once with a file that shows it.
Shrinks nothing: test_fuzz_readers.py with REGMIX_FUZZ does.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from material import Material
from readers import READERS, Reader
from test_fuzz_readers import contents, try_one
from watching import TookTooLong, TookTooMuch

from regmix.errors import RegmixError


@dataclass
class Tally:
    """What one reader met; failures: kind of failure -> how often, words, and a file."""

    refused: int = 0
    answered: int = 0
    slowest: float = 0.0
    failures: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """All files."""
        return self.refused + self.answered + sum(found[0] for found in self.failures.values())


def hunt(row: Reader, files: Material, examples: int, start: int) -> Tally:
    """Try so many files on a reader."""
    tally = Tally()
    valid = (files.root / row.file).read_bytes()

    @seed(start)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(contents(row, files))
    def check(content: bytes) -> None:
        begun = time.monotonic()
        try:
            try_one(row, files, content)
        except RegmixError:
            tally.refused += 1
        except (Exception, TookTooLong, TookTooMuch) as error:
            kind = kind_of(error)
            count, _, shown = tally.failures.get(kind, (0, "", content))
            shown = min(shown, content, key=len)
            tally.failures[kind] = (count + 1, str(error)[:160], shown)
        else:
            tally.answered += 1
        tally.slowest = max(tally.slowest, time.monotonic() - begun)

    try:
        check()
    finally:
        (files.root / row.file).write_bytes(valid)
    return tally


def kind_of(error: BaseException) -> str:
    """Name a failure by its type and by the last line of ours that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame
        for frame in frames
        if "/regmix" in frame.filename and "site-packages" not in frame.filename
    ]
    place = ours[-1] if ours else frames[-1]
    name = "/".join(Path(place.filename).parts[-3:])
    return f"{type(error).__name__} at {name}:{place.lineno} {place.name}"


def main() -> None:
    """Hunt with the readers named, or with all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    unknown = set(options.names) - {row.name for row in READERS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = Material(root)
        os.chdir(root)
        for row in READERS:
            if options.names and row.name not in options.names:
                continue
            begun = time.monotonic()
            tally = hunt(row, files, options.examples, options.seed)
            print(
                f"{row.name:32} {tally.tried:6} files  {tally.refused:6} refused  "
                f"{tally.answered:6} answered  slowest {tally.slowest:6.2f} s  "
                f"failures {len(tally.failures)}  in {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            for kind, (count, words, content) in sorted(tally.failures.items()):
                print(f"    {count} x {kind}: {words!r}\n        {content[:160]!r}", flush=True)
            found += len(tally.failures)
        os.chdir("/")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
