"""The C++ core without Python: its own checks, plain and under the sanitizers of the compiler.

The program is `csrc/tests/test_core.cpp`. `make sanitize` runs this file alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
BUILDS = {
    "plain": ["-O2"],
    "address": ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}


def program(folder: Path, build: str) -> Path:
    """Compile the checks; skip, with the reason, where this machine cannot."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: no g++ here, and CXX names none")
    path, source = folder / build, CSRC / "tests" / "test_core.cpp"
    options = ["-std=c++17", "-pthread", f"-I{CSRC}", *BUILDS[build]]
    done = subprocess.run([compiler, *options, source, "-o", path], capture_output=True, text=True)
    if build != "plain" and "cannot find" in done.stderr:
        pytest.skip(f"the compiler has no runtime of the {build} sanitizer")
    assert done.returncode == 0, done.stderr
    return path


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # A hang is a failure: the checks take a second, ten under a sanitizer.
    done = subprocess.run([path, *words], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer cannot place its memory under this kernel's settings")
    return done


def test_the_core_passes_its_own_checks(tmp_path: Path) -> None:
    done = run(program(tmp_path, "plain"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all checks passed\n"


def test_no_access_is_out_of_bounds_or_undefined(tmp_path: Path) -> None:
    path = program(tmp_path, "address")
    done = run(path)
    assert done.returncode == 0, done.stderr
    assert "heap-buffer-overflow" in run(path, "overrun").stderr  # so it does look


def test_no_two_threads_race(tmp_path: Path) -> None:
    path = program(tmp_path, "thread")
    done = run(path)
    assert done.returncode == 0, done.stderr
    race = run(path, "race").stderr
    assert "data race" in race  # so it does see the threads
    assert "ring.hpp" in race
