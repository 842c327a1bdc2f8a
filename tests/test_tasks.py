"""Downstream tasks: lm-eval's numbers are the model's own, kept with it and shown side by side."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from model_cases import SHAPES, make_study, random_parameters
from report_cases import Page
from report_cases import make_study as make_reported

from regmix.cli.evaluate import command
from regmix.cli.tasks import parse_shots
from regmix.errors import ConfigError, ModelError, RegmixError, StudyError
from regmix.large.export import export_model
from regmix.large.generate import Writer
from regmix.large.scores import (
    TaskScore,
    compare_scores,
    read_results,
    read_scores,
    write_scores,
)
from regmix.large.tasks import PAPER, TaskRunner, expand_tasks
from regmix.model.llama import StackedLlama
from regmix.report.page import render_report
from regmix.study import Study

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'regmix-fast[lm-eval]'",
)
CHOICES = (" wolves.", " naïve wolves were there", "x + 1")
QUESTIONS = [(f"Once upon a time there were {n}", n % 3) for n in range(9)]


def score(**changes: Any) -> TaskScore:
    usual = TaskScore(
        task="piqa",
        shots=0,
        metric="acc_norm",
        value=0.5,
        error=0.02,
        higher_is_better=True,
        num_questions=100,
        limit=None,
        num_cut=0,
        version="0.4.13",
        metrics={"acc": 0.4, "acc_norm": 0.5},
    )
    return dataclasses.replace(usual, **changes)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task made here, whose data lies beside it."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"prompt": p, "choices": CHOICES, "label": label} for p, label in QUESTIONS]
    (folder / "wolves.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {
        "task": "wolves",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "wolves.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "fewshot_split": "validation",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    # JSON is YAML.
    (folder / "wolves.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("the tests have no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


def expected_scores(study: Study) -> dict[str, float]:
    """Accuracy by the likeliest answer, and by the likeliest per byte, from logits alone."""
    shape, parameters = SHAPES["plain"], random_parameters(SHAPES["plain"])
    writer, right = Writer.of_study(study, "plain"), {"acc": 0, "acc_norm": 0}
    for prompt, label in QUESTIONS:
        sums = []
        for choice in CHOICES:
            start, whole = writer.encode(prompt), writer.encode(prompt + choice)
            tokens = torch.tensor(whole)
            logits = StackedLlama(shape).logits(parameters, tokens[None, None])[0, 0].double()
            nats = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
            sums.append(float(nats[len(start) - 1 :].sum()))
        per_byte = [s / len(choice.encode()) for s, choice in zip(sums, CHOICES, strict=True)]
        right["acc"] += sums.index(max(sums)) == label
        right["acc_norm"] += per_byte.index(max(per_byte)) == label
    return {name: number / len(QUESTIONS) for name, number in right.items()}


@needs_lm_eval
def test_lm_eval_finds_what_the_models_own_logits_say(study: Study, own_tasks: Path) -> None:
    answer = CliRunner().invoke(
        command,
        [
            *(str(study.path), "--model", "plain", "--tasks", "wolves", "--shots", "0,3"),
            *("--task-folder", str(own_tasks), "--json"),
        ],
        catch_exceptions=False,
    )
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)["plain"]
    assert [row["shots"] for row in rows] == [0, 3]
    assert rows[0]["num_questions"] == len(QUESTIONS)
    expected = expected_scores(study)
    assert 0 < expected["acc"] < 1
    assert rows[0]["metrics"] == pytest.approx(expected)
    kept = read_scores(study.models_path / "plain")
    assert [(s.task, s.shots, s.value) for s in kept] == [
        ("wolves", row["shots"], row["value"]) for row in rows
    ]
    # With three examples a prompt is longer than the 32 tokens of this model.
    assert kept[0].num_cut == 0
    assert kept[1].num_cut == len(QUESTIONS) * len(CHOICES)
    assert "Downstream tasks" in render_report(study)


@needs_lm_eval
def test_a_score_that_is_there_is_not_asked_again(
    study: Study, own_tasks: Path, tmp_path: Path
) -> None:
    runner = TaskRunner(["wolves"], folder=own_tasks, limit=4)
    export_model(study, "plain", tmp_path / "model")
    ((found,),) = runner.run(tmp_path / "model", runner.waiting((0,)))
    assert (found.num_questions, found.limit) == (4, 4)
    assert runner.waiting((0, 1), [found]) == [("wolves", 1)]
    assert runner.waiting((0,), [dataclasses.replace(found, limit=None)]) == [("wolves", 0)]
    older = dataclasses.replace(found, version="0.4.0")
    assert runner.waiting((0,), [older]) == [("wolves", 0)]


@needs_lm_eval
def test_lm_eval_knows_every_task_of_the_paper(own_tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    assert set(PAPER) <= set(TaskManager().all_tasks)
    with pytest.raises(ModelError, match="did you mean 'wolves'"):
        TaskRunner(["wolvs"], folder=own_tasks)


@needs_lm_eval
def test_a_task_whose_data_is_missing_is_refused_before_any_is_asked(tmp_path: Path) -> None:
    task = {"task": "empty", "dataset_path": "json", "output_type": "multiple_choice"}
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "absent.jsonl")}}}
    (tmp_path / "empty.yaml").write_text(json.dumps({**task, **files, "test_split": "test"}))
    with pytest.raises(ModelError, match="'empty' cannot be loaded") as refused:
        TaskRunner(["empty"], folder=tmp_path)
    assert "where there is a network" in refused.value.cure


def test_without_lm_eval_the_error_says_how_to_install_it(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match="lm-eval is not installed") as refused:
        CliRunner().invoke(command, [str(study.path), "--tasks", "paper"], catch_exceptions=False)
    assert refused.value.cure == "Install it: pip install 'regmix-fast[lm-eval]'"


def test_the_papers_tasks_are_a_preset() -> None:
    assert len(PAPER) == len(set(PAPER)) == 13
    assert expand_tasks(["paper"]) == PAPER
    assert expand_tasks(["mmlu, paper", "piqa,,own"]) == ("mmlu", *PAPER, "own")
    with pytest.raises(ConfigError, match="no task is named"):
        expand_tasks([" , "])


def test_examples_of_a_prompt_are_numbers_and_spans() -> None:
    assert parse_shots("0") == (0,)
    assert parse_shots("0-5") == (0, 1, 2, 3, 4, 5)
    assert parse_shots("5, 0-1,1") == (5, 0, 1)
    for text in ("", "a", "3-1", "-1", "0-65", "1-2-3"):
        with pytest.raises(ConfigError, match="--shots is"):
            parse_shots(text)


def results_of(tables: dict[str, Any], **more: Any) -> list[TaskScore]:
    results = {"results": tables, **more}
    return read_results(results, shots=2, limit=None, num_cut=3, version="1")


def test_the_normalised_accuracy_stands_for_a_task_that_has_one() -> None:
    found = {"acc,none": 0.25, "acc_stderr,none": 0.01, "acc_norm,none": 0.5, "alias": "x"}
    found |= {"acc_norm_stderr,none": 0.02, "perplexity,none": 40.0, "bad,none": math.nan}
    (read,) = results_of(
        {"piqa": found},
        **{"n-samples": {"piqa": {"original": 9, "effective": 7}}},
        higher_is_better={"piqa": {"acc_norm": True}},
    )
    assert (read.metric, read.value, read.error) == ("acc_norm", 0.5, 0.02)
    assert read.metrics == {"acc": 0.25, "acc_norm": 0.5, "perplexity": 40.0}
    assert (read.num_questions, read.num_cut, read.shots) == (7, 3, 2)


def test_a_measure_without_accuracy_or_error_is_read() -> None:
    tables = {"wiki": {"word_perplexity,none": 40.0, "word_perplexity_stderr,none": "N/A"}}
    (read,) = results_of(tables, higher_is_better={"wiki": {"word_perplexity": False}})
    assert (read.metric, read.error, read.higher_is_better) == ("word_perplexity", None, False)


def test_a_group_with_a_score_stands_for_its_parts() -> None:
    tables = {name: {"acc,none": 0.3} for name in ("mmlu", "mmlu_law", "mmlu_art")}
    parts = {"mmlu": ["mmlu_law", "mmlu_art"]}
    counts = {name: {"effective": 5} for name in parts["mmlu"]}
    (read,) = results_of(tables, group_subtasks=parts, **{"n-samples": counts})
    assert (read.task, read.num_questions) == ("mmlu", 10)
    tables["mmlu"] = {"alias": "mmlu"}
    found = results_of(tables, group_subtasks=parts)
    assert [read.task for read in found] == ["mmlu_art", "mmlu_law"]


def test_scores_are_added_to_those_of_other_questions_and_replace_their_own(
    tmp_path: Path,
) -> None:
    assert read_scores(tmp_path) == ()
    write_scores(tmp_path, [score(), score(task="copa", error=None, limit=10)])
    write_scores(tmp_path, [score(value=0.6), score(shots=1)])
    kept = read_scores(tmp_path)
    assert [(s.task, s.shots, s.value, s.limit) for s in kept] == [
        ("copa", 0, 0.5, 10),
        ("piqa", 0, 0.6, None),
        ("piqa", 1, 0.5, None),
    ]
    assert kept[0] == score(task="copa", error=None, limit=10)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"scores": [{}]}', '{"scores": 3}', '{"scores": [{"value": NaN}]}']
)
def test_damaged_scores_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(RegmixError, match=r"tasks\.json"):
        read_scores(tmp_path)


def test_only_what_was_asked_alike_is_one_column() -> None:
    table = compare_scores(
        {
            "a": [score(), score(shots=1, value=0.7), score(task="copa", value=0.9)],
            "b": [score(value=0.2), score(shots=1, value=0.4), score(task="copa", limit=5)],
        }
    )
    assert table.columns == (
        "copa, 0-shot acc_norm",
        "copa, 0-shot acc_norm, first 5",
        "piqa, 0–1-shot acc_norm",
    )
    assert table.cells["a"] == ((0.9, 0.02), None, (pytest.approx(0.6), None))
    assert table.cells["b"] == (None, (0.5, 0.02), (pytest.approx(0.3), None))
    # Over the one column that both have.
    assert table.averages == {"a": pytest.approx(0.6), "b": pytest.approx(0.3)}


def test_a_perplexity_is_not_averaged_with_accuracies() -> None:
    found = [score(), score(task="wiki", metric="word_perplexity", value=40.0)]
    assert compare_scores({"a": found}).averages == {"a": 0.5}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = make_reported(tmp_path_factory.mktemp("reported") / "study")
    for replicate, value in enumerate((0.5, 0.6)):
        folder = made.models_path / f"optimum-{replicate}"
        write_scores(folder, [score(value=value), score(task="copa", value=0.8)])
    hostile = score(task="<script>alert(1)</script>", metric="<b>acc</b>")
    write_scores(made.models_path / "natural-0", [score(), hostile])
    return made


def test_the_report_shows_scores_with_their_errors_over_seeds(reported: Study) -> None:
    text = Page(render_report(reported)).text
    assert "Downstream tasks" in text
    rows = text[text.index("Downstream tasks") :]
    assert "0.5000 ± 0.0200" in rows
    # Of 0.5 and 0.6.
    assert "optimum, mean of 2" in rows
    assert "0.5500 ± 0.0500" in rows


def test_a_tasks_name_cannot_break_out_of_the_report(reported: Study) -> None:
    page = render_report(reported)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_report_without_scores_has_no_table_of_tasks(tmp_path: Path) -> None:
    assert "Downstream tasks" not in render_report(make_reported(tmp_path / "study"))


def test_a_study_with_damaged_scores_is_named(tmp_path: Path) -> None:
    made = make_reported(tmp_path / "study")
    (made.models_path / "optimum-0" / "tasks.json").write_text('{"scores": [1]}')
    with pytest.raises(StudyError, match=r"optimum-0/tasks\.json"):
        render_report(made)
