"""`regmix-fast bench`: records in, tables and comparisons out, and an exit code that means done."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from click.testing import CliRunner, Result
from regmix_bench import (
    ceilings,
    compare,
    harness,
    throughput,
    timing,
)
from regmix_bench.harness import Record
from regmix_bench.peaks import Sweep, mfu
from regmix_bench.stack import Case
from regmix_bench.suites import decision, kernels, proxies, registry, train

from regmix.cli.bench import command
from regmix.errors import ConfigError, RegmixError, StorageError
from regmix.model.peaks import peak_of
from regmix.model.presets import PRESETS


def record(
    metric: str = "speed", value: float = 2.0, unit: str = "tokens/s", **more: Any
) -> Record:
    values = {"suite": "train", "case": "cpu-128", **more}
    return Record(metric=metric, value=value, unit=unit, **values)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the suites' sizes those of a test, and the peers absent."""
    case = Case(preset="cpu-32", vocab_size=64, sequences=2, seq_len=16)
    monkeypatch.setattr(train, "CPU_CASE", case)
    monkeypatch.setattr(proxies, "CASE", case)
    for name, value in {"VOCAB": 64, "SEQUENCES": 2, "SEQ_LEN": 16, "TOKENS": 32}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(decision, "NUM_RUNS", 24)
    monkeypatch.setattr(decision, "NUM_GUESSES", 1000)
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 20)
    for module in (train, proxies):
        monkeypatch.setattr(module, "missing", lambda name: f"{name} is not installed")
        monkeypatch.setattr(module, "available_cores", lambda: 1)
    monkeypatch.setattr(proxies.Runner, "measure", lambda self, seconds: 100.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*words: str) -> Result:
    return CliRunner().invoke(command, list(words), catch_exceptions=True)


