"""The final models in the report: measured in pairs, and no loss called a gain."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from report_cases import (
    Page,
    make_study,
)

from regmix.files import write_json
from regmix.report.facts import read_facts
from regmix.report.page import render_report
from regmix.report.verdict import headline
from regmix.study import Study


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("complete") / "study")


@pytest.fixture(scope="module")
def page(complete: Study) -> Page:
    return Page(render_report(complete))


def test_the_verdict_says_gains_with_units_over_natural_and_uniform(page: Page) -> None:
    assert re.search(
        r"loss is 0\.0500 nats per token lower than on the natural mixture and "
        r"0\.0300 nats lower than on the uniform mixture\.",
        page.text,
    )
    assert "better in 3 of 3 pairs against natural and 3 of 3 pairs against uniform" in page.text


def test_a_gain_is_measured_between_models_with_the_same_seeds(complete: Study) -> None:
    gains = {gain.baseline: gain for gain in read_facts(complete).gains}
    # Seeds move the losses by 0.01, which pairs cancel.
    assert gains["natural"].pairs_nats == pytest.approx((0.05, 0.04, 0.06), abs=1e-12)
    assert gains["natural"].error_nats == pytest.approx(0.01 / 3**0.5)


@pytest.mark.parametrize(
    ("gains", "kind", "word"),
    [
        ((0.05, 0.04, 0.06), "good", "lower"),
        ((0.05, -0.04, 0.06), "mixed", "lower"),
        ((-0.05, -0.04, -0.06), "bad", "higher"),
    ],
)
def test_the_verdict_does_not_call_a_loss_a_gain(
    tmp_path: Path, gains: tuple[float, float, float], kind: str, word: str
) -> None:
    study = make_study(tmp_path / "study", ("models",), gains=gains)
    found = headline(read_facts(study))
    assert found["kind"] == kind
    assert f"{word} than on the natural mixture" in found["text"]


def test_models_trained_otherwise_are_not_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("models",))
    path = study.models_path / "uniform-0" / "summary.json"
    summary = json.loads(path.read_text())
    write_json(path, {**summary, "training": {"num_steps": 600}})
    compared = {result.mixture: result.models for result in read_facts(study).compared}
    assert [model.name for model in compared["uniform"]] == ["uniform-1", "uniform-2"]


def test_targets_are_compared_between_models_with_the_same_seeds(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("models",))
    shutil.rmtree(study.models_path / "natural-0")
    variants = Page(render_report(study)).charts["targets"]["variants"]
    means, dots = variants["difference from natural"]["data"][:2]
    assert means["x"] == pytest.approx([-0.05] * 3)
    assert dots["x"] == pytest.approx([-0.04, -0.06] * 3)


def test_the_final_models_curves_are_means_over_the_replicates(page: Page) -> None:
    (natural,) = [
        line
        for line in page.charts["training"]["variants"][""]["data"]
        if line["name"] == "natural"
    ]
    assert natural["x"] == list(range(1, 61))
    # Replicate r of a mixture is written at 5 + r nats, less 0.01 a step.
    assert natural["y"] == pytest.approx([6 - 0.01 * step for step in range(1, 61)])


def test_a_mixture_without_metrics_has_no_curve(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("models",))
    (study.models_path / "uniform-1" / "metrics.jsonl").unlink()
    assert list(read_facts(study).model_curves) == ["optimum", "natural"]
