"""The best mixture that a surrogate predicts, under constraints.

Enters: a surrogate, an objective, constraints, baselines. Leaves: an `Optimum`: the mixture, its
predicted losses, its gain over the baselines and a verdict. Every number is at the proxies' scale:
losses of larger models lie elsewhere, their order and the sign of gains carry over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from regmix.data.mixtures import Mixture, normalised
from regmix.decision.baselines import Baseline, make_baselines
from regmix.decision.constraints import Constraints, PerDomain, make_constraints
from regmix.decision.objective import Objective, ObjectiveLike, make_objective
from regmix.decision.runs import resolve
from regmix.decision.search import Predictor, search
from regmix.decision.surrogate import Surrogate
from regmix.errors import ConfigError, nearest

METHODS = ("exact", "simulate")
# One-sided 95 %: a gain is believed beyond this many standard deviations of its own error.
_BELIEVED = 1.645


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A baseline beside the optimum: predicted objective, gain over it, in nats."""

    name: str
    weights: dict[str, float]
    loss: float
    gain: float
    feasible: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """The best mixture found, all losses predicted, in nats at the proxies' scale.

    weights [D] in the order of `domains`; loss and gain of the objective, gain over the chosen
    baseline with its standard error; per_target: (mean, standard deviation); epochs of each
    domain in the run, where token counts were given; at_edge: domains at the largest weight that
    any run had, where more may be better still. Intervals on the weights are not given:
    they need the runs resampled.
    """

    domains: tuple[str, ...]
    weights: np.ndarray
    mixture: Mixture
    objective: Objective
    method: str
    loss: float
    gain: float
    gain_error: float
    baseline: str
    per_target: dict[str, tuple[float, float]]
    baselines: tuple[Compared, ...]
    epochs: dict[str, float] | None
    constraints: Constraints
    seed: int
    verdict: str
    at_edge: tuple[str, ...] = ()


def optimize(
    model: Surrogate,
    *,
    objective: ObjectiveLike = "mean",
    prior: Mapping[str, float] | Sequence[float] | str | None = None,
    lower: PerDomain = None,
    upper: PerDomain = None,
    available_tokens: PerDomain = None,
    budget_tokens: float | None = None,
    max_epochs: float | None = 4,
    baseline: str | Mapping[str, float] = "prior",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    method: str = "exact",
    concentration: float = 1.0,
    extrapolate: bool = False,
    seed: int = 0,
) -> Optimum:
    """Return the mixture with the lowest predicted objective that respects the constraints.

    `simulate`: the mean of the best 128 of 100,000 draws from Dirichlet(prior * concentration), as
    in the RegMix paper. `exact` goes on from there and never ends worse. Without a prior the mean
    of the runs takes its place; `baselines` are further mixtures to compare with. No domain gets
    more than the largest weight of any run, unless `extrapolate`, an upper bound of its own, or
    constraints that leave no mixture otherwise: a surrogate knows nothing there. Raises
    `ConstraintError`, `ConfigError`, `MixtureError` and `LossTableError`.
    """
    if method not in METHODS:
        raise ConfigError(
            f"unknown method '{method}' ({nearest(method, METHODS)})", cure="Use exact or simulate"
        )
    if not (np.isfinite(concentration) and concentration > 0):
        raise ConfigError(f"concentration {concentration:g}", cure="Give a number above 0")
    target = make_objective(objective, model.targets)
    limits = make_constraints(
        model.domains,
        lower=lower,
        upper=upper,
        available_tokens=available_tokens,
        budget_tokens=budget_tokens,
        max_epochs=max_epochs,
    )
    given = dict(baselines or {})
    taken = [name for name in given if name in ("prior", "natural", "uniform", "best observed")]
    if taken:
        raise ConfigError(f"a baseline may not be called '{taken[0]}'", cure="Rename it")
    if not isinstance(baseline, str):
        given["baseline"] = baseline
        baseline = "baseline"
    known = make_baselines(model, target, _prior(prior, model.domains), given)
    chosen = known[0] if baseline == "prior" else _named(baseline, known)
    observed = model.weights.max(0)
    weights = search(
        Predictor(model, target),
        limits if extrapolate else _within_runs(limits, observed, upper),
        centre=np.maximum(known[0].weights, 1e-6) * concentration,
        starts=np.stack([entry.weights for entry in known]),
        method=method,
        seed=seed,
    )
    best = _describe(model, target, limits, normalised(weights), known, chosen, method, seed)
    at_edge = (best.weights >= observed - 1e-6) & (observed < np.minimum(limits.upper, 0.99))
    return replace(
        best, at_edge=tuple(np.array(model.domains)[at_edge & (best.weights > 0)].tolist())
    )


