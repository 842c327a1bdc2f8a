"""Which mixtures to train next: rules that score candidates, and batches that are spread out.

Enters: candidate mixtures, the runs so far, and what is expected of the candidates. Leaves: the
positions of those to train, in the order of choice. Draws no candidates and fits nothing.

A batch is chosen one by one, and each choice counts as a run from then on. The covariance is
conditioned on it (its loss is taken to be the predicted one: the kriging believer of Ginsbourger
et al., 2010), and distances are measured to it as well.

Legend: N candidates, K runs, D domains, R references, S members of the blend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from regmix.errors import ConfigError, MixtureError, nearest

DEFAULT_RULE = "precision+lcb"
# The share of a batch that is drawn at random.
DEFAULT_EXPLORE = 0.25
# The share of mixtures that counts as near the optimum.
BEST_SHARE = 0.25
# Candidates nearer than this in sqrt(p) are one mixture: a weight of 1e-6 against 0.
_SAME = 1e-3
# A run this near to another one tells little more, however low the prediction there: where the
# surface is known well, nothing else keeps a batch apart. Half the largest distance where that is
# less. Batches on a stand-in fitted to the published runs lie 0.15 apart without it.
_APART = 0.05
_JITTER = 1e-9


@dataclass(frozen=True, eq=False)
class Candidates:
    """Mixtures that could be trained, and what is expected of them, in nats of the objective.

    weights [N, D]; runs [K, D]: mixtures that have a proxy or will; mean [N]; covariance [N, N] of
    the predicted surface; noise [N]: variance of a proxy around it; members [S, N]: the prediction
    of each member; importance [N]: how much an error there would matter, see `importance`.
    """

    weights: np.ndarray
    runs: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    members: np.ndarray
    importance: np.ndarray


def importance(mean: np.ndarray, reference: np.ndarray, share: float = BEST_SHARE) -> np.ndarray:
    """Return [N]: from 1 at the best of `reference` [R] down to 0 at its best `share`, by rank."""
    below = np.searchsorted(np.sort(reference), mean) / len(reference)
    return np.asarray(np.maximum(0.0, 1 - below / share))


def distances(weights: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return [N]: how far in sqrt(p) each mixture [N, D] is from the nearest of `others` [K, D]."""
    left, right = np.sqrt(weights), np.sqrt(others)
    nearest_squared = np.full(len(left), np.inf)
    for row in right:
        nearest_squared = np.minimum(nearest_squared, ((left - row) ** 2).sum(1))
    return np.sqrt(nearest_squared)


class _State:
    """What a rule sees: the candidates after the choices made so far."""

    def __init__(self, candidates: Candidates, seed: int) -> None:
        self.mean, self.noise = candidates.mean, candidates.noise
        self.importance = candidates.importance
        self.disagreement = np.ptp(candidates.members, axis=0)
        self.covariance = candidates.covariance.copy()
        self.distance = distances(candidates.weights, candidates.runs)
        self.rng = np.random.default_rng(seed)
        # Nats are measured against the spread of the predictions, so that rules need no unit.
        self.spread = max(float(self.mean.std()), 1e-12)
        self._weights = candidates.weights

    @property
    def variance(self) -> np.ndarray:
        """The variance [N] of the surface."""
        return np.maximum(np.diag(self.covariance), 0.0)

    def take(self, position: int) -> None:
        """Count a candidate as a run."""
        away = distances(self._weights, self._weights[position][None])
        self.distance = np.minimum(self.distance, away)
        column = self.covariance[:, position].copy()
        known = column[position] + self.noise[position]
        self.covariance -= np.outer(column, column) / max(known, 1e-300)


def _promise(state: _State) -> np.ndarray:
    return state.mean


def _lcb(state: _State) -> np.ndarray:
    return state.mean - np.sqrt(state.variance)


def _promise_and_distance(state: _State) -> np.ndarray:
    return state.mean / state.spread - state.distance


