"""Replicates: one mixture trained again with other seeds, which tells the noise floor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from regmix import cli
from regmix.data.mixtures import MixtureTable
from regmix.data.shards import ShardSet
from regmix.decision.runs import read_runs
from regmix.errors import MixtureError
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, add_mixtures, add_replicates, make_study
from regmix.swarm.sweep import SweepOptions, run_sweep


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    objective = {tiny_shards.domains("valid")[0]: 1.0}
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=5, seed=4),
        training=tiny_training,
        objective=objective,
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, arguments)


def test_replicates_repeat_the_mixture_nearest_to_the_natural_one(study: Study) -> None:
    index, added = add_replicates(study, 3)
    table = MixtureTable.read_csv(study.mixtures_path)
    natural = np.array([study.config.prior[domain] for domain in table.domains])
    distance = ((np.sqrt(table.weights[:5]) - np.sqrt(natural)) ** 2).sum(1)
    row = int(distance.argmin())
    assert index == table.indices[row]
    assert added == table.indices[5:]
    np.testing.assert_array_equal(table.weights[5:], np.repeat(table.weights[[row]], 3, axis=0))


def test_replicates_train_with_other_seeds_and_the_rest_as_before(study: Study) -> None:
    run_sweep(study, SweepOptions(num_workers=1))
    before = read_runs(study.mixtures_path, study.losses_path)
    add_replicates(study, 2, of=1)
    run_sweep(study, SweepOptions(num_workers=1))
    runs = read_runs(study.mixtures_path, study.losses_path)
    np.testing.assert_array_equal(runs.losses[:5], before.losses)
    alike = np.asarray(runs.losses)[[runs.indices.index(1), 5, 6]]
    assert len(np.unique(alike[:, 0])) == 3
    # Other seeds, not another mixture: they differ by far less than the mixtures do.
    assert np.ptp(alike[:, 0]) < np.ptp(np.asarray(before.losses)[:, 0])


def test_a_replicate_is_the_same_whether_trained_at_once_or_later(
    study: Study, tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    add_replicates(study, 1, of=2)
    run_sweep(study, SweepOptions(num_workers=1))
    later = make_study(
        tmp_path / "later",
        tiny_shards,
        swarm=SwarmRequest(num=5, seed=4),
        training=tiny_training,
        objective=dict(study.config.objective),
    )
    run_sweep(later, SweepOptions(num_workers=1))
    add_replicates(later, 1, of=2)
    run_sweep(later, SweepOptions(num_workers=1))
    assert later.losses_path.read_text() == study.losses_path.read_text()


def test_mixtures_drawn_after_replicates_are_new_ones(study: Study) -> None:
    add_replicates(study, 2)
    add_mixtures(study, SwarmRequest(num=4, seed=9))
    table = MixtureTable.read_csv(study.mixtures_path)
    assert len(table) == 11
    assert len(np.unique(table.weights, axis=0)) == 9


def test_an_unknown_mixture_is_named(study: Study) -> None:
    with pytest.raises(MixtureError, match="no mixture 99"):
        add_replicates(study, 2, of=99)


def test_the_command_says_which_mixture_is_trained_again(study: Study) -> None:
    result = run("mixtures", str(study.path), "--replicates", "2", "--of", "3")
    assert result.exit_code == 0, result.output
    assert "Mixture 3 again, with other seeds, as 6 to 7" in result.output
    assert "Next: regmix-fast proxies" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--replicates", "2", "--num", "4"), "--num has no use with --replicates"),
        (("--of", "3", "--add"), "--of has no use with"),
    ],
)
def test_options_without_use_are_refused(
    study: Study, options: tuple[str, ...], words: str
) -> None:
    result = run("mixtures", str(study.path), *options)
    assert result.exit_code != 0
    assert words in str(result.exception) + result.output
