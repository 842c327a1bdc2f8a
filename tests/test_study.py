"""A study's settings and its lock."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from regmix.config import as_table, read_toml, write_toml
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, MixtureError, StudyError
from regmix.study import Study, Training, find_study
from regmix.swarm.drawing import SwarmRequest, add_mixtures, make_study


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=5),
        training=tiny_training,
        objective={"animals": 1.0},
    )


def edited(study: Study, **changes: object) -> None:
    table = read_toml(study.path / "study.toml")
    write_toml(study.path / "study.toml", {**table, **changes})


def test_a_study_reads_back_as_it_was_made(study: Study) -> None:
    assert Study.open(study.path).config == study.config
    assert study.open_shards().domains("train") == ("animals", "colours", "numbers")
    assert sum(study.config.prior.values()) == pytest.approx(1.0)


def test_no_study_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="regmix-fast mixtures"):
        Study.open(tmp_path)


def test_a_second_study_in_one_folder_is_refused(study: Study) -> None:
    with pytest.raises(StudyError, match="already"):
        Study.create(study.path, study.config)


def test_an_unknown_setting_names_the_nearest(study: Study) -> None:
    edited(study, data_sead=4)
    with pytest.raises(ConfigError, match="did you mean 'data_seed'"):
        Study.open(study.path)


def test_a_setting_of_the_wrong_type_is_refused(study: Study) -> None:
    edited(study, data_seed="four")
    with pytest.raises(ConfigError, match="expected int"):
        Study.open(study.path)


def test_malformed_toml_names_the_line(study: Study) -> None:
    (study.path / "study.toml").write_text("a = [1,\nb = ")
    with pytest.raises(ConfigError, match="line 2"):
        Study.open(study.path)


def test_a_newer_study_is_refused_by_version(study: Study) -> None:
    edited(study, version=2)
    with pytest.raises(StudyError, match="another version"):
        Study.open(study.path)


def test_another_corpus_is_refused(study: Study) -> None:
    edited(study, shards_checksum="0" * 16)
    with pytest.raises(StudyError, match="has changed"):
        Study.open(study.path).open_shards()


def test_an_unknown_target_is_refused(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="did you mean 'animals'"):
        make_study(
            tmp_path / "s",
            tiny_shards,
            swarm=SwarmRequest(num=5),
            training=tiny_training,
            objective={"animal": 1.0},
        )


def test_a_domain_below_one_sequence_is_refused(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    shape = dataclasses.replace(tiny_training.shape, seq_len=10**6)
    with pytest.raises(StudyError, match="fewer than one sequence"):
        make_study(
            tmp_path / "s",
            tiny_shards,
            swarm=SwarmRequest(num=5),
            training=dataclasses.replace(tiny_training, shape=shape),
            objective={"animals": 1.0},
        )


def test_mixtures_come_from_a_file_in_the_published_format(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    source = tmp_path / "mixtures.csv"
    source.write_text(
        "index,train_animals,train_colours,train_numbers\n4,0.5,0.25,0.25\n9,1.0,0,0\n"
    )
    made = make_study(
        tmp_path / "s",
        tiny_shards,
        swarm=None,
        training=tiny_training,
        objective={"animals": 1.0},
        mixtures_from=source,
    )
    assert made.mixtures_path.read_text().splitlines()[1].startswith("4,0.5,0.25,0.25")
    source.write_text("index,train_animals,train_sounds\n4,0.5,0.5\n")
    with pytest.raises(MixtureError, match="sounds"):
        make_study(
            tmp_path / "t",
            tiny_shards,
            swarm=None,
            training=tiny_training,
            objective={"animals": 1.0},
            mixtures_from=source,
        )


def test_added_mixtures_keep_those_before_them(study: Study) -> None:
    before = study.mixtures_path.read_text().splitlines()
    extended = add_mixtures(study, SwarmRequest(num=4, seed=1))
    after = study.mixtures_path.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == len(before) + 4
    assert len(set(extended.indices)) == 9


def test_two_writers_exclude_each_other(study: Study) -> None:
    with (
        study.lock(),
        pytest.raises(StudyError, match="in use"),
        study.lock(patience_seconds=0.2),
    ):
        pass
    with study.lock(patience_seconds=0.2):
        pass


def test_a_study_can_be_moved_with_its_corpus(study: Study, tmp_path: Path) -> None:
    import shutil

    shards = study.shards_path
    home = tmp_path / "elsewhere"
    shutil.copytree(shards, home / "shards")
    shutil.copytree(study.path, home / "study")
    edited(Study(home / "study", study.config), shards="../shards")
    assert Study.open(home / "study").open_shards().path == home / "shards"


def test_the_default_study_is_the_current_folder_or_its_child(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.path)
    assert find_study(None) == Path(".")
    monkeypatch.chdir(tmp_path)
    assert find_study(None) == Path("study")
    assert find_study("x") == Path("x")


def test_settings_are_stored_without_the_absent_ones(study: Study) -> None:
    assert "eval_tokens" not in as_table(study.config)["proxy"]


@pytest.mark.parametrize(
    "objective",
    [{}, {"animals": -1.0, "numbers": 2.0}, {"animals": 0.0}, {"animals": float("nan")}],
)
def test_an_objective_that_is_none_is_refused(study: Study, objective: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="objective"):
        dataclasses.replace(study.config, objective=objective)


def test_a_negative_seed_is_refused(study: Study) -> None:
    with pytest.raises(ConfigError, match="data_seed is -1"):
        dataclasses.replace(study.config, data_seed=-1)


def test_the_samplers_constants_can_be_set(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    def drawn(name: str, **options: float) -> bytes:
        study = make_study(
            tmp_path / name,
            tiny_shards,
            swarm=SwarmRequest(num=5, sampler="regmix", options=options or None),
            training=tiny_training,
            objective={"animals": 1.0},
        )
        return study.mixtures_path.read_bytes()

    assert drawn("a") == drawn("b", temperature=0.5, num_strengths=15)
    assert drawn("c", temperature=1.0) != drawn("a2")
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        drawn("d", temperatur=1.0)
