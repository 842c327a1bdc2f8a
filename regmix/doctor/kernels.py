"""Triton and what serves the model's operations.

Enters: what Triton says, whether it can compile here, where it keeps what it compiled. Leaves:
findings; what stops a GPU is only worth a note where there is none. Compiles nothing itself.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from regmix.display import size
from regmix.doctor.disk import FolderFacts, look_at
from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem

LEAST_CACHE_BYTES = 1 << 30
PLAIN = ("torch-", "reference")  # paths without a kernel of ours or of a library


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of Triton and of its surroundings.

    wanted: the requirement of torch that names Triton, None where it names none; compiler: path of
    the C compiler that Triton would start, None where there is none; asked: the one that CC names;
    header: path of Python.h; cache: the folder of compiled kernels; launches: device -> why a tiny
    kernel failed, "" where it ran; paths: device -> operation -> what serves it.
    """

    triton: str | None
    triton_error: str
    wanted: str | None
    fits: bool
    compiler: str | None
    asked: str | None
    header: str | None
    cache: FolderFacts
    launches: Mapping[str, str]
    launch_error: str
    paths: Mapping[str, Mapping[str, str]]
    paths_error: str
    num_gpus: int

    @property
    def serious(self) -> Callable[[str, str], Finding]:
        """The level of what stands in the way of a GPU."""
        return problem if self.num_gpus else note


def gather(request: Request) -> Facts:
    """Return the facts of this machine."""
    failures = request.failures
    version = request.answer("triton").get("version")
    wanted, fits = pair(version)
    header = Path(sysconfig.get_paths(scheme=_scheme())["include"], "Python.h")
    asked = os.environ.get("CC")
    return Facts(
        triton=version,
        triton_error=failures.get("triton") or failures.get("probe", ""),
        wanted=wanted,
        fits=fits,
        compiler=find_compiler(asked),
        asked=asked,
        header=str(header) if header.is_file() else None,
        cache=look_at(cache_folder(os.environ), "Triton's cache", timed=False),
        launches=request.answer("kernel").get("errors", {}),
        launch_error=failures.get("kernel", ""),
        paths=request.answer("paths"),
        paths_error=failures.get("paths", ""),
        num_gpus=int(request.answer("torch").get("num_devices") or 0),
    )


def _scheme() -> str:
    # As Triton: Debian's own scheme names a folder without headers.
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def pair(version: str | None) -> tuple[str | None, bool]:
    """Return the requirement of torch that names Triton (None: none), and whether it holds."""
    from importlib import metadata

    from packaging.requirements import Requirement as Parsed

    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return None, True
    for line in lines:
        parsed = Parsed(line)
        applies = parsed.marker is None or parsed.marker.evaluate({"extra": ""})
        if applies and re.fullmatch(r"(pytorch-)?triton", parsed.name):
            fits = version is not None and parsed.specifier.contains(version, prereleases=True)
            return f"{parsed.name}{parsed.specifier}", fits
    return None, True


def find_compiler(asked: str | None) -> str | None:
    """Return the C compiler that Triton starts: what CC names, else gcc, else clang."""
    if asked is not None:
        words = shlex.split(asked)
        return shutil.which(words[0]) if words else None
    return shutil.which("gcc") or shutil.which("clang")


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return where Triton keeps compiled kernels."""
    if named := environment.get("TRITON_CACHE_DIR"):
        return Path(named)
    return Path(environment.get("TRITON_HOME") or Path.home(), ".triton", "cache")


def check_triton(facts: Facts) -> list[Finding]:
    """Does Triton load, and is it the one that torch was made for?"""
    if facts.triton is None:
        why = facts.triton_error or "not installed"
        cure = f'pip install "{facts.wanted or "triton>=3.4"}" (Linux only)'
        return [facts.serious(f"Triton cannot be used: {why}", cure)]
    if not facts.fits:
        what = f"Triton {facts.triton} is not torch's pair: torch requires {facts.wanted}"
        return [facts.serious(what, f'pip install "{facts.wanted}"')]
    if facts.wanted is None:
        return [ok(f"Triton {facts.triton}; this build of torch names no pair for it")]
    return [ok(f"Triton {facts.triton}, torch's pair ({facts.wanted})")]


def check_compiler(facts: Facts) -> list[Finding]:
    """Are a C compiler and Python's headers there, which Triton needs to start kernels?"""
    found = []
    if facts.compiler is None:
        what = "no C compiler (gcc or clang), which Triton needs on a GPU"
        if facts.asked is not None:
            what = f"CC names '{facts.asked}', which is not there, and Triton asks for no other"
        cure = "Install one: apt install gcc, or conda install gcc; or set CC to its path"
        found.append(facts.serious(what, cure))
    if facts.header is None:
        cure = "Install Python's headers (apt install python3-dev), or use a Python that has them"
        found.append(facts.serious("no Python.h, which Triton compiles against on a GPU", cure))
    return found or [ok(f"C compiler: {facts.compiler}, with Python's headers")]


def check_cache(facts: Facts) -> list[Finding]:
    """Can Triton keep, and load, what it compiled?"""
    cache = facts.cache
    where = f"Triton's cache {cache.asked}"
    elsewhere = "Name a folder on a local disk: export TRITON_CACHE_DIR=/path/to/folder"
    found = []
    if cache.trial is not None and cache.trial.error:
        what = f"{where} cannot be written: {cache.trial.error}"
        found.append(facts.serious(what, elsewhere))
    if "noexec" in cache.mount.options:
        what = f"{where} is on a file system mounted noexec: compiled launchers cannot be loaded"
        found.append(facts.serious(what, elsewhere))
    if cache.free_bytes < LEAST_CACHE_BYTES:
        what = f"{where}: {size(cache.free_bytes)} free"
        found.append(facts.serious(what, f"Free some space. {elsewhere}"))
    if cache.mount.is_network:
        what = f"{where} is on a network ({cache.mount.kind}): slow, and shared between machines"
        found.append(note(what, elsewhere))
    return found or [ok(f"{where} can be written")]


def check_launches(facts: Facts) -> list[Finding]:
    """Does a tiny Triton kernel compile and run on every GPU?"""
    if not facts.num_gpus:
        return []
    if not facts.launches:
        why = facts.launch_error or "the probe did not get that far"
        return [problem(f"no Triton kernel could be tried: {why}", "Mend what is said above")]
    found = []
    for device, error in facts.launches.items():
        if error:
            cure = "Mend Triton, the compiler or the cache named here; else clear Triton's cache"
            found.append(problem(f"{device}: a tiny Triton kernel fails: {error}", cure))
    return found or [ok(f"a tiny Triton kernel runs on {', '.join(facts.launches)}")]


def check_paths(facts: Facts) -> list[Finding]:
    """What serves the model's operations on each device?"""
    if not facts.paths:
        why = facts.paths_error or "the probe did not get that far"
        return [problem(f"the model's operations cannot be loaded: {why}", "Mend torch first")]
    found = []
    for device, served in facts.paths.items():
        names: dict[str, list[str]] = {}
        for operation, path in served.items():
            names.setdefault(path, []).append(operation)
        said = "; ".join(f"{path}: {', '.join(every)}" for path, every in names.items())
        what = f"{device} is served by {said}"
        if device.startswith("cuda") and any(path.startswith(PLAIN) for path in names):
            cure = "Mend Triton, if a line above says so; plain PyTorch gives the same, far slower"
            found.append(note(what, cure))
        else:
            found.append(ok(what))
    return found


SUBJECT = Subject(
    "kernels",
    gather,
    (check_triton, check_compiler, check_cache, check_launches, check_paths),
)
