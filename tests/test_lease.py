"""Who holds a study: processes of one machine by its lock, other machines by its lease."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regmix import lease as leases
from regmix.errors import StudyError
from regmix.lease import Lease, held, is_held, read_lease
from regmix.swarm.ledger import Ledger

HOLDER = """
import sys, time
from pathlib import Path
from regmix.lease import held
folder = Path(sys.argv[1])
with held(folder / ".lock", folder / ".lease", patience_seconds=0):
    print("held", flush=True)
    time.sleep(60)
"""


class FakeTime:
    """A clock that moves only by sleeping, and what else happens meanwhile."""

    def __init__(self, meanwhile: Callable[[float], None] = lambda _: None) -> None:
        self.now, self.meanwhile = 100.0, meanwhile

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now)


def take(folder: Path, fake: FakeTime, patience_seconds: float = 15.0):
    return held(
        folder / ".lock",
        folder / ".lease",
        patience_seconds=patience_seconds,
        clock=fake.clock,
        sleep=fake.sleep,
    )


def leave_foreign_lease(folder: Path, counter: int = 3) -> None:
    foreign = Lease(token="theirs", host="node-7", pid=41, boot="another", counter=counter)
    (folder / ".lease").write_text(json.dumps(dataclasses.asdict(foreign)))


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lease_that_is_renewed_elsewhere_is_in_use(tmp_path: Path) -> None:
    leave_foreign_lease(tmp_path)
    fake = FakeTime(lambda now: leave_foreign_lease(tmp_path, counter=int(now)))
    with (
        pytest.raises(StudyError, match=r"in use by another command \(process 41 on node-7\)"),
        take(tmp_path, fake),
    ):
        pass
    assert fake.now < 100 + leases.LEASE_SECONDS


def test_a_lease_that_stands_still_elsewhere_is_taken_over(tmp_path: Path) -> None:
    leave_foreign_lease(tmp_path)
    fake = FakeTime()
    with take(tmp_path, fake):
        found = read_lease(tmp_path / ".lease")
        assert found is not None
        assert found.pid == os.getpid()
    assert 100 + leases.LEASE_SECONDS <= fake.now < 101 + leases.LEASE_SECONDS
    assert not (tmp_path / ".lease").exists()


def test_a_lease_that_is_given_back_elsewhere_is_taken_at_once(tmp_path: Path) -> None:
    leave_foreign_lease(tmp_path)
    fake = FakeTime(lambda _: (tmp_path / ".lease").unlink(missing_ok=True))
    with take(tmp_path, fake):
        assert fake.now < 101


def test_a_renewal_after_a_long_wait_starts_the_wait_again(tmp_path: Path) -> None:
    leave_foreign_lease(tmp_path)
    renewed_at = 100 + leases.LEASE_SECONDS - 1

    def renew_once(now: float) -> None:
        leave_foreign_lease(tmp_path, counter=4 if now >= renewed_at else 3)

    fake = FakeTime(renew_once)
    with pytest.raises(StudyError, match="in use"), take(tmp_path, fake, patience_seconds=15.0):
        pass
    assert fake.now >= renewed_at


def test_what_a_killed_process_of_this_machine_left_is_taken_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert read_lease(tmp_path / ".lease") is not None
    fake = FakeTime()
    with take(tmp_path, fake):
        assert fake.now == 100.0


def test_a_stopped_process_of_this_machine_keeps_its_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    fake = FakeTime()
    with (
        pytest.raises(StudyError, match=f"process {holder.pid}"),
        take(tmp_path, fake, patience_seconds=1000.0),
    ):
        pass


def test_a_held_folder_is_seen_without_writing_to_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    paths = tmp_path / ".lock", tmp_path / ".lease"
    assert is_held(*paths) is True
    holder.kill()
    holder.wait()
    assert is_held(*paths) is False
    leave_foreign_lease(tmp_path)
    assert is_held(*paths) is None
    assert is_held(tmp_path / "none", tmp_path / "none") is False


def test_a_lease_is_renewed_while_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    with take(tmp_path, FakeTime()):
        seen = set()
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            found = read_lease(tmp_path / ".lease")
            assert found is not None
            seen.add(found.counter)
        assert len(seen) == 3


def test_a_holder_that_lost_its_lease_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.01)
    with take(tmp_path, FakeTime()):
        leave_foreign_lease(tmp_path)
        before = (tmp_path / ".lease").read_bytes()
        time.sleep(0.1)
        assert (tmp_path / ".lease").read_bytes() == before
    assert (tmp_path / ".lease").read_bytes() == before


def test_a_writer_that_was_overtaken_writes_nothing_more(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as stalled:
        with Ledger(tmp_path / "ledger.sqlite") as other:
            other.add_stacks([])
        before = (tmp_path / "ledger.sqlite").read_bytes()
        with pytest.raises(StudyError, match="took the study over"):
            stalled.add_stacks([])
        with pytest.raises(StudyError, match="took the study over"):
            stalled.copy_to(tmp_path / "copy.sqlite")
    assert (tmp_path / "ledger.sqlite").read_bytes() == before
    assert not (tmp_path / "copy.sqlite").exists()


def test_a_lease_that_makes_no_sense_is_none(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe", b"[]", b"[" * 10_000, b'{"token": "x"}'):
        (tmp_path / ".lease").write_bytes(content)
        assert read_lease(tmp_path / ".lease") is None
