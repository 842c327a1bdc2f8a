"""What the runs so far say of mixtures that could be trained: the blend, without its own error.

Enters: runs and an objective. Leaves: an `Outlook`: predictions of the objective and joint
covariances, as acquisition needs them. A surrogate (`surrogate.fit`) spends ten more fits on its
held-out error and on the law's share; an outlook takes the default share and fits the objective's
targets alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regmix.decision.active.acquisition import Candidates, importance
from regmix.decision.blend import LAW, LAW_SHARES, SMOOTH, sum_of
from regmix.decision.objective import Objective
from regmix.decision.regressors.gp import GPModel
from regmix.decision.regressors.interface import Model
from regmix.decision.regressors.registry import make_regressor
from regmix.errors import LossTableError

# In nats squared: keeps a matrix of runs on one mixture invertible.
_LEAST_NOISE = 1e-12


@dataclass(frozen=True, eq=False)
class Outlook:
    """The Gaussian process and, where there are runs enough, the power law; weights [K, D]."""

    weights: np.ndarray
    objective: Objective
    smooth: GPModel
    law: Model | None

    def mean(self, weights: np.ndarray) -> np.ndarray:
        """Return the predicted objective [N], in nats."""
        parts = [self.smooth.mean(weights)]
        if self.law is not None:
            share = LAW_SHARES[0]
            parts = [(1 - share) * parts[0], share * self.law.mean(weights)]
        return self.objective.value(sum_of(parts))

    def predict(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted objective [N] and its standard deviation, noise included.

        Errors of targets are taken to go together; the true deviation is no larger.
        """
        variance = self.smooth.predict(weights)[1] ** 2 @ self.objective.shares
        return self.mean(weights), np.sqrt(variance)

    def candidates(
        self, weights: np.ndarray, *, reference: np.ndarray, pending: np.ndarray
    ) -> Candidates:
        """Return the mixtures [N, D] as candidates.

        reference [R, D]: mixtures whose best quarter says what is near the optimum; pending
        [P, D]: mixtures without losses that will be trained.
        """
        every = np.concatenate([weights, pending])
        surface = np.tensordot(self.objective.shares, self.smooth.covariance(every), axes=1)
        noise = np.maximum(self.predict(every)[1] ** 2 - np.diag(surface), _LEAST_NOISE)
        size = len(weights)
        if len(pending):
            # What the pending ones will tell is known before any choice.
            cross = surface[:, size:]
            known = surface[size:, size:] + np.diag(noise[size:])
            surface = surface - cross @ np.linalg.solve(known, cross.T)
        mean = self.mean(weights)
        members = [self.smooth, *([] if self.law is None else [self.law])]
        return Candidates(
            weights=weights,
            runs=np.concatenate([self.weights, pending]),
            mean=mean,
            covariance=surface[:size, :size],
            noise=noise[:size],
            members=np.stack([self.objective.value(one.mean(weights)) for one in members]),
            importance=importance(mean, self.mean(reference)),
        )


def look(weights: np.ndarray, losses: np.ndarray, objective: Objective, seed: int = 0) -> Outlook:
    """Fit the outlook on runs: weights [K, D], losses [K, M] of all targets.

    Raises `LossTableError` where there are fewer runs than the Gaussian process can use.
    """
    x = np.asarray(weights)
    y = np.asarray(losses)[:, list(objective.columns)]
    smooth, law = make_regressor(SMOOTH, seed), make_regressor(LAW, seed)
    check_enough_to_look(len(x), x.shape[1])
    process = smooth.fit(x, y)
    assert isinstance(process, GPModel)
    enough = len(x) >= law.fewest_runs(x.shape[1])
    return Outlook(x, objective, process, law.fit(x, y) if enough else None)


def check_enough_to_look(num_runs: int, num_domains: int) -> None:
    """Raise `LossTableError` where there are fewer runs than the Gaussian process can use."""
    needed = make_regressor(SMOOTH, 0).fewest_runs(num_domains)
    if num_runs < needed:
        raise LossTableError(
            f"{num_runs} runs are too few to propose mixtures from",
            cure=f"Train at least {needed} proxies first; 24 make a good start",
        )
