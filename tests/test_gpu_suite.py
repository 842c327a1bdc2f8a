"""The GPU suite, tried without a GPU: all of it runs at tiny sizes; a failure costs itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
from regmix_bench import gpu_suite
from regmix_bench.gpu import agreement, checks, parts
from regmix_bench.gpu.check_cases import Case
from regmix_bench.gpu.run import Run
from regmix_bench.gpu.stacks import REFERENCE
from regmix_bench.harness import Record

from regmix.model.presets import PRESETS

# What is not installed where the suite runs.
ABSENT = (
    *("pyarrow", "numba", "lightgbm", "click", "rich", "scipy", "tokenizers", "yaml", "orjson"),
    *("fastokens", "xxhash", "zstandard", "plotly", "jinja2", "threadpoolctl", "tomli_w"),
    *("transformers", "pandas", "matplotlib"),
)
# A child that was asked for all sections at the smallest sizes, with the packages out of reach.
PROGRAM = f"""
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
for name in {ABSENT!r}:
    sys.modules[name] = None
from regmix_bench import gpu_suite
request = {{"device": "cpu", "tiny": True, "seconds": 500, "skipped": []}}
code = gpu_suite.child({{**request, "sections": list(gpu_suite.NAMES)}})
print(json.dumps({{"kind": "end", "value": code}}))
"""


@pytest.fixture(scope="module")
def messages() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def records_of(messages: list[dict[str, Any]]) -> list[Record]:
    lines = [message["value"] for message in messages if message["kind"] == "record"]
    return [Record(**json.loads(line)) for line in lines]


def test_every_section_runs_where_little_is_installed(messages: list[dict[str, Any]]) -> None:
    assert messages[-1] == {"kind": "end", "value": 0}
    done = [message["value"] for message in messages if message["kind"] == "done"]
    assert done == list(gpu_suite.NAMES)
    assert gpu_suite.failures(records_of(messages)) == []


def test_every_kernel_is_checked_against_float64_and_stacked(
    messages: list[dict[str, Any]],
) -> None:
    records = records_of(messages)
    checked = {r.case.split(", tiny")[0] for r in records if "against float64" in r.metric}
    stacked = {r.case.split(", tiny")[0] for r in records if "equals single proxies" in r.metric}
    assert checked == stacked
    assert checked >= {"linear_cross_entropy.fused", "linear_cross_entropy.chunked", "attention"}
    assert checked >= {"adamw", "rmsnorm", "swiglu", "embedding, segment_sum", "products"}


def test_a_bake_off_tells_ours_against_each_peer(messages: list[dict[str, Any]]) -> None:
    ours = [r for r in records_of(messages) if r.case.endswith("; C, streamed") and r.peer]
    assert {r.peer for r in ours} == {"A, chunked", "eager cross_entropy"}
    assert all(r.ratio_to_peer is not None and r.unit == "ns/token" for r in ours)


def test_nothing_that_was_tried_is_tried_again(messages: list[dict[str, Any]]) -> None:
    cases = [message["value"] for message in messages if message["kind"] == "case"]
    assert len(cases) == len(set(cases))


def test_the_parts_are_the_budget_of_a_step() -> None:
    flops = parts.part_flops(REFERENCE)
    assert sum(flops.values()) == pytest.approx(REFERENCE.flops_per_token())
    assert flops[parts.HEAD] == pytest.approx(77.46e6, rel=1e-3)
    assert flops[parts.QKVO] == pytest.approx(3.15e6, rel=1e-2)
    assert PRESETS["1m"] == REFERENCE


CHILD = """
import json, sys, time
request = json.loads(sys.argv[2])
def send(kind, value):
    print(json.dumps({"kind": kind, "value": value}), flush=True)
def record(case):
    values = dict(suite="gpu", case=case, metric="m", value=1.0, unit="ms", machine="gpu box")
    send("record", json.dumps(values))
for name in request["sections"]:
    send("section", {"name": name, "seconds": 0.2})
    for case in (f"{name} first", f"{name} bad", f"{name} last"):
        if case in request["skipped"]:
            continue
        send("case", case)
        if case == "head bad":
            HOW
        record(case)
    send("done", name)
