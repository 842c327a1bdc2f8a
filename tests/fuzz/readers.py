"""Every reader of files that others may have made or changed: the table, and what a row says.

- name: of the reader here, and of its test.
- file: the valid file that is changed, in the folder that material.py makes.
- form: json, toml, yaml or csv: its tree or its cells are changed, so that what comes after the
  parser is reached too; bytes: bytes alone. Bytes are changed in every form.
- sign: gives a changed tree the checksum that it asks for: a stranger can count one too.
- read: what a command does with the file; where it succeeds, what was read is used as there.

`read` may raise a `RegmixError`, and nothing else. The rows are in corpus_readers.py,
study_readers.py and model_readers.py. test_fuzz_inventory.py finds all places in the source where
files are read, and fails where one is neither reached by a row nor exempt with a reason.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from material import Material

Read = Callable[[Material], object]


@dataclass(frozen=True)
class Reader:
    """One row of the table; see the module's docstring."""

    name: str
    file: str
    form: str
    read: Read
    sign: Callable[[Material, Any], bytes] | None = None
    tree: Callable[[Material], Any] | None = None
    slow: bool = False  # takes 50 ms rather than 2

    def tree_of(self, files: Material) -> Any:
        """The tree of the valid file."""
        path = files.root / self.file
        if self.tree is not None:
            return self.tree(files)
        text = path.read_text()
        if self.form == "toml":
            return tomllib.loads(text)
        if self.form == "yaml":
            import yaml

            return yaml.safe_load(text)
        return json.loads(text)


READERS: list[Reader] = []


def reader(
    name: str,
    file: str,
    form: str,
    *,
    sign: Callable[[Material, Any], bytes] | None = None,
    tree: Callable[[Material], Any] | None = None,
    slow: bool = False,
) -> Callable[[Read], Read]:
    """Add a row to the table; the function decorated is its `read`."""

    def add(read: Read) -> Read:
        READERS.append(Reader(name, file, form, read, sign, tree, slow))
        return read

    return add
