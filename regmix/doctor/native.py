"""What of the data path is compiled: the C++ extension, the sampler's backend, the tokenizer's.

Enters: what a worker's imports find, and what is installed. Leaves: findings, above all which
fallback serves and why. Chooses no backend: `data.sampling.backends` and `data.packing.engines` do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem
from regmix.doctor.interpreter import DISTRIBUTION

REBUILD = (
    "Install again with a C++17 compiler there: REGMIX_REQUIRE_NATIVE=1 pip install -e . in the "
    "source tree says why it is not built"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where regmix comes from and what serves.

    folder: of the regmix that runs this; worker_folder: of the one that workers import, None where
    they find none; extension: its compiled file, None where there is none; in_source_tree: whether
    csrc/ lies beside it; installed: version in the metadata, None without; editable: installed as
    a link to its source; sampler, tokenizer: answers of the probe; failures: why there is none.
    """

    folder: str
    worker_folder: str | None
    extension: str | None
    in_source_tree: bool
    installed: str | None
    editable: bool
    revision: str
    sampler: dict[str, Any]
    tokenizer: dict[str, Any]
    failures: dict[str, str]


def gather(request: Request) -> Facts:
    """Return where this package was imported from and what the probe found out."""
    from importlib import metadata

    from regmix.provenance import revision

    folder = Path(__file__).resolve().parents[1]
    imports = request.answer("imports")
    origin = imports.get("regmix")
    installed, editable = None, False
    try:
        distribution = metadata.distribution(DISTRIBUTION)
        installed = distribution.version
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        editable = bool(direct.get("dir_info", {}).get("editable"))
    except metadata.PackageNotFoundError:
        pass
    return Facts(
        folder=str(folder),
        worker_folder=str(Path(origin).resolve().parent) if origin else None,
        extension=imports.get("regmix._sampler"),
        in_source_tree=(folder.parent / "csrc").is_dir(),
        installed=installed,
        editable=editable,
        revision=revision(),
        sampler=request.answer("sampler"),
        tokenizer=request.answer("tokenizer"),
        failures={
            name: why
            for name, why in request.failures.items()
            if name in ("imports", "sampler", "tokenizer", "probe")
        },
    )


def check_origin(facts: Facts) -> list[Finding]:
    """Do this command and the workers that it starts run the same regmix?"""
    how = f"regmix-fast {facts.installed}" if facts.installed else "not installed"
    if facts.installed and facts.editable:
        how += ", linked to its source"
    what = f"regmix from {facts.folder} ({how}, revision {facts.revision})"
    if "imports" in facts.failures or "probe" in facts.failures:
        why = facts.failures.get("imports") or facts.failures["probe"]
        return [
            problem(
                f"{what}, but a fresh process cannot import it: {why}",
                "Start python -c 'import regmix' by hand, and install what it misses",
            )
        ]
    if facts.worker_folder is None:
        return [
            problem(
                f"{what}, but the workers that it starts would find none",
                "Install the package: pip install -e . in its source tree",
            )
        ]
    if facts.worker_folder != facts.folder:
        return [
            problem(
                f"{what}, but workers would import the one in {facts.worker_folder}",
                "Run `regmix-fast` rather than python -m regmix.cli, or leave this folder",
            )
        ]
    return [ok(what)]


def check_sampler(facts: Facts) -> list[Finding]:
    """Which backend makes the batches, and why not a faster one?"""
    if not facts.sampler:
        why = facts.failures.get("sampler") or facts.failures.get("probe") or "no answer"
        return [problem(f"no sampler backend could be loaded: {why}", "Install the package again")]
    chosen, reasons = facts.sampler["chosen"], facts.sampler["reasons"]
    why = "; ".join(reasons.values())
    if chosen == "native" and Path(facts.extension or "").parent != Path(facts.worker_folder or ""):
        return [
            note(
                f"sampler backend: native, but the extension is another installation's "
                f"({facts.extension})",
                f"Build it for this one: pip install -e . in {Path(facts.folder).parent}",
            )
        ]
    if chosen == "native":
        return [ok(f"sampler backend: native (C++, {facts.extension})")]
    if chosen is None:
        return [problem(f"no sampler backend works ({why})", "Install the package again")]
    cure = REBUILD
    if facts.in_source_tree and facts.extension is None and not facts.editable:
        cure = (
            "This is a source tree without its extension: run regmix-fast from another folder, "
            "or build in place: pip install -e ."
        )
    if chosen == "numba":
        return [note(f"sampler backend: numba, same batches, slower to make ({why})", cure)]
    return [
        problem(
            f"sampler backend: {chosen}, same batches, far slower to make; neither the C++ "
            f"extension nor Numba works ({why})",
            cure,
        )
    ]


def check_tokenizer(facts: Facts) -> list[Finding]:
    """Which engine does `pack` encode with?"""
    if not facts.tokenizer:
        why = facts.failures.get("tokenizer") or facts.failures.get("probe") or "no answer"
        return [
            problem(
                f"no tokenizer engine: {why}", "Mend the tokenizer, or install tokenizers again"
            )
        ]
    engine, version = facts.tokenizer["engine"], facts.tokenizer["version"]
    if facts.tokenizer["reason"]:
        return [
            note(
                f"tokenizer engine: {engine} {version}, the slower one "
                f"({facts.tokenizer['reason']})",
                'pip install "fastokens>=0.3.5,<0.4", or use a tokenizer that it reads; '
                "the ids are the same",
            )
        ]
    return [ok(f"tokenizer engine: {engine} {version}, checked against tokenizers before use")]


SUBJECT = Subject("package", gather, (check_origin, check_sampler, check_tokenizer))
