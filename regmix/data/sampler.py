"""Batches as a pure function of the seed, the mixture and the step.

Enters: packed shards, a mapping {domain: weight}, a sequence length T and a batch size B. Leaves:
int64 batches [B, T+1], one token shared between a sequence and the next for the label. Any step can
be asked for, in any order; step s holds sequences s B + 1 to (s + 1) B of the order that `order.py`
defines. Trains nothing, verifies no checksum, knows no rank: a rank takes its rows of the batch.
"""

from __future__ import annotations

import bisect
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regmix.data.backends import available_backends, load_backend
from regmix.data.order import (
    COUNT,
    ORDER_VERSION,
    WEIGHT_SUM,
    hash_key,
    integer_weights,
    mix_key,
    order_table,
    start_dealing,
)
from regmix.errors import ConfigError, MixtureError, ShardError, nearest

__all__ = [
    "ORDER_VERSION",
    "DomainPlan",
    "MixtureSampler",
    "Shards",
    "StackSampler",
    "available_backends",
]

# Going back replays at most this many steps; a snapshot is 8 bytes per domain.
SNAPSHOT_STEPS = 256


class Shards(Protocol):
    """What the sampler needs of a `ShardSet`."""

    def domains(self, split: str) -> tuple[str, ...]:
        """Return the domains of a split."""

    def arrays(self, split: str, domain: str) -> tuple[NDArray[Any], ...]:
        """Return the token arrays of a domain, in order."""


@dataclass(frozen=True, kw_only=True)
class DomainPlan:
    """What a run takes from one domain."""

    sequences: int
    """Sequences dealt."""
    tokens: int
    """Tokens trained on: sequences times the sequence length."""
    epochs: float
    """Passes over the domain, or over its pool where it has one."""


