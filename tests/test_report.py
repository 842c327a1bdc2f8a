"""The report: complete, escaped, offline, the same each time, and honest about what is missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from regmix.cli.report import command
from regmix.data.mixtures import MixtureTable
from regmix.errors import StudyError
from regmix.files import write_json
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.provenance import environment_record
from regmix.report.facts import read_facts
from regmix.report.page import render_report, script_json
from regmix.report.verdict import headline
from regmix.study import Study, StudyConfig, Training

DOMAINS = ("code", "legal", "maths", "web")
TARGETS = ("code", "maths", "wiki")
PRIOR = {"code": 0.2, "legal": 0.1, "maths": 0.05, "web": 0.65}
OPTIMUM = {"code": 0.35, "legal": 0.02, "maths": 0.25, "web": 0.38}
NUM_PROXIES = 24
PARTS = ("mixtures", "losses", "fit", "optimum", "models", "steps", "sweep")


def training() -> Training:
    shape = ModelShape(num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=512, seq_len=64)
    optim = OptimConfig(lr=3e-3, warmup_steps=5, schedule="cosine", total_steps=60)
    return Training(shape=shape, optim=optim, batch_size=8, num_steps=60)


def true_losses(weights: np.ndarray) -> np.ndarray:
    useful = np.array([[1.0, 0.1, 0.2, 0.2], [0.3, 0.05, 1.0, 0.1], [0.1, 0.3, 0.1, 1.0]])
    return 2.0 + 1.2 * (weights @ useful.T + 0.05) ** -0.3


def make_study(
    folder: Path,
    parts: tuple[str, ...] = PARTS,
    *,
    domains: tuple[str, ...] = DOMAINS,
    gains: tuple[float, float, float] = (0.05, 0.04, 0.06),
) -> Study:
    rename = dict(zip(DOMAINS, domains, strict=True))
    targets = tuple(rename.get(target, target) for target in TARGETS)
    config = StudyConfig(
        shards="../shards",
        shards_checksum="0123456789abcdef",
        train_domains=domains,
        targets=targets,
        objective=dict.fromkeys(targets, 1 / 3),
        prior={rename[d]: w for d, w in PRIOR.items()},
        available_tokens=dict.fromkeys(domains, 2_000_000),
        proxy=training(),
        swarm={"sampler": "bounded", "seed": "0"},
    )
    study = Study.create(folder, config)
    random = np.random.default_rng(1)
    weights = random.dirichlet([1.0] * 4, size=NUM_PROXIES)
    losses = true_losses(weights) + random.normal(0, 0.003, size=(NUM_PROXIES, 3))
    table = MixtureTable(domains, tuple(range(1, NUM_PROXIES + 1)), weights)
    if "mixtures" in parts:
        table.write_csv(study.mixtures_path)
    if "losses" in parts:
        columns = [f"metric/{target}_val_loss" for target in targets]
        write_csv(study.losses_path, columns, losses)
    if "fit" in parts:
        write_fit(study, targets, losses, losses + random.normal(0, 0.01, size=losses.shape))
    if "optimum" in parts:
        write_optimum(study, rename, targets)
    if "models" in parts:
        write_models(study, rename, targets, gains)
    if "steps" in parts:
        study.steps_path.mkdir()
        for index in range(1, NUM_PROXIES + 1):
            curve = 3 + 3 * np.exp(-np.arange(60) / 12) + random.normal(0, 0.05, 60)
            np.save(study.steps_path / f"{index}.npy", curve.astype(np.float32))
    if "sweep" in parts:
        speed = {"num_proxies": NUM_PROXIES, "workers": 2, "tokens_per_second": 123456.7}
        write_json(study.path / "sweep.json", {**speed, "environment": environment_record()})
    return study


def write_csv(path: Path, columns: list[str], values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["index", *columns])
        writer.writerows([i, *row] for i, row in enumerate(values.tolist(), start=1))


def write_fit(
    study: Study, targets: tuple[str, ...], true: np.ndarray, predicted: np.ndarray
) -> None:
    columns = [f"true/{t}" for t in targets] + [f"predicted/{t}" for t in targets]
    study.surrogate_path.mkdir()
    write_csv(study.surrogate_path / "predictions.csv", columns, np.hstack([true, predicted]))
    scores = {"spearman": 0.9719, "rmse_nats": 0.0123}
    write_json(
        study.surrogate_path / "fit.json",
        {
            "regressor": "powerlaw",
            "choice": {"why": "lowest error"},
            "dropped": [{"index": 99, "reason": "its losses are not finite"}],
            "exchange_rates": {t: dict.fromkeys(study.config.train_domains, 0.5) for t in targets},
            "seed": 0,
            "num_runs": NUM_PROXIES,
            "targets": dict.fromkeys(targets, scores),
            "objective": {"spearman": 0.9345, "rmse_nats": 0.0101},
        },
    )


def write_optimum(study: Study, rename: dict[str, str], targets: tuple[str, ...]) -> None:
    losses = dict.fromkeys(targets, 3.1)
    write_json(
        study.path / "optimum.json",
        {
            "domains": [rename[d] for d in OPTIMUM],
            "weights": list(OPTIMUM.values()),
            "objective": study.config.objective,
            "predicted": {"objective": 3.1234, "targets": losses},
            "baselines": {"natural": {"weights": list(PRIOR.values()), "objective": 3.2}},
            "gain_nats": {"natural": 0.0766, "uniform": 0.0321, "best observed": 0.0042},
            "epochs": {rename["code"]: 1.4, rename["maths"]: 3.9, rename["web"]: 0.6},
            "budget_tokens": 5_000_000,
            "max_epochs": 4.0,
            "method": "exact",
            "verdict": "use the optimum: 0.077 nats below 'natural'",
        },
    )


def write_models(
    study: Study, rename: dict[str, str], targets: tuple[str, ...], gains: tuple[float, ...]
) -> None:
    random = np.random.default_rng(2)
    offsets = {"optimum": 0.0, "natural": 1.0, "uniform": 0.6}
    for replicate, gain in enumerate(gains):
        seed_noise = random.normal(0, 0.01)
        for mixture, offset in offsets.items():
            folder = study.models_path / f"{mixture}-{replicate}"
            folder.mkdir(parents=True)
            losses = {t: 2.9 + 0.3 * i + seed_noise + offset * gain for i, t in enumerate(targets)}
            rows = {
                t: {"loss_nats": loss, "bits_per_byte": loss / 2.5} for t, loss in losses.items()
            }
            objective = sum(losses.values()) / len(losses)
            write_json(
                folder / "evaluation.json",
                {"targets": rows, "objective": {"loss_nats": objective}},
            )
            steps = [
                {"step": step, "loss_nats": 5 + replicate - 0.01 * step} for step in range(1, 61)
            ]
            lines = "".join(f"{json.dumps(step)}\n" for step in steps)
            (folder / "metrics.jsonl").write_text(lines)
            member = {
                "name": folder.name,
                "weights": {rename[d]: w for d, w in OPTIMUM.items()},
                "data_seed": replicate,
                "init_seed": replicate,
            }
            summary = {"name": folder.name, "mixture": mixture, "replicate": replicate}
            extra = {"tokens": 5_000_000, "environment": environment_record()}
            shared = {"member": member, "training": {"num_steps": 60}}
            write_json(folder / "summary.json", {**summary, **shared, **extra})


class Page(HTMLParser):
    """Collects the text, the scripts and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        self.loads += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._inside is None:
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        (found,) = [s for attributes, s in self.scripts if attributes.get("id") == "charts"]
        return json.loads(found)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("complete") / "study")


