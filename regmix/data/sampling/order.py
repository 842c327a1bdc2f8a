"""The data order: which sequence of which domain comes next, for ever, from three numbers.

Enters: integer weights, sequences per domain, keys. Leaves: for the i-th sequence of a run (from 1)
its domain and its index within that domain. Reads no token and opens no file.

Three pure functions make the order; `csrc/order.hpp` and `_numba_order.py` repeat them and must
give the same bytes, so a change here is a change there and a new `ORDER_VERSION`.
1. Dealing. Tijdeman's chairman assignment (Discrete Mathematics 32, 1980). With weight w_d, count
   c_d and D domains, the c-th sequence of a domain may be dealt from the release on, the first i
   with w_d i >= c_d + 1/(2(D-1)), and before its deadline, the first i with
   w_d i >= c_d + 1 - 1/(2(D-1)). Among the released domains the earliest deadline wins, ties by
   name. Every prefix is then within one sequence of the request.
2. Permutation. The k-th sequence dealt to a domain of n is the image of k mod n under a keyed
   Feistel network with cycle walking; the key depends on the seed, the domain's name and the epoch.
3. Shuffle. The order within a step is a Fisher-Yates shuffle whose draws come from the seed and
   the step, so that it is the same for any mixture.

Shapes: D domains with a positive weight, N sequences.
"""

from __future__ import annotations

import functools
import heapq
import json
import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from regmix.errors import MixtureError

ORDER_VERSION = 1
WEIGHT_SUM = 1 << 50  # the counts stay exact in int64 and a weight of 1e-15 is still dealt
SUM_TOLERANCE_PARTS = 1_000_000  # the weights sum to 1 within a part in so many

# Rows of the table, int64 [6, D]: what does not change during a run. KEY holds uint64 bits.
WEIGHT, PERIOD, REMAINDER, SIZE, POOL, KEY = range(6)
# Rows of the dealing, int64 [5, D]: what one dealt sequence changes, in its own domain only.
# A slack is weight * time - target, in [0, weight): the exact remainder of the ceiling division.
COUNT, RELEASE, RELEASE_SLACK, DEADLINE, DEADLINE_SLACK = range(5)
NEVER = (1 << 63) - 1  # the release of a domain of weight 0

