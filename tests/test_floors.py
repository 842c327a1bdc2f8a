"""The house: imports go down, nothing heavy happens at import, modules say what they are for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {
    "regmix": ROOT / "regmix",
    "regmix_kernels": ROOT / "kernels" / "regmix_kernels",
    "regmix_bench": ROOT / "bench" / "regmix_bench",
}
# Ground floor first. A module belongs to the first floor that names it or its package.
FLOORS = (
    ("errors", "files", "lease", "config", "display", "provenance", "_sampler"),
    ("data",),
    ("model",),
    ("study",),
    ("swarm",),
    ("decision",),
    ("large",),
    ("report",),
    ("demo", "doctor", "cli"),
)
KERNEL_IMPORTS = {"torch", "triton", "numpy", "regmix_kernels"}
HEAVY = {
    *("torch", "numba", "pyarrow", "lightgbm", "plotly", "tokenizers"),
    *("scipy", "pandas", "transformers", "triton"),
}


def module_name(path: Path) -> str:
    for package, folder in SOURCE_ROOTS.items():
        if path.is_relative_to(folder):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    raise ValueError(path)


MODULES = {
    module_name(path): path for folder in SOURCE_ROOTS.values() for path in folder.rglob("*.py")
}


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every imported module with its line; `from a import b` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES or full == "regmix._sampler" else base), node.lineno


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str) -> list[tuple[str, int]]:
    return list(imported(parsed(module), module, MODULES[module].name == "__init__.py"))


def floor(module: str) -> int:
    parts = module.split(".")
    for number, names in enumerate(FLOORS):
        if len(parts) > 1 and parts[1] in names:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS and docs/architecture.md")


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported; not what is only for type checkers."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            waiting += getattr(node, field, [])
        waiting += [part for handler in getattr(node, "handlers", []) for part in handler.body]


def imported_at_import(module: str) -> set[str]:
    is_package = MODULES[module].name == "__init__.py"
    statements = [
        node for node in at_import(parsed(module)) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    return {name for node in statements for name, _ in imported(node, module, is_package)}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("regmix.")))
def test_imports_go_down_or_sideways(module: str) -> None:
    upward = []
    for name, line in imports_of(module):
        root = name.split(".")[0]
        if root == "regmix_bench":
            if not module.startswith("regmix.cli") or name in imported_at_import(module):
                upward.append(f"line {line}: {name} (only cli may import it, inside a function)")
        elif name == "regmix":
            upward.append(f"line {line}: import the module that defines the name, not `regmix`")
        elif root == "regmix" and floor(name) > floor(module):
            upward.append(f"line {line}: {name}")
    assert not upward


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imported_at_import(module) & MODULES.keys() for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


def test_kernels_import_torch_and_triton_only() -> None:
    foreign = {
        f"{module}: {name}"
        for module in MODULES
        if module.split(".")[0] == "regmix_kernels"
        for name, _ in imports_of(module)
        if name.split(".")[0] not in KERNEL_IMPORTS | sys.stdlib_module_names
    }
    assert not foreign


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_opens_with_what_it_is_for(module: str) -> None:
    tree = parsed(module)
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("regmix.cli")))
def test_commands_import_nothing_heavy_at_import(module: str) -> None:
    assert not {name.split(".")[0] for name in imported_at_import(module)} & HEAVY


@pytest.mark.parametrize(
    "statement",
    [
        "import regmix",
        "import regmix; regmix.__all__",
        "import regmix.cli; regmix.cli.cli(['--help'], standalone_mode=False)",
    ],
)
def test_starting_up_imports_nothing_heavy(statement: str) -> None:
    program = f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert "regmix" in loaded
    assert not loaded & HEAVY


def test_at_most_ten_names_are_public_and_all_exist() -> None:
    import regmix

    assert 0 < len(regmix.__all__) <= 10
    assert [name for name in regmix.__all__ if not hasattr(regmix, name)] == []
