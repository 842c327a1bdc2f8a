"""The whole examination: every subject, in the order in which a person would mend them.

Enters: a folder, perhaps a number of GPUs. Leaves: an `Examination`. Prints nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.doctor import gpu, interpreter, kernels, machine, native, storage, variables
from regmix.doctor.asking import ask_probe
from regmix.doctor.cards import look_at_cards
from regmix.doctor.findings import Finding, Request, Subject

SUBJECTS: tuple[Subject, ...] = (
    *(interpreter.SUBJECT, native.SUBJECT, gpu.SUBJECT, kernels.SUBJECT),
    *(machine.SUBJECT, variables.SUBJECT, storage.SUBJECT),
)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The folder, all findings, and the facts of each subject."""

    folder: str
    findings: tuple[Finding, ...]
    facts: dict[str, Any]

    @property
    def healthy(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.count("problem")

    def count(self, level: str) -> int:
        """Return how many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def as_table(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "healthy": self.healthy,
            "folder": self.folder,
            "counts": {level: self.count(level) for level in ("ok", "note", "problem")},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "facts": self.facts,
        }


def examine(folder: Path, *, gpus: int | None = None) -> Examination:
    """Examine this machine for work in `folder`; raises nothing about what it finds."""
    cards = look_at_cards()  # before the probe, which would show as another program
    answers, failures = ask_probe(storage.tokenizer_words(folder))
    request = Request(folder=folder, gpus=gpus, answers=answers, failures=failures, cards=cards)
    return conclude(request)


def conclude(request: Request) -> Examination:
    """Return the findings of every subject on what was asked beforehand and on the machine."""
    findings: list[Finding] = []
    facts: dict[str, Any] = {}
    for subject in SUBJECTS:
        found, known = subject.examine(request)
        findings += found
        facts[subject.name] = None if known is None else dataclasses.asdict(known)
    return Examination(folder=str(request.folder), findings=tuple(findings), facts=facts)
