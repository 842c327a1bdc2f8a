"""A finding, and a subject that makes findings out of facts.

Enters: facts, gathered from the machine or written down by a test. Leaves: findings. Knows no
subject. Whatever raises becomes a finding too: a machine that is ill must not silence its doctor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was found: `note` is worth knowing, `problem` stands in the way; both have a cure.

    subject and check say who found it; `examine` fills them in.
    """

    level: Level
    what: str
    cure: str = ""
    subject: str = ""
    check: str = ""


def ok(what: str) -> Finding:
    """Return a finding that all is well."""
    return Finding("ok", what)


def note(what: str, cure: str) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding("note", what, cure)


def problem(what: str, cure: str) -> Finding:
    """Return a finding that stands in the way."""
    return Finding("problem", what, cure)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be examined.

    folder: where the work will be; study: whether it holds a study; gpus: how many must be usable;
    answers: section -> what `probe.py` found out in a process of its own; failures: section -> why
    it could not; cards: what nvidia-smi said before any process of ours used a GPU.
    """

    folder: Path
    gpus: int | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    cards: Any = None

    def answer(self, section: str) -> dict[str, Any]:
        """Return what the probe found out about a section; empty where it could not."""
        return dict(self.answers.get(section) or {})


@dataclass(frozen=True)
class Subject:
    """A name, how to gather its facts from this machine, and what to conclude from them."""

    name: str
    gather: Callable[[Request], Any]
    checks: tuple[Callable[[Any], list[Finding]], ...]

    def conclude(self, facts: Any) -> list[Finding]:
        """Return the findings of every check; a check that raises is a finding."""
        findings: list[Finding] = []
        for check in self.checks:
            name = check.__name__.removeprefix("check_")
            try:
                found = check(facts)
            except Exception as error:
                found = [_not_examined(error)]
            findings += [dataclasses.replace(f, subject=self.name, check=name) for f in found]
        return findings

    def examine(self, request: Request) -> tuple[list[Finding], Any]:
        """Return the findings about this machine, and the facts (None where there are none)."""
        try:
            facts = self.gather(request)
        except Exception as error:
            failed = dataclasses.replace(_not_examined(error), subject=self.name, check="facts")
            return [failed], None
        return self.conclude(facts), facts


def _not_examined(error: Exception) -> Finding:
    return note(
        f"could not be examined ({type(error).__name__}: {error})",
        "Report this line: doctor should have known what to do here",
    )
