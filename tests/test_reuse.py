"""A study that keeps another one's ratios: what is kept, what is drawn, what is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from regmix.cli.mixtures import command
from regmix.config import read_toml, write_toml
from regmix.data.groups import KEPT
from regmix.data.mixtures import MixtureTable, read_mixture_yaml, write_mixture_yaml
from regmix.data.packing.pack import pack
from regmix.data.shards import ShardSet
from regmix.errors import MixtureError, StudyError
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, add_mixtures, make_study
from regmix.swarm.reuse import Reuse, plan_reuse

OPTIMUM = {"animals": 0.2, "colours": 0.3, "numbers": 0.5}
DRAWN = SwarmRequest(num=8)
Packed = Callable[..., ShardSet]


@pytest.fixture(scope="module")
def packed(
    tiny_corpus: Path, tiny_shards_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Packed:
    """The tiny corpus with `changes` of its files: name -> another's text, or None to leave out."""

    def make(tokenizer: bool = True, **changes: str | None) -> ShardSet:
        folder = tmp_path_factory.mktemp("other")
        for path in tiny_corpus.glob("*.jsonl"):
            shutil.copy(path, folder / path.name)
        for name, source in changes.items():
            lines = (tiny_corpus / f"{source or name}-0.jsonl").read_text().splitlines()
            (folder / f"{name}-0.jsonl").unlink(missing_ok=True)
            if source is not None:
                # Half of the other's text: a domain of its own, or the same name with other data.
                (folder / f"{name}-0.jsonl").write_text("\n".join(lines[::2]) + "\n")
        kind = (
            {"tokenizer": tiny_shards_path / "tokenizer.json"} if tokenizer else {"train_bpe": 300}
        )
        pack([folder], folder / "shards", valid_fraction=0.15, **kind)
        return ShardSet.open(folder / "shards")

    return make


