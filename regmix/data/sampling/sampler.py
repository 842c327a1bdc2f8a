"""Batches as a pure function of the seed, the mixture and the step.

Enters: packed shards, a mapping {domain: weight} or several of them one after the other, a sequence
length T and a batch size B. Leaves: batches [B, T+1] of int64, int32 or uint16, one token shared
between a sequence and the next for the label. Any step can be asked for, in any order; step s holds
sequences s B + 1 to (s + 1) B of the order that `order.py` defines. Trains nothing, verifies no
checksum, starts no thread (`ring.py` does), knows no rank: a rank takes its rows of the batch.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regmix.data.sampling.backends import Batch, available_backends, load_backend
from regmix.data.sampling.dealer import Dealer
from regmix.data.sampling.order import (
    ORDER_VERSION,
    WEIGHT_SUM,
    hash_key,
    integer_weights,
    order_table,
)
from regmix.data.sampling.token_store import Shards, token_store
from regmix.errors import ConfigError, MixtureError, ShardError, nearest

__all__ = [
    "ORDER_VERSION",
    "DomainPlan",
    "MixtureSampler",
    "Shards",
    "StackSampler",
    "available_backends",
]

_DTYPES = frozenset(np.dtype(kind) for kind in (np.int64, np.int32, np.uint16))

# A mixture for the whole run, or (first step, mixture) pairs, the first at step 0.
Schedule = Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]]


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
    """Batches of one mixture, or of one mixture after the other.

    `mixture` is {domain: weight}, or a list of (first step, {domain: weight}), the first at step 0:
    from its step on each is dealt exactly, and every domain goes on where it was.
    Raises `MixtureError` for weights that are invalid or name an unknown domain, `ShardError` for a
    weighted domain without one whole sequence, `ConfigError` for a size or backend out of range.
    `pool` caps domains at their first M sequences, {domain: M}.
    """

    def __init__(
        self,
        shards: Shards,
        mixture: Schedule,
        *,
        seq_len: int,
        batch_size: int,
        data_seed: int = 0,
        split: str = "train",
        pool: Mapping[str, int] | None = None,
        backend: str = "auto",
    ) -> None:
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size)):
            if not hasattr(value, "__index__") or value < 1:
                raise ConfigError(f"{name} is {value!r}", cure="Use a whole number of at least 1")
        if not hasattr(shards, "arrays"):
            raise ConfigError(
                f"shards is {shards!r}", cure="Open the folder first: regmix.ShardSet.open(folder)"
            )
        self.seq_len, self.batch_size = operator.index(seq_len), operator.index(batch_size)
        self.data_seed, self.split = operator.index(data_seed), split
        known = shards.domains(split)
        self._segments = tuple(
            (step, _dealt_weights(weights, known, split)) for step, weights in _segments(mixture)
        )
        self.domains = tuple(sorted({name for _, weights in self._segments for name in weights}))
        chosen = load_backend(backend)
        self.backend_name = chosen.name
        store = token_store(shards, split, chosen)
        opened = {domain: store.open(shards, domain) for domain in self.domains}
        self.num_sequences = {
            domain: _num_sequences(domain, tokens, self.seq_len)
            for domain, (_, tokens, _) in opened.items()
        }
        self._wide = any(wide for _, _, wide in opened.values())
        self._slots = np.array([slot for slot, _, _ in opened.values()], dtype=np.int64)
        self.gather = store.gather
        self._pools = _pools(pool or {}, self.num_sequences, known)
        self._dealer = self._make_dealer(chosen)
        self._source = (shards, {"pool": dict(pool or {}), "backend": backend})

    def _make_dealer(self, backend: Any) -> Dealer:
        keys = [hash_key("domain", self.data_seed, domain) for domain in self.domains]
        sizes, pools = list(self.num_sequences.values()), list(self._pools.values())
        return Dealer(
            [
                order_table([weights.get(name, 0) for name in self.domains], sizes, pools, keys)
                for _, weights in self._segments
            ],
            [step for step, _ in self._segments],
            batch_size=self.batch_size,
            step_key=hash_key("step", self.data_seed),
            backend=backend,
        )

    def copy(self) -> Self:
        """Return a sampler of the same stream, for another thread: samplers are not shared."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _dealer=self._dealer.copy())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what makes the stream, for the workers of a data loader; they map the shards."""
        shards, chosen = self._source
        options: dict[str, Any] = {
            **chosen,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "data_seed": self.data_seed,
            "split": self.split,
        }
        schedule = [
            (step, {name: weight / WEIGHT_SUM for name, weight in weights.items()})
            for step, weights in self._segments
        ]
        return _rebuilt, (type(self), shards, schedule, options)

    @property
    def weights(self) -> dict[str, int]:
        """The weights as dealt at step 0: integers that sum to 2^50, positive ones only."""
        return dict(self._segments[0][1])

    @property
    def segments(self) -> tuple[tuple[int, dict[str, int]], ...]:
        """The weights as dealt, from which step on."""
        return tuple((step, dict(weights)) for step, weights in self._segments)

    def batch(
        self,
        step: int,
        out: Batch | None = None,
        *,
        dtype: Any = np.int64,
        rows: tuple[int, int] | None = None,
    ) -> Batch:
        """Return the tokens of a step, [B, T+1]; written into `out` where it is given.

        `rows` = (first, last + 1) are the rows of one rank, all where it is None: the batch of a
        step is the same whoever asks for which part. `dtype`, or that of `out`, is int64, int32, or
        uint16 where the corpus stores that.
        """
        if out is None:
            out = np.empty(self.batch_shape(rows), dtype=dtype)
        self.check_out(out, rows)
        self._dealer.order(step)
        domains, sequences = self._dealer.domains, self._dealer.sequences
        if rows is not None:
            domains, sequences = domains[rows[0] : rows[1]], sequences[rows[0] : rows[1]]
        self.gather.fill(self._slots, domains, sequences, self.seq_len, out)
        return out

    def batch_shape(self, rows: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the shape of a batch; `ConfigError` for rows that it does not have."""
        first, last = rows or (0, self.batch_size)
        if not 0 <= first < last <= self.batch_size:
            raise ConfigError(
                f"rows {first} to {last} of a batch of {self.batch_size}",
                cure="Give the first row and the one after the last",
            )
        return (last - first, self.seq_len + 1)

    def check_out(self, out: Batch, rows: tuple[int, int] | None = None) -> None:
        """Raise `ValueError` where a batch cannot be written into `out`."""
        shape = self.batch_shape(rows)
        if not isinstance(out, np.ndarray):
            raise ValueError(f"out is a {type(out).__name__}: of a torch tensor give .numpy()")
        if out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a contiguous array of shape {shape}")
        if out.dtype not in _DTYPES:
            raise ValueError(f"out is of type {out.dtype}: use int64, int32 or uint16")
        if out.dtype == np.uint16 and self._wide:
            raise ValueError("these shards store uint32 tokens, which uint16 cannot hold")

    def ring_member(self, step: int) -> tuple[Any, ...]:
        """Return what the C++ ring needs to deal this stream from `step` on."""
        dealer = self._dealer
        dealing, sequence = dealer.dealing(step)
        segments = [
            (dealer.first_steps[number], dealer.tables[number], dealer.fresh(number))
            for number in range(dealer.segment(step), len(dealer.tables))
        ]
        return segments, dealing, sequence, dealer.step_key, self._slots

    def ids(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, in batch order, the index into `domains` and the sequence within it, [B] each."""
        self._dealer.order(step)
        return self._dealer.domains.copy(), self._dealer.sequences.copy()

    def counts(self, step: int) -> dict[str, int]:
        """Return the sequences dealt of each domain before `step`."""
        counts, _ = self._dealer.counts(step)
        return dict(zip(self.domains, counts.tolist(), strict=True))

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint at the start of `step` keeps: plain JSON values.

        It tells the steps before `step` only, so a run may go on from it in another way.
        """
        identity = self._identity(operator.index(step))
        counts, begun = self._dealer.counts(step)
        for name, values in (("counts", counts), ("begun", begun)):
            named = dict(zip(self.domains, values.tolist(), strict=True))
            identity[name] = {domain: named[domain] for domain in identity["num_sequences"]}
        return {**identity, "step": operator.index(step)}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take up a run at the step of `state`, without replay, and return that step.

        The steps before it must be those of this sampler; the segments after it may be others.
        Raises `MixtureError` where the state belongs to another order.
        """
        step = state.get("step") if isinstance(state, Mapping) else None
        if type(step) is not int or step < 0:
            raise MixtureError(
                f"The data order was saved for step {step!r}",
                cure="The checkpoint is damaged: resume from an earlier one",
            )
        identity = self._identity(step)
        for name, ours in identity.items():
            if state.get(name) != ours:
                raise MixtureError(
                    f"The saved data order differs in '{name}': saved {state.get(name)!r}, "
                    f"now {ours!r}",
                    cure="Resume with the shards, mixture and settings of the run that was saved",
                )
        counts: Any = state.get("counts")
        begun: Any = state.get("begun")
        if not _fit(counts, begun, identity["segments"], step, self.batch_size):
            raise MixtureError(
                f"The counts saved for step {step} do not belong to this mixture",
                cure="The checkpoint is damaged: resume from an earlier one",
            )
        self._dealer.restore(step, self._array(counts), self._array(begun))
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

    def _identity(self, step: int) -> dict[str, Any]:
        """Return all that the steps before `step` depend on."""
        past: list[list[Any]] = [
            [first, dict(weights)]
            for first, weights in self._segments
            if first < step or first == 0
        ]
        dealt = sorted({domain for _, weights in past for domain in weights})
        return {
            "order_version": ORDER_VERSION,
            "data_seed": self.data_seed,
            "split": self.split,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "segments": past,
            "num_sequences": {domain: self.num_sequences[domain] for domain in dealt},
            "pool": {domain: self._pools[domain] for domain in dealt},
        }

    def _array(self, named: Mapping[str, int]) -> NDArray[np.int64]:
        return np.array([named.get(domain, 0) for domain in self.domains], dtype=np.int64)


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

    def batch(
        self,
        step: int,
        out: Batch | None = None,
        *,
        dtype: Any = np.int64,
        rows: tuple[int, int] | None = None,
    ) -> Batch:
        """Return the tokens of a step, [P, B, T+1]; see `MixtureSampler.batch`."""
        if out is None:
            out = np.empty(self.batch_shape(rows), dtype=dtype)
        self.check_out(out, rows)
        for sampler, part in zip(self.samplers, out, strict=True):
            sampler.batch(step, out=part, rows=rows)
        return out

    def batch_shape(self, rows: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the shape of a batch; `ConfigError` for rows that it does not have."""
        return (len(self.samplers), *self.samplers[0].batch_shape(rows))

    def check_out(self, out: Batch, rows: tuple[int, int] | None = None) -> None:
        """Raise `ValueError` where a batch cannot be written into `out`."""
        shape = self.batch_shape(rows)
        if not isinstance(out, np.ndarray) or out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(f"out must be a contiguous array of shape {shape}")
        for sampler, part in zip(self.samplers, out, strict=True):
            sampler.check_out(part, rows)

    def copy(self) -> Self:
        """Return a stack of the same streams, for another thread."""
        return type(self)([sampler.copy() for sampler in self.samplers])


def _rebuilt(
    kind: type[MixtureSampler], shards: Shards, schedule: Schedule, options: dict[str, Any]
) -> MixtureSampler:
    return kind(shards, schedule, **options)


def _segments(mixture: Schedule) -> list[tuple[int, Mapping[str, float]]]:
    if isinstance(mixture, Mapping):
        return [(0, mixture)]
    if isinstance(mixture, str) or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[1], Mapping)
        for pair in mixture
    ):
        raise ConfigError(
            f"mixture is {str(mixture)[:80]!r}",
            cure="Give {domain: weight}, or a list of (first step, {domain: weight})",
        )
    segments = [(operator.index(step), weights) for step, weights in mixture]
    steps = [step for step, _ in segments]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ConfigError(
            f"The mixtures of a run begin at steps {steps}",
            cure="Give (first step, mixture) pairs in order, the first at step 0",
        )
    return segments


def _dealt_weights(
    mixture: Mapping[str, float], known: Sequence[str], split: str
) -> dict[str, int]:
    names = frozenset(known)  # of a thousand, perhaps
    for domain in mixture:
        if domain not in names:
            raise MixtureError(
                f"The mixture names a domain that split '{split}' of the shards does not have, "
                f"'{domain}' ({nearest(domain, known) if known else 'the split has none'})",
                cure="Correct the name or the split, or pack that domain",
            )
    integers = integer_weights(mixture)
    lost = [domain for domain in integers if mixture[domain] > 0 and integers[domain] == 0]
    if lost:
        warnings.warn(
            f"The weight of {', '.join(lost)} is below 1/{WEIGHT_SUM:,} and counts as zero.",
            RuntimeWarning,
            stacklevel=4,
        )
    return {domain: integer for domain, integer in integers.items() if integer}


def _num_sequences(domain: str, tokens: int, seq_len: int) -> int:
    if tokens < seq_len + 1:
        raise ShardError(
            f"Domain '{domain}' has {tokens:,} tokens, fewer than one sequence of {seq_len:,} "
            "and its label",
            cure="Give it weight 0, add documents, or use shorter sequences",
        )
    return (tokens - 1) // seq_len


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


def _fit(counts: Any, begun: Any, segments: list[Any], step: int, batch_size: int) -> bool:
    """Return whether these counts can be what is dealt at `step`, after the last of `segments`."""
    domains = {domain for _, weights in segments for domain in weights}
    for saved in (counts, begun):
        if not isinstance(saved, Mapping) or set(saved) != domains:
            return False
        if not all(type(count) is int and count >= 0 for count in saved.values()):
            return False
    first, weights = segments[-1]
    dealt = (step - first) * batch_size
    return (
        sum(counts.values()) == step * batch_size
        and sum(begun.values()) == first * batch_size
        and all(
            abs((counts[domain] - begun[domain]) * WEIGHT_SUM - weights.get(domain, 0) * dealt)
            < WEIGHT_SUM
            for domain in domains
        )
    )
