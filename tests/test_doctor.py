"""`regmix-fast doctor`: every check passes what is well, and names what is ill with its cure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from doctor_cases import GIB, GPU, HEALTHY, ILL, KERNELS, NO_CARDS, NO_GPU, SUBJECT_OF, cards

from regmix.cli import cli
from regmix.doctor import gpu, interpreter, kernels, machine, storage
from regmix.doctor.asking import ask_probe, ask_smi, read_answers
from regmix.doctor.disk import Mount, Trial, look_at, mount_of
from regmix.doctor.examination import SUBJECTS, Examination, conclude
from regmix.doctor.findings import Finding, Request, Subject, note, ok, problem


@pytest.mark.parametrize(
    ("subject", "facts"), HEALTHY, ids=lambda value: getattr(value, "name", "")
)
def test_a_healthy_machine_has_nothing_to_mend(subject: Subject, facts: Any) -> None:
    findings = subject.conclude(facts)
    assert findings
    assert [finding for finding in findings if finding.level != "ok"] == []


def test_every_subject_has_a_healthy_case() -> None:
    assert [subject for subject, _ in HEALTHY] == list(SUBJECTS)


@pytest.mark.parametrize(
    ("facts", "check", "level", "word", "cure"),
    ILL,
    ids=[f"{SUBJECT_OF[type(case[0])].name}-{case[1]}-{case[3]}" for case in ILL],
)
def test_what_is_ill_is_named_with_its_cure(
    facts: Any, check: str, level: str, word: str, cure: str
) -> None:
    findings = SUBJECT_OF[type(facts)].conclude(facts)
    fitting = [f for f in findings if f.check == check and word in f.what]
    assert [finding.level for finding in fitting] == [level], findings
    assert cure in fitting[0].cure


def test_every_check_has_an_ill_case() -> None:
    always_well = {("variables", "none")}
    seen = {(SUBJECT_OF[type(case[0])].name, case[1]) for case in ILL}
    every = {
        (subject.name, check.__name__.removeprefix("check_"))
        for subject in SUBJECTS
        for check in subject.checks
    }
    assert every - seen == always_well


def test_a_machine_without_a_gpu_has_no_problem() -> None:
    for subject, facts in (
        (gpu.SUBJECT, NO_GPU),
        (kernels.SUBJECT, replace(KERNELS, num_gpus=0, launches={}, compiler=None, header=None)),
    ):
        assert not [f for f in subject.conclude(facts) if f.level == "problem"]


def test_hidden_gpus_are_no_problem_unless_they_are_wanted() -> None:
    hidden = replace(GPU, visible="-1", devices=(), wanted=None)
    assert not [f for f in gpu.SUBJECT.conclude(hidden) if f.level == "problem"]
    wanted = gpu.SUBJECT.conclude(replace(hidden, wanted=1))
    assert [f.check for f in wanted if f.level == "problem"] == ["wanted"]


def test_paths_are_grouped_by_what_serves_them() -> None:
    said = [f.what for f in kernels.check_paths(KERNELS)]
    assert said == [
        "cpu is served by torch-cpu: loss",
        "cuda:0 is served by triton: loss; sdpa: attention",
    ]


def test_a_check_that_raises_is_a_finding() -> None:
    def check_nothing(facts: Any) -> list[Finding]:
        raise ZeroDivisionError("by zero")

    def gather(request: Request) -> Any:
        raise OSError("gone")

    found = Subject("s", lambda request: 1, (check_nothing,)).conclude(1)
    assert [(f.level, f.subject, f.check) for f in found] == [("note", "s", "nothing")]
    assert "ZeroDivisionError: by zero" in found[0].what
    found, facts = Subject("s", gather, ()).examine(Request(folder=Path()))
    assert facts is None
    assert "OSError: gone" in found[0].what


# The process that asks the libraries.


def test_a_library_that_crashes_is_named_and_costs_no_other_answer() -> None:
    program = (
        "import json, os\n"
        "print(json.dumps({'sections': ['a', 'b', 'c']}))\n"
        "print(json.dumps({'begun': 'a'}))\n"
        "print(json.dumps({'section': 'a', 'answer': {'x': 1}}))\n"
        "print(json.dumps({'begun': 'b'}), flush=True)\n"
        "os.abort()\n"
    )
    answers, failures = ask_probe(program=("-c", program))
    assert answers == {"a": {"x": 1}}
    assert "killed by signal 6" in failures["b"]
    assert "stopped at b" in failures["c"]


def test_a_library_that_hangs_is_given_up() -> None:
    program = (
        'import time\nprint(\'{"sections": ["a"]}\\n{"begun": "a"}\', flush=True)\ntime.sleep(60)\n'
    )
    answers, failures = ask_probe(program=("-c", program), limit_seconds=1.5)
    assert answers == {}
    assert failures == {"a": "no answer within 2 s"}


def test_a_probe_that_cannot_start_is_a_failure() -> None:
    answers, failures = read_answers("", "ended with code 1: no such file")
    assert (answers, failures) == ({}, {"probe": "ended with code 1: no such file"})


def test_an_examination_survives_a_probe_without_answers(tmp_path: Path) -> None:
    request = Request(folder=tmp_path, failures={"probe": "killed by signal 11"}, cards=NO_CARDS)
    examination = conclude(request)
    assert not examination.healthy
    assert [f.what for f in examination.findings if "could not be examined" in f.what] == []
    said = " ".join(f.what for f in examination.findings if f.level == "problem")
    assert "torch cannot be used: killed by signal 11" in said


def test_nvidia_smi_is_never_told_to_set_anything() -> None:
    with pytest.raises(AssertionError):
        ask_smi(["--gpu-reset"])


def test_the_tiny_kernel_doubles_and_compiles() -> None:
    interpret = "from regmix.doctor.probe import kernel; print(kernel('cpu')['errors'])"
    compiled = (
        "from regmix.doctor.probe import tiny_kernel\n"
        "from regmix_kernels.compilation import Case, compile_case\n"
        "case = Case(name='tiny', kernel=tiny_kernel(), signature={'x_pointer': '*fp32', "
        "'y_pointer': '*fp32'}, constants={'SIZE': 1024})\n"
        "print(compile_case(case, 80).num_spills)"
    )
    for program, value, said in ((interpret, "1", "{'cpu': ''}"), (compiled, "0", "0")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "TRITON_INTERPRET": value},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == said, done.stderr


# What is read from the system.


def test_a_mount_is_the_deepest_that_holds_the_path(tmp_path: Path) -> None:
    text = (
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / {tmp_path.resolve()} rw,noexec - nfs4 server:/x rw\n"
        f"41 22 0:51 / {tmp_path.resolve()}x rw - tmpfs tmpfs rw\n"
        f"42 22 0:52 / {tmp_path.resolve().parent} rw - xfs /dev/sdb rw\n"
    )
    found = mount_of(tmp_path / "study", text)
    assert (found.kind, "noexec" in found.options, found.is_network) == ("nfs4", True, True)
    assert mount_of(Path("/"), text).kind == "ext4"


@pytest.mark.parametrize(
    ("kind", "network"),
    [("ext4", False), ("overlay", False), ("lustre", True), ("fuse.sshfs", True), ("cifs", True)],
)
def test_network_file_systems_are_known(kind: str, network: bool) -> None:
    assert Mount(point="/", kind=kind, options=()).is_network is network


def test_a_folder_is_tried_and_nothing_stays(tmp_path: Path) -> None:
    found = look_at(tmp_path / "study", "folder")
    assert (found.exists, found.path, found.speed) == (False, str(tmp_path), None)
    found = look_at(tmp_path, "folder")
    assert found.exists
    assert found.trial == Trial()
    assert found.speed is not None
    assert found.speed.num_bytes > 0
    assert found.speed.source == "a new file"
    assert list(tmp_path.iterdir()) == []


def test_the_largest_file_is_timed_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "small.bin").write_bytes(b"x" * 1000)
    (tmp_path / "large.bin").write_bytes(os.urandom(9 << 20))
    speed = look_at(tmp_path, "shards", writes=False).speed
    assert speed is not None
    assert (speed.source, speed.num_bytes) == ("large.bin", 9 << 20)


def test_a_folder_that_is_only_read_gets_no_file(tmp_path: Path) -> None:
    found = look_at(tmp_path, "shards", writes=False)
    assert (found.trial, found.speed) == (None, None)


def test_control_groups_limit_cores_and_memory(tmp_path: Path) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job" / "cpu.max").write_text("150000 100000\n")
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("2147483648\n")
    assert machine.read_cgroup(tmp_path, "0::/job/step\n") == (1.5, 2 * GIB)
    assert machine.read_cgroup(tmp_path / "none", "") == (None, None)


def test_requirements_are_read_with_their_markers() -> None:
    lines = ["click>=8.1", "click>=999", "absent-package>=1,<2", 'x>=1; extra == "test"']
    found = [(r.name, r.wanted, r.fits) for r in interpreter.needed(lines)]
    assert found == [
        ("click", ">=8.1", True),
        ("click", ">=999", False),
        ("absent-package", ">=1,<2", False),
    ]


def test_tritons_cache_follows_the_environment() -> None:
    assert kernels.cache_folder({"TRITON_CACHE_DIR": "/fast"}) == Path("/fast")
    assert kernels.cache_folder({"TRITON_HOME": "/h"}) == Path("/h/.triton/cache")


def test_an_answer_without_numbers_is_read_as_unknown() -> None:
    found = cards(("81559", "[N/A]"), ("600", "[N/A]"), ("Enabled, 0", "Enabled, [N/A]"), num=1)
    (card,) = found.cards
    assert (card.total_bytes, card.used_bytes, card.uncorrected) == (None, None, None)


def test_a_study_names_its_shards_and_their_tokenizer(
    tmp_path: Path, tiny_shards_path: Path
) -> None:
    study = tmp_path / "study"
    study.mkdir()
    (study / "study.toml").write_text(f'shards = "{os.path.relpath(tiny_shards_path, study)}"\n')
    assert storage.shards_folder(study) == tiny_shards_path.resolve()
    path, separator = storage.tokenizer_words(study)
    assert (Path(path).is_file(), separator) == (True, "<|endoftext|>")
    facts = storage.gather(Request(folder=study))
    assert [(f.role, f.exists) for f in facts.folders] == [("study", True), ("shards", True)]
    assert [f.speed is None for f in facts.folders] == [
        False,
        True,
    ]
    (study / "study.toml").write_text("shards = \n")
    facts = storage.gather(Request(folder=study))
    assert "study.toml" in facts.study_error


# The command.


def test_it_runs_here_and_its_json_says_all(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", str(tmp_path), "--json"])
    table = json.loads(result.stdout)
    assert result.exit_code == (0 if table["healthy"] else 1)
    assert set(table) == {"healthy", "folder", "counts", "findings", "facts"}
    assert table["counts"]["problem"] == sum(f["level"] == "problem" for f in table["findings"])
    assert set(table["facts"]) == {subject.name for subject in SUBJECTS}
    assert None not in table["facts"].values()
    for finding in table["findings"]:
        assert set(finding) == {"level", "what", "cure", "subject", "check"}
        assert bool(finding["cure"]) == (finding["level"] != "ok")
        assert "could not be examined" not in finding["what"]
    assert table["facts"]["package"]["worker_folder"] == table["facts"]["package"]["folder"]
    assert table["facts"]["kernels"]["paths"]["cpu"]


def result_with(monkeypatch: pytest.MonkeyPatch, findings: tuple[Finding, ...], *words: str) -> Any:
    from regmix.doctor import examination

    asked: dict[str, Any] = {}

    def examine(folder: Path, *, gpus: int | None = None) -> Examination:
        asked.update(folder=folder, gpus=gpus)
        return Examination(folder=str(folder), findings=findings, facts={})

    monkeypatch.setattr(examination, "examine", examine)
    result = CliRunner().invoke(cli, ["doctor", *words])
    return result, asked


def test_all_well_ends_with_the_next_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = (ok("fine"), note("odd [not markup]", "look"))
    result, asked = result_with(monkeypatch, found)
    assert (result.exit_code, asked) == (0, {"folder": Path("."), "gpus": None})
    assert "odd [not markup]\n         Cure: look\n1 ok, 1 note, no problems\n" in result.output
    assert result.output.endswith("Next: regmix-fast demo\n")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.toml").write_text("")
    result, asked = result_with(monkeypatch, found, "--gpus", "3")
    assert asked == {"folder": Path("study"), "gpus": 3}
    assert result.output.endswith("Next: regmix-fast proxies\n")


def test_a_problem_fails_and_promises_nothing_next(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = result_with(monkeypatch, (problem("the disk is full", "free some"),))
    assert result.exit_code == 1
    assert "the disk is full" in result.output
    assert "Next:" not in result.output


def test_wanting_a_gpu_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    request = Request(folder=tmp_path, gpus=4, cards=NO_CARDS, answers={"torch": {"version": "2"}})
    assert [f.check for f in conclude(request).findings if f.check == "wanted"] == ["wanted"]
    assert not conclude(request).healthy