"""
KEPT = ["head first", "head last", "step first", "step bad", "step last"]


def run_suite(tmp_path: Path, how: str, seconds: float = 30.0) -> list[Record]:
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("HOW", how), encoding="utf-8")
    suite = gpu_suite.Suite(
        device="cpu",
        tiny=True,
        deadline=time.monotonic() + seconds,
        sections=["head", "step"],
        path=tmp_path / "records.jsonl",
        grace_seconds=1.0,
        command=(sys.executable, str(script)),
    )
    return suite.run()


@pytest.mark.parametrize(
    ("how", "reason"),
    [("sys.exit(3)", "code 3"), ("time.sleep(60)", "too long")],
    ids=["a lost device", "a hang"],
)
def test_a_case_that_ends_its_process_costs_only_itself(
    tmp_path: Path, how: str, reason: str
) -> None:
    records = run_suite(tmp_path, how)
    assert [r.case for r in records if r.unit == "ms"] == KEPT
    failed = [r for r in records if r.unit == "failures"]
    assert [(r.case, r.machine) for r in failed] == [("head bad", "gpu box")]
    assert reason in failed[0].metric
    written = (tmp_path / "records.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["case"] for line in written] == [r.case for r in records]


def test_a_process_that_never_starts_ends_the_suite(tmp_path: Path) -> None:
    records = run_suite(tmp_path, "pass")
    assert [r.unit for r in records] == ["ms"] * 6
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "child.py").write_text("raise SystemExit(1)", encoding="utf-8")
    suite = gpu_suite.Suite(
        device="cpu",
        tiny=True,
        deadline=time.monotonic() + 30,
        sections=["head", "step"],
        command=(sys.executable, str(broken / "child.py")),
    )
    assert [r.unit for r in suite.run()] == ["failures"] * 2


def test_what_had_no_time_is_a_failure(tmp_path: Path) -> None:
    records = run_suite(tmp_path, "pass", seconds=-1.0)
    assert [r.case for r in records] == ["section head", "section step"]
    assert all("no time left" in r.metric for r in records)


def test_failures_are_errors_beyond_a_bound_and_unequal_bits() -> None:
    def record(metric: str, value: float, unit: str, **more: Any) -> Record:
        return Record(suite="gpu", case="c", metric=metric, value=value, unit=unit, **more)

    good = [
        record("stack of 8 equals single proxies", 1.0, "equal"),
        record("error", 1e-3, "relative error", ceiling="bound 0.01", ratio_to_ceiling=0.1),
        record("step", 900.0, "ns/token", ceiling="bf16 GEMM measured here", ratio_to_ceiling=1.2),
        record("error", 1.0, "relative error", ceiling="acceptance 0.01", ratio_to_ceiling=100.0),
    ]
    bad = [
        record("stack of 8 equals single proxies", 0.0, "equal"),
        record("error", 0.1, "relative error", ceiling="bound 0.01", ratio_to_ceiling=10.0),
        record("error", 1e30, "nats", ceiling="bound 0.01", ratio_to_ceiling=float("nan")),
        record("failed: it fell", 1.0, "failures"),
    ]
    assert gpu_suite.failures(good) == []
    assert len(gpu_suite.failures([*good, *bad])) == len(bad)


def checked(ours: Any) -> list[str]:
    """Return what the check of y = 2 x says of a way to compute it."""
    case = Case(
        inputs=lambda sizes, seed, dtype: {"x": torch.full((4,), 1.0 + seed)},
        ours=lambda given, sizes: {"y": ours(given["x"])},
        wanted=lambda given, sizes: {"y": 2.0 * given["x"].double()},
    )
    found: list[Record] = []
    run = Run(torch.device("cpu"), 60.0, found.append, lambda words: None, tiny=True)
    sizes = checks.TINY_SIZES[0]
    checks._check(run, "doubling", case, sizes, torch.float32)()
    assert len(found) == 2
    return gpu_suite.failures(found)


def half_written(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    y[:, :2] = 2 * x[:, :2]
    return y


def test_a_check_sees_wrong_unwritten_and_stack_dependent_results() -> None:
    assert checked(lambda x: 2 * x) == []
    assert "error of y" in checked(lambda x: 2.001 * x)[0]
    assert "error of y" in checked(half_written)[0]
    # Off by a rounding that depends on how many there are: no error, but not the same bits.
    assert "NOT stack" in checked(lambda x: 2 * x * (1 + 2e-7 * (len(x) > 1)))[0]


def test_the_shares_leave_time_to_every_usual_section() -> None:
    left, given = 500.0, []
    names = [section.name for section in gpu_suite.SECTIONS if not section.on_request]
    for place in range(len(names)):
        given.append(gpu_suite.seconds_for(names[place:], left))
        left -= given[-1]
    assert left == pytest.approx(0, abs=1e-6)
    assert min(given) > 10


def test_the_command_writes_its_records_and_says_how_it_went(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--section", "ceilings", "--json", "r.jsonl"]
    command = [sys.executable, "-m", "regmix_bench.gpu_suite", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "r.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["metric"] for line in lines} == {"fp32 GEMM", "copy, read and written"}
    assert "2 records" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "regmix_bench.gpu_suite", "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("torch sees no GPU") == 1


def test_a_cpu_is_for_trials_only() -> None:
    command = [sys.executable, "-m", "regmix_bench.gpu_suite", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--tiny" in done.stderr


def test_agreement_sees_a_biased_head_and_lost_ranks() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(3.0, 0.2, (32, 4))
    seed = base + draw.normal(0.0, 0.01, base.shape)
    same = base + draw.normal(0.0, 0.001, base.shape)
    assert all(value <= bound for _, value, bound in agreement.figures(base, same, seed))
    biased = agreement.figures(base, same + 0.02, seed)
    assert [value > bound for _, value, bound in biased] == [True, True, False]
    shuffled = agreement.figures(base, base[::-1], seed)
    assert shuffled[2][1] > shuffled[2][2]