@pytest.fixture
def old(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    study = new_study(tiny_shards, tiny_training, tmp_path / "old")
    write_mixture_yaml(study.optimum_path, OPTIMUM)
    return study


def new_study(
    shards: ShardSet,
    training: Training,
    path: Path,
    reuse: Reuse | None = None,
    swarm: SwarmRequest = DRAWN,
    source: Path | None = None,
) -> Study:
    return make_study(
        path,
        shards,
        swarm=swarm,
        training=training,
        objective={shards.domains("valid")[0]: 1.0},
        reuse=reuse,
        mixtures_from=source,
    )


def weights_of(study: Study) -> np.ndarray:
    return MixtureTable.read_csv(study.mixtures_path).weights


def test_an_added_domain_leaves_the_others_ratios_frozen(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    reuse = plan_reuse(old, shards)
    assert reuse.groups.ratios == pytest.approx(OPTIMUM)
    assert reuse.groups.names == (KEPT, "sounds")
    assert "by checksum" in reuse.remarks[0]
    study = new_study(shards, tiny_training, tmp_path / "new", reuse=reuse)
    table = weights_of(study)
    assert table.shape == (8, 4)
    assert table[0].tolist() == pytest.approx([0.2, 0.3, 0.5, 0.0])
    assert reuse.groups.representable(table).all()
    assert np.ptp(table[:, 3]) > 0.3
    again = Study.open(study.path).config
    assert again.frozen == reuse.groups.ratios
    assert again.groups is not None
    assert again.groups.names == reuse.groups.names
    assert dict(read_mixture_yaml(study.reused_path)) == dict(reuse.carried)


def test_a_split_domain_is_gone_and_its_parts_are_free(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(numbers=None, low="numbers", high="animals")
    reuse = plan_reuse(old, shards)
    assert reuse.groups.ratios == pytest.approx({"animals": 0.4, "colours": 0.6})
    assert reuse.groups.names == (KEPT, "high", "low")
    assert reuse.gone == {"numbers": 0.5}
    assert any("'numbers' is gone: the 50.00%" in remark for remark in reuse.remarks)
    table = weights_of(new_study(shards, tiny_training, tmp_path / "new", reuse=reuse))
    np.testing.assert_allclose(table[0], [0.4, 0.6, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(3 * table[:, 0], 2 * table[:, 1], atol=1e-9)


def test_a_removed_domain_leaves_its_weight_to_the_others_in_proportion(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    reuse = plan_reuse(old, packed(animals=None), ["colours"])
    assert dict(reuse.carried) == pytest.approx({"colours": 0.375, "numbers": 0.625})
    assert any("'animals' is gone: the 20.00%" in remark for remark in reuse.remarks)
    table = weights_of(new_study(packed(animals=None), tiny_training, tmp_path / "n", reuse=reuse))
    np.testing.assert_allclose(table[0], [0.375, 0.625])


def test_a_removal_alone_leaves_nothing_to_find_and_names_the_mixture(
    old: Study, packed: Packed
) -> None:
    with pytest.raises(StudyError, match=r"the mixture is numbers 62.50%, colours 37.50%"):
        plan_reuse(old, packed(animals=None))


def test_a_domain_with_other_data_is_free(old: Study, packed: Packed) -> None:
    shards = packed(numbers="numbers")
    assert plan_reuse(old, shards).groups.free == ("numbers",)
    reuse = plan_reuse(old, shards, ["numbers", "animals"])
    assert reuse.groups.frozen == ("animals", "numbers")
    assert any("'numbers' is frozen as asked, and its data differs" in r for r in reuse.remarks)


def test_without_the_old_corpus_names_and_token_counts_decide(old: Study, packed: Packed) -> None:
    table = read_toml(old.path / "study.toml")
    write_toml(old.path / "study.toml", {**table, "shards": "nowhere"})
    reuse = plan_reuse(Study.open(old.path), packed(numbers="numbers", sounds="animals"))
    assert reuse.groups.free == ("numbers", "sounds")
    assert "by name and number of tokens" in reuse.remarks[0]


def test_another_tokenizer_keeps_nothing(old: Study, packed: Packed) -> None:
    shards = packed(tokenizer=False, sounds="numbers")
    with pytest.raises(StudyError, match=r"the tokenizer is another.*old study's tokenizer.json"):
        plan_reuse(old, shards)


def test_a_study_without_an_optimum_cannot_be_reused(old: Study, packed: Packed) -> None:
    old.optimum_path.unlink()
    with pytest.raises(StudyError, match="regmix-fast optimize old"):
        plan_reuse(old, packed(sounds="numbers"))


def test_domains_without_weight_have_no_ratio_to_keep(old: Study, packed: Packed) -> None:
    write_mixture_yaml(old.optimum_path, {"animals": 0.0, "colours": 0.0, "numbers": 1.0})
    with pytest.raises(StudyError, match="no weight on animals, colours"):
        plan_reuse(old, packed(numbers="numbers"))


def test_a_frozen_domain_of_weight_zero_is_named(old: Study, packed: Packed) -> None:
    write_mixture_yaml(old.optimum_path, {"animals": 0.0, "colours": 0.5, "numbers": 0.5})
    remarks = plan_reuse(old, packed(sounds="numbers")).remarks
    assert any("'animals' has no weight in the old optimum" in remark for remark in remarks)


def test_an_old_verdict_against_the_optimum_is_repeated(old: Study, packed: Packed) -> None:
    verdict = "keep 'natural': a predicted gain of 0.001 nats"
    old.optimum_path.with_suffix(".json").write_text(json.dumps({"verdict": verdict}))
    assert verdict in plan_reuse(old, packed(sounds="numbers")).remarks[-1]


@pytest.mark.parametrize("name", ["sounds", "animal"])
def test_a_domain_that_both_do_not_share_cannot_be_frozen(
    old: Study, packed: Packed, name: str
) -> None:
    with pytest.raises(StudyError, match=f"'{name}' cannot be frozen"):
        plan_reuse(old, packed(sounds="numbers"), [name])


def test_added_mixtures_keep_the_frozen_ratios(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    reuse = plan_reuse(old, shards)
    study = new_study(shards, tiny_training, tmp_path / "new", reuse=reuse)
    before = study.mixtures_path.read_text()
    add_mixtures(study, SwarmRequest(num=4, seed=3))
    table = MixtureTable.read_csv(study.mixtures_path)
    assert study.mixtures_path.read_text().startswith(before)
    assert table.indices == tuple(range(1, 13))
    assert reuse.groups.representable(table.weights).all()
    assert len(np.unique(table.weights.round(6), axis=0)) == 12


def test_bounds_of_frozen_domains_bound_what_is_drawn(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    swarm = SwarmRequest(num=8, upper={"colours": 0.15}, lower={"animals": 0.04})
    reuse = plan_reuse(old, shards)
    study = new_study(shards, tiny_training, tmp_path / "n", reuse=reuse, swarm=swarm)
    drawn = weights_of(study)[1:]
    assert drawn[:, 1].max() <= 0.15 + 1e-12
    assert drawn[:, 0].min() >= 0.04 - 1e-12


def test_given_mixtures_of_other_ratios_are_refused(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    source = tmp_path / "given.csv"
    source.write_text(
        "index,train_animals,train_colours,train_numbers,train_sounds\n"
        "3,0.1,0.15,0.25,0.5\n4,0.15,0.1,0.25,0.5\n"
    )
    with pytest.raises(MixtureError, match="mixture 4: 'animals'"):
        new_study(shards, tiny_training, tmp_path / "n", plan_reuse(old, shards), source=source)


def test_one_mixture_is_too_few(
    old: Study, packed: Packed, tiny_training: Training, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    with pytest.raises(StudyError, match="the old optimum alone"):
        new_study(
            shards, tiny_training, tmp_path / "n", plan_reuse(old, shards), SwarmRequest(num=1)
        )


def test_frozen_ratios_that_do_not_sum_to_one_are_refused(old: Study) -> None:
    table = read_toml(old.path / "study.toml")
    write_toml(old.path / "study.toml", {**table, "frozen": {"animals": 0.5}})
    with pytest.raises(MixtureError, match=r"sum to 0\.5"):
        Study.open(old.path)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_command_says_what_is_kept_and_draws_fewer(
    old: Study, packed: Packed, tmp_path: Path
) -> None:
    shards = packed(sounds="numbers")
    new = tmp_path / "new"
    result = invoke(new, "--shards", shards.path, "--reuse", old.path, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    assert (
        "Kept of old, by checksum: numbers 50.00%, colours 30.00%, animals 20.00%" in result.output
    )
    assert "Free: sounds" in result.output
    assert len(weights_of(Study.open(new))) == 16
    assert Study.open(new).config.swarm["reuse"] == "old"


def test_freeze_without_reuse_is_refused(packed: Packed, tmp_path: Path) -> None:
    shards = packed(sounds="numbers")
    result = invoke(tmp_path / "new", "--shards", shards.path, "--freeze", "animals")
    assert "--reuse OLD_STUDY" in str(result.exception)
