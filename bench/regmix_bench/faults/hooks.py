"""What disturbs a process from inside: run at its start, before any of the package's code.

Enters: rules, as JSON in the environment of the disturbed commands. Leaves: one file for each time
that a rule has struck, so that a fault that never happened is not taken for one that was survived.
A rule strikes at a moment (when the process starts, when it opens or renames a file, before a
training step) and then does one thing. Imports the standard library only, and no code of the
package: it changes what the package meets, never what it decides.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.abc
import importlib.machinery
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "REGMIX_FAULTS"
WORKER, COORDINATOR = "worker", "coordinator"
_ROLES = {"regmix.swarm.worker": WORKER, "regmix.cli": COORDINATOR}
# A clock that jumps by days, there and back, twice a second: further than any limit of the package.
JUMP_SECONDS, JUMP_PERIOD_SECONDS = 3 * 86_400.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One disturbance.

    role: which processes. at: "start", "open" (for writing), "read", "rename", "step" or "import".
    match: pattern that the moment's words must hold: a path, "<stack>@<step>", a module. nth: from
    which such moment on, in one process. do: what happens, a name of `ACTIONS`; value: of what.
    times: how often it strikes, over all processes; None for always.
    """

    role: str
    at: str
    do: str
    match: str = ""
    nth: int = 1
    value: Any = None
    times: int | None = 1


@dataclass
class _Armed:
    """The rules of this process; `seen` counts the moments that matched."""

    rules: list[Rule]
    marks: Path
    seen: dict[int, int] = field(default_factory=dict)
    is_busy: bool = False


