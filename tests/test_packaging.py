"""What is built and installed: the sdist can be built from, the wheel installs three packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.so", "*.egg-info", "build", "dist"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from that sdist, in one folder."""
    # A copy: setuptools writes into the tree it builds from, and the tests run side by side.
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED)
    out = tmp_path_factory.mktemp("built")
    result = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        capture_output=True,
        text=True,
        cwd=out,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def sdist(built: Path) -> set[str]:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def sources(folder: Path, name: str) -> set[str]:
    """The files that the package `name` consists of, as a wheel names them."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for pattern in ("*.py", "*.html", "py.typed")
        for path in folder.rglob(pattern)
    }


def test_sdist_holds_all_that_a_build_needs(sdist: set[str]) -> None:
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt", "Makefile"}
    assert needed <= sdist
    csrc = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*")}
    assert csrc <= sdist
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")} <= sdist


def test_sdist_holds_nothing_that_was_built(sdist: set[str]) -> None:
    assert not [name for name in sdist if name.endswith((".so", ".pyd", ".pyc"))]


def test_wheel_installs_three_packages_and_nothing_else(wheel: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top - {info} == {"regmix", "regmix_kernels", "regmix_bench"}
    assert f"{info}/licenses/LICENSE" in wheel
    assert f"{info}/licenses/csrc/third_party/LICENSE.xxhash" in wheel


def test_wheel_holds_every_module_and_template(wheel: set[str]) -> None:
    expected = sources(ROOT / "regmix", "regmix")
    expected |= sources(ROOT / "kernels" / "regmix_kernels", "regmix_kernels")
    expected |= sources(ROOT / "bench" / "regmix_bench", "regmix_bench")
    assert expected - wheel == set()


def test_wheel_holds_the_extension_where_it_is_required(wheel: set[str]) -> None:
    if os.environ.get("REGMIX_REQUIRE_NATIVE") != "1":
        pytest.skip("REGMIX_REQUIRE_NATIVE is not set: the extension is optional")
    assert [name for name in wheel if name.startswith("regmix/_sampler.")]


def test_a_machine_without_a_compiler_can_install(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    environment = {**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    environment.pop("REGMIX_REQUIRE_NATIVE", None)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list((tree / "regmix").glob("_sampler*"))
    environment["REGMIX_REQUIRE_NATIVE"] = "1"
    refused = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0


def test_the_torch_of_the_constraints_is_allowed_by_the_ranges() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {
        requirement.name: requirement.specifier
        for requirement in map(packaging.Requirement, project["dependencies"])
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {"torch", "triton"} <= pins.keys()
    assert all(ranges[name].contains(version) for name, version in pins.items())
