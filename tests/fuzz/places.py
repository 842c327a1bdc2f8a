"""Where the package reads files: found in its source.

Enters: the source of the package. Leaves: the functions in which a file is opened, decoded or
parsed, as `module:Class.function`. Knows nothing of the table of readers.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "regmix"
# Called by name alone, or as an attribute of a module.
PLAIN = {
    *("open", "read_text", "read_json", "read_table", "read_toml", "read_yaml"),
    *("read_index_table", "read_tensors", "read_numbers", "read_header", "read_start"),
    *("safe_open", "load_file", "open_shard"),
}
# Called as attributes of anything.
ATTRIBUTES = {
    *("read_text", "read_bytes", "fdopen", "from_str", "from_file", "safe_open", "load_file"),
    *("GzipFile", "ParquetFile", "ZstdDecompressor", "memmap", "fromfile", "read_magic"),
}
# Called as attributes of these modules.
OF_MODULES = {
    ("json", "load"),
    ("json", "loads"),
    ("orjson", "loads"),
    ("tomllib", "load"),
    ("tomllib", "loads"),
    ("yaml", "load"),
    ("csv", "reader"),
    ("np", "load"),
    ("torch", "load"),
    ("sqlite3", "connect"),
    ("os", "open"),
    ("gzip", "open"),
}
WRITES = ("w", "a", "x", "+")


def reading_places(root: Path = ROOT) -> dict[str, set[str]]:
    """The functions that read -> what they call for it."""
    found: dict[str, set[str]] = {}
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        _visit(ast.parse(path.read_text(encoding="utf-8")), f"{module}:", found)
    return found


def _visit(node: ast.AST, place: str, found: dict[str, set[str]]) -> None:
    for child in ast.iter_child_nodes(node):
        inside = place
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{place}{'' if place.endswith(':') else '.'}{child.name}"
        if isinstance(child, ast.Call) and (word := _word_of(child)) is not None:
            found.setdefault(place, set()).add(word)
        _visit(child, inside, found)


def _word_of(call: ast.Call) -> str | None:
    """What a call reads with, None where it does not read."""
    if isinstance(call.func, ast.Name):
        name = call.func.id
        return name if name in PLAIN and not (name == "open" and _writes(call)) else None
    if not isinstance(call.func, ast.Attribute):
        return None
    name, owner = call.func.attr, call.func.value
    if isinstance(owner, ast.Name) and (owner.id, name) in OF_MODULES:
        return f"{owner.id}.{name}"
    return name if name in ATTRIBUTES else None


def _writes(call: ast.Call) -> bool:
    mode = call.args[1] if len(call.args) > 1 else None
    given = [key.value for key in call.keywords if key.arg == "mode"]
    for value in (mode, *given):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return any(letter in value.value for letter in WRITES)
    return False
