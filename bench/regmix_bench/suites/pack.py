"""Packing the text that is on this machine anyway, against other ways to prepare it.

Enters: settings. Leaves: the records of `pack_speed`, on the demo's corpus and with a BPE trained
on it. `python -m regmix_bench.pack_speed --corpus CORPUS` measures a corpus of yours; on text as
small as this, start-up weighs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from regmix.data.found import collect
from regmix.data.packing.corpus import DEFAULT_VALID_FRACTION, side_of
from regmix.data.packing.documents import TRAIN
from regmix.provenance import available_cores
from regmix_bench import pack_speed
from regmix_bench.harness import Record
from regmix_bench.pack_speed import Way
from regmix_bench.peer_imports import with_versions
from regmix_bench.suites.registry import Settings

QUICK_BYTES, FULL_BYTES = 600_000, 3_000_000  # of each domain
PIECE_CHARACTERS = 1500


def measure(settings: Settings) -> list[Record]:
    """Pack what is found here; compare speed, memory and ids."""
    with tempfile.TemporaryDirectory(prefix="regmix-bench-") as temporary:
        return with_versions(_measure(Path(temporary), settings))


def _measure(folder: Path, settings: Settings) -> list[Record]:
    found = collect(
        folder / "found", max_bytes_per_domain=QUICK_BYTES if settings.quick else FULL_BYTES
    )
    total, num_domains = 0, 0
    for name, domain in found.items():
        documents = [] if domain.path is None else list(_pieces(domain.path))
        # `pack` refuses a domain without validation documents.
        if all(side_of(text.encode(), DEFAULT_VALID_FRACTION) == TRAIN for text in documents):
            settings.say(f"left out: domain {name} (too little text on this machine)")
            continue
        total += pack_speed.write_texts(folder / "corpus", name, iter(documents))
        num_domains += 1
    settings.say(f"{total / 1e6:.1f} MB of text in {num_domains} domains, found on this machine")
    whole, sample = pack_speed.prepare(
        folder / "corpus", folder, megabytes=1.0 if settings.quick else 4.0, copies=1
    )
    tokenizer = pack_speed.train_tokenizer(sample, folder / "tokenizer.json")
    kinds = ["regmix", "script", "encode_batch"] if settings.quick else list(pack_speed.NAMES)
    numbers = [1] if settings.quick else [n for n in (1, 2) if n <= available_cores()]
    ways = [Way(kind=kind, workers=workers) for workers in numbers for kind in kinds]
    rounds = 1 if settings.quick else 3
    outcomes = pack_speed.run_rounds(ways, whole, sample, tokenizer, folder / "out", rounds)
    records = pack_speed.make_records(outcomes, whole, sample)
    ours = next((way for way in outcomes if way.kind == "regmix"), None)
    if ours is None:
        raise RuntimeError("regmix pack did not run")
    shards = folder / "out" / f"{ours.kind}-{ours.workers}" / "shards"
    share = pack_speed.identical(shards, sample, tokenizer)
    case = f"{ours.name}, {sample.utf8_bytes / 1e6:.0f} MB of its documents"
    metric = "documents with identical ids"
    return [
        *records,
        Record(suite=pack_speed.SUITE, case=case, metric=metric, value=share, unit=""),
    ]


def _pieces(path: Path) -> Iterator[str]:
    """Yield documents cut into pieces, so that small domains have validation documents, too."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            text = json.loads(line)["text"]
            for start in range(0, len(text), PIECE_CHARACTERS):
                yield text[start : start + PIECE_CHARACTERS]
