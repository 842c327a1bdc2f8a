"""Mixtures one after the other: exact within each, and no domain repeated or skipped between."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import MIXTURE, SHARDS, few, quick, sampler

from regmix.data.sampling.backends import available_backends
from regmix.data.sampling.dealer import SNAPSHOT_STEPS
from regmix.data.sampling.ring import BatchRing
from regmix.data.sampling.sampler import MixtureSampler
from regmix.errors import ConfigError, MixtureError

Schedule = list[tuple[int, Mapping[str, float]]]
MIXTURES: list[Mapping[str, float]] = [
    MIXTURE,
    {"web": 1.0},
    {"code": 1.0},
    {"news": 0.999999, "zoo": 0.000001},
    {"code": 0.25, "news": 0.25, "web": 0.25, "zoo": 0.25},
    {"code": 0.0, "zoo": 1.0},
    {"code": 1 - 1e-7, "web": 1e-7},
]
# Around the snapshots, and one step long.
STEPS = [1, 2, 3, 40, 255, 256, 257, 300, 511, 512, 513]
COMES_AND_GOES: Schedule = [
    (0, {"code": 0.5, "web": 0.5}),
    (5, {"news": 0.7, "web": 0.3}),
    (9, {"code": 0.1, "zoo": 0.9}),
    (10, MIXTURE),
    (SNAPSHOT_STEPS, {"web": 1.0}),
    (SNAPSHOT_STEPS + 1, {"news": 0.5, "web": 0.5}),
]

schedules = st.builds(
    lambda first, rest: [(0, first), *sorted(rest, key=lambda pair: pair[0])],
    st.sampled_from(MIXTURES),
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.sampled_from(MIXTURES)),
        max_size=4,
        unique_by=lambda pair: pair[0],
    ),
)


def ordinals(stream: MixtureSampler, num_steps: int) -> dict[str, list[int]]:
    """The sequences of each domain in the order of the steps, sorted within a step."""
    taken: dict[str, list[int]] = {domain: [] for domain in stream.domains}
    for step in range(num_steps):
        rows = sorted(zip(*(ids.tolist() for ids in stream.ids(step)), strict=True))
        for d, sequence in rows:
            taken[stream.domains[d]].append(sequence)
    return taken


@given(schedules, st.integers(1, 9))
@few
def test_every_segment_is_within_one_sequence_of_its_own_request(
    schedule: Schedule, batch_size: int
) -> None:
    stream = sampler(schedule, batch_size=batch_size)
    ends = [step for step, _ in schedule[1:]] + [schedule[-1][0] + 20]
    for (first, weights), end in zip(stream.segments, ends, strict=True):
        begun = stream.counts(first)
        for step in {first, first + 1, (first + end) // 2, end}:
            counts = stream.counts(step)
            for domain in stream.domains:
                asked = Fraction(weights.get(domain, 0) * (step - first) * batch_size, 2**50)
                assert abs(counts[domain] - begun[domain] - asked) < 1
                assert domain in weights or counts[domain] == begun[domain]


@given(schedules, st.integers(1, 9))
@few
def test_every_domain_goes_on_where_it_was(schedule: Schedule, batch_size: int) -> None:
    stream = sampler(schedule, batch_size=1)
    taken = ordinals(stream, 600)
    for domain, sequences in taken.items():
        alone = ordinals(sampler({domain: 1.0}, batch_size=1), len(sequences))[domain]
        assert sequences == alone
    many = sampler(schedule, batch_size=batch_size)
    for domain, sequences in ordinals(many, 300).items():
        size = many.num_sequences[domain]
        times = Counter(sequences)  # whole epochs and a part of one
        assert set(times.values()) <= {len(sequences) // size, -(-len(sequences) // size)}
        assert len(times) == min(size, len(sequences))


def test_one_domain_in_all_segments_is_the_stream_without_segments() -> None:
    plain, cut = sampler({"web": 1.0}), sampler([(step, {"web": 1.0}) for step in (0, 3, 256, 300)])
    for step in (0, 2, 3, 4, 255, 256, 299, 300, 301, 700, 5):
        assert np.array_equal(cut.batch(step), plain.batch(step))


def test_a_schedule_of_one_mixture_is_that_mixture() -> None:
    for step in (0, 7, 300):
        assert np.array_equal(sampler([(0, MIXTURE)]).batch(step), sampler().batch(step))
    assert sampler([(0, MIXTURE)]).state(5) == sampler().state(5)


def test_what_comes_later_changes_nothing_before_it() -> None:
    plain, other = sampler(), sampler([(0, MIXTURE), (200, {"zoo": 0.5, "web": 0.5})])
    for step in (0, 100, 199):
        assert np.array_equal(plain.batch(step), other.batch(step))
        assert plain.state(step) == other.state(step)
    assert plain.state(200) == other.state(200)
    assert not np.array_equal(plain.batch(200), other.batch(200))


def test_a_segment_owes_nothing_of_the_one_before() -> None:
    # Steps of one sequence: without a reset the second would be of web, which is owed half of one.
    stream = sampler([(0, {"code": 0.5, "web": 0.5}), (1, {"code": 0.5, "web": 0.5})], batch_size=1)
    assert stream.ids(0)[0].tolist() == stream.ids(1)[0].tolist()


# --- any step, states, plans ---


@pytest.mark.parametrize("backend", available_backends())
@given(schedule=schedules, steps=st.lists(st.sampled_from([0, *STEPS, 600]), max_size=8))
@few
def test_any_step_in_any_order_across_borders_is_the_uninterrupted_stream(
    backend: str, schedule: Schedule, steps: list[int]
) -> None:
    straight, jumping = sampler(schedule), sampler(schedule, backend=backend)
    stream = [straight.batch(step) for step in range(601)]
    for step in steps:
        assert np.array_equal(jumping.batch(step), stream[step])
        assert jumping.state(step) == sampler(schedule).state(step)


@given(schedules, st.one_of(st.sampled_from(STEPS), st.integers(0, 600)))
@quick
def test_resume_at_or_near_any_border_is_the_uninterrupted_stream(
    schedule: Schedule, saved_at: int
) -> None:
    straight = sampler(schedule)
    state = json.loads(json.dumps(straight.state(saved_at)))
    resumed = sampler(schedule)
    assert resumed.restore(state) == saved_at
    for step in (saved_at, saved_at + 1, saved_at + 300, max(saved_at - 1, 0), 0):
        assert np.array_equal(resumed.batch(step), straight.batch(step))
        assert resumed.state(step) == straight.state(step)


def test_asking_at_a_border_leaves_the_state_as_it_was() -> None:
    expected = sampler(COMES_AND_GOES).state(5)
    stream = sampler(COMES_AND_GOES)
    BatchRing(stream, start=5, stop=5).close()
    assert stream.state(5) == expected
    stream.batch(5)
    assert stream.state(5) == expected
    assert stream.copy().state(5) == expected


@pytest.mark.parametrize("border", [5, 10, 256])
def test_a_state_at_a_border_goes_on_with_another_future(border: int) -> None:
    past = [(step, weights) for step, weights in COMES_AND_GOES if step < border]
    state = json.loads(json.dumps(sampler(COMES_AND_GOES).state(border)))
    future: Schedule = [*past, (border, {"zoo": 0.5, "web": 0.5}), (border + 3, {"code": 1.0})]
    resumed, straight = sampler(future), sampler(future)
    resumed.restore(state)
    for step in (border, border + 1, border + 4, border - 1, border + 300):
        assert np.array_equal(resumed.batch(step), straight.batch(step))
    assert resumed.state(border + 4) == straight.state(border + 4)


def test_a_state_within_a_segment_goes_on_with_a_later_change() -> None:
    resumed = sampler([(0, MIXTURE), (8, {"zoo": 1.0})])
    resumed.restore(sampler().state(7))
    straight = sampler([(0, MIXTURE), (8, {"zoo": 1.0})])
    for step in (7, 8, 9):
        assert np.array_equal(resumed.batch(step), straight.batch(step))


@pytest.mark.parametrize(
    "other",
    [
        MIXTURE,
        [(0, {"web": 1.0}), (5, {"news": 0.7, "web": 0.3})],
        [(0, {"code": 0.5, "web": 0.5}), (4, {"news": 0.7, "web": 0.3})],
        [(0, {"code": 0.5, "web": 0.5}), (5, {"news": 0.6, "web": 0.4})],
        [(0, {"code": 0.5, "web": 0.5}), (5, {"news": 0.7, "web": 0.3}), (6, {"web": 1.0})],
    ],
    ids=["no-segments", "other-first", "other-step", "other-second", "one-more"],
)
def test_a_state_of_another_past_is_refused(other: Any) -> None:
    with pytest.raises(MixtureError, match="differs in 'segments'"):
        sampler(other).restore(sampler(COMES_AND_GOES).state(7))


@pytest.mark.parametrize(
    "damage",
    [
        {"begun": {"code": 11, "news": 0, "web": 10}},
        {"begun": {"code": 10, "web": 10}},
        {"begun": None},
        {"counts": {"code": 11, "news": 5, "web": 12}},
    ],
    ids=str,
)
def test_damaged_counts_of_a_segment_are_refused(damage: dict[str, Any]) -> None:
    state = sampler(COMES_AND_GOES).state(7)
    assert state["begun"] == {"code": 10, "news": 0, "web": 10}
    sampler(COMES_AND_GOES).restore(state)
    with pytest.raises(MixtureError, match="The checkpoint is damaged"):
        sampler(COMES_AND_GOES).restore({**state, **damage})


def test_a_plan_across_borders_is_what_the_run_takes() -> None:
    stream = sampler(COMES_AND_GOES, pool={"news": 10})
    for num_steps in (4, 5, 6, 9, 10, 11, 256, 257, 300):
        taken = ordinals(sampler(COMES_AND_GOES, pool={"news": 10}), num_steps)
        plan = stream.plan(num_steps)
        assert {domain: part.sequences for domain, part in plan.items()} == {
            domain: len(sequences) for domain, sequences in taken.items()
        }
        assert plan["news"].epochs == len(taken["news"]) / 10


@pytest.mark.parametrize("backend", ["numpy", *available_backends()[:1]])
@pytest.mark.parametrize("start", [0, 4, 5, 9, 10, 255, 256, 257])
def test_a_ring_across_borders_gives_the_batches_of_the_sampler(backend: str, start: int) -> None:
    stream = sampler(COMES_AND_GOES, backend=backend)
    with BatchRing(stream, start=start, stop=start + 12, threads=2, depth=3) as ring:
        steps = 0
        for step, batch in ring:
            assert np.array_equal(batch, sampler(COMES_AND_GOES).batch(step))
            steps += 1
    assert steps == 12


# --- what is refused ---


@pytest.mark.parametrize(
    "steps", [[], [1], [0, 0], [0, 5, 3], [-1, 0]], ids=lambda steps: str(steps)
)
def test_segments_out_of_order_are_an_error(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match="begin at steps"):
        sampler([(step, MIXTURE) for step in steps])


def test_a_bad_mixture_in_a_later_segment_is_an_error() -> None:
    with pytest.raises(MixtureError, match="did you mean 'code'"):
        sampler([(0, MIXTURE), (9, {"coda": 1.0})])


def test_the_domains_of_a_schedule_are_all_that_are_drawn_from() -> None:
    stream = sampler([(0, {"web": 1.0, "zoo": 0.0}), (3, {"code": 1.0})])
    assert stream.domains == ("code", "web")
    assert set(stream.num_sequences) < set(SHARDS.domains("train"))
