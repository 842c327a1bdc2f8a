"""The Python that runs this: its version, kind and width, and the packages that it finds.

Enters: the metadata of what is installed. Leaves: findings. Imports none of those packages.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from dataclasses import dataclass

from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem

DISTRIBUTION = "regmix-fast"
SHOWN = ("torch", "triton", "numpy", "numba", "pyarrow", "lightgbm")  # --json has all


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A package that regmix-fast names: the range it needs, and the version that is there."""

    name: str
    wanted: str
    version: str | None
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of the interpreter; supported is None where regmix-fast is not installed."""

    version: str
    supported: str | None
    fits: bool
    implementation: str
    bits: int
    system: str
    free_threaded: bool
    optimized: bool
    executable: str
    requirements: tuple[Requirement, ...]


def gather(request: Request) -> Facts:
    """Return the facts of the interpreter that runs this."""
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    supported: str | None = None
    lines: list[str] = []
    try:
        supported = str(metadata.metadata(DISTRIBUTION)["Requires-Python"] or "")
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        pass
    version = platform.python_version()
    return Facts(
        version=version,
        supported=supported and in_order(supported),
        fits=SpecifierSet(supported or "").contains(version, prereleases=True),
        implementation=platform.python_implementation(),
        bits=64 if sys.maxsize > 2**32 else 32,
        system=f"{platform.system()} {platform.machine()}",
        free_threaded=bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        optimized=bool(sys.flags.optimize),
        executable=sys.executable,
        requirements=tuple(needed(lines)),
    )


def in_order(specifiers: str) -> str:
    """Return a range with its lower end first: `>=3.11,<3.14`."""
    return ",".join(sorted(specifiers.split(","), reverse=True))


def needed(lines: list[str]) -> list[Requirement]:
    """Return the requirements, as metadata writes them, that apply here without extras."""
    from importlib import metadata

    from packaging.requirements import Requirement as Parsed

    found = []
    for parsed in map(Parsed, lines):
        if parsed.marker is not None and not parsed.marker.evaluate({"extra": ""}):
            continue
        try:
            version: str | None = metadata.version(parsed.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and parsed.specifier.contains(version, prereleases=True)
        wanted = in_order(str(parsed.specifier))
        found.append(
            Requirement(name=parsed.name, wanted=wanted, version=version, fits=fits),
        )
    return found


def check_version(facts: Facts) -> list[Finding]:
    """Is this a Python that regmix-fast supports?"""
    what = f"Python {facts.version}, {facts.bits}-bit {facts.implementation}, {facts.system}"
    found = []
    if not facts.fits:
        found.append(
            problem(
                f"{what}: regmix-fast supports {facts.supported}",
                f"Make an environment with a Python {facts.supported} and install there",
            )
        )
    if facts.bits != 64:
        found.append(
            problem(
                f"{what}: shards are mapped into memory, which 32 bits cannot address",
                "Use a 64-bit Python",
            )
        )
    if facts.implementation != "CPython":
        found.append(
            problem(f"{what}: torch and Numba are built for CPython only", "Use CPython"),
        )
    if not facts.system.startswith("Linux"):
        found.append(
            note(
                f"{what}: Triton and the tests of this package run on Linux only",
                "Use Linux for GPUs; elsewhere the CPU paths may serve",
            )
        )
    supported = f", supported: {facts.supported}" if facts.supported else ""
    return found or [ok(f"{what}{supported} ({facts.executable})")]


def check_build(facts: Facts) -> list[Finding]:
    """Is the interpreter started and built in the usual way?"""
    found = []
    if facts.free_threaded:
        found.append(
            note(
                "a Python without the global lock: not tested with this package",
                "Use the ordinary build of the same version",
            )
        )
    if facts.optimized:
        found.append(
            note(
                "Python runs with -O or PYTHONOPTIMIZE: internal checks are off",
                "Leave -O out and unset PYTHONOPTIMIZE",
            )
        )
    return found


def check_packages(facts: Facts) -> list[Finding]:
    """Is every package there that the installed metadata names, in its range?"""
    if facts.supported is None:
        return [
            note(
                f"{DISTRIBUTION} is not installed here: its requirements cannot be checked",
                "Install it: pip install -e . in its source tree",
            )
        ]
    found = []
    for one in facts.requirements:
        cure = f'pip install "{one.name}{one.wanted}"'
        if one.version is None:
            found.append(problem(f"{one.name} is not installed (needs {one.wanted})", cure))
        elif not one.fits:
            found.append(problem(f"{one.name} {one.version} is not {one.wanted}", cure))
    if found:
        return found
    shown = [f"{r.name} {r.version}" for r in facts.requirements if r.name in SHOWN]
    return [ok(f"{len(facts.requirements)} packages in range, among them {', '.join(shown)}")]


SUBJECT = Subject("interpreter", gather, (check_version, check_build, check_packages))
