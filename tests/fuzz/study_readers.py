"""Rows of the table: mixtures, losses, and the other files of a study."""

from __future__ import annotations

import contextlib

import numpy as np
from material import Material
from readers import reader

from regmix.errors import RegmixError

# Mixtures and losses


@reader("mixture", "mixture.yaml", "yaml")
def _mixture(files: Material) -> None:
    from regmix.data.mixtures import read_mixture_yaml
    from regmix.large.train import resolve_recipe
    from regmix.swarm.drawing import read_mixtures

    path = files.root / "mixture.yaml"
    read_mixture_yaml(path, normalise=True)
    with contextlib.suppress(RegmixError):
        read_mixtures(path, ("code", "web"))
    resolve_recipe(files.study, str(path))


@reader("schedule", "schedule.yaml", "yaml")
def _schedule(files: Material) -> None:
    from regmix.large.train import dealt, resolve_recipe

    _, recipe = resolve_recipe(files.study, str(files.root / "schedule.yaml"))
    dealt(recipe, files.study.config.proxy)


@reader("mixtures.csv", "study/mixtures.csv", "csv")
def _mixtures_csv(files: Material) -> None:
    from regmix.data.mixtures import MixtureTable, coverage
    from regmix.decision.runs import read_runs

    table = MixtureTable.read_csv(files.study.mixtures_path)
    with contextlib.suppress(RegmixError):
        coverage(table, files.study.config.prior)
    table.write_csv(files.root / "again.csv")
    again = MixtureTable.read_csv(files.root / "again.csv")
    assert np.array_equal(again.weights, table.weights)
    read_runs(files.study.mixtures_path, files.study.losses_path, partial=True)


@reader("losses.csv", "study/losses.csv", "csv")
def _losses(files: Material) -> None:
    from regmix.decision.runs import read_runs

    read_runs(files.study.mixtures_path, files.study.losses_path)


@reader("schedules.csv", "study/schedules.csv", "csv")
@reader("trajectories.csv", "study/trajectories.csv", "csv")
def _schedules(files: Material) -> None:
    from regmix.data.schedules import ScheduleTable
    from regmix.decision.schedules.histories import _followed
    from regmix.decision.schedules.trajectories import read_trajectories

    table = ScheduleTable.read_csv(files.study.schedules_path)
    for position in range(len(table)):
        table.named(position)
        table.mean_between(position, 0, 4)
    _followed(files.study, read_trajectories(files.study))


# A study


@reader("study.toml", "study/study.toml", "toml")
def _study(files: Material) -> None:
    from regmix.config import as_table
    from regmix.study import Study

    study = Study.open(files.study.path)
    as_table(study.config)
    assert study.config.groups is None or study.config.groups.names
    assert study.config.proxy.tokens > 0
    study.config.proxy.optim.lr_at(3)
    study.config.proxy.evaluates_at(3)
    study.open_shards()


@reader("model.toml", "shape.toml", "toml")
def _shape(files: Material) -> None:
    from regmix.cli.words import shape_from

    shape_from(str(files.root / "shape.toml"), 300, None).flops_per_token()


@reader("rounds.json", "study/rounds.json", "json")
def _rounds(files: Material) -> None:
    from regmix.decision.active.rounds import _append_stored, read_rounds, told

    for made in read_rounds(files.study):
        list(told(made))
    before = files.study.mixtures_path.read_bytes()
    try:
        _append_stored(files.study)
    finally:
        files.study.mixtures_path.write_bytes(before)


def _told(files: Material) -> None:
    """The report, without the script of the charts, which is always the same."""
    from unittest import mock

    from regmix.report import page
    from regmix.study import Study

    with mock.patch.object(page, "_plotly", return_value=""):
        text = page.render_report(Study.open(files.report.path))
    assert "<script>alert" not in text
    text.encode()


for _name, _file, _form in (
    ("fit.json", "surrogate/fit.json", "json"),
    ("predictions.csv", "surrogate/predictions.csv", "csv"),
    ("optimum.json", "optimum.json", "json"),
    ("optimum-tradeoffs.json", "optimum-tradeoffs.json", "json"),
    ("sweep.json", "sweep.json", "json"),
    ("summary.json", "models/optimum-0/summary.json", "json"),
    ("evaluation.json", "models/optimum-0/evaluation.json", "json"),
    ("report's study.toml", "study.toml", "toml"),
    ("report's mixtures.csv", "mixtures.csv", "csv"),
    ("report's losses.csv", "losses.csv", "csv"),
):
    reader(_name, f"told/{_file}", _form, slow=True)(_told)
reader("tasks.json", "told/models/optimum-0/tasks.json", "json", slow=True)(_told)
reader("metrics.jsonl", "told/models/optimum-0/metrics.jsonl", "bytes", slow=True)(_told)
reader("steps.npy", "told/steps/1.npy", "bytes", slow=True)(_told)


@reader("optimum.json of the commands", "study/optimum.json", "json")
def _optimum(files: Material) -> None:
    from regmix.cli.export import _known_epochs
    from regmix.data.mixtures import Mixture
    from regmix.large.train import budget_remarks
    from regmix.swarm.reuse import _verdict

    budget_remarks(files.study, ["optimum"], files.study.config.proxy)
    _verdict(files.study)
    for mixture in ("optimum", "natural"):
        _known_epochs(files.study, mixture, Mixture({"code": 0.5, "web": 0.5}))


@reader("fit.json of optimize", "told/surrogate/fit.json", "json")
def _fit_settings(files: Material) -> None:
    from regmix.cli.optimize import _settings_of_fit

    _settings_of_fit(files.report, None, None)


@reader("ledger.sqlite", "told/ledger.sqlite", "bytes", slow=True)
@reader("progress.json", "told/progress.json", "json", slow=True)
@reader("lease", "told/.lease", "json", slow=True)
def _status(files: Material) -> None:
    from click.testing import CliRunner

    from regmix.cli.status import command
    from regmix.swarm.export import export
    from regmix.swarm.ledger_reading import LedgerReader
    from regmix.swarm.planning import all_indices

    for options in ([], ["--json"], ["--out", str(files.root / "rows.csv")]):
        answer = CliRunner().invoke(command, [str(files.report.path), *options])
        if answer.exception is not None:
            raise answer.exception
        assert answer.output.replace("\n", "").isprintable(), repr(answer.output)
    losses = files.report.losses_path.read_bytes()
    try:
        with LedgerReader.read(files.report.ledger_path) as ledger:
            export(files.report, ledger)
            ledger.export_trajectories(files.root / "steps.csv", files.report.config.targets)
            ledger.job_tables()
            all_indices(files.report)
            ledger.stacks()
    finally:
        files.report.losses_path.write_bytes(losses)


@reader("corpus.json of the demo", "corpus.json", "json")
def _demo(files: Material) -> None:
    from regmix.demo import DemoSize, collect_corpus

    collect_corpus(files.root, DemoSize(), lambda _: None)