@pytest.fixture(scope="module")
def page(complete: Study) -> Page:
    return Page(render_report(complete))


def test_every_part_of_a_complete_study_has_its_chart(page: Page) -> None:
    expected = {"mixture", "epochs", "models", "targets", "training", "prediction", "rates"}
    assert set(page.charts) == {*expected, "swarm", "curves"}
    assert "Make it with" not in page.text


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


def test_the_objective_of_predictions_is_the_mean_of_its_targets(complete: Study) -> None:
    predictions = read_facts(complete).predictions
    assert predictions is not None
    mean = sum(predictions.true[target] for target in TARGETS) / 3
    assert predictions.true["objective"] == pytest.approx(mean)


def test_predictions_have_a_variant_for_each_target_with_its_scores(page: Page) -> None:
    variants = page.charts["prediction"]["variants"]
    assert list(variants) == ["objective", *TARGETS]
    note = variants["maths"]["layout"]["annotations"][0]["text"]
    assert note == "Spearman 0.972, RMSE 0.0123 nats"
    assert len(variants["maths"]["data"][1]["x"]) == NUM_PROXIES


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
            ["train"],
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


def test_runs_that_the_fit_left_out_are_named(page: Page) -> None:
    assert "Left out: proxy 99 (its losses are not finite)." in page.text


def test_the_report_reads_what_fit_and_optimize_write(tmp_path: Path) -> None:
    from regmix.decision.objective import make_objective
    from regmix.decision.optimum import optimize
    from regmix.decision.records import write_fit, write_optimum
    from regmix.decision.runs import read_runs
    from regmix.decision.surrogate import fit

    study = make_study(tmp_path / "study", ("mixtures", "losses"))
    config = study.config
    runs = read_runs(study.mixtures_path, study.losses_path)
    model = fit(runs.weights, runs.losses, regressor="powerlaw")
    write_fit(study.surrogate_path, model, runs, make_objective(config.objective, runs.targets))
    best = optimize(
        model,
        objective=config.objective,
        prior=config.prior,
        available_tokens=config.available_tokens,
        budget_tokens=4e6,
        method="simulate",
    )
    write_optimum(study.optimum_path, best, model)
    facts = read_facts(study)
    assert facts.other_fit_objective is None
    assert facts.other_optimum_objective is None
    assert facts.epochs == best.epochs
    gain = next(entry.gain for entry in best.baselines if entry.name == "natural")
    assert f"{gain:.4f} nats over the natural mixture" in headline(facts)["text"]
    charts = Page(render_report(study)).charts
    assert set(charts) == {"mixture", "epochs", "prediction", "rates", "swarm"}
    assert list(charts["prediction"]["variants"]) == ["objective", *TARGETS]


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