def test_the_list_names_every_suite_and_measures_nothing() -> None:
    result = bench("--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == list(registry.SUITES)
    assert set(registry.SUITES) == {"kernels", "proxies", "train", "sampler", "decision", "pack"}


def test_an_unknown_suite_is_an_error_that_names_the_nearest() -> None:
    result = bench("kernel")
    assert isinstance(result.exception, ConfigError)
    assert "'kernels'" in str(result.exception)


def test_cheap_suites_run_and_their_records_come_back(small: None, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    result = bench("kernels", "train", "decision", "--quick", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "Triton kernels (they need a GPU)" in result.output
    assert "transformers is not installed" in result.output
    records = compare.read_records(path)
    assert {r.suite for r in records} == {"kernels", "train", "decision"}
    assert all(math.isfinite(r.value) for r in records)
    units = {r.metric: r.unit for r in records}
    assert units["training speed"] == "tokens/s"
    assert units["forward and backward"] == "ns/token"
    for r in records:
        assert compare.amount(r.value) in result.output
        assert json.loads(r.line())["machine"]
    to_ceiling = [r for r in records if r.ceiling == "copy measured here"]
    assert to_ceiling
    assert all(r.ratio_to_ceiling for r in to_ceiling)


def test_a_second_run_is_shown_beside_the_first(small: None, tmp_path: Path) -> None:
    path = str(tmp_path / "r.jsonl")
    assert bench("train", "--quick", "--json", path).exit_code == 0
    result = bench("train", "--quick", "--compare", path)
    assert result.exit_code == 0
    below = result.output.split("new / old")[1]
    assert "training speed" in below
    assert "better" in below or "worse" in below or "same" in below
    assert "machines differ" not in below


def test_proxies_tell_what_a_sweep_takes_and_costs(small: None) -> None:
    words = ("proxies", "--quick", "--proxies", "10", "--tokens", "32k", "--price-per-hour", "3")
    result = bench(*words)
    assert result.exit_code == 0, result.output
    # 100 proxy-steps/s of 32 tokens: 3,200 tokens/s, so a proxy takes 10 s.
    lines = [line.split() for line in result.output.splitlines()]
    values = {" ".join(line[:-2]): line[-2:] for line in lines if len(line) > 2}
    assert values["predicted sweep of 10 proxies of 32k tokens"] == ["0.02778", "h"]
    cost = values["predicted sweep of 10 proxies of 32k tokens, at 3 an hour"]
    assert cost == ["0.08333", "currency"]
    assert values["proxies of 32k tokens"] == ["360", "proxies/h"]


def test_a_profile_is_a_trace_with_the_parts_of_a_step(small: None, tmp_path: Path) -> None:
    result = bench("train", "--quick", "--profile", str(tmp_path / "traces"))
    assert result.exit_code == 0, result.output
    trace = json.loads((tmp_path / "traces" / "train.json").read_text("utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step", "head", "layer_forward", "attention_backward", "update"} <= names
    assert "part, by time" in result.output
    assert "aten::" in result.output.split("operation, by time")[1]


def test_a_file_that_cannot_be_written_fails_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(name: str, settings: registry.Settings) -> list[Record]:
        raise AssertionError("it measured")

    monkeypatch.setattr(registry, "run_suite", measure)
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = bench("train", "--json", str(tmp_path / "file" / "r.jsonl"))
    assert isinstance(result.exception, StorageError)
    result = bench("train", "--compare", str(tmp_path / "none.jsonl"))
    assert isinstance(result.exception, StorageError)


def test_a_failed_measurement_is_no_success_and_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = record("failed: RuntimeError: it fell", 1.0, "failures")
    monkeypatch.setattr(registry, "run_suite", lambda name, settings: [record(), failed])
    path = tmp_path / "r.jsonl"
    result = bench("train", "--json", str(path))
    assert isinstance(result.exception, RegmixError)
    assert "it fell" in str(result.exception)
    assert len(compare.read_records(path)) == 2


def test_without_a_suite_all_are_toured_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    toured = []

    def measure(name: str, settings: registry.Settings) -> list[Record]:
        toured.append((name, settings.quick))
        return [record(suite=name)]

    monkeypatch.setattr(registry, "run_suite", measure)
    assert bench().exit_code == 0
    assert toured == [(name, True) for name in registry.SUITES]
    toured.clear()
    assert bench("pack", "pack").exit_code == 0
    assert toured == [("pack", False)]


def test_records_survive_the_file(tmp_path: Path) -> None:
    written = [
        record(peer="eager", ratio_to_peer=2.0),
        record("MFU", 40.0, "% of peak", ceiling="GEMM", ratio_to_ceiling=0.4, machine="mine"),
    ]
    harness.append(tmp_path / "r.jsonl", written)
    assert compare.read_records(tmp_path / "r.jsonl") == written


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"suite": "train"}',
        '{"suite": "a", "case": "b", "metric": "c", "unit": "s"}',
        '{"suite": "a", "case": "b", "metric": "c", "unit": "s", "value": "x"}',
        '{"suite": "a", "case": "b", "metric": "c", "unit": "s", "value": NaN}',
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{record().line()}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        compare.read_records(path)


@pytest.mark.parametrize(
    ("unit", "old", "new", "said"),
    [
        ("tokens/s", 100.0, 120.0, "better"),
        ("tokens/s", 120.0, 100.0, "worse"),
        ("proxies/h", 1.0, 2.0, "better"),
        ("ns/token", 100.0, 120.0, "worse"),
        ("ns/token", 120.0, 100.0, "better"),
        ("h", 2.0, 1.0, "better"),
        ("currency", 1.0, 2.0, "worse"),
        ("% of peak", 40.0, 50.0, "better"),
        ("relative error", 1e-3, 1e-2, "worse"),
        ("GB", 2.0, 1.0, "better"),
        ("GB/s", 2.0, 1.0, "worse"),
        ("ms", 1.0, 1.001, "same"),
        ("1", 1.0, 2.0, ""),
    ],
)
def test_the_unit_says_which_way_is_better(unit: str, old: float, new: float, said: str) -> None:
    assert compare.verdict(old, new, unit) == said


def test_a_comparison_matches_by_suite_case_and_metric() -> None:
    old = [
        record(value=1.0),
        record(value=4.0),  # a later run of the same file counts
        record(case="gone", value=1.0),
        record(suite="pack", value=1.0),
    ]
    new = [record(value=2.0), record(case="added", value=1.0)]
    text = compare.comparison(old, new)
    row = next(line for line in text.splitlines() if "cpu-128" in line)
    assert row.split()[-2:] == ["0.500", "worse"]
    assert "1 new, 1 old" in text
    assert "added" not in text


def test_a_comparison_says_when_the_machines_differ() -> None:
    old = [record(machine="an H200")]
    assert "machines differ" in compare.comparison(old, [record(machine="an A100")])
    assert "machines differ" not in compare.comparison(old, [record(machine="an H200")])


def test_a_table_shows_ceiling_and_every_peer_of_a_measurement_once() -> None:
    speed = record(value=123456.0, ceiling="GEMM measured here", ratio_to_ceiling=0.42)
    text = compare.wide_table([speed, record(value=123456.0, peer="eager", ratio_to_peer=3.0)])
    assert text.count("123,456") == 1
    assert text.count("cpu-128") == 1
    assert "0.42x" in text
    assert "3.00x" in text


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_a_datasheet_is_found_by_the_drivers_name(name: str, flops: float) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert peak.bf16_flops == flops


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""],
)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_mfu_of_the_published_proxy_is_the_published_one() -> None:
    # 20 minutes for 1.05B tokens on an A100: 874k tokens/s, 25.7%.
    rate = 1000 * 512 * 2048 / (20 * 60)
    assert mfu(rate, PRESETS["1m"].flops_per_token(), 312e12) == pytest.approx(0.257, abs=1e-3)


def test_a_sweep_takes_its_tokens_over_the_speed() -> None:
    sweep = Sweep(num_proxies=64, proxy_tokens=250_000_000, num_devices=8, price_per_hour=2.0)
    assert sweep.proxies_per_hour(1e6) == pytest.approx(14.4)
    assert sweep.hours(1e6) == pytest.approx(64 / 14.4 / 8)
    assert sweep.cost(1e6) == pytest.approx(64 / 14.4 * 2)
    assert Sweep(num_proxies=1, proxy_tokens=1).cost(1.0) is None


def test_an_unknown_device_is_held_to_the_rate_measured_alone() -> None:
    limits = ceilings.Ceilings(
        device=torch.device("cpu"), copy_bytes=1e9, gemm_flops={torch.float32: 1e12}
    )
    shape = PRESETS["cpu-64"]
    records = throughput.speed_records("s", "c", 1000.0, shape, limits)
    assert {r.metric for r in records} == {
        *("training speed", "time per token", "MFU, of the GEMM rate measured")
    }
    share = next(r.value for r in records if r.unit == "% of peak")
    assert share == pytest.approx(100 * 1000 * shape.flops_per_token() / 1e12)


def test_contenders_take_turns_and_ratios_are_of_the_same_round() -> None:
    visits: list[str] = []
    work = {name: (lambda _, name=name: visits.append(name)) for name in ("a", "b")}
    found = timing.interleaved(work, torch.device("cpu"), rounds=2, seconds=0, warmup=0)
    assert visits == ["a", "b", "a", "b", "b", "a"]  # one each to see how long a call is
    assert [len(times) for times in found.values()] == [2, 2]
    # A neighbour who takes half of the machine in one round slows both.
    assert timing.times_as_fast([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == 3.0


def test_a_rotation_is_larger_than_the_cache() -> None:
    device = torch.device("cpu")
    sets = timing.Rotation(lambda number: number, num_bytes=20e6, device=device)
    assert len(sets) * 20e6 >= timing.ROTATION_BYTES["cpu"]
    assert [sets[call] for call in range(len(sets) + 1)] == [*range(len(sets)), 0]


def test_the_law_of_the_made_up_runs_has_its_best_where_it_is_found() -> None:
    law = decision.Law()
    even = [1 / decision.NUM_DOMAINS] * decision.NUM_DOMAINS
    worst = decision.shortfall(law, even)
    assert worst.value > 0.01
    assert worst.unit == "nats"
