"""`status`: what a person and a program see of a study, while it runs and after it broke."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from click.testing import CliRunner
from sweep_cases import ENVIRONMENT, FakeExecutor, result_of

from regmix.cli import cli
from regmix.cli import status as status_command
from regmix.errors import ConfigError, StudyError
from regmix.lease import LEASE_SECONDS
from regmix.study import Study
from regmix.swarm.events import Failed, Requeued
from regmix.swarm.jobs import StackJob
from regmix.swarm.pace import Pace
from regmix.swarm.state import read_state
from regmix.swarm.sweep import run_sweep


def shown(study: Study, *words: str) -> str:
    result = CliRunner().invoke(cli, ["status", str(study.path), *words])
    assert result.exit_code == 0, result.output
    return result.output


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_new_study_is_pending(study: Study) -> None:
    before = snapshot(study.path)
    text = shown(study)
    assert "6 proxies: 0 done, 6 pending, 0 failed" in text
    assert f"Next: regmix-fast proxies {study.path}" in text
    assert snapshot(study.path) == before


def test_failures_are_shown_with_their_reason_and_cure(study: Study) -> None:
    outcomes: dict[str, Any] = {}

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0000":
            return result_of(job, failed=(1,))
        if job.name == "stack-0001":
            return Failed(job=job, what="no GPU is left", cure="Mend one")
        if not outcomes.setdefault(job.name, 0):
            outcomes[job.name] = 1
            return Requeued(job=job, outcome="hung", why="it said nothing for 60 s")
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=2))
    before = snapshot(study.path)
    text = shown(study)
    assert "6 proxies: 3 done, 0 pending, 3 failed" in text
    assert "proxy 1: its gradient was not finite" in text
    assert "--retry-failed" in text
    assert "stack-0001 (proxies 3, 4) could not be trained: no GPU is left. Mend one." in text
    assert "hung once (it said nothing for 60 s), last worker-0 on here" in text
    table = json.loads(shown(study, "--json"))
    assert table["proxies"]["failed"] == 3
    assert table["untrained"] == [["stack-0001", [3, 4], "no GPU is left. Mend one."]]
    assert [index for index, _ in table["failures"]] == [1]
    assert table["num_attempts"] == 4
    assert snapshot(study.path) == before


def test_a_sweep_that_runs_is_shown_and_watched_to_its_end(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tick", lambda pace: pace.now() if pace.is_wanted else None)
    seen: list[str] = []

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0001":
            seen.extend((shown(study), shown(study, "--json")))
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=3))
    text, table = seen[0], json.loads(seen[1])
    assert "6 proxies: 3 done, 0 pending, 0 failed, 3 running" in text
    assert "stack-0001 (proxies 4, 5, 6): step 3 of 12, 2.500 nats, 100 tokens/s" in text
    assert "worker-0 on here" in text
    assert "--cancel" in text
    assert table["is_running"] is True
    assert table["progress"]["running"][0]["machine"] == "here"
    assert json.loads(shown(study, "--json"))["is_running"] is False


def test_watching_ends_with_the_sweep(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "tick", lambda pace: pace.now() if pace.is_wanted else None)
    states = []

    def becomes(job: StackJob) -> Any:
        states.append(read_state(study))
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=3))
    waits: list[float] = []
    monkeypatch.setattr(status_command.time, "sleep", waits.append)
    ended = read_state(study)
    answers = iter([*states, ended, ended])
    monkeypatch.setattr("regmix.swarm.state.read_state", lambda _: next(answers))
    lines = shown(study, "--watch").splitlines()
    assert len(waits) == 2
    assert "3 running" in lines[0]
    assert "tokens/s" in lines[0]
    assert lines[2].startswith("6 proxies: 6 done")


def test_watching_a_machine_that_says_nothing_more_ends(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pace, "tick", lambda pace: pace.now() if pace.is_wanted else None)
    states = []

    def becomes(job: StackJob) -> Any:
        states.append(dataclasses.replace(read_state(study), is_running=None, renewals=7))
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=6))
    waits: list[float] = []
    monkeypatch.setattr(status_command.time, "sleep", waits.append)
    monkeypatch.setattr("regmix.swarm.state.read_state", lambda _: states[0])
    shown(study, "--watch")
    assert 2 * LEASE_SECONDS < sum(waits) < 3 * LEASE_SECONDS


def test_a_killed_sweep_is_not_said_to_run(study: Study, tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    copies = tmp_path / "copy"

    def becomes(job: StackJob) -> Any:
        if job.name == "stack-0001":
            # As a kill leaves it, or a copy of a study that runs.
            shutil.copytree(study.path, copies)
        return None

    run_sweep(study, FakeExecutor(becomes).options(stack_size=3))
    before = snapshot(copies)
    state = read_state(Study.open(copies))
    assert (state.is_running, state.progress) == (False, None)
    assert (state.counts["done"], state.counts["running"], state.counts["retried"]) == (3, 0, 3)
    assert "killed" in str(state.problem)
    assert snapshot(copies) == before


def test_a_missing_ledger_is_said(study: Study) -> None:
    run_sweep(study, FakeExecutor().options())
    study.ledger_path.unlink()
    assert "ledger.sqlite is missing or empty, though losses.csv is there" in shown(study)


def test_a_damaged_ledger_is_refused_with_its_cure(study: Study) -> None:
    run_sweep(study, FakeExecutor().options())
    study.ledger_path.write_bytes(study.ledger_path.read_bytes()[:5000])
    result = CliRunner().invoke(cli, ["status", str(study.path)])
    assert isinstance(result.exception, StudyError)
    assert "cp ledger.backup.sqlite ledger.sqlite" in str(result.exception)


def test_every_proxy_has_a_row_in_csv_and_parquet(study: Study, tmp_path: Path) -> None:
    run_sweep(
        study,
        FakeExecutor(lambda job: result_of(job, failed=(2,))).options(
            stack_size=2, only=frozenset({1, 2, 3, 4})
        ),
    )
    for name in ("proxies.csv", "proxies.parquet"):
        assert "6 proxies" in shown(study, "--out", str(tmp_path / name))
    rows = pyarrow.parquet.read_table(tmp_path / "proxies.parquet").to_pylist()
    assert [row["state"] for row in rows] == [
        "done",
        "failed",
        "done",
        "done",
        "pending",
        "pending",
    ]
    assert rows[0]["metric/animals_val_loss"] == 1.0
    assert (rows[1]["metric/animals_val_loss"], rows[1]["attempts"]) == (None, 1)
    assert "not finite" in rows[1]["error"]
    assert (rows[2]["machine"], rows[2]["stack_seconds"], rows[2]["stack_tokens"]) == (
        "here",
        2.0,
        200,
    )
    assert json.loads(rows[2]["environment"]) == ENVIRONMENT
    assert rows[5]["worker"] is None
    for row in rows:
        assert sum(
            row[f"train_{domain}"] for domain in study.config.train_domains
        ) == pytest.approx(1)
    lines = (tmp_path / "proxies.csv").read_text().splitlines()
    assert lines[0].split(",") == list(rows[0])
    assert len(lines) == 7


def test_a_file_of_another_kind_is_refused(study: Study, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", str(study.path), "--out", str(tmp_path / "x.xlsx")])
    assert isinstance(result.exception, StudyError)
    assert not (tmp_path / "x.xlsx").exists()


def test_watch_and_json_contradict_each_other(study: Study) -> None:
    result = CliRunner().invoke(cli, ["status", str(study.path), "--watch", "--json"])
    assert isinstance(result.exception, ConfigError)


def test_a_status_needs_no_torch() -> None:
    code = "import sys; import regmix.swarm.state; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