def _within_runs(limits: Constraints, observed: np.ndarray, upper: PerDomain) -> Constraints:
    """Return the constraints with no weight above the largest observed, where that is feasible."""
    own = np.array([False] * len(limits.domains))
    if isinstance(upper, Mapping):
        own[[limits.domains.index(resolve(str(n), limits.domains, "domain")) for n in upper]] = True
    elif upper is not None:
        own[:] = True
    ceiling = np.where(own, limits.upper, np.minimum(limits.upper, observed))
    ceiling = np.maximum(ceiling, limits.lower)
    if ceiling.sum() < 1:
        return limits
    return replace(limits, upper=ceiling)


def _prior(prior: Any, domains: tuple[str, ...]) -> np.ndarray | None:
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior != "uniform":
            raise ConfigError(f"unknown prior '{prior}'", cure="Give weights, or 'uniform'")
        return np.full(len(domains), 1 / len(domains))
    if isinstance(prior, Mapping):
        named = {resolve(str(name), domains, "domain"): weight for name, weight in prior.items()}
    else:
        if len(prior) != len(domains):
            raise ConfigError(
                f"prior: {len(prior)} weights for {len(domains)} domains", cure="Give one each"
            )
        named = dict(zip(domains, prior, strict=True))
    return Mixture(named, where="prior").array(domains)


def _named(name: str, baselines: Sequence[Baseline]) -> Baseline:
    for entry in baselines:
        if entry.name == name:
            return entry
    names = ["prior", *(entry.name for entry in baselines)]
    raise ConfigError(f"unknown baseline '{name}' ({nearest(name, names)})", cure="Correct it")


def _describe(
    model: Surrogate,
    objective: Objective,
    limits: Constraints,
    weights: np.ndarray,
    baselines: Sequence[Baseline],
    chosen: Baseline,
    method: str,
    seed: int,
) -> Optimum:
    mean, deviation = model.predict(weights)
    loss = float(objective.of_all(mean)[0])
    compared = []
    for entry in baselines:
        predicted = float(objective.of_all(model.mean(entry.weights))[0])
        compared.append(
            Compared(
                name=entry.name,
                weights=dict(zip(model.domains, entry.weights.tolist(), strict=True)),
                loss=predicted,
                gain=predicted - loss,
                feasible=bool(limits.satisfied(entry.weights[None])[0]),
            )
        )
    gain = next(entry.gain for entry in compared if entry.name == chosen.name)
    error = _gain_error(model, objective)
    return Optimum(
        domains=model.domains,
        weights=weights,
        mixture=Mixture(dict(zip(model.domains, weights.tolist(), strict=True))),
        objective=objective,
        method=method,
        loss=loss,
        gain=gain,
        gain_error=error,
        baseline=chosen.name,
        per_target={
            name: (float(mean[0, j]), float(deviation[0, j]))
            for j, name in enumerate(model.targets)
        },
        baselines=tuple(compared),
        epochs=limits.epochs(weights),
        constraints=limits,
        seed=seed,
        verdict=_verdict(next(entry for entry in compared if entry.name == chosen.name), error),
    )


def _gain_error(model: Surrogate, objective: Objective) -> float:
    """Return the standard error of a predicted difference of the objective between two mixtures."""
    wrong = objective.of_all(model.held_out) - objective.of_all(model.losses)
    return float(np.sqrt(2 * np.mean(wrong**2)))


def _verdict(over: Compared, error: float) -> str:
    gain, limit, name = over.gain, _BELIEVED * error, over.name
    allowance = f"the {limit:.3f} nats that the error of the prediction explains"
    if gain > limit:
        return f"use the optimum: {gain:.3f} nats below '{name}', more than {allowance}"
    if not over.feasible:
        cost = f"costs {-gain:.3f} nats" if gain < 0 else f"costs nothing (gain {gain:.3f} nats)"
        return (
            f"use the optimum: '{name}' breaks the constraints, and keeping them {cost} by the "
            f"prediction (standard error {error:.3f} nats)"
        )
    if gain < 0:
        return (
            f"keep '{name}': it respects the constraints, and the optimum is predicted "
            f"{-gain:.3f} nats worse"
        )
    return f"keep '{name}': a predicted gain of {gain:.3f} nats is no more than {allowance}"