def environment(rules: Sequence[Rule], folder: Path) -> dict[str, str]:
    """Return what processes need in their environment to obey `rules`; marks go to `folder`."""
    marks, start = folder / "marks", folder / "start"
    marks.mkdir(parents=True, exist_ok=True)
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(
        "from regmix_bench.faults import hooks\nhooks.install()\n", encoding="utf-8"
    )
    table = {"rules": [asdict(rule) for rule in rules], "marks": str(marks)}
    paths = [str(start), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {VARIABLE: json.dumps(table), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def times_struck(folder: Path, do: str) -> int:
    """Return how often the rules that do `do`, and whose marks go to `folder`, have struck."""
    return len(list((folder / "marks").glob(f"*-{do}-*")))


def install() -> None:
    """Obey the rules of the environment that are for a process like this one."""
    text = os.environ.get(VARIABLE)
    words = sys.orig_argv
    role = _ROLES.get(words[words.index("-m") + 1]) if "-m" in words[:-1] else None
    if text is None or role is None:
        return
    table = json.loads(text)
    rules = [Rule(**rule) for rule in table["rules"]]
    armed = _Armed([rule for rule in rules if rule.role in (role, "any")], Path(table["marks"]))
    if any(rule.at in ("open", "read", "rename") for rule in armed.rules):
        sys.addaudithook(lambda event, arguments: _audit(armed, event, arguments))
    if any(rule.at in ("step", "import") for rule in armed.rules):
        sys.meta_path.insert(0, _AfterImport(armed))
    moment(armed, "start", role)


def moment(armed: _Armed, at: str, words: str, subject: Any = None) -> None:
    """Let the rules strike whose moment this is; the subject is what they may act on."""
    if armed.is_busy:
        return
    for number, rule in enumerate(armed.rules):
        if rule.at != at or not re.search(rule.match, words):
            continue
        armed.seen[number] = armed.seen.get(number, 0) + 1
        if armed.seen[number] >= rule.nth and _may_strike(armed, number, rule):
            armed.is_busy = True
            try:
                ACTIONS[rule.do](rule, words, subject)
            finally:
                armed.is_busy = False


def _may_strike(armed: _Armed, number: int, rule: Rule) -> bool:
    """Leave a mark, and return whether the rule may strike: no more often than it says."""
    armed.is_busy = True
    try:
        for turn in range(rule.times if rule.times is not None else 1_000_000):
            path = armed.marks / f"{number}-{rule.role}-{rule.do}-{turn}"
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
            if rule.times is None:
                return True
        return False
    finally:
        armed.is_busy = False


def _audit(armed: _Armed, event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, str | os.PathLike):
            writes = bool(set(mode or "") & set("wax+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))
            moment(armed, "open" if writes else "read", os.fspath(path))
    elif event == "os.rename":
        moment(armed, "rename", os.fspath(arguments[1]))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Tells when a module was imported, before its importer sees it."""

    def __init__(self, armed: _Armed) -> None:
        self._armed = armed

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("regmix."):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            armed, loader = self._armed, spec.loader
            run = loader.exec_module

            def run_and_tell(module: ModuleType) -> None:
                run(module)
                if name == "regmix.swarm.engine":
                    _tell_of_steps(armed, module)
                moment(armed, "import", name, module)

            loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


def _tell_of_steps(armed: _Armed, engine: ModuleType) -> None:
    step = engine.StackTrainer.train_step

    def train_step(trainer: Any) -> None:
        moment(armed, "step", f"{trainer.job.name}@{trainer.step}@", trainer)
        step(trainer)

    engine.StackTrainer.train_step = train_step


def _signal(number: signal.Signals) -> Callable[[Rule, str, Any], None]:
    return lambda _rule, _words, _subject: os.kill(os.getpid(), number)


def _error(rule: Rule, words: str, _subject: Any) -> None:
    raise OSError(rule.value, os.strerror(rule.value), words)


def _fill(rule: Rule, _words: str, _subject: Any) -> None:
    """Leave no byte free on the disk of the folder `value`."""
    fill_disk(Path(rule.value))


def fill_disk(folder: Path, leave_bytes: int = 0) -> None:
    """Fill a small disk with files named `ballast`, but for `leave_bytes`."""
    state = os.statvfs(folder)
    left = state.f_bavail * state.f_frsize - leave_bytes
    with open(folder / f"ballast-{os.getpid()}-{time.monotonic_ns()}", "wb") as stream:
        size = 1 << 16
        while left > 0 and size:
            try:
                left -= os.write(stream.fileno(), b"\0" * min(size, left))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2


def _wait(rule: Rule, _words: str, _subject: Any) -> None:
    time.sleep(rule.value)


def _hang(_rule: Rule, _words: str, _subject: Any) -> None:
    while True:
        time.sleep(60)


def _cut(rule: Rule, _words: str, _subject: Any) -> None:
    os.truncate(*rule.value)


def _remove(rule: Rule, _words: str, _subject: Any) -> None:
    os.unlink(rule.value)


def _poison(rule: Rule, _words: str, trainer: Any) -> None:
    """Give the member called `value` a weight that is no number."""
    rows = [row for row, member in enumerate(trainer.job.members) if member.name == rule.value]
    for row in rows:
        next(iter(trainer.parameters.values()))[row] = float("nan")


def _starve(rule: Rule, _words: str, _subject: Any) -> None:
    """Allow this process `value` bytes of address space more than it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + int(rule.value)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _allocate(rule: Rule, _words: str, _subject: Any) -> None:
    """Ask for `value` bytes, as the training does for its next batch."""
    import torch

    torch.empty(int(rule.value), dtype=torch.uint8)


def _print(rule: Rule, _words: str, _subject: Any) -> None:
    """Print `value` = (text, times) as a library does, with no regard for who reads."""
    text, times = rule.value
    for _ in range(times):
        sys.stdout.write(text)
    sys.stdout.flush()


def _write(rule: Rule, _words: str, _subject: Any) -> None:
    """Write `value` = (descriptor, text, times) as a library in C does."""
    descriptor, text, times = rule.value
    for _ in range(times):
        os.write(descriptor, text.encode())


def _limit_files(rule: Rule, _words: str, _subject: Any) -> None:
    """Let no file of this process grow past `value` bytes."""
    limit = (int(rule.value), resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def _set(rule: Rule, _words: str, module: Any) -> None:
    """Set constants of a module that was just imported: `value` is name -> value."""
    for name, value in rule.value.items():
        getattr(module, name)  # a name that is gone is a fault of the suite
        setattr(module, name, value)


def _jump(rule: Rule, _words: str, _subject: Any) -> None:
    """Make the wall clock jump by days for as long as the process lives."""
    true_time = time.time

    def shift() -> float:
        turn = int(time.monotonic() / JUMP_PERIOD_SECONDS) % 4
        return (0.0, JUMP_SECONDS, 0.0, -JUMP_SECONDS)[turn]

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: true_time() + shift()
    time.time_ns = lambda: int(time.time() * 1e9)
    datetime.datetime = Jumping  # type: ignore[misc]


def _elsewhere(rule: Rule, _words: str, lease: Any) -> None:
    """Be on another machine, whose `flock` does not reach this one: `value` is its name."""
    import fcntl
    import platform

    fcntl.flock = lambda *_: None
    platform.node = lambda: str(rule.value)
    lease.boot_id = lambda: f"boot of {rule.value}"


ACTIONS: dict[str, Callable[[Rule, str, Any], None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "error": _error,
    "fill": _fill,
    "wait": _wait,
    "hang": _hang,
    "cut": _cut,
    "remove": _remove,
    "poison": _poison,
    "starve": _starve,
    "allocate": _allocate,
    "print": _print,
    "write": _write,
    "limit_files": _limit_files,
    "set": _set,
    "jump": _jump,
    "elsewhere": _elsewhere,
}
