"""Resume: a state at any step, through JSON, goes on exactly where the stream was."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import MIXTURE, FakeShards, few, mixtures, normalised, quick, sampler

from regmix.data.sampling.backends import available_backends
from regmix.data.sampling.dealer import SNAPSHOT_STEPS
from regmix.errors import MixtureError


@given(st.lists(st.integers(0, 700), min_size=1, max_size=12), st.integers(1, 6))
@quick
def test_any_step_in_any_order_is_the_uninterrupted_stream(
    steps: list[int], batch_size: int
) -> None:
    straight, jumping = sampler(batch_size=batch_size), sampler(batch_size=batch_size)
    stream = [straight.batch(step) for step in range(max(steps) + 1)]
    for step in steps:
        assert np.array_equal(jumping.batch(step), stream[step])


@given(st.integers(0, 900), st.integers(0, 900))
@quick
def test_resume_repeats_no_step_and_skips_none(saved_at: int, then: int) -> None:
    state = json.loads(json.dumps(sampler().state(saved_at)))
    resumed = sampler()
    assert resumed.restore(state) == saved_at
    for step in (saved_at, saved_at + 1, then):
        assert np.array_equal(resumed.batch(step), sampler().batch(step))
    assert resumed.state(saved_at) == state


def test_numpy_integers_are_taken_as_numbers() -> None:
    plain = sampler(data_seed=3).batch(5)
    stream = sampler(data_seed=np.int64(3), seq_len=np.int32(16))
    step: Any = np.int64(5)
    assert np.array_equal(stream.batch(step), plain)
    assert json.loads(json.dumps(stream.state(step))) == sampler(data_seed=3).state(5)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 32},
        {"batch_size": 8},
        {"data_seed": 1},
        {"split": "valid"},
        {"pool": {"code": 5}},
        {"mixture": {"code": 0.5, "news": 0.2, "web": 0.3}},
        {"shards": FakeShards({"code": (1001,), "news": (821,), "web": (4100,)})},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_state_of_another_order_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MixtureError, match="saved data order differs"):
        sampler(**change).restore(sampler().state(3))


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(MixtureError, match="order_version"):
        sampler().restore({**sampler().state(3), "order_version": 0})


@pytest.mark.parametrize(
    "damage",
    [
        {"counts": {"code": 12, "news": 0, "web": 0}},
        {"counts": {"code": 6, "news": 4, "web": "2"}},
        {"counts": {"code": 6, "news": 4}},
        {"counts": None},
        {"step": 4},
        {"step": None},
    ],
    ids=str,
)
def test_damaged_counts_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(MixtureError, match="The checkpoint is damaged"):
        sampler().restore({**sampler().state(3), **damage})


def test_a_length_of_run_is_nowhere_in_the_order() -> None:
    stream = sampler()
    before = [stream.batch(step) for step in range(5)]
    stream.plan(5)
    stream.plan(5_000)
    assert all(np.array_equal(stream.batch(step), before[step]) for step in range(5))


@pytest.mark.parametrize("backend", available_backends())
@given(raw=mixtures, saved_at=st.integers(0, 60), batch_size=st.integers(1, 20))
@few
def test_a_state_gives_the_stream_of_any_mixture_to_any_backend(
    backend: str, raw: tuple[float, ...], saved_at: int, batch_size: int
) -> None:
    weights = [value for value in raw[:30] if value > 1e-9]
    mixture = normalised(weights or [1.0])
    shards = FakeShards({domain: (90 + 7 * d,) for d, domain in enumerate(mixture)})
    options: Any = {"shards": shards, "seq_len": 5, "batch_size": batch_size}
    straight = sampler(mixture, **options)
    stream = [straight.batch(step) for step in range(saved_at + 4)]
    resumed = sampler(mixture, backend=backend, **options)
    resumed.restore(json.loads(json.dumps(straight.state(saved_at))))
    for step in range(saved_at, saved_at + 4):
        assert np.array_equal(resumed.batch(step), stream[step])
    if saved_at:  # and what lies before is as it was
        assert np.array_equal(resumed.batch(saved_at - 1), stream[saved_at - 1])


@pytest.mark.parametrize("steps", [[0, 255, 256, 257], [511, 0, 512, 256], [513, 512, 511, 257]])
def test_going_to_and_from_snapshots_changes_nothing(steps: list[int]) -> None:
    assert SNAPSHOT_STEPS == 256
    jumping = sampler()
    for step in steps:
        fresh = sampler()
        assert np.array_equal(jumping.batch(step), fresh.batch(step))
        assert jumping.state(step) == sampler().state(step)
        assert jumping.counts(step + 1) == sampler().counts(step + 1)


def test_asking_for_counts_and_plans_moves_no_stream() -> None:
    stream = sampler()
    for step in range(6):
        stream.plan(300 * step)
        stream.counts(7)
        assert np.array_equal(stream.batch(step), sampler().batch(step))


def test_a_copy_goes_its_own_way() -> None:
    stream = sampler()
    stream.batch(5)
    twin = stream.copy()
    twin.batch(300)
    assert np.array_equal(stream.batch(6), sampler().batch(6))
    assert np.array_equal(twin.batch(301), sampler().batch(301))


def test_a_pickled_sampler_gives_the_same_stream() -> None:
    stream = sampler([(0, MIXTURE), (7, {"web": 1.0, "zoo": 0.0})], pool={"news": 9}, data_seed=3)
    stream.batch(4)
    twin = pickle.loads(pickle.dumps(stream))
    for step in (4, 6, 7, 300):
        assert np.array_equal(twin.batch(step), stream.batch(step))
    assert twin.state(300) == stream.state(300)
    assert twin.backend_name == stream.backend_name


def test_a_state_resumes_a_run_without_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    state = sampler().state(100_000)
    resumed = sampler(backend="numpy")
    resumed.restore(state)

    def refuse(*_: Any) -> None:
        raise AssertionError("replayed")

    monkeypatch.setattr(type(resumed._dealer._backend), "advance", refuse)
    assert np.array_equal(resumed.ids(100_000)[0], sampler().ids(100_000)[0])
