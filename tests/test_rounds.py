"""Rounds: proposals a study can have, stored before they are trained, never made twice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from regmix.cli import mixtures as mixtures_command
from regmix.cli import proxies as proxies_command
from regmix.data.mixtures import MixtureTable
from regmix.data.shards import ShardSet
from regmix.decision.active import rounds
from regmix.decision.active.proposals import ProposalRequest, propose
from regmix.decision.active.rounds import add_round, read_rounds, told, train_in_rounds
from regmix.errors import ConfigError, ConstraintError, LossTableError, StudyError
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.sweep import SweepResult

FILES = ("mixtures.csv", "losses.csv", "rounds.json")
BOUNDS = SwarmRequest(num=12, lower={"animals": 0.1}, upper={"colours": 0.5})


class KilledError(BaseException):
    """What a kill looks like from inside."""


NewStudy = Callable[..., Study]


@pytest.fixture
def new_study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> NewStudy:
    def make(name: str = "study", swarm: SwarmRequest = BOUNDS) -> Study:
        objective = {"animals": 0.5, "numbers": 0.5}
        return make_study(
            tmp_path / name, tiny_shards, swarm=swarm, training=tiny_training, objective=objective
        )

    return make


def trainer(study: Study, *, pending: int = 0) -> Callable[[], SweepResult]:
    """Something that writes the losses of a law for every mixture, as a sweep would."""

    def train() -> SweepResult:
        table = MixtureTable.read_csv(study.mixtures_path)
        columns = [table.domains.index(name) for name in ("animals", "colours", "numbers")]
        losses = 2 + (0.1 + table.weights[:, columns]) ** -0.3
        lines = ["index," + ",".join(f"metric/{t}_val_loss" for t in study.config.targets)]
        for index, row in zip(table.indices, losses.tolist(), strict=True):
            lines.append(f"{index}," + ",".join(map(repr, row)))
        study.losses_path.write_text("\n".join(lines) + "\n")
        return SweepResult(len(table), 0, pending, len(table))

    return train


def outcome(study: Study) -> list[bytes]:
    return [(study.path / name).read_bytes() for name in FILES]


def test_proposals_repeat_themselves_and_no_mixture_of_the_study(new_study: NewStudy) -> None:
    study = new_study()
    trainer(study)()
    first, again = (propose(study, ProposalRequest(num=8)) for _ in range(2))
    assert np.array_equal(first.table.weights, again.table.weights)
    assert first.expected_nats == again.expected_nats
    table = MixtureTable.read_csv(study.mixtures_path)
    assert first.table.indices == tuple(range(13, 21))
    every = table.extended(first.table).weights
    apart = np.abs(every[:, None] - every).max(2)[~np.eye(len(every), dtype=bool)]
    assert apart.min() > 1e-6
    other = propose(study, ProposalRequest(num=8, seed=1))
    assert not np.array_equal(first.table.weights, other.table.weights)


@pytest.mark.parametrize("rule", ["precision+lcb", "random"])
def test_proposals_lie_in_the_bounds_of_the_swarm(new_study: NewStudy, rule: str) -> None:
    study = new_study()
    trainer(study)()
    table = propose(study, ProposalRequest(num=12, rule=rule)).table
    low = dict(zip(table.domains, table.weights.min(0), strict=True))
    high = dict(zip(table.domains, table.weights.max(0), strict=True))
    assert low["animals"] >= 0.1 - 1e-9
    assert high["colours"] <= 0.5 + 1e-9
    assert ((table.weights == 0) | (table.weights >= 1e-3 * 0.99)).all()


def test_a_proposed_batch_keeps_apart_and_away_from_the_runs(new_study: NewStudy) -> None:
    study = new_study(swarm=SwarmRequest(num=12))
    trainer(study)()
    table = propose(study, ProposalRequest(num=6, explore=0)).table
    runs = MixtureTable.read_csv(study.mixtures_path)
    roots = np.sqrt(runs.extended(table).weights)
    away = np.sqrt(((roots[:, None] - roots) ** 2).sum(2))[12:]
    away[np.arange(6), np.arange(12, 18)] = np.inf
    assert away.min() > 0.05


def test_chosen_proposals_keep_the_epochs_of_the_large_run(new_study: NewStudy) -> None:
    study = new_study(swarm=SwarmRequest(num=12))
    trainer(study)()
    available = study.config.available_tokens
    tokens = int(2 * sum(available.values()))
    request = ProposalRequest(num=8, explore=0.25, target_tokens=tokens, max_epochs=2.5)
    proposed = propose(study, request)
    assert proposed.num_explored == 2
    numbers = np.array([available[name] for name in proposed.table.domains])
    epochs = proposed.table.weights * tokens / numbers
    assert epochs[2:].max() <= 2.5 + 1e-6
    free = propose(study, ProposalRequest(num=8, explore=0.25)).table.weights * tokens / numbers
    assert free[2:].max() > 2.5


def test_epochs_that_no_mixture_can_keep_are_refused(new_study: NewStudy) -> None:
    study = new_study(swarm=SwarmRequest(num=12))
    trainer(study)()
    with pytest.raises(ConstraintError, match=r"4 epochs .* fill only"):
        propose(study, ProposalRequest(target_tokens=10**12))


def test_mixtures_without_losses_are_kept_away_from(new_study: NewStudy) -> None:
    study = new_study()
    trainer(study)()
    first = add_round(study, ProposalRequest(num=4))
    second = propose(study, ProposalRequest(num=4))
    assert (second.num_runs, second.num_waiting) == (12, 4)
    assert second.table.indices == (17, 18, 19, 20)
    assert first.num_runs == 12


def test_frozen_ratios_are_kept(new_study: NewStudy) -> None:
    import dataclasses

    study = new_study(swarm=SwarmRequest(num=12))
    ratios = {"animals": 0.25, "colours": 0.75}
    study.config = dataclasses.replace(study.config, frozen=ratios)
    groups = study.config.groups
    assert groups is not None
    drawn = SwarmRequest(num=12).draw(study.config.prior, None, groups)
    drawn.write_csv(study.mixtures_path)
    trainer(study)()
    table = propose(study, ProposalRequest(num=6)).table
    columns = [table.domains.index(name) for name in groups.domains]
    assert groups.representable(table.weights[:, columns]).all()


def test_a_study_without_losses_says_to_train(new_study: NewStudy) -> None:
    with pytest.raises(StudyError, match=r"no losses yet.*regmix-fast proxies"):
        propose(new_study(), ProposalRequest())


def test_too_few_mixtures_are_refused_before_any_training(new_study: NewStudy) -> None:
    def train() -> SweepResult:
        raise AssertionError("trained")

    study = new_study(swarm=SwarmRequest(num=5))
    with pytest.raises(LossTableError, match=r"5 runs are too few .*at least 8"):
        train_in_rounds(study, 1, ProposalRequest(), train=train)


def test_bounds_that_cannot_be_read_are_an_error_with_a_cure(new_study: NewStudy) -> None:
    study = new_study()
    trainer(study)()
    study.config.swarm["lower"] = "__import__('os')"
    with pytest.raises(StudyError, match=r"swarm\.lower is not a mapping.*Restore it"):
        propose(study, ProposalRequest())


def test_an_unknown_rule_and_no_mixtures_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'promise'"):
        ProposalRequest(rule="promis")
    with pytest.raises(ConfigError, match="at least 1"):
        ProposalRequest(num=0)


def test_rounds_go_on_to_the_number_asked_for_and_no_further(new_study: NewStudy) -> None:
    study = new_study()
    seen: list[int] = []
    request = ProposalRequest(num=3)
    for wanted in (2, 2, 3):
        train_in_rounds(
            study, wanted, request, train=trainer(study), on_round=lambda r: seen.append(r.number)
        )
    assert seen == [1, 2, 3]
    assert [made.num_runs for made in read_rounds(study)] == [12, 15, 18]
    assert len(MixtureTable.read_csv(study.mixtures_path)) == 21


def test_no_round_follows_a_proxy_that_could_not_be_trained(new_study: NewStudy) -> None:
    study = new_study()
    train_in_rounds(study, 2, ProposalRequest(num=3), train=trainer(study, pending=1))
    assert read_rounds(study) == ()


@pytest.mark.parametrize("moment", ["before the record", "before the table", "before training"])
def test_a_kill_between_two_steps_changes_nothing(
    new_study: NewStudy, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    request = ProposalRequest(num=3)
    undisturbed = new_study("undisturbed")
    train_in_rounds(undisturbed, 2, request, train=trainer(undisturbed))
    study = new_study("killed")

    def killed(*_: object, **__: object) -> Any:
        raise KilledError

    with monkeypatch.context() as patch:
        if moment == "before the record":
            patch.setattr(rounds, "write_json", killed)
        elif moment == "before the table":
            patch.setattr(MixtureTable, "write_csv", killed)
        on_round = killed if moment == "before training" else lambda _: None
        with pytest.raises(KilledError):
            train_in_rounds(study, 2, request, train=trainer(study), on_round=on_round)
    assert len(read_rounds(study)) == (moment != "before the record")
    train_in_rounds(study, 2, request, train=trainer(study))
    assert outcome(study) == outcome(undisturbed)


def test_a_proposed_row_that_was_changed_is_refused(new_study: NewStudy) -> None:
    study = new_study()
    train_in_rounds(study, 1, ProposalRequest(num=2), train=trainer(study))
    lines = study.mixtures_path.read_text().splitlines()
    lines[-1] = f"{lines[-1].split(',')[0]},0.2,0.3,0.5"
    study.mixtures_path.write_text("\n".join(lines) + "\n")
    with pytest.raises(StudyError, match=r"mixture 14 is not that of round 1.*Restore the row"):
        train_in_rounds(study, 1, ProposalRequest(num=2), train=trainer(study))


def test_rounds_of_another_version_are_refused(new_study: NewStudy) -> None:
    study = new_study()
    (study.path / "rounds.json").write_text('{"version": 2, "rounds": []}')
    with pytest.raises(StudyError, match="made by another version"):
        read_rounds(study)


def test_a_round_is_told_with_its_rule_and_what_is_expected(new_study: NewStudy) -> None:
    study = new_study()
    trainer(study)()
    words = "\n".join(told(add_round(study, ProposalRequest(num=4))))
    assert "mixtures 13 to 16, proposed from 12 proxies" in words
    assert "1 drawn at random" in words
    assert "3 by 'precision+lcb'" in words
    assert "nats; the best proxy so far has" in words


def invoke(command: Any, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_command_proposes_and_names_the_next_one(new_study: NewStudy) -> None:
    study = new_study()
    trainer(study)()
    result = invoke(mixtures_command.command, study.path, "--propose", 4, "--rule", "lcb")
    assert result.exit_code == 0, result.output
    assert "Round 1: mixtures 13 to 16" in result.output
    assert "by 'lcb'" in result.output
    assert f"Next: regmix-fast proxies {study.path}" in result.output
    assert len(MixtureTable.read_csv(study.mixtures_path)) == 16


@pytest.mark.parametrize(
    ("command", "words", "error"),
    [
        (mixtures_command.command, ("--propose", 4, "--num", 8), "--num has no use with --propose"),
        (mixtures_command.command, ("--rule", "lcb"), "--rule has no use without --propose"),
        (proxies_command.command, ("--per-round", 4), "--per-round has no use without --rounds"),
        (proxies_command.command, ("--rounds", 1, "--rule", "lbc"), "did you mean 'lcb'"),
    ],
)
def test_options_without_use_are_refused(
    new_study: NewStudy, command: Any, words: tuple[object, ...], error: str
) -> None:
    result = invoke(command, new_study().path, *words)
    assert result.exit_code != 0
    assert error in str(result.exception)


def test_a_command_killed_in_its_round_ends_as_if_it_had_not_been(new_study: NewStudy) -> None:
    study, again = new_study("killed"), new_study("again")
    words = [str(study.path), "--rounds", "1", "--per-round", "2", "--workers", "1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "regmix.cli", "proxies", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (study.path / "rounds.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert len(read_rounds(study)) == 1
    result = invoke(proxies_command.command, *words)
    found = json.loads(result.stdout)
    assert [entry["indices"] for entry in found["rounds"]] == [[13, 14]]
    assert (found["num_done"], found["num_pending"]) == (14, 0)
    # The round is what the losses of the swarm alone say, and the table has it once.
    lines = study.losses_path.read_text().splitlines(keepends=True)
    again.losses_path.write_text("".join(lines[:13]))
    add_round(again, ProposalRequest(num=2))
    for name in ("rounds.json", "mixtures.csv"):
        assert (again.path / name).read_bytes() == (study.path / name).read_bytes()
    finished = invoke(proxies_command.command, *words)
    assert json.loads(finished.stdout)["trained_now"] == 0
    assert "Then" not in finished.stderr