class MixtureSampler:
    """Batches of one mixture.

    Raises `MixtureError` for weights that are invalid or name an unknown domain, `ShardError` for a
    weighted domain without one whole sequence, `ConfigError` for a size or backend out of range.
    `pool` caps domains at their first M sequences, {domain: M}.
    """

    def __init__(
        self,
        shards: Shards,
        mixture: Mapping[str, float],
        *,
        seq_len: int,
        batch_size: int,
        data_seed: int = 0,
        split: str = "train",
        pool: Mapping[str, int] | None = None,
        backend: str = "auto",
    ) -> None:
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", cure="Use a whole number of at least 1")
        self.seq_len, self.batch_size = operator.index(seq_len), operator.index(batch_size)
        self.data_seed, self.split = operator.index(data_seed), split
        self._weights = _dealt_weights(mixture, shards.domains(split))
        self.domains = tuple(self._weights)
        arrays = [_token_arrays(shards, split, domain, self.seq_len) for domain in self.domains]
        sizes = [(sum(map(len, files)) - 1) // self.seq_len for files in arrays]
        self.num_sequences = dict(zip(self.domains, sizes, strict=True))
        self._pools = _pools(pool or {}, self.num_sequences, shards.domains(split))
        keys = [hash_key("domain", self.data_seed, domain) for domain in self.domains]
        self._step_key = hash_key("step", self.data_seed)
        self._table = order_table(
            list(self._weights.values()), sizes, list(self._pools.values()), keys
        )
        self._backend = load_backend(backend)
        self._gather = self._backend.gather(arrays, self.seq_len)
        self._snapshot_steps: list[int] = []
        self._snapshots: list[tuple[int, ...]] = []
        self._set(0, (0,) * len(self.domains))
        self._last_step: int | None = None
        self._last_domains = np.empty(self.batch_size, dtype=np.int64)
        self._last_sequences = np.empty(self.batch_size, dtype=np.int64)

    @property
    def backend_name(self) -> str:
        """The backend in use: native, numba or numpy."""
        return self._backend.name

    @property
    def weights(self) -> dict[str, int]:
        """The weights as dealt: integers that sum to 2^50, positive ones only."""
        return dict(self._weights)

    def batch(self, step: int, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the tokens of a step, int64 [B, T+1]; written into `out` where it is given."""
        shape = (self.batch_size, self.seq_len + 1)
        if out is None:
            out = np.empty(shape, dtype=np.int64)
        elif out.shape != shape or out.dtype != np.int64 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous int64 array of shape {shape}")
        self._order(step)
        self._gather.fill(self._last_domains, self._last_sequences, out)
        return out

    def ids(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, in batch order, the index into `domains` and the sequence within it, [B] each."""
        self._order(step)
        return self._last_domains.copy(), self._last_sequences.copy()

    def counts(self, step: int) -> dict[str, int]:
        """Return the sequences dealt of each domain before `step`."""
        self._seek(step)
        return dict(zip(self.domains, self._dealing[COUNT].tolist(), strict=True))

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint at the start of `step` keeps: plain JSON values."""
        return {**self._identity(), "step": operator.index(step), "counts": self.counts(step)}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take up a run at the step of `state`, without replay, and return that step.

        Raises `MixtureError` where the state belongs to another order.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise MixtureError(
                    f"The saved data order differs in '{name}': saved {state.get(name)!r}, "
                    f"now {ours!r}",
                    cure="Resume with the shards, mixture and settings of the run that was saved",
                )
        step = state.get("step")
        counts = _saved_counts(state.get("counts"), self._weights, step, self.batch_size)
        if counts is None or not isinstance(step, int):
            raise MixtureError(
                f"The counts saved for step {step!r} do not belong to this mixture",
                cure="The checkpoint is damaged: resume from an earlier one",
            )
        self._set(step, counts)
        self._remember(step, counts)
        return step

    def plan(self, num_steps: int, *, max_epochs: float | None = None) -> dict[str, DomainPlan]:
        """Return exactly what `num_steps` steps take from each domain.

        Raises `MixtureError` where a domain would be passed over more than `max_epochs` times.
        """
        plans = {
            domain: DomainPlan(
                sequences=count, tokens=count * self.seq_len, epochs=count / self._pools[domain]
            )
            for domain, count in self.counts(num_steps).items()
        }
        for domain, plan in plans.items():
            if max_epochs is not None and plan.epochs > max_epochs:
                raise MixtureError(
                    f"{num_steps:,} steps pass {plan.epochs:.2f} times over domain '{domain}', "
                    f"which may be repeated {max_epochs:g} times ({plan.sequences:,} sequences "
                    f"asked, {self._pools[domain]:,} there)",
                    cure="Lower its weight, train for fewer steps, or allow more epochs",
                )
        return plans

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "data_seed": self.data_seed,
            "split": self.split,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "weights": dict(self._weights),
            "num_sequences": dict(self.num_sequences),
            "pool": dict(self._pools),
        }

    def _order(self, step: int) -> None:
        """Put the ids of `step` into the last ids, and the dealing behind it."""
        step = operator.index(step)  # a NumPy integer would overflow in the key
        if step == self._last_step:
            return
        self._seek(step)
        self._last_step = None  # a failure below must not leave half-written ids under a step
        first = step * self.batch_size + 1
        key = mix_key(self._step_key, step)
        self._backend.order(
            self._table, self._dealing, first, key, self._last_domains, self._last_sequences
        )
        self._last_step = step
        self._position = step + 1
        self._snapshot()

    def _seek(self, step: int) -> None:
        """Put the dealing at the start of `step`, by replay from the nearest place before it."""
        step = operator.index(step)
        if step == self._position:
            return
        if step < 0:
            raise ConfigError(f"step is {step}", cure="Steps count from 0")
        nearest_snapshot = bisect.bisect_right(self._snapshot_steps, step) - 1
        snapshot_step = self._snapshot_steps[nearest_snapshot] if nearest_snapshot >= 0 else 0
        if not snapshot_step <= self._position <= step:
            start = (0,) * len(self.domains)
            counts = self._snapshots[nearest_snapshot] if nearest_snapshot >= 0 else start
            self._set(snapshot_step, counts)
        while self._position < step:
            ahead = min(step, self._position - self._position % SNAPSHOT_STEPS + SNAPSHOT_STEPS)
            first = self._position * self.batch_size + 1
            num = (ahead - self._position) * self.batch_size
            self._backend.advance(self._table, self._dealing, first, num)
            self._position = ahead
            self._snapshot()

    def _set(self, step: int, counts: Sequence[int]) -> None:
        self._position = step
        self._dealing: NDArray[np.int64] = start_dealing(self._table, counts)

    def _snapshot(self) -> None:
        if self._position % SNAPSHOT_STEPS == 0:
            self._remember(self._position, tuple(self._dealing[COUNT].tolist()))

    def _remember(self, step: int, counts: tuple[int, ...]) -> None:
        place = bisect.bisect_left(self._snapshot_steps, step)
        if place == len(self._snapshot_steps) or self._snapshot_steps[place] != step:
            self._snapshot_steps.insert(place, step)
            self._snapshots.insert(place, counts)


class StackSampler:
    """Batches of a stack of P mixtures that share T and B."""

    def __init__(self, samplers: Sequence[MixtureSampler]) -> None:
        shapes = {(sampler.batch_size, sampler.seq_len) for sampler in samplers}
        if not shapes:
            raise ConfigError("The stack holds no sampler", cure="Give it at least one")
        if len(shapes) != 1:
            raise ConfigError(
                f"A stack of samplers has the (batch size, sequence length) {sorted(shapes)}",
                cure="Give all proxies of a stack one batch size and one sequence length",
            )
        self.samplers = tuple(samplers)
        self.batch_size, self.seq_len = shapes.pop()

    def batch(self, step: int, out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the tokens of a step, int64 [P, B, T+1]; written into `out` where it is given."""
        shape = (len(self.samplers), self.batch_size, self.seq_len + 1)
        if out is None:
            out = np.empty(shape, dtype=np.int64)
        elif out.shape != shape:
            raise ValueError(f"out must be a contiguous int64 array of shape {shape}")
        for sampler, rows in zip(self.samplers, out, strict=True):
            sampler.batch(step, out=rows)
        return out


def _dealt_weights(mixture: Mapping[str, float], known: Sequence[str]) -> dict[str, int]:
    for domain in mixture:
        if domain not in known:
            raise MixtureError(
                f"The mixture names a domain that the shards do not have, '{domain}' "
                f"({nearest(domain, known)})",
                cure="Correct the name, or pack that domain",
            )
    integers = integer_weights(mixture)
    lost = [domain for domain in integers if mixture[domain] > 0 and integers[domain] == 0]
    if lost:
        warnings.warn(
            f"The weight of {', '.join(lost)} is below 1/{WEIGHT_SUM:,} and counts as zero.",
            RuntimeWarning,
            stacklevel=3,
        )
    return {domain: integer for domain, integer in integers.items() if integer}


def _token_arrays(
    shards: Shards, split: str, domain: str, seq_len: int
) -> tuple[NDArray[Any], ...]:
    arrays = shards.arrays(split, domain)
    tokens = sum(map(len, arrays))
    if tokens < seq_len + 1:
        raise ShardError(
            f"Domain '{domain}' has {tokens:,} tokens, fewer than one sequence of {seq_len:,} "
            "and its label",
            cure="Give it weight 0, add documents, or use shorter sequences",
        )
    for array in arrays:
        if array.dtype not in (np.uint16, np.uint32) or not array.flags.c_contiguous:
            raise ShardError(
                f"Domain '{domain}' holds tokens of type {array.dtype}",
                cure="Pack the corpus again: tokens are contiguous uint16 or uint32",
            )
    return arrays


def _pools(
    pool: Mapping[str, int], num_sequences: Mapping[str, int], known: Sequence[str]
) -> dict[str, int]:
    """Return the sequences to draw from per domain: the cap, or all there are."""
    for domain, cap in pool.items():
        if domain not in known:
            raise MixtureError(
                f"The pool names an unknown domain, '{domain}' ({nearest(domain, known)})",
                cure="Correct the name",
            )
        available = num_sequences.get(domain, cap)
        if not 1 <= cap <= available:
            raise MixtureError(
                f"The pool of domain '{domain}' is {cap:,} sequences; {available:,} are there",
                cure=f"Use a number from 1 to {max(available, 1):,}, or leave the domain out",
            )
    return {domain: operator.index(pool.get(domain, num)) for domain, num in num_sequences.items()}


def _saved_counts(
    saved: object, weights: Mapping[str, int], step: object, batch_size: int
) -> tuple[int, ...] | None:
    """Return `saved` in the order of `weights` if it can be what is dealt at `step`."""
    if not isinstance(step, int) or step < 0 or not isinstance(saved, Mapping):
        return None
    counts = tuple(saved[domain] for domain in weights if type(saved.get(domain)) is int)
    if not len(counts) == len(weights) == len(saved):
        return None
    dealt = step * batch_size
    fits = sum(counts) == dealt and all(
        abs(count * WEIGHT_SUM - weight * dealt) < WEIGHT_SUM
        for count, weight in zip(counts, weights.values(), strict=True)
    )
    return counts if fits else None
