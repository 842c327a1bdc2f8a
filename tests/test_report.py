"""The report: complete, escaped, offline, the same each time, and honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from report_cases import (
    DOMAINS,
    NUM_PROXIES,
    Page,
    make_study,
)

from regmix.cli.report import command
from regmix.errors import StudyError
from regmix.report.page import render_report, script_json
from regmix.study import Study


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("complete") / "study")


@pytest.fixture(scope="module")
def page(complete: Study) -> Page:
    return Page(render_report(complete))


def test_every_part_of_a_complete_study_has_its_chart(page: Page) -> None:
    decision = {"mixture", "intervals", "epochs", "gains", "tradeoffs"}
    learned = {"prediction", "learning", "influence", "rates", "swarm", "curves"}
    assert set(page.charts) == decision | {"models", "targets", "training"} | learned
    assert "Make it with" not in page.text


def test_the_same_study_gives_the_same_page_but_for_the_date(complete: Study) -> None:
    first = render_report(complete, made="2026-01-01 10:00")
    second = render_report(complete, made="2026-01-02 11:00")
    assert first != second
    assert first.replace("2026-01-01 10:00", "") == second.replace("2026-01-02 11:00", "")


def test_the_page_loads_nothing(page: Page, complete: Study) -> None:
    assert page.loads == []
    text = render_report(complete)
    assert "default-src 'none'" in text
    own = text.replace(page.scripts[0][1], "")
    assert not re.search(r"https?://|@import|url\(", own)


def test_plotly_is_inlined_once(page: Page) -> None:
    plain = [script for attributes, script in page.scripts if not attributes]
    assert sum("plotly.js v" in script for script in plain) == 1


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(2)>',
    "a & <b>b</b> {{ 7 * 7 }}",
)


def test_a_hostile_domain_name_stays_text(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", domains=HOSTILE)
    text = render_report(study)
    page = Page(text)
    assert [attributes for attributes, _ in page.scripts] == [
        {},
        {"type": "application/json", "id": "charts"},
        {},
    ]
    assert "img" not in page.tags
    assert all(name in page.text for name in HOSTILE)
    # plotly.js reads labels as markup, so there they are escaped a second time.
    ticks = page.charts["swarm"]["variants"][""]["layout"]["yaxis"]["ticktext"]
    assert not any("<" in tick for tick in ticks)


def test_embedded_json_cannot_end_its_script() -> None:
    value = {"</script>": "<!-- & \u2028"}
    text = script_json(value)
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("parts", "present", "commands"),
    [
        ((), set(), ["optimize", "train", "fit", "mixtures"]),
        (("mixtures",), {"swarm"}, ["optimize", "train", "fit", "proxies"]),
        (("mixtures", "losses", "steps"), {"swarm", "curves"}, ["optimize", "train", "fit"]),
        (("mixtures", "losses", "fit"), {"swarm", "prediction", "rates"}, ["optimize", "train"]),
        (
            ("mixtures", "losses", "fit", "optimum"),
            {"swarm", "prediction", "rates", "mixture", "epochs"},
            ["optimize", "train"],
        ),
    ],
)
def test_a_part_that_is_missing_names_the_command_that_makes_it(
    tmp_path: Path, parts: tuple[str, ...], present: set[str], commands: list[str]
) -> None:
    text = render_report(make_study(tmp_path / "study", parts))
    page = Page(text)
    assert re.findall(r"Make it with\s+regmix-fast (\w+) study", page.text) == commands
    assert (set(page.charts) if present else set()) == present
    assert len(text) < 200_000 or present


def test_a_proxy_without_losses_and_a_broken_curve_do_not_stop_the_report(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("mixtures", "losses", "steps"))
    lines = study.losses_path.read_text().splitlines()
    lines[1] = "1,nan,2.0,2.0"
    study.losses_path.write_text("\n".join(lines[:-3]) + "\n")
    np.save(study.steps_path / "2.npy", np.full(60, np.nan, np.float32))
    page = Page(render_report(study))
    points = page.charts["swarm"]["variants"][""]["data"][0]["x"]
    assert len(points) == (NUM_PROXIES - 4) * len(DOMAINS)


@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("optimum.json", '{"domains": ["a"], "weights": []}'),
        ("optimum.json", "[]"),
        ("surrogate/fit.json", "{}"),
        ("surrogate/fit.json", '{"targets": {}, "learning_curve": {"points": [{}]}}'),
        ("surrogate/fit.json", '{"targets": {}, "exchange_rates": {"a": {"b": [1, 2]}}}'),
        ("surrogate/fit.json", '{"targets": {}, "influence": {"change_nats": {"a": {"b": "c"}}}}'),
        ("optimum.json", '{"domains": ["a"], "weights": [1], "intervals": {"a": 0.1}}'),
        ("optimum.json", '{"domains": ["a"], "weights": [1], "guard": ["natural"]}'),
        ("optimum-tradeoffs.json", "{}"),
        ("optimum-tradeoffs.json", '{"domains": [], "targets": [], "mixtures": {}, "points": []}'),
        ("surrogate/predictions.csv", "index,other\n1,2\n"),
        ("losses.csv", "index,metric/a_val_loss\n1,low\n"),
        ("models/optimum-0/summary.json", '{"name": "optimum-0"}'),
        ("models/optimum-0/evaluation.json", '{"targets": {"a": 3}, "objective": {}}'),
        ("models/optimum-0/metrics.jsonl", '{"step": 1}\n'),
        ("models/optimum-1/metrics.jsonl", '{"step": 1, "loss_nats": 3.0}\n'),
        ("steps/1.npy", "not an array"),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, part: str, content: str) -> None:
    study = make_study(tmp_path / "study")
    (study.path / part).write_text(content)
    with pytest.raises(StudyError, match=re.escape(part)):
        render_report(study)


def test_the_command_writes_one_file_where_it_was_asked_to(tmp_path: Path, complete: Study) -> None:
    target = tmp_path / "out" / "page.html"
    result = CliRunner().invoke(
        command, [str(complete.path), "--out", str(target)], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]
    assert "Made on 2" in Page(target.read_text(encoding="utf-8")).text
    assert str(target) in result.output


def test_the_command_writes_into_the_study_by_default(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("mixtures",))
    result = CliRunner().invoke(command, [str(study.path)], catch_exceptions=False)
    assert study.report_path.is_file()
    assert "Next: regmix-fast" in result.output
