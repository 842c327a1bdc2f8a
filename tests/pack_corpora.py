"""Small corpora that the tests of packing share: texts, lines, files, and what a folder holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["time", "person", "year", "way", "day", "thing", "world", "life", "hand", "part", "eye"]


def texts(seed: str, num: int) -> list[str]:
    """Return `num` different texts of 5 to 60 words."""
    draw = random.Random(seed)
    return [
        f"{seed} {number}: " + " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))
        for number in range(num)
    ]


def lines(rows: list[str]) -> bytes:
    """Return texts as lines of JSON."""
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def put(path: Path, content: bytes) -> None:
    """Write a file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