def _disagreement(state: _State) -> np.ndarray:
    return _promise_and_distance(state) - state.disagreement / state.spread


def _thompson(state: _State) -> np.ndarray:
    """The mean plus one draw from the joint posterior of all candidates."""
    size = len(state.mean)
    jitter = _JITTER * max(float(state.variance.mean()), 1e-12)
    values, vectors = np.linalg.eigh(state.covariance + jitter * np.eye(size))
    scale = np.sqrt(np.maximum(values, 0.0))
    return state.mean + vectors @ (scale * state.rng.standard_normal(size))


def _precision(state: _State) -> np.ndarray:
    """Minus the variance that a run there takes from the predictions that matter (Cohn, 1996)."""
    removed = state.importance @ state.covariance**2
    return -removed / np.maximum(state.variance + state.noise, 1e-300)


def _distance(state: _State) -> np.ndarray:
    return -state.distance


def _random(state: _State) -> np.ndarray:
    return state.rng.random(len(state.mean))


@dataclass(frozen=True)
class Rule:
    """scores: from a state to numbers [N], of which the lowest is chosen; several take turns.

    why: in words, of a mixture; everywhere: whether it looks far from the optimum as well.
    """

    why: str
    scores: tuple[Callable[[_State], np.ndarray], ...]
    everywhere: bool = False


_SUREST = "a run there makes predictions near the optimum surest"
_LOWEST = "the lowest predicted objective less its standard deviation"

RULES = {
    "precision+lcb": Rule(f"by turns: {_SUREST}; {_LOWEST}", (_precision, _lcb)),
    "precision": Rule(_SUREST, (_precision,)),
    "lcb": Rule(_LOWEST, (_lcb,)),
    "promise": Rule("the lowest predicted objective", (_promise,)),
    "promise+distance": Rule("low prediction, far from all runs", (_promise_and_distance,)),
    "disagreement": Rule("low prediction, far from all runs, members at odds", (_disagreement,)),
    "thompson": Rule("the best mixture of a surface that the runs allow", (_thompson,)),
    "distance": Rule("the farthest from all runs", (_distance,), everywhere=True),
    "random": Rule("a random mixture", (_random,), everywhere=True),
}


def find_rule(name: str) -> Rule:
    """Return a rule by name; `ConfigError` names the nearest one."""
    if name not in RULES:
        raise ConfigError(
            f"unknown rule '{name}' ({nearest(name, RULES)})", cure=f"Use one of {', '.join(RULES)}"
        )
    return RULES[name]


def num_explored(num: int, explore: float) -> int:
    """Return how many mixtures of a batch are drawn at random; `ConfigError` for no share."""
    if not 0 <= explore <= 1:
        raise ConfigError(
            f"a share of {explore:g} for exploration", cure="Give a number from 0 to 1"
        )
    return round(explore * num)


def choose(
    candidates: Candidates, num: int, *, rule: str = DEFAULT_RULE, seed: int = 0
) -> np.ndarray:
    """Return the positions [num] of the candidates to train, none of them twice or a run already.

    seed: of the rules that draw. Raises `ConfigError` for an unknown rule, `MixtureError` where
    fewer than `num` candidates differ from the runs and from each other.
    """
    scores = find_rule(rule).scores
    state = _State(candidates, seed)
    chosen: list[int] = []
    for _ in range(num):
        farthest = float(state.distance.max(initial=0.0))
        if farthest <= _SAME:
            raise MixtureError(
                f"only {len(chosen)} of the {num} mixtures asked for differ from all runs",
                cure="Ask for fewer, or loosen the bounds",
            )
        free = state.distance > max(_SAME, min(_APART, farthest / 2))
        score = scores[len(chosen) % len(scores)](state)
        position = int(np.where(free, score, np.inf).argmin())
        chosen.append(position)
        state.take(position)
    return np.array(chosen, dtype=np.int64)
