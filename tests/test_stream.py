"""The sampler as a torch dataset: any loader, any number of workers and ranks, one stream."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sampler_cases import MIXTURE, SHARDS, no_longer_than, sampler
from torch.utils.data import DataLoader

from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.sampling.stream import MixtureDataset
from regmix.errors import ConfigError, MixtureError

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet

STEPS = 9


@pytest.fixture(autouse=True)
def _hanging_is_failing() -> Iterator[None]:
    with no_longer_than(120), warnings.catch_warnings():
        # Two workers on a machine with one processor work as well, only slower.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # by torchdata
        yield


def dataset(**options: Any) -> MixtureDataset:
    return MixtureDataset(sampler(backend="auto"), **{"num_steps": STEPS, **options})


def steps_of(batches: Any, expected: MixtureSampler | None = None) -> list[int]:
    """The steps of these batches; each must be a whole batch of the stream."""
    stream = expected or sampler()
    known = {stream.batch(step).tobytes(): step for step in range(2 * STEPS)}
    assert len(known) == 2 * STEPS
    return [known[batch.numpy().tobytes()] for batch in batches]


def stateful(data: MixtureDataset, num_workers: int, **options: Any) -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(data, batch_size=None, num_workers=num_workers, **options)


def test_a_plain_loop_gives_the_steps_in_order() -> None:
    batches = list(dataset())
    assert steps_of(batches) == list(range(STEPS))
    assert all(batch.dtype == torch.int64 for batch in batches)
    assert len({batch.data_ptr() for batch in batches}) == STEPS  # each its own memory
    assert steps_of(dataset(start=4)) == list(range(4, STEPS))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_steps_in_order(num_workers: int) -> None:
    loader = DataLoader(dataset(), batch_size=None, num_workers=num_workers)
    assert steps_of(loader) == list(range(STEPS))
    assert steps_of(loader) == list(range(STEPS))  # and again
    assert len(loader) == STEPS


def test_a_loader_of_three_workers_gives_the_steps_in_order() -> None:
    loader = DataLoader(dataset(start=1), batch_size=None, num_workers=3)
    assert steps_of(loader) == list(range(1, STEPS))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_make_the_global_batches(num_ranks: int) -> None:
    parts = [list(dataset(rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    assert all(part[0].shape == (4 // num_ranks, 17) for part in parts)
    assert steps_of(torch.cat(rows) for rows in zip(*parts, strict=True)) == list(range(STEPS))


@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_ranks_that_do_not_fit_the_batch_are_an_error(rank: int, num_ranks: int) -> None:
    with pytest.raises(ConfigError, match="for a batch of 4"):
        dataset(rank=rank, num_ranks=num_ranks)


def test_the_length_is_the_number_of_steps_left() -> None:
    data = dataset(start=2)
    assert len(data) == STEPS - 2
    data.load_state_dict(sampler().state(5))
    assert len(data) == STEPS - 5
    assert len(dataset(start=STEPS + 1)) == 0
    with pytest.raises(TypeError, match="without end"):
        len(dataset(num_steps=None))


def test_a_stream_without_end_goes_on() -> None:
    batches = iter(dataset(num_steps=None))
    assert steps_of(next(batches) for _ in range(2 * STEPS)) == list(range(2 * STEPS))


# --- the place in the stream ---


@pytest.mark.parametrize("taken", [0, 1, 4, 8])
def test_a_state_of_a_plain_loop_goes_on_with_the_next_step(taken: int) -> None:
    data = dataset()
    batches = iter(data)
    assert steps_of(next(batches) for _ in range(taken)) == list(range(taken))
    state = json.loads(json.dumps(data.state_dict()))
    assert state == sampler().state(taken)
    resumed = dataset()
    resumed.load_state_dict(state)
    assert steps_of(resumed) == list(range(taken, STEPS))
    assert steps_of(resumed) == list(range(STEPS))  # the next round begins at the start


def test_a_state_fits_any_number_of_ranks() -> None:
    data = dataset(rank=1, num_ranks=2)
    batches = iter(data)
    next(batches), next(batches)
    parts = [dataset(rank=rank, num_ranks=4) for rank in range(4)]
    for part in parts:
        part.load_state_dict(data.state_dict())
    rows = zip(*(list(part) for part in parts), strict=True)
    assert steps_of(torch.cat(row) for row in rows) == list(range(2, STEPS))


def test_a_state_of_another_stream_is_refused() -> None:
    other = MixtureDataset(sampler({"web": 1.0}), num_steps=STEPS)
    with pytest.raises(MixtureError, match="differs"):
        dataset().load_state_dict(other.state_dict())


def test_a_loaded_state_reaches_the_workers_of_a_plain_loader() -> None:
    data = dataset()
    data.load_state_dict(sampler().state(3))
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert steps_of(loader) == list(range(3, STEPS))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 5, STEPS - 1])
def test_a_stateful_loader_goes_on_with_the_next_step(num_workers: int, taken: int) -> None:
    loader = stateful(dataset(), num_workers)
    batches = iter(loader)
    assert steps_of(next(batches) for _ in range(taken)) == list(range(taken))
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    del batches, loader
    resumed = stateful(dataset(), num_workers)
    resumed.load_state_dict(state)
    assert steps_of(resumed) == list(range(taken, STEPS))


@pytest.mark.parametrize("taken", [1, 3, 4, 7])
def test_a_stateful_loader_with_rare_snapshots_repeats_no_step(taken: int) -> None:
    loader = stateful(dataset(), 2, snapshot_every_n_steps=3)
    batches = iter(loader)
    assert steps_of(next(batches) for _ in range(taken)) == list(range(taken))
    state = loader.state_dict()
    del batches, loader
    resumed = stateful(dataset(), 2, snapshot_every_n_steps=3)
    resumed.load_state_dict(state)
    assert steps_of(resumed) == list(range(taken, STEPS))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_resumed_twice_repeats_no_step(num_workers: int) -> None:
    seen, state = [], None
    for _ in range(3):
        loader = stateful(dataset(), num_workers)
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader)
        seen += steps_of(next(batches) for _ in range(3))
        state = loader.state_dict()
        del batches, loader
    assert seen == list(range(9))


@pytest.mark.parametrize(("num_workers", "kept"), [(0, False), (2, False), (2, True)])
def test_a_stateful_loader_begins_the_next_round_at_the_start(num_workers: int, kept: bool) -> None:
    loader = stateful(dataset(), num_workers, persistent_workers=kept)
    assert steps_of(loader) == list(range(STEPS))
    assert steps_of(loader) == list(range(STEPS))


def test_a_stateful_loader_takes_segments_and_ranks() -> None:
    schedule = [(0, MIXTURE), (4, {"web": 1.0}), (6, {"zoo": 0.5, "code": 0.5})]

    def half(rank: int) -> MixtureDataset:
        return MixtureDataset(sampler(schedule), num_steps=STEPS, rank=rank, num_ranks=2)

    halves = []
    for rank in range(2):
        loader = stateful(half(rank), 2)
        batches = iter(loader)
        first = [next(batches) for _ in range(4)]
        state = loader.state_dict()
        del batches, loader
        resumed = stateful(half(rank), 2)
        resumed.load_state_dict(state)
        halves.append(first + list(resumed))
    rows = (torch.cat(row) for row in zip(*halves, strict=True))
    assert steps_of(rows, sampler(schedule)) == list(range(STEPS))


# --- other processes ---


def test_a_worker_that_was_spawned_reads_the_packed_corpus(tiny_shards: ShardSet) -> None:
    mixture = {"animals": 0.5, "colours": 0.25, "numbers": 0.25}
    stream = MixtureSampler(tiny_shards, mixture, seq_len=32, batch_size=4, data_seed=3)
    loader = stateful(MixtureDataset(stream, num_steps=6), 1, multiprocessing_context="spawn")
    batches = list(loader)
    assert len(batches) == 6
    for step, batch in enumerate(batches):
        assert np.array_equal(batch.numpy(), stream.batch(step))


@pytest.mark.parametrize("shards", ["fake", "packed"])
def test_a_pickle_holds_no_tokens(shards: str, tiny_shards: ShardSet) -> None:
    if shards == "packed":
        stream = MixtureSampler(tiny_shards, {"animals": 1.0}, seq_len=32, batch_size=4)
        stored = sum(len(array) for array in tiny_shards.arrays("train", "animals"))
        pickled = pickle.dumps(MixtureDataset(stream))
        assert len(pickled) < 2 * stored
    else:
        stream = sampler(shards=SHARDS)
        pickled = pickle.dumps(MixtureDataset(stream))
    twin = pickle.loads(pickled)
    assert np.array_equal(next(iter(twin)).numpy(), stream.batch(0))


def test_forked_workers_and_this_process_share_a_sampler() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    data = dataset()
    here = iter(data)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    there = iter(loader)
    for step in range(STEPS):
        assert steps_of([next(here), next(there)]) == [step, step]
