"""Large models: trained once, resumed to the same bits, evaluated over whole sets."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from regmix.data.mixtures import Mixture, write_mixture_yaml
from regmix.data.shards import ShardSet
from regmix.errors import MixtureError, ModelError, RegmixError, StudyError
from regmix.large.comparison import FinalModel, compare_models, gains_of, group_models
from regmix.large.evaluate import evaluate_model, load_model
from regmix.large.train import (
    TrainRequest,
    budget_remarks,
    plan_domains,
    resolve_mixture,
    resolve_recipes,
    run_training,
)
from regmix.study import Study, Training
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.events import Event, Progress
from regmix.swarm.sweep import Tally


@pytest.fixture
def study(tiny_shards: ShardSet, tiny_training: Training, tmp_path: Path) -> Study:
    return make_study(
        tmp_path / "study",
        tiny_shards,
        swarm=SwarmRequest(num=4),
        training=tiny_training,
        objective={"animals": 0.5, "numbers": 0.5},
    )


@pytest.fixture
def request_of(study: Study, tiny_training: Training) -> TrainRequest:
    mixtures = dict(resolve_mixture(study, name) for name in ("natural", "uniform"))
    return TrainRequest(
        mixtures=mixtures, replicates=2, training=tiny_training, num_workers=2, threads=1
    )


def weights_of(study: Study) -> dict[str, bytes]:
    return {
        path.parent.name: path.read_bytes()
        for path in sorted(study.models_path.glob("*/model.safetensors"))
    }


def test_every_mixture_and_seed_gives_a_model_of_its_own(
    study: Study, request_of: TrainRequest
) -> None:
    names = run_training(study, request_of)
    assert names == ["natural-0", "natural-1", "uniform-0", "uniform-1"]
    assert len(set(weights_of(study).values())) == 4
    summary = json.loads((study.models_path / "natural-1" / "summary.json").read_text())
    assert summary["mixture"] == "natural"
    assert summary["member"]["data_seed"] == 1
    metrics = (study.models_path / "natural-0" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 12
    assert json.loads(metrics[-1])["tokens"] == request_of.training.tokens
    assert not list(study.stacks_path.glob("train-*"))


def test_training_again_trains_nothing(study: Study, request_of: TrainRequest) -> None:
    run_training(study, request_of)
    before = weights_of(study)
    started = []
    run_training(study, request_of, on_start=lambda cost, _: started.append(cost))
    assert started == []
    assert weights_of(study) == before


def test_other_settings_under_the_same_name_are_refused(
    study: Study, request_of: TrainRequest
) -> None:
    run_training(study, request_of)
    other = dataclasses.replace(request_of.training, batch_size=8)
    with pytest.raises(ModelError, match="other settings"):
        run_training(study, dataclasses.replace(request_of, training=other))


def test_a_stop_in_the_middle_changes_no_bit(
    study: Study, request_of: TrainRequest, tiny_shards: ShardSet, tmp_path: Path
) -> None:
    optim = dataclasses.replace(request_of.training.optim, total_steps=400)
    training = dataclasses.replace(request_of.training, num_steps=400, optim=optim)
    request = dataclasses.replace(request_of, training=training)
    other = make_study(
        tmp_path / "other",
        tiny_shards,
        swarm=SwarmRequest(num=4),
        training=training,
        objective={"animals": 1.0},
    )
    run_training(other, request)

    def interrupt(event: Event, _tally: Tally) -> None:
        if isinstance(event, Progress) and event.step > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(study, request, on_event=interrupt)
    stopped = [json.loads(path.read_text()) for path in study.stacks_path.glob("*/job.json")]
    assert len(stopped) == 2
    # Fewer workers plan other stacks; those that were begun are kept as they are.
    run_training(study, dataclasses.replace(request, num_workers=1))
    assert weights_of(study) == weights_of(other)


def test_the_objective_is_the_weighted_mean_of_its_targets(
    study: Study, request_of: TrainRequest, tiny_shards: ShardSet
) -> None:
    run_training(study, request_of)
    folder = study.models_path / "natural-0"
    stored = json.loads((folder / "evaluation.json").read_text())
    again = evaluate_model(study, folder)
    # Evaluated as a stack of one, trained as a stack of two: float32 rounding apart.
    for name, cell in stored["targets"].items():
        assert again["targets"][name] == pytest.approx(cell, rel=1e-6)
    losses = {name: cell["loss_nats"] for name, cell in stored["targets"].items()}
    assert stored["objective"]["loss_nats"] == pytest.approx(
        (losses["animals"] + losses["numbers"]) / 2
    )
    cell = stored["targets"]["animals"]
    stats = tiny_shards.stats("valid", "animals")
    assert cell["tokens"] == stats.tokens - 1
    assert cell["bits_per_byte"] == pytest.approx(
        cell["loss_nats"] * cell["tokens"] / math.log(2) / stats.utf8_bytes
    )


def test_a_damaged_model_is_refused(study: Study, request_of: TrainRequest) -> None:
    run_training(study, dataclasses.replace(request_of, replicates=1))
    folder = study.models_path / "natural-0"
    shape, parameters, _ = load_model(folder)
    assert all(torch.isfinite(value).all() for value in parameters.values())
    assert shape == request_of.training.shape
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ModelError, match="checksum"):
        load_model(folder)
    path.write_bytes(data[:-100])
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        load_model(folder)


def test_a_model_that_is_not_there_says_how_to_train_it(study: Study) -> None:
    with pytest.raises(ModelError, match="regmix-fast train"):
        load_model(study.models_path / "natural-0")


def test_an_unknown_mixture_is_refused(study: Study) -> None:
    with pytest.raises(MixtureError, match="did you mean 'natural'"):
        resolve_mixture(study, "naturel")


def test_an_optimum_that_is_not_there_says_how_to_find_it(study: Study) -> None:
    with pytest.raises(StudyError, match="regmix-fast optimize"):
        resolve_mixture(study, "optimum")


def test_the_plan_adds_up_to_the_budget(tiny_shards: ShardSet, tiny_training: Training) -> None:
    mixture = Mixture({"animals": 0.75, "colours": 0.25, "numbers": 0.0})
    plan = plan_domains(tiny_shards, mixture, tiny_training)
    assert sum(use.tokens for use in plan.values()) == tiny_training.tokens
    assert plan["animals"].tokens == tiny_training.tokens * 3 // 4


def models_of(mixture: str, losses: dict[int, float], num_steps: int = 60) -> list[FinalModel]:
    return [
        FinalModel(
            name=f"{mixture}-{replicate}",
            mixture=mixture,
            replicate=replicate,
            folder=Path(f"{mixture}-{replicate}"),
            training={"num_steps": num_steps},
            summary={},
            objective=loss,
            losses={},
            bits_per_byte={},
        )
        for replicate, loss in losses.items()
    ]


def test_gains_pair_the_seeds_that_both_have() -> None:
    ours = models_of("optimum", {0: 1.0, 1: 2.0})
    natural = models_of("natural", {2: 9.0, 1: 2.7, 0: 1.5})
    (gain,) = gains_of(group_models([*ours, *natural, *models_of("far", {7: 1.0})]))
    assert gain.baseline == "natural"
    assert gain.pairs_nats == pytest.approx((0.5, 0.7))
    assert gain.num_better == 2
    assert gain.mean_nats == pytest.approx(0.6)
    assert gain.error_nats == pytest.approx(0.1)
    assert "ahead of natural by 0.6000" in str(gain)
    assert gains_of(group_models(natural)) == []


def test_only_models_trained_alike_are_compared() -> None:
    longer = models_of("optimum", {1: 0.5}, num_steps=600)
    results = group_models(
        [*models_of("optimum", {0: 1.0}), *longer, *models_of("natural", {0: 1.5, 1: 1.7})]
    )
    assert [result.mixture for result in results] == ["optimum", "natural"]
    assert results[0].replicates == (0,)
    (gain,) = gains_of(results)
    assert gain.pairs_nats == pytest.approx((0.5,))
    assert gain.error_nats is None


def test_models_are_compared_best_first(study: Study, request_of: TrainRequest) -> None:
    run_training(study, request_of)
    first, second = compare_models(study)
    assert first.mean <= second.mean
    assert first.spread is not None
    assert set(first.models[0].losses) == {"animals", "colours", "numbers"}


def test_a_stack_killed_while_it_was_collected_is_collected_and_not_trained_again(
    study: Study, request_of: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regmix.large import train

    class KilledError(BaseException):
        pass

    write = train.write_json
    summaries = []

    def killed_at_the_second_summary(path: Path, table: object) -> None:
        if path.name == "summary.json":
            summaries.append(path)
            if len(summaries) == 2:
                raise KilledError
        write(path, table)

    request = dataclasses.replace(request_of, num_workers=1)
    monkeypatch.setattr(train, "write_json", killed_at_the_second_summary)
    with pytest.raises(KilledError):
        run_training(study, request)
    monkeypatch.setattr(train, "write_json", write)
    (first,) = study.models_path.glob("*/summary.json")
    kept = first.stat().st_mtime_ns
    steps: list[int] = []

    def note(event: Event, _tally: Tally) -> None:
        if isinstance(event, Progress):
            steps.append(event.step)

    assert len(run_training(study, request, on_event=note)) == 4
    assert steps == []
    assert len(list(study.models_path.glob("*/summary.json"))) == 4
    assert first.stat().st_mtime_ns == kept


def test_a_model_of_another_tokenizer_is_refused(study: Study, request_of: TrainRequest) -> None:
    run_training(study, dataclasses.replace(request_of, replicates=1))
    path = study.models_path / "natural-0" / "config.json"
    config = json.loads(path.read_text())
    config["tokenizer"]["hash"] = "0" * 16
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="another tokenizer"):
        evaluate_model(study, path.parent)


def test_two_mixtures_of_one_name_are_refused(study: Study, tmp_path: Path) -> None:
    for folder, weights in (("a", {"animals": 1.0}), ("b", {"numbers": 1.0})):
        (tmp_path / folder).mkdir()
        write_mixture_yaml(tmp_path / folder / "mix.yaml", weights)
    files = [str(tmp_path / folder / "mix.yaml") for folder in "ab"]
    with pytest.raises(MixtureError, match="called 'mix' too"):
        resolve_recipes(study, files)
    assert list(resolve_recipes(study, [files[0], files[0], "natural"])) == ["mix", "natural"]


def test_a_file_may_not_take_the_name_of_the_studys_own_mixture(
    study: Study, tmp_path: Path
) -> None:
    write_mixture_yaml(tmp_path / "optimum.yaml", {"animals": 1.0})
    with pytest.raises(MixtureError, match="may not be called 'optimum'"):
        resolve_mixture(study, str(tmp_path / "optimum.yaml"))


def test_a_mixture_file_with_an_unknown_domain_is_refused(study: Study, tmp_path: Path) -> None:
    write_mixture_yaml(tmp_path / "mix.yaml", {"animal": 1.0})
    with pytest.raises(MixtureError, match="did you mean 'animals'"):
        resolve_mixture(study, str(tmp_path / "mix.yaml"))


def test_weights_of_another_shape_are_refused(study: Study, request_of: TrainRequest) -> None:
    run_training(study, dataclasses.replace(request_of, replicates=1))
    path = study.models_path / "natural-0" / "config.json"
    config = json.loads(path.read_text())
    config["shape"]["width"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="do not have the shape"):
        load_model(path.parent)


@pytest.mark.parametrize("text", ["{}", "[]", '{"shape": 1, "tokenizer": {"hash": "x"}}'])
def test_damaged_settings_of_a_model_are_refused(
    study: Study, request_of: TrainRequest, text: str
) -> None:
    run_training(study, dataclasses.replace(request_of, replicates=1))
    folder = study.models_path / "natural-0"
    (folder / "config.json").write_text(text)
    with pytest.raises(RegmixError, match=r"config\.json"):
        load_model(folder)


def test_a_model_that_diverged_is_named_and_leaves_nothing_behind(
    study: Study, request_of: TrainRequest
) -> None:
    optim = dataclasses.replace(request_of.training.optim, lr=1e30)
    training = dataclasses.replace(request_of.training, optim=optim)
    request = dataclasses.replace(request_of, training=training, replicates=1)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"-0: .*not finite.*learning-rate"):
            run_training(study, request)
    assert not list(study.models_path.glob("*"))


def test_a_run_longer_than_the_optimums_budget_is_remarked(
    study: Study, tiny_training: Training
) -> None:
    table = {"budget_tokens": tiny_training.tokens, "verdict": "use the optimum: 1 nat"}
    (study.path / "optimum.json").write_text(json.dumps(table))
    assert budget_remarks(study, ["optimum"], tiny_training) == []
    longer = dataclasses.replace(tiny_training, num_steps=24)
    (remark,) = budget_remarks(study, ["optimum"], longer)
    assert "does not hold" in remark
    assert budget_remarks(study, ["natural"], longer) == []
    table["verdict"] = "keep 'natural': within the error"
    (study.path / "optimum.json").write_text(json.dumps(table))
    (remark,) = budget_remarks(study, ["optimum"], tiny_training)
    assert "keep 'natural'" in remark
