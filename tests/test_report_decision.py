"""The decision in the report: its action, its intervals, what held it back, what it costs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from report_cases import (
    NUM_PROXIES,
    OLDER,
    OPTIMUM,
    TARGETS,
    Page,
    change,
    make_study,
)

from regmix.files import write_json
from regmix.report.charts import make_charts
from regmix.report.decision_tables import bound_rows, gain_rows, guard_rows, payoff_rows
from regmix.report.facts import read_facts
from regmix.report.page import render_report
from regmix.report.verdict import cards, headline
from regmix.report.words import signed
from regmix.study import Study


@pytest.fixture
def decided(tmp_path: Path) -> Study:
    return make_study(tmp_path / "study", ("mixtures", "losses", "fit", "optimum", "sure"))


def test_before_the_models_the_verdict_is_a_prediction(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("optimum",))
    found = headline(read_facts(study))
    assert "predicted to gain 0.0766 nats over the natural mixture" in found["text"]
    assert "use the optimum: 0.077 nats below 'natural'." in found["support"]
    assert found["kind"] == "open"


def test_a_prior_that_is_not_the_corpus_as_it_is_is_not_called_natural(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("optimum",))
    path = study.path / "optimum.json"
    table = json.loads(path.read_text())
    write_json(path, {**table, "baselines": {"natural": {"weights": [0.25] * 4}}})
    found = headline(read_facts(study))
    assert "over the natural mixture" not in found["text"]
    assert "below the given prior" in found["support"]


def test_advice_to_keep_the_prior_is_not_shown_as_a_success(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("optimum",))
    path = study.path / "optimum.json"
    write_json(path, {**json.loads(path.read_text()), "verdict": "keep 'natural': too close"})
    found = headline(read_facts(study))
    assert found["kind"] == "mixed"
    assert "keep 'natural': too close" in found["support"]


def test_an_optimum_for_another_objective_says_so(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("optimum", "models"))
    path = study.path / "optimum.json"
    write_json(path, {**json.loads(path.read_text()), "objective_name": "wiki"})
    assert "another objective than the study's: wiki." in headline(read_facts(study))["support"]


def test_the_report_reads_what_fit_and_optimize_write(tmp_path: Path) -> None:
    from regmix.decision.learning import learning_curve
    from regmix.decision.objective import make_objective
    from regmix.decision.optimum import optimize
    from regmix.decision.records import fit_record, write_fit, write_optimum
    from regmix.decision.runs import read_runs
    from regmix.decision.surrogate import fit
    from regmix.decision.tradeoffs import tradeoffs, write_tradeoffs

    study = make_study(tmp_path / "study", ("mixtures", "losses"))
    config = study.config
    runs = read_runs(study.mixtures_path, study.losses_path)
    model = fit(runs.weights, runs.losses, regressor="powerlaw")
    objective = make_objective(config.objective, runs.targets)
    curve = learning_curve(model, objective, sizes=[10, 14], repeats=2)
    record = fit_record(model, runs, objective, curve=curve)
    write_fit(study.surrogate_path, model, runs, record)
    best = optimize(
        model,
        objective=config.objective,
        prior=config.prior,
        available_tokens=config.available_tokens,
        budget_tokens=4e6,
        guard="uniform",
        guard_tolerance=0.2,
        method="simulate",
    )
    write_optimum(study.optimum_path, best, model)
    named = {"optimum": best.weights, "uniform": np.full(4, 0.25)}
    found = tradeoffs(model, best.objective, best.constraints, named, guard=best.guard, number=120)
    write_tradeoffs(study.optimum_path, found)
    facts = read_facts(study)
    assert facts.other_fit_objective is None
    assert facts.other_optimum_objective is None
    assert facts.epochs == best.epochs
    assert facts.decided is not None
    assert facts.traded is not None
    assert facts.decided.action == best.action
    rows = {row["baseline"]: row for row in gain_rows(facts)}
    gain = next(entry for entry in best.baselines if entry.name == "natural")
    assert rows["natural"]["gain"] == signed(gain.gain)
    assert rows["natural"]["better"] == f"{gain.better:.0%}".replace("%", " %")
    assert {row["target"] for row in guard_rows(facts)} == set(TARGETS)
    assert facts.traded.num_allowed == found.num_allowed
    charts = Page(render_report(study)).charts
    decision = {"mixture", "intervals", "epochs", "gains", "tradeoffs"}
    assert set(charts) == decision | {"prediction", "learning", "influence", "rates", "swarm"}
    assert list(charts["prediction"]["variants"]) == ["objective", *TARGETS]


@pytest.mark.parametrize(
    ("action", "more", "kind", "badge", "text"),
    [
        ("use", None, "use", "Use the optimum", "The optimum is predicted to gain 0.0766 nats"),
        ("keep", None, "keep", "Keep the natural mixture", "Keep the natural mixture: the optimum"),
        ("train more", 12, "train", "Train about 12 more proxies", "Train about 12 more proxies"),
    ],
)
def test_each_action_has_its_own_headline_and_look(
    decided: Study, action: str, more: int | None, kind: str, badge: str, text: str
) -> None:
    change(decided.path / "optimum.json", action=action, more_proxies=more)
    found = headline(read_facts(decided))
    assert (found["kind"], found["badge"]) == (kind, badge)
    assert found["text"].startswith(text)
    page = render_report(decided)
    assert f'<div class="verdict {kind}">' in page
    assert f'<p class="badge">{badge}</p>' in page


def test_a_measured_gain_comes_before_the_advice(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study")
    change(study.path / "optimum.json", action="keep")
    found = headline(read_facts(study))
    assert (found["kind"], found["badge"]) == ("good", "")


def test_cards_tell_intervals_shortfall_and_noise_with_units(decided: Study) -> None:
    found = {card["name"]: card for card in cards(read_facts(decided))}
    natural = found["predicted, over natural"]
    assert natural["value"] == "+0.0766"
    assert natural["unit"] == "nats, 90%: +0.050 to +0.100"
    shortfall = found["what a still better mixture might save"]
    assert (shortfall["value"], shortfall["unit"]) == ("0.0021", "nats")
    noise = found["noise between seeds, measured"]
    assert (noise["value"], noise["unit"]) == ("0.0031", "nats")


def test_every_weight_has_its_interval_the_range_of_the_swarm_and_its_limits(
    decided: Study,
) -> None:
    facts = read_facts(decided)
    traces = {t["name"]: t for t in make_charts(facts)["intervals"].variants[""]["data"]}
    code = facts.ordered_domains.index("code")
    own = traces["optimum, 90% interval"]
    assert own["x"][code] ** 2 == pytest.approx(0.35)
    assert (own["x"][code] + own["error_x"]["array"][code]) ** 2 == pytest.approx(0.45)
    assert (own["x"][code] - own["error_x"]["arrayminus"][code]) ** 2 == pytest.approx(0.25)
    assert facts.mixtures is not None
    swarm = traces["range of the swarm"]
    highest = facts.mixtures.weights[:, facts.mixtures.domains.index("code")].max()
    assert (swarm["base"][code] + swarm["x"][code]) ** 2 == pytest.approx(highest)
    texts = traces["limit (bound or epochs)"]["text"]
    assert texts == ["code: at most 35.00%", "legal: at most 50.00%", "legal: at least 2.00%"]


def test_gains_are_shown_with_intervals_and_beside_the_measured_ones(tmp_path: Path) -> None:
    facts = read_facts(make_study(tmp_path / "study"))
    rows = {row["baseline"]: row for row in gain_rows(facts)}
    assert rows["natural"] == {
        "baseline": "natural",
        "gain": "+0.0766",
        "interval": "+0.0500 to +0.1000",
        "better": "100 %",
        "feasible": "–",
        "measured": "+0.0500 ± 0.0058",
        "pairs": "3 of 3",
    }
    assert rows["best observed"]["measured"] == "–"
    predicted, measured = make_charts(facts)["gains"].variants[""]["data"]
    assert predicted["error_x"]["array"] == pytest.approx([0.1 - 0.0766, 0.07 - 0.0321, 0])
    assert predicted["error_x"]["arrayminus"] == pytest.approx([0.0766 - 0.05, 0.0321 + 0.01, 0])
    assert sorted(measured["x"]) == pytest.approx([0.03, 0.05])


def test_the_guard_tells_what_it_held_and_what_bound(decided: Study) -> None:
    rows = {row["target"]: row for row in guard_rows(read_facts(decided))}
    assert rows["maths"] == {
        "target": "maths",
        "reference": "3.0800",
        "optimum": "3.1000",
        "change": "+0.0200",
        "tolerance": "0.0200",
        "state": "binds",
    }
    assert [row["state"] for row in rows.values()] == ["holds", "binds", "holds"]


def test_a_weight_at_a_limit_names_the_limit(decided: Study) -> None:
    at = {row["domain"]: row["limit"] for row in bound_rows(read_facts(decided))}
    assert at == {
        "code": "its upper bound",
        "legal": "its lower bound",
        "maths": "the largest weight of any run",
    }
    change(decided.path / "optimum.json", epochs={"code": 4.0})
    rows = bound_rows(read_facts(decided))
    assert {row["domain"]: row["limit"] for row in rows}["code"] == "4 epochs of its tokens"


def test_the_price_of_leaving_the_prior_is_told_in_nats(decided: Study) -> None:
    text = Page(render_report(decided)).text
    assert "cost 0.05 nats of loss per nat of KL divergence" in text
    assert "the optimum is 0.4000 nats from it, so 0.0200 nats were paid" in text


def test_the_readers_two_targets_have_values_for_every_point(decided: Study) -> None:
    chart = Page(render_report(decided)).charts["tradeoffs"]
    assert chart["names"] == ["objective", *TARGETS]
    shapes = {group: [len(column) for column in v] for group, v in chart["values"].items()}
    assert shapes == {"points": [NUM_PROXIES] * 4, "named 0": [1] * 4, "named 1": [1] * 4}
    for trace in chart["variants"][""]["data"]:
        assert len(trace["text"]) == len(chart["values"][trace["group"]][0])
    assert [trace.get("front") for trace in chart["variants"][""]["data"][:2]] == [None, True]


def test_costs_with_an_open_sign_are_marked_and_carry_their_interval(decided: Study) -> None:
    (first, *_) = payoff_rows(read_facts(decided))
    assert [cell["open"] for cell in first["cells"]] == [False, True, True, True]
    assert first["cells"][1] == {
        "text": "+0.010",
        "title": "90% interval −0.0100 to +0.0300 nats",
        "open": True,
        "own": True,
    }


def test_trade_offs_of_another_optimum_are_not_shown(decided: Study) -> None:
    change(decided.path / "optimum.json", weights=[0.25, 0.12, 0.25, 0.38])
    assert read_facts(decided).traded is None
    page = Page(render_report(decided))
    assert "tradeoffs" not in page.charts
    assert "They are not computed for this optimum yet." in page.text


def test_an_older_optimum_says_which_command_adds_its_intervals(tmp_path: Path) -> None:
    page = Page(render_report(make_study(tmp_path / "study", OLDER)))
    assert not {"intervals", "gains", "tradeoffs", "learning", "influence"} & set(page.charts)
    assert re.search(r"No intervals on the weights:.*regmix-fast optimize study", page.text)
    assert re.search(r"No intervals on the gains:.*regmix-fast optimize study", page.text)
    assert re.search(r"No learning curve:.*regmix-fast fit study", page.text)


def test_a_change_that_rounds_to_nothing_has_no_sign() -> None:
    assert [signed(-0.00004), signed(0.0), signed(-0.0001)] == ["0.0000", "0.0000", "−0.0001"]


def test_an_optimum_of_weights_alone_still_renders(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", ("optimum",))
    weights = {"domains": list(OPTIMUM), "weights": list(OPTIMUM.values())}
    write_json(study.path / "optimum.json", weights)
    page = Page(render_report(study))
    assert set(page.charts) == {"mixture"}
    assert "The optimum is found; its gain is not known." in page.text