# A permutation of few elements needs many rounds: 6 rounds left the orders of 5 elements 53% apart
# from uniform, 24 leave none measurable over 100,000 keys.
ROUNDS, SMALL_ROUNDS, SMALL_BITS = 8, 24, 8
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Return integers in proportion to `weights` that sum to 2^50, sorted by domain.

    Largest remainder, ties by name; zero stays zero. Raises `MixtureError` for a weight that is not
    a finite number of at least 0 and for a sum further than 1e-6 from 1.
    """
    if not weights:
        raise MixtureError("The mixture names no domain", cure="Give at least one domain a weight")
    ratios: dict[str, tuple[int, int]] = {}
    for domain in sorted(weights):
        value = weights[domain]
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise MixtureError(
                f"The weight of domain '{domain}' is {value!r}",
                cure="A weight is a number between 0 and 1",
            )
        ratios[domain] = float(value).as_integer_ratio()
    # The denominators are powers of two, so the largest is common to all: exact, without fractions.
    unit = max(denominator for _, denominator in ratios.values())
    exact = {domain: top * (unit // bottom) for domain, (top, bottom) in ratios.items()}
    total = sum(exact.values())
    if abs(total - unit) * SUM_TOLERANCE_PARTS > unit:
        shown = math.fsum(min(float(value), 1e300) for value in weights.values())
        raise MixtureError(
            f"The weights of the mixture sum to {shown:.9g}",
            cure="Weights are fractions of the training tokens: make them sum to 1",
        )
    integers, remainders = {}, {}
    for domain, share in exact.items():
        integers[domain], remainders[domain] = divmod(share * WEIGHT_SUM, total)
    short = WEIGHT_SUM - sum(integers.values())
    by_remainder = sorted(remainders, key=lambda domain: (-remainders[domain], domain))
    for domain in by_remainder[:short]:
        integers[domain] += 1
    return integers


@functools.lru_cache(maxsize=1 << 16)  # a thousand mixtures name the same domains
def hash_key(*parts: str | int) -> int:
    """Return the 64-bit key of some words and numbers under this version of the order."""
    canonical = json.dumps(["regmix order", ORDER_VERSION, *parts], ensure_ascii=True)
    return xxhash.xxh3_64_intdigest(canonical.encode("ascii"))


def mix_key(key: int, number: int) -> int:
    """Return the key of `number` (an epoch or a step) under `key`: splitmix64."""
    mixed = (key + number * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _MIX_1) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _MIX_2) & _MASK
    return mixed ^ (mixed >> 31)


def order_table(
    weights: Sequence[int], sizes: Sequence[int], pools: Sequence[int], keys: Sequence[int]
) -> NDArray[np.int64]:
    """Return the table [6, D] of weights, sequences, pools and keys per domain.

    A weight of 0 is of a domain that other segments of the run draw from.
    """
    weight = np.array(weights, dtype=np.int64)
    divisor = np.maximum(weight, 1)
    rows = [weight, WEIGHT_SUM // divisor, WEIGHT_SUM % divisor]
    rows += [np.array(row, dtype=np.int64) for row in (sizes, pools)]
    rows.append(np.array(keys, dtype=np.uint64).view(np.int64))
    return np.ascontiguousarray(np.stack(rows))


def start_dealing(table: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the dealing [5, D] of a segment that has dealt `counts` [D] sequences so far."""
    positive = np.flatnonzero(table[WEIGHT])
    # 1 / (2(D-1)) in units of 2^-50. Rounding up for the release and down for the deadline changes
    # no comparison: the other side of each is an integer.
    halves = 2 * (len(positive) - 1)
    early, late = (-(-WEIGHT_SUM // halves), WEIGHT_SUM // halves) if halves else (0, 0)
    dealing = np.zeros((5, table.shape[1]), dtype=np.int64)
    dealing[COUNT] = counts
    dealing[RELEASE] = dealing[DEADLINE] = NEVER
    if not counts.any():
        weight = table[WEIGHT, positive]
        for time, slack, target in (
            (RELEASE, RELEASE_SLACK, early),
            (DEADLINE, DEADLINE_SLACK, WEIGHT_SUM - late),
        ):
            dealing[time, positive] = -(-target // weight)
            dealing[slack, positive] = dealing[time, positive] * weight - target
        return dealing
    for d in positive.tolist():  # in Python's integers: a count times 2^50 is beyond int64
        weight, count = int(table[WEIGHT, d]), int(counts[d])
        release_target = count * WEIGHT_SUM + early
        deadline_target = (count + 1) * WEIGHT_SUM - late
        release = -(-release_target // weight)
        deadline = -(-deadline_target // weight)
        dealing[1:, d] = (
            release,
            release * weight - release_target,
            deadline,
            deadline * weight - deadline_target,
        )
    return dealing


def deal(
    table: NDArray[np.int64], dealing: NDArray[np.int64], first: int, num: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Deal sequences `first` to `first + num - 1`; move `dealing` on; return domains and ordinals.

    The ordinal of a sequence is how many of its domain were dealt before it.
    """
    weight, period, remainder = table[:3].tolist()
    count, release, release_slack, deadline, deadline_slack = dealing.tolist()
    waiting = [(time, d) for d, time in enumerate(release)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    domains = np.empty(num, dtype=np.int64)
    ordinals = np.empty(num, dtype=np.int64)
    for position in range(num):
        while waiting and waiting[0][0] <= first + position:
            d = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (deadline[d], d))
        d = heapq.heappop(ready)[1]
        domains[position] = d
        ordinals[position] = count[d]
        count[d] += 1
        # Both targets move by 2^50 = period * weight + remainder: no division is needed.
        for time, slack in ((release, release_slack), (deadline, deadline_slack)):
            late = remainder[d] > slack[d]
            time[d] += period[d] + late
            slack[d] += late * weight[d] - remainder[d]
        heapq.heappush(waiting, (release[d], d))
    dealing[:] = (count, release, release_slack, deadline, deadline_slack)
    return domains, ordinals


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MIX_2)
    return values ^ (values >> np.uint64(31))


def permute(
    index_N: NDArray[np.uint64], size_N: NDArray[np.uint64], key_N: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return the image of each index in [0, size) under the permutation of its size and key."""
    one = np.uint64(1)
    # frexp gives the bit length of size - 1, exactly below 2^53.
    bits = np.frexp((size_N - one).astype(np.float64))[1].astype(np.uint64)
    right_bits = bits - (bits >> one)
    left_mask = (one << (bits >> one)) - one
    right_mask = (one << right_bits) - one
    last_round = np.where(bits < np.uint64(SMALL_BITS), SMALL_ROUNDS, ROUNDS)
    value = index_N.copy()
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value >> right_bits, value & right_mask
        for number in range(int(last_round.max())):
            key = key_N + np.uint64(((number + 1) * _GOLDEN) & _MASK)
            active = number < last_round
            if number % 2 == 0:
                left = np.where(active, left ^ (_mix(key + right) & left_mask), left)
            else:
                right = np.where(active, right ^ (_mix(key + left) & right_mask), right)
        value = np.where(outside, (left << right_bits) | right, value)
        outside = value >= size_N
    return value


def shuffle(num: int, key: int) -> NDArray[np.int64]:
    """Return which dealt sequence each row of a step takes; the bias of a draw is below 2^-22."""
    source = np.arange(num)
    for row in range(num - 1, 0, -1):
        other = (mix_key(key, row) >> 32) * (row + 1) >> 32
        source[row], source[other] = source[other], source[row]
    return source


def order(
    table: NDArray[np.int64],
    dealing: NDArray[np.int64],
    first: int,
    step_key: int,
    domains: NDArray[np.int64],
    sequences: NDArray[np.int64],
) -> None:
    """Deal one step from sequence `first` on, into `domains` and `sequences` in batch order."""
    num = len(domains)
    dealt, ordinals = deal(table, dealing, first, num)
    sizes = table[SIZE].astype(np.uint64)[dealt]
    pools = table[POOL].astype(np.uint64)[dealt]
    keys = table[KEY].view(np.uint64)[dealt]
    epochs, within = np.divmod(ordinals.astype(np.uint64), pools)
    epoch_keys = _mix(keys + epochs * np.uint64(_GOLDEN))
    first_keys = _mix(keys)
    # A capped pool is the start of the first epoch's order; later epochs permute that start.
    capped = pools < sizes
    later = permute(within, pools, epoch_keys)
    within = np.where(capped & (epochs > 0), later, within)
    keys = np.where(capped, first_keys, epoch_keys)
    placed = permute(within, sizes, keys)
    source = shuffle(num, step_key)
    domains[:] = dealt[source]
    sequences[:] = placed[source].astype(np.int64)
