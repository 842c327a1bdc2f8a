"""The demo, in a small size, from nothing to its report; stopped and run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from regmix.cli import cli
from regmix.demo import DemoResult, DemoSize, commands, run_demo
from regmix.large.comparison import Gain

SMALL = ["--mixtures", "24", "--proxy-tokens", "20k", "--final-tokens", "40k", "--seeds", "2"]


def test_the_demo_ends_with_a_comparison_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = CliRunner().invoke(cli, ["demo", "--out", str(out), *SMALL], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "ahead of" in result.output or "behind" in result.output
    for name in ("optimum", "natural", "uniform"):
        assert (out / "study" / "models" / f"{name}-1" / "evaluation.json").exists()
    report = (out / "study" / "report.html").read_text(encoding="utf-8")
    assert "uniform" in report


def test_a_stopped_demo_goes_on_where_it_was(tmp_path: Path) -> None:
    size = DemoSize(max_bytes_per_domain=800_000, vocab_size=512)
    done: list[str] = []

    class StopError(Exception):
        pass

    def run(words: Sequence[str]) -> None:
        done.append(words[0])
        if words[0] == "proxies":
            raise StopError
        cli.main(args=list(words), standalone_mode=False)

    for _ in range(2):
        with pytest.raises(StopError):
            run_demo(tmp_path / "demo", size, run=run, say=lambda _: None)
    # The corpus is collected once, the mixtures are drawn once.
    assert done == ["pack", "mixtures", "proxies", "pack", "proxies"]


def test_a_loss_is_told_as_plainly_as_a_win() -> None:
    gains = [
        Gain(baseline="natural", mean_nats=0.2, error_nats=0.01),
        Gain(baseline="uniform", mean_nats=-0.1, error_nats=None),
    ]
    verdict = DemoResult(study=Path("s"), results=[], gains=gains).verdict
    assert "does not win" in verdict
    assert "ahead of natural by 0.2000 ± 0.0100" in verdict
    assert "behind uniform by 0.1000" in verdict
    assert DemoResult(study=Path("s"), results=[], gains=gains[:1]).verdict.startswith(
        "The optimum wins"
    )


def test_the_optimum_may_repeat_no_domain_more_than_four_times() -> None:
    steps = commands(Path("d"), Path("c"), ["docs"], DemoSize())
    optimize = next(step for step in steps if step[0] == "optimize")
    assert optimize[optimize.index("--max-epochs") + 1] == "4"
    train = next(step for step in steps if step[0] == "train")
    assert optimize[optimize.index("--tokens") + 1] == train[train.index("--tokens") + 1]
