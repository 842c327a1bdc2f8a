"""Repetition-matched pools: what proxies read, how often, and that nothing else reads them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from regmix.cli.mixtures import command
from regmix.config import read_toml, write_toml
from regmix.data.mixtures import MixtureTable, coverage
from regmix.data.pools import matched_pools, pool_remarks, pool_use
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, ModelError, StudyError
from regmix.large.train import budget_remarks
from regmix.study import Study, Training
from regmix.swarm.cost import Cost
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.engine import StackTrainer, StoppedError
from regmix.swarm.jobs import StackJob
from regmix.swarm.ledger import Ledger
from regmix.swarm.sweep import SweepOptions, Tally, plan_stacks, run_sweep, stack_job, study_member
from tests.sampler_cases import quick

# 100 times the 1,536 tokens of a proxy: pools of a hundredth, which proxies pass over again.
TARGET_TOKENS = 153_600


def pooled_study(
    shards: ShardSet, training: Training, path: Path, target_tokens: int | None = TARGET_TOKENS
) -> Study:
    return make_study(
        path,
        shards,
        swarm=SwarmRequest(num=3),
        training=training,
        objective={"animals": 1.0},
        target_tokens=target_tokens,
    )


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return pooled_study(tiny_shards, tiny_training, tmp_path / "study")


def planned(study: Study) -> StackJob:
    """The one stack of a study with all of its proxies."""
    table = MixtureTable.read_csv(study.mixtures_path)
    with Ledger(study.ledger_path) as ledger:
        shards = study.open_shards()
        (job,) = plan_stacks(study, ledger, table, shards, SweepOptions(num_workers=1))
    return job


def first_of_order(shards: ShardSet, study: Study, domain: str, num: int) -> set[int]:
    """The first sequences that a sampler without pools takes of a domain."""
    seq_len = study.config.proxy.shape.seq_len
    whole = MixtureSampler(shards, {domain: 1.0}, seq_len=seq_len, batch_size=1)
    return {int(whole.ids(step)[1][0]) for step in range(num)}


def test_proxies_read_only_the_sequences_of_the_pool(study: Study, tiny_shards: ShardSet) -> None:
    pools = study.config.pools
    assert pools is not None
    trainer = StackTrainer(planned(study), tiny_shards)
    passed_over = 0
    for sampler in trainer.samplers:
        for number, domain in enumerate(sampler.domains):
            read = [
                int(sequence)
                for step in range(study.config.proxy.num_steps)
                for place, sequence in zip(*sampler.ids(step), strict=True)
                if place == number
            ]
            assert set(read) <= first_of_order(tiny_shards, study, domain, pools[domain])
            passed_over += len(read) > pools[domain]
    assert passed_over > 0, "no proxy repeats a domain: the test shows nothing"


def test_epochs_of_proxies_are_those_of_the_run(study: Study, tiny_shards: ShardSet) -> None:
    config, shape = study.config, study.config.proxy.shape
    trainer = StackTrainer(planned(study), tiny_shards)
    for member, sampler in zip(trainer.job.members, trainer.samplers, strict=True):
        run = MixtureSampler(tiny_shards, member.weights, seq_len=shape.seq_len, batch_size=4)
        num_steps = TARGET_TOKENS // (4 * shape.seq_len)
        for domain, use in run.plan(num_steps).items():
            pool = (config.pools or {})[domain]
            # One sequence more or less dealt, and half a sequence of the pool by rounding.
            allowed = 1 / pool + use.epochs * 0.5 / (pool - 0.5) + 1 / sampler.num_sequences[domain]
            proxy = sampler.plan(config.proxy.num_steps)[domain]
            assert abs(proxy.epochs - use.epochs) <= allowed


def test_the_pool_of_a_longer_run_lies_within_that_of_a_shorter_one(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    studies = [
        pooled_study(tiny_shards, tiny_training, tmp_path / str(times), times * 1536)
        for times in (10, 4, 2)
    ]
    for domain in tiny_shards.domains("train"):
        read = []
        for study in studies:
            pool = (study.config.pools or {})[domain]
            sampler = MixtureSampler(
                tiny_shards, {domain: 1.0}, seq_len=32, batch_size=1, pool={domain: pool}
            )
            # Two epochs, so that later ones are seen to stay within the pool.
            read.append({int(sampler.ids(step)[1][0]) for step in range(2 * pool)})
            assert len(read[-1]) == pool
        assert read[0] < read[1] < read[2]


def test_resume_with_pools_gives_the_bits_of_an_undisturbed_run(
    study: Study, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    job = planned(study)
    elsewhere = dataclasses.replace(job, folder=str(tmp_path / "whole"))
    whole = StackTrainer(elsewhere, tiny_shards).run()
    trainer = StackTrainer(job, tiny_shards)
    with pytest.raises(StoppedError):
        trainer.run(should_stop=lambda: trainer.step >= 7)
    resumed = StackTrainer(job, tiny_shards).run()
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(resumed.train_losses, whole.train_losses)


@pytest.mark.parametrize("change", ["none", "another"])
def test_a_checkpoint_of_other_pools_is_refused(
    study: Study, tiny_shards: ShardSet, change: str
) -> None:
    job = planned(study)
    trainer = StackTrainer(job, tiny_shards)
    with pytest.raises(StoppedError):
        trainer.run(should_stop=lambda: trainer.step >= 2)
    pools = None if change == "none" else {**(job.pools or {}), "animals": 2}
    with pytest.raises(ModelError, match="another stack"):
        StackTrainer(dataclasses.replace(job, pools=pools), tiny_shards).run()


def test_a_sweep_with_pools_trains_other_losses_and_keeps_its_pools_when_moved(
    study: Study, tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(_cost: Cost, _tally: Tally) -> None:
        raise StopError

    options = SweepOptions(num_workers=1)
    job = planned(study)
    with Ledger(study.ledger_path) as ledger:
        ledger.add_stacks([job])
    moved = study.path.rename(tmp_path / "moved")
    with pytest.raises(StopError):
        run_sweep(Study.open(moved), options, on_start=stop)
    result = run_sweep(Study.open(moved), options)
    assert (result.num_done, result.num_failed) == (3, 0)
    with Ledger(moved / "ledger.sqlite") as ledger:
        assert [job.pools for job in ledger.stacks()] == [study.config.pools]
    plain = pooled_study(tiny_shards, tiny_training, tmp_path / "plain", None)
    run_sweep(plain, options)
    assert plain.mixtures_path.read_bytes() == (moved / "mixtures.csv").read_bytes()
    assert plain.losses_path.read_bytes() != (moved / "losses.csv").read_bytes()


def test_a_sweep_whose_pools_were_changed_in_between_is_refused(study: Study) -> None:
    job = planned(study)
    with Ledger(study.ledger_path) as ledger:
        ledger.add_stacks([job])
    table = read_toml(study.path / "study.toml")
    del table["pools"], table["target_tokens"]
    write_toml(study.path / "study.toml", table)
    with pytest.raises(StudyError, match="pools are not those"):
        run_sweep(Study.open(study.path), SweepOptions(num_workers=1))


def test_final_models_read_all_there_is(study: Study, tiny_training: Training) -> None:
    member = study_member(study, "natural-0", dict(study.config.prior))
    assert stack_job(study, "train-x", (member,), tiny_training, 1).pools is None


def test_a_final_model_of_another_size_is_remarked(study: Study, tiny_training: Training) -> None:
    (study.path / "optimum.json").write_text("{}")
    assert tiny_training.tokens != TARGET_TOKENS
    (remark,) = budget_remarks(study, ["optimum"], tiny_training)
    assert "as a run of 154k tokens would; this run has 1.54k" in remark
    same = dataclasses.replace(tiny_training, num_steps=100 * tiny_training.num_steps)
    assert budget_remarks(study, ["optimum"], same) == []


def test_a_study_without_pools_opens_and_has_none(
    tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path
) -> None:
    study = pooled_study(tiny_shards, tiny_training, tmp_path / "plain", None)
    assert not {"pools", "target_tokens"} & set(read_toml(study.path / "study.toml"))
    assert Study.open(study.path).config.pools is None
    assert "pools" not in planned(study).identity()


def test_a_study_reads_its_pools_back(study: Study) -> None:
    again = Study.open(study.path).config
    assert again == study.config
    assert again.target_tokens == TARGET_TOKENS


@given(
    tokens=st.integers(33, 10**9),
    proxy=st.integers(1, 10**7),
    factor=st.floats(1, 1000),
)
@quick
def test_a_pool_is_the_nearest_number_of_sequences(tokens: int, proxy: int, factor: float) -> None:
    target = max(proxy, round(proxy * factor))
    pools = matched_pools({"a": tokens}, seq_len=32, proxy_tokens=proxy, target_tokens=target)
    pool, whole = pools["a"], (tokens - 1) // 32
    assert 1 <= pool.sequences <= whole
    exact = whole * proxy / target
    assert abs(pool.sequences - exact) <= 0.5 or (pool.sequences == 1 and exact < 0.5)


def test_a_pool_below_one_sequence_is_raised_and_said_aloud() -> None:
    tokens = {"rare": 3201, "web": 320_001}
    pools = matched_pools(tokens, seq_len=32, proxy_tokens=10, target_tokens=4000)
    assert pools["rare"].sequences == 1
    (remark,) = pool_remarks(pools)
    assert "'rare' is 1 sequence, the least there can be, where 0.25 would match" in remark
    assert "0.25 times as often" in remark


def test_a_run_shorter_than_a_proxy_is_refused() -> None:
    with pytest.raises(ConfigError, match="shorter than a proxy"):
        matched_pools({"a": 1000}, seq_len=32, proxy_tokens=10_000, target_tokens=9_999)


def test_a_domain_below_one_sequence_has_no_pool() -> None:
    with pytest.raises(ConfigError, match="fewer than one sequence"):
        matched_pools({"a": 32}, seq_len=32, proxy_tokens=10, target_tokens=100)


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"animals": 5, "colours": 5}, "'numbers' is missing"),
        ({"animals": 5, "colours": 5, "numbers": 5, "web": 5}, "'web' names no domain"),
        ({"animals": 0, "colours": 5, "numbers": 5}, "'animals' is 0 sequences"),
        ({"animals": 10**9, "colours": 5, "numbers": 5}, "are there"),
    ],
)
def test_pools_that_do_not_fit_the_study_are_refused(
    study: Study, pools: dict[str, int], message: str
) -> None:
    table = read_toml(study.path / "study.toml")
    write_toml(study.path / "study.toml", {**table, "pools": pools})
    with pytest.raises(ConfigError, match=message):
        Study.open(study.path)


def test_pools_without_the_run_they_match_are_refused(study: Study) -> None:
    table = read_toml(study.path / "study.toml")
    del table["target_tokens"]
    write_toml(study.path / "study.toml", table)
    with pytest.raises(ConfigError, match="belong together"):
        Study.open(study.path)


def test_epochs_that_are_shown_are_those_that_are_dealt(
    study: Study, tiny_shards: ShardSet
) -> None:
    config, table = study.config, MixtureTable.read_csv(study.mixtures_path)
    uses = pool_use(
        config.pools or {},
        coverage(table, config.prior),
        config.available_tokens,
        seq_len=32,
        proxy_tokens=config.proxy.tokens,
        target_tokens=TARGET_TOKENS,
    )
    plans = [
        s.plan(config.proxy.num_steps) for s in StackTrainer(planned(study), tiny_shards).samplers
    ]
    for domain, use in uses.items():
        largest = max(plan[domain].epochs for plan in plans if domain in plan)
        assert use.largest_epochs == pytest.approx(largest, abs=1 / use.sequences)
        assert use.largest_epochs_of_run == pytest.approx(use.largest_epochs, rel=0.1)


def test_the_command_tells_pools_and_epochs(tiny_shards_path: Path, tmp_path: Path) -> None:
    words = [str(tmp_path / "s"), "--shards", str(tiny_shards_path), "--num", "4",
             "--tokens", "5k", "--seq-len", "32", "--target-tokens", "50k"]  # fmt: skip
    shown = CliRunner().invoke(command, words)
    assert shown.exit_code == 0, shown.output
    assert "repeat each domain as a run of 50k tokens would" in shown.output
    words[0] = str(tmp_path / "t")
    told = CliRunner().invoke(command, [*words, "--json"])
    table = json.loads(told.stdout)
    assert Study.open(tmp_path / "t").config.pools == {
        domain: entry["pool"]["sequences"] for domain, entry in table.items()
    }
