"""No reader is missing from the table: each place that reads is reached by a row, or exempt."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

from material import Material
from places import ROOT, reading_places
from readers import READERS
from test_fuzz_readers import files  # noqa: F401 - a fixture

# Place -> why files of others do not come there.
EXEMPT = {
    **dict.fromkeys(
        (
            "regmix.doctor.cards:_count_on_bus",
            "regmix.doctor.disk:_mounts",
            "regmix.doctor.machine:_text",
            "regmix.provenance:processor",
            "regmix.swarm.cost:available_memory_bytes",
            "regmix.swarm.processes:worker_processes",
            "regmix.swarm.cluster.actor:PlaceActor.sees",
        ),
        "what the kernel says of this machine",
    ),
    **dict.fromkeys(
        (
            "regmix.data.packing.encoder_pool:receive",
            "regmix.data.packing.encoder_process:main",
            "regmix.doctor.asking:read_answers",
            "regmix.doctor.cards:_rows",
            "regmix.doctor.probe:main",
            "regmix.large.distributed.exchange:_decode",
            "regmix.swarm.gpus:ask",
            "regmix.swarm.probe:main",
            "regmix.swarm.processes:WorkerProcess._read",
            "regmix.swarm.cluster.actor:PlaceActor.send",
            "regmix.swarm.worker:_Worker.listen",
            "regmix.swarm.worker:main",
        ),
        "a pipe to a process that this one has started",
    ),
    **dict.fromkeys(
        (
            "regmix.lease:_renew",
            "regmix.lease:held",
            "regmix.swarm.ledger_schema:copy_ledger",
            "regmix.swarm.shard_cache:IncomingCorpus.begin",
            "regmix.swarm.shard_cache:IncomingCorpus.write",
            "regmix.swarm.shard_cache:_sync",
            "regmix.swarm.cluster.scratch:*",
        ),
        "opened for a lock, or to be written",
    ),
    **dict.fromkeys(
        (
            "regmix.large.distributed.checkpoint:save",
            "regmix.large.distributed.checkpoint_index:render",
        ),
        "its own JSON, to have plain types",
    ),
    **dict.fromkeys(
        (
            "regmix.large.train:_collect",
            "regmix.swarm.shard_cache:parts_of",
            "regmix.doctor.disk:read_speed",
        ),
        "copied or timed as bytes, not read",
    ),
    "regmix.data.found:_read": "text of the packages installed here: any UTF-8 will do",
    "regmix.doctor.native:gather": "what the installer wrote of this package",
    "regmix.large.distributed.finish:write_model": "given to _curve, which is in the table",
    "regmix.large.distributed.rank:main": "read_table and from_table, as the row of job.json does",
    "regmix.swarm.stop_request:StopWatch._watch": "compared with the token of a lease",
    "regmix.swarm.worker:read_parameters": "read_tensors, which is in the table",
}


def reached_by(call: Callable[[], object]) -> set[str]:
    """The functions of the package that a call enters, as `places` names them."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, _event: str, _argument: object) -> None:
        codes.add(frame.f_code)

    threading.setprofile(note)  # of threads that the call starts
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    found = set()
    for code in codes:
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT):
            module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
            found.add(f"{module}:{code.co_qualname.replace('.<locals>', '')}")
    return found


def test_every_place_that_reads_is_in_the_table_or_exempt(files: Material) -> None:  # noqa: F811
    reads = {row.read for row in READERS}
    reached = set().union(*(reached_by(lambda read=read: read(files)) for read in reads))
    places = set(reading_places())
    exempt = {place for place in places if place in EXEMPT or f"{_module(place)}:*" in EXEMPT}
    missing = sorted(places - reached - exempt)
    assert missing == [], "add a reader to tests/fuzz, or say in EXEMPT why none is needed"
    known = places | {f"{_module(place)}:*" for place in places}
    assert sorted(EXEMPT.keys() - known) == [], "these are gone, or read no more"
    assert sorted(EXEMPT.keys() & reached) == [], "these are in the table: no exemption is needed"


def _module(place: str) -> str:
    return place.partition(":")[0]


def test_a_place_that_reads_is_found(tmp_path: Path) -> None:
    (tmp_path / "regmix").mkdir()
    source = """
def load(path):
    with open(path, "w") as stream:
        stream.write("")
    def inner():
        return open(path).read()

class Table:
    def read(self, path):
        return json.loads(path.read_text())
"""
    (tmp_path / "regmix" / "table.py").write_text(source)
    assert reading_places(tmp_path / "regmix") == {
        "regmix.table:load.inner": {"open"},
        "regmix.table:Table.read": {"json.loads", "read_text"},
    }
