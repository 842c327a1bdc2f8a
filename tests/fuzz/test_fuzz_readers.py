"""Whatever is in a file of others, a reader answers or refuses it with a `RegmixError`, in time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus_readers  # noqa: F401 - these fill the table
import model_readers  # noqa: F401
import pytest
import study_readers  # noqa: F401
from fuzzing import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from material import Material
from mutations import changed_bytes, changed_table, changed_tree, to_json
from readers import READERS, Reader
from watching import watched

from regmix.errors import RegmixError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    here = Path.cwd()
    root = tmp_path_factory.mktemp("fuzz")
    made = Material(root)
    os.chdir(root)
    yield made
    os.chdir(here)


def contents(row: Reader, files: Material) -> st.SearchStrategy[bytes]:
    """The bytes to write in place of a valid file."""
    raw = changed_bytes((files.root / row.file).read_bytes())
    if row.form == "bytes":
        return raw
    if row.form == "csv":
        return raw | changed_table((files.root / row.file).read_text())
    trees = changed_tree(row.tree_of(files))
    written = trees.map(WRITERS[row.form])
    if row.sign is not None:
        sign = row.sign
        written = trees.map(lambda tree: sign(files, tree)) | written
    return written | written | raw


def _toml(tree: Any) -> bytes:
    import tomli_w

    try:
        return tomli_w.dumps(tree).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, AttributeError, RecursionError):
        return to_json(tree)


def _yaml(tree: Any) -> bytes:
    import yaml

    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return to_json(tree)


WRITERS = {"json": to_json, "toml": _toml, "yaml": _yaml}


def try_one(row: Reader, files: Material, content: bytes) -> None:
    """Let a reader read a changed file; raises what it raises, and where that is not one line."""
    (files.root / row.file).write_bytes(content)
    try:
        with watched():
            row.read(files)
    except RegmixError as error:
        if not str(error).isprintable():
            raise ValueError(f"not one printable line: {str(error)!r}") from error
        raise


@pytest.mark.parametrize("row", READERS, ids=lambda row: row.name)
def test_a_reader_answers_or_refuses(row: Reader, files: Material) -> None:
    path = files.root / row.file
    valid = path.read_bytes()
    row.read(files)  # the valid file is read

    @given(contents(row, files))
    def check(content: bytes) -> None:
        with contextlib.suppress(RegmixError):
            try_one(row, files, content)

    try:
        fuzzed(check, slow=row.slow)()
    finally:
        path.write_bytes(valid)
