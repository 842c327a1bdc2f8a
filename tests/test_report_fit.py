"""The surrogate in the report: predictions with intervals, learning curve, influence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_cases import (
    NUM_PROXIES,
    OLDER,
    PARTS,
    TARGETS,
    Page,
    change,
    make_study,
)

from regmix.files import write_json
from regmix.report.charts import make_charts
from regmix.report.facts import read_facts
from regmix.report.page import render_report
from regmix.report.predictions import read_predictions
from regmix.report.tables import target_rows
from regmix.study import Study


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("complete") / "study")


@pytest.fixture(scope="module")
def page(complete: Study) -> Page:
    return Page(render_report(complete))


SURE = ("mixtures", "losses", "fit", "optimum", "sure")


def test_the_objective_of_predictions_is_the_mean_of_its_targets(complete: Study) -> None:
    predictions = read_facts(complete).predictions
    assert predictions is not None
    mean = sum(predictions.true[target] for target in TARGETS) / 3
    assert predictions.true["objective"] == pytest.approx(mean)


def test_predictions_have_a_variant_for_each_target_with_its_scores(page: Page) -> None:
    variants = page.charts["prediction"]["variants"]
    assert list(variants) == ["objective", *TARGETS]
    note = variants["maths"]["layout"]["annotations"][0]["text"]
    assert note == "Spearman 0.972, RMSE 0.0123 nats, 92% inside their 90% interval"
    assert len(variants["maths"]["data"][1]["x"]) == NUM_PROXIES


def test_runs_that_the_fit_left_out_are_named(page: Page) -> None:
    assert "Left out: proxy 99 (its losses are not finite)." in page.text


def test_a_prediction_carries_its_90_percent_interval_and_its_mixture(page: Page) -> None:
    line, points = page.charts["prediction"]["variants"]["maths"]["data"]
    # Of the second target the standard deviation is written as 0.02 nats.
    assert points["error_x"]["array"] == pytest.approx([1.645 * 0.02] * NUM_PROXIES)
    assert line["x"] == line["y"]
    assert re.fullmatch(r"proxy 1: \w+ \d+%, \w+ \d+%.*", points["text"][0])


def test_errors_that_go_together_make_the_objective_less_sure(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    rows = {"same": (1.0, 1.0), "opposed": (1.0, -1.0)}
    found = {}
    for name, (first, second) in rows.items():
        lines = ["index,true/a,true/b,predicted/a,predicted/b,sd/a,sd/b"]
        for run in range(4):
            error = (-1) ** run * 0.1
            lines.append(f"{run},3,3,{3 + first * error},{3 + second * error},0.2,0.2")
        path.write_text("\n".join(lines) + "\n")
        found[name] = read_predictions(path, {"a": 0.5, "b": 0.5}).sd["objective"]
    assert found["same"] == pytest.approx([0.2] * 4)
    assert found["opposed"] == pytest.approx([0.0] * 4, abs=1e-7)


def test_an_objective_of_one_target_has_that_targets_coverage(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SURE)
    config = study.path / "study.toml"
    # The other targets leave the objective.
    lines = config.read_text().splitlines()
    config.write_text("\n".join(x for x in lines if not x.endswith("= 0.3333333333333333")) + "\n")
    config.write_text(config.read_text().replace("[objective]", "[objective]\nmaths = 1.0"))
    facts = read_facts(Study.open(study.path))
    assert target_rows(facts)[0]["coverage"] == "92 %"


def test_the_learning_curve_has_a_band_and_goes_on_to_twice_the_proxies(page: Page) -> None:
    variants = page.charts["learning"]["variants"]
    assert list(variants) == ["error [nats]", "Spearman"]
    band, line, dashed = variants["error [nats]"]["data"]
    assert band["x"] == [6, 12, 12, 6]
    assert band["y"] == pytest.approx([0.05, 0.025, 0.015, 0.03])
    assert line["x"] == [6, 12, NUM_PROXIES]
    assert dashed["x"] == [NUM_PROXIES, 2 * NUM_PROXIES]
    assert dashed["y"] == pytest.approx([0.0101, 0.00505])
    axes = variants["error [nats]"]["layout"]
    assert (axes["xaxis"]["type"], axes["yaxis"]["type"]) == ("log", "log")
    assert "Twice as many would help." in page.text


def test_an_error_that_does_not_fall_is_not_extrapolated(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SURE)
    path = study.surrogate_path / "fit.json"
    curve = json.loads(path.read_text())["learning_curve"]
    change(path, learning_curve={**curve, "exponent": -0.1})
    data = make_charts(read_facts(study))["learning"].variants["error [nats]"]["data"]
    assert "extrapolated" not in [trace["name"] for trace in data]


def test_influence_marks_the_changes_whose_sign_is_open(page: Page) -> None:
    (cells,) = page.charts["influence"]["variants"][""]["data"]
    # Rows are domains, the heaviest first; the first target's change by the second is open.
    place = cells["y"].index("legal"), cells["x"].index("code")
    assert cells["text"][place[0]][place[1]] == "(+0.004)"
    assert [text for row in cells["text"] for text in row].count("−0.020") == 11
    assert cells["customdata"][place[0]][place[1]] == (
        "+0.0040 nats (90% interval −0.0020 to +0.0100)"
    )
    assert cells["zmin"] == -cells["zmax"]


def test_frozen_domains_have_one_row_of_influence(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", SURE)
    changes = {"(kept)": [0.01, 0.0, 0.02], "web": [-0.02, -0.03, -0.01]}
    told = {"raised_by": 0.05, "at": {"web": 0.5}, "change_nats": dict.fromkeys(TARGETS, changes)}
    change(study.surrogate_path / "fit.json", influence=told)
    facts = read_facts(study)
    (cells,) = make_charts(facts)["influence"].variants[""]["data"]
    assert cells["y"] == ["web", "(kept)"]
    assert cells["text"][0] == ["−0.020"] * 3
    assert facts.influence_from == "the mean of the runs"


@pytest.mark.parametrize(
    ("parts", "words"), [(PARTS, "0.500 (90% interval 0.400 to 0.700)"), (OLDER, "0.500")]
)
def test_exchange_rates_are_read_with_and_without_intervals(
    tmp_path: Path, parts: tuple[str, ...], words: str
) -> None:
    study = make_study(tmp_path / "study", parts)
    (cells,) = make_charts(read_facts(study))["rates"].variants[""]["data"]
    assert cells["z"] == [[0.5] * 3] * 4
    assert cells["customdata"] == [[words] * 3] * 4


def test_an_older_fit_has_no_bars_and_no_coverage(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", OLDER)
    facts = read_facts(study)
    _, points = make_charts(facts)["prediction"].variants["maths"]["data"]
    assert "error_x" not in points
    assert {row["coverage"] for row in target_rows(facts)} == {"–"}


def test_a_fit_of_scores_alone_still_renders(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("mixtures", "losses", "fit"))
    score = {"spearman": None, "rmse_nats": 0.0123}
    write_json(study.surrogate_path / "fit.json", {"targets": dict.fromkeys(TARGETS, score)})
    page = Page(render_report(study))
    assert set(page.charts) == {"prediction", "swarm"}
    assert page.charts["prediction"]["variants"]["maths"]["layout"]["annotations"][0]["text"] == (
        "RMSE 0.0123 nats"
    )
