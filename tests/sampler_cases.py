"""What the tests of the sampler share: shards that show their place, samplers, weights.

A test file starts with `test_`; this one holds no test.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from regmix.data.sampling.sampler import MixtureSampler, available_backends

FAST = "numba" if "native" not in available_backends() else "native"
quick = settings(max_examples=40, deadline=None)
few = settings(max_examples=15, deadline=None)


class FakeShards:
    """Token t of the d-th domain, over all its files, is d * 10,000 + t."""

    def __init__(self, files: Mapping[str, tuple[int, ...]], dtype: type = np.uint16) -> None:
        self._arrays: dict[str, tuple[NDArray[Any], ...]] = {}
        for d, (domain, lengths) in enumerate(sorted(files.items())):
            tokens: NDArray[Any] = (d * 10_000 + np.arange(sum(lengths))).astype(dtype)
            cuts = np.cumsum(lengths)[:-1]
            self._arrays[domain] = tuple(np.ascontiguousarray(a) for a in np.split(tokens, cuts))

    def domains(self, split: str) -> tuple[str, ...]:
        return tuple(sorted(self._arrays))

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        return self._arrays[domain]


SHARDS = FakeShards({"code": (1000,), "news": (300, 17, 4, 500), "web": (2000, 2000), "zoo": (65,)})
MIXTURE = {"code": 0.5, "news": 0.3, "web": 0.2}


def sampler(mixture: Any = MIXTURE, **options: Any) -> MixtureSampler:
    options = {"seq_len": 16, "batch_size": 4, "backend": FAST, **options}
    return MixtureSampler(options.pop("shards", SHARDS), mixture, **options)


def drawn(stream: MixtureSampler, num_steps: int, first: int = 0) -> dict[str, list[int]]:
    """The sequences taken from each domain, in any order within a step."""
    taken: dict[str, list[int]] = {domain: [] for domain in stream.domains}
    for step in range(first, num_steps):
        for d, sequence in zip(*stream.ids(step), strict=True):
            taken[stream.domains[d]].append(int(sequence))
    return taken


def normalised(raw: list[float]) -> dict[str, float]:
    total = sum(raw)
    assume(total > 0)
    return {f"d{number:03d}": value / total for number, value in enumerate(raw)}


weight = st.one_of(
    st.floats(0, 1), st.sampled_from([0.0, 5e-324, 1e-300, 1e-15, 1e-7, 1e-3, 1.0, 1 / 3])
)


@st.composite
def _many_weights(draw: Any) -> tuple[float, ...]:
    """Up to 1,000 weights of a few values, which Hypothesis could not draw one by one."""
    values = draw(st.lists(weight, min_size=1, max_size=5))
    num = draw(st.integers(1, 1000))
    return tuple(values[number % len(values)] for number in range(num))


mixtures = st.one_of(st.lists(weight, min_size=1, max_size=60).map(tuple), _many_weights())


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """End the process with the place of every thread where the block hangs."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
