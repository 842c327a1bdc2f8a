"""The data order compiled by Numba: the twin of `order.py`, which says what every step means.

Enters: the arrays of `order.py`. Leaves: the same bytes. Unusable without Numba, so imported only
by the backend that needs it. Every uint64 operand is cast: Numba would make int64 + uint64 a float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from regmix.data.sampling.order import (
    COUNT,
    DEADLINE,
    DEADLINE_SLACK,
    KEY,
    PERIOD,
    POOL,
    RELEASE,
    RELEASE_SLACK,
    REMAINDER,
    ROUNDS,
    SIZE,
    SMALL_BITS,
    SMALL_ROUNDS,
    WEIGHT,
)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)


@njit(cache=True, nogil=True)
def _mix(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@njit(cache=True, nogil=True)
def _permute(index: Any, size: Any, key: Any) -> Any:
    bits = np.uint64(0)
    while (_ONE << bits) < size:
        bits += _ONE
    left_bits = bits >> _ONE
    right_bits = bits - left_bits
    left_mask = (_ONE << left_bits) - _ONE
    right_mask = (_ONE << right_bits) - _ONE
    rounds = SMALL_ROUNDS if bits < np.uint64(SMALL_BITS) else ROUNDS
    value = index
    while True:
        left = value >> right_bits
        right = value & right_mask
        round_key = key
        for number in range(rounds):
            round_key += _GOLDEN
            if number % 2 == 0:
                left ^= _mix(round_key + right) & left_mask
            else:
                right ^= _mix(round_key + left) & right_mask
        value = (left << right_bits) | right
        if value < size:
            return value


@njit(cache=True, nogil=True)
def _deal_one(table: Any, dealing: Any, now: int) -> int:
    best = -1
    for d in range(table.shape[1]):
        if dealing[RELEASE, d] <= now and (
            best < 0 or dealing[DEADLINE, d] < dealing[DEADLINE, best]
        ):
            best = d
    if best < 0:
        raise ValueError("no domain is released: the dealing does not fit `first`")
    weight, period, remainder = table[WEIGHT, best], table[PERIOD, best], table[REMAINDER, best]
    dealing[COUNT, best] += 1
    for time, slack in ((RELEASE, RELEASE_SLACK), (DEADLINE, DEADLINE_SLACK)):
        late = remainder > dealing[slack, best]
        dealing[time, best] += period + late
        dealing[slack, best] += late * weight - remainder
    return best


@njit(cache=True, nogil=True)
def advance(table: Any, dealing: Any, first: int, num: int) -> None:
    """Move `dealing` past sequences `first` to `first + num - 1`."""
    for now in range(first, first + num):
        _deal_one(table, dealing, now)


@njit(cache=True, nogil=True)
def _place(table: Any, d: int, ordinal: int) -> Any:
    size = np.uint64(table[SIZE, d])
    pool = np.uint64(table[POOL, d])
    key = np.uint64(table[KEY, d])
    epoch = np.uint64(ordinal) // pool
    within = np.uint64(ordinal) % pool
    epoch_key = _mix(key + epoch * _GOLDEN)
    if pool == size:
        return np.int64(_permute(within, size, epoch_key))
    if epoch > np.uint64(0):
        within = _permute(within, pool, epoch_key)
    return np.int64(_permute(within, size, _mix(key)))


@njit(cache=True, nogil=True)
def order(
    table: Any, dealing: Any, first: int, step_key: Any, domains: Any, sequences: Any
) -> None:
    """Deal one step from sequence `first` on, into `domains` and `sequences` in batch order."""
    num = len(domains)
    for position in range(num):
        d = _deal_one(table, dealing, first + position)
        domains[position] = d
        sequences[position] = _place(table, d, dealing[COUNT, d] - 1)
    for row in range(num - 1, 0, -1):
        draw = _mix(step_key + np.uint64(row) * _GOLDEN) >> np.uint64(32)
        other = np.int64((draw * np.uint64(row + 1)) >> np.uint64(32))
        domains[row], domains[other] = domains[other], domains[row]
        sequences[row], sequences[other] = sequences[other], sequences[row]
