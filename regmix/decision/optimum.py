"""The best mixture that a surrogate predicts, under constraints.

Enters: a surrogate, an objective, constraints, a guard, baselines. Leaves: an `Optimum`: the
mixture, its predicted losses, its gain over the baselines and a verdict. Every number is at the
proxies' scale: losses of larger models lie elsewhere, their order and the sign of gains carry over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from regmix.data.mixtures import Mixture
from regmix.decision.baselines import RESERVED, Baseline, make_baselines, named
from regmix.decision.comparison import Compared, compare
from regmix.decision.noise import objective_noise
from regmix.decision.objective import Objective, ObjectiveLike, make_objective
from regmix.decision.runs import resolve
from regmix.decision.searching.constraints import (
    Constraints,
    PerDomain,
    make_constraints,
    upper_is_own,
)
from regmix.decision.searching.guard import TOLERANCE_NATS, Guard, make_guard
from regmix.decision.searching.penalty import divergence, make_penalty
from regmix.decision.searching.predictor import Predictor
from regmix.decision.searching.search import Found, search
from regmix.decision.surrogate import Surrogate
from regmix.decision.uncertainty import Interval, Sureness, predicted_interval, sureness
from regmix.decision.validation import spearman
from regmix.decision.verdict import judge
from regmix.errors import ConfigError, nearest

METHODS = ("exact", "simulate")


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """The best mixture found, all losses predicted, in nats at the proxies' scale.

    weights [D] in the order of `domains`, interval [D, 2]: where 90% of the surfaces that the runs
    leave possible have their best mixture; loss of the objective, loss_interval: of a new proxy on
    it; gain over the chosen baseline with its 90% interval, as over the others in `baselines`;
    shortfall_nats: what the best mixture of such a surface saves beyond the optimum, on average;
    noise_nats: standard deviation between seeds, where known; verdict in words, its action (`use`,
    `keep`, `train more`) and how many more_proxies; per_target: (mean, standard deviation) of a
    new proxy; epochs of each domain in the run, where token counts were given; at_edge: domains at
    the largest weight that any run had, where more may be better still; kl: strength of the
    penalty, and divergence_nats: KL from the prior, where there is one; guard: what no target may
    be worse than, and guard_changes: target -> nats above it; remarks: what `simulate` could not
    do as in the paper.
    """

    domains: tuple[str, ...]
    weights: np.ndarray
    interval: np.ndarray
    mixture: Mixture
    objective: Objective
    method: str
    loss: float
    loss_interval: Interval
    gain: float
    gain_interval: Interval
    shortfall_nats: float
    noise_nats: float | None
    baseline: str
    per_target: dict[str, tuple[float, float]]
    baselines: tuple[Compared, ...]
    epochs: dict[str, float] | None
    constraints: Constraints
    seed: int
    verdict: str
    action: str
    more_proxies: int | None
    at_edge: tuple[str, ...] = ()
    kl: float = 0.0
    divergence_nats: float | None = None
    guard: Guard | None = None
    guard_changes: dict[str, float] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def minimised(self) -> float:
        """The objective with the penalty: what the search made as small as it could."""
        return self.loss + self.kl * (self.divergence_nats or 0.0)


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
    kl: float = 0.0,
    guard: str | Mapping[str, float] | None = None,
    guard_tolerance: float = TOLERANCE_NATS,
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
    bounds that leave no mixture otherwise: a surrogate knows nothing there. kl: nats added per nat
    of KL(p || prior). guard: a baseline's name or a mixture that no target, of all that the
    surrogate knows, may be predicted worse than by more than guard_tolerance nats. Raises
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
    natural = _prior(prior, model.domains)
    penalty = make_penalty(kl, natural, limits)
    given = dict(baselines or {})
    if taken := [name for name in given if name in RESERVED]:
        raise ConfigError(f"a baseline may not be called '{taken[0]}'", cure="Rename it")
    if not isinstance(baseline, str):
        given["baseline"] = baseline
        baseline = "baseline"
    known = make_baselines(model, target, natural, given, limits)
    chosen = named(baseline, known)
    kept = _guard(model, guard, guard_tolerance, known)
    observed = model.weights.max(0)
    own = upper_is_own(upper, model.domains)
    predictor = Predictor(model, target, penalty, kept)
    searched = limits if extrapolate else limits.within(observed, own)
    found = search(
        predictor,
        searched,
        centre=np.maximum(known[0].weights, 1e-6) * concentration,
        starts=np.stack([entry.weights for entry in known]),
        method=method,
        seed=seed,
    )
    edge = (found.weights >= observed - 1e-6) & (observed < np.minimum(limits.upper, 0.99))
    edge &= found.weights > 0
    rows = [entry.weights for entry in known]
    sure = sureness(predictor, model, searched, found.weights, rows, seed=seed)
    return _described(
        model,
        predictor,
        limits,
        found,
        known,
        chosen,
        sure,
        kl=kl,
        divergence_nats=None if natural is None else _divergence(found.weights, natural),
        at_edge=tuple(name for name, at in zip(model.domains, edge, strict=True) if at),
        method=method,
        seed=seed,
    )


def _guard(
    model: Surrogate,
    wanted: str | Mapping[str, float] | None,
    tolerance_nats: float,
    known: tuple[Baseline, ...],
) -> Guard | None:
    if wanted is None:
        return None
    if isinstance(wanted, str):
        return make_guard(model, named(wanted, known, "guard"), tolerance_nats)
    mixture = Mixture(wanted, where="guard").array(model.domains)
    return make_guard(model, Baseline("guard", mixture), tolerance_nats)


def _divergence(weights: np.ndarray, prior: np.ndarray) -> float | None:
    """Return KL(p || prior) in nats; None where it is infinite."""
    found = float(divergence(weights[None], prior)[0])
    return found if np.isfinite(found) else None


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


def _described(
    model: Surrogate,
    predictor: Predictor,
    limits: Constraints,
    found: Found,
    baselines: Sequence[Baseline],
    chosen: Baseline,
    sure: Sureness,
    **rest: Any,
) -> Optimum:
    """Return the optimum with its predicted losses, beside every baseline, and the verdict."""
    weights, objective, guard = found.weights, predictor.objective, predictor.guard
    mean, deviation = model.predict(weights)
    expected, _ = predicted_interval(model, objective, weights)
    compared = compare(model, predictor, limits, expected.mean, baselines, sure)
    over = next(entry for entry in compared if entry.name == chosen.name)
    verdict = judge(
        gain=over.gain_interval,
        better=over.better,
        baseline=over.name,
        feasible=over.feasible,
        num_runs=len(model.losses),
        held_out_spearman=spearman(
            objective.of_all(model.losses), objective.of_all(model.held_out)
        ),
    )
    return Optimum(
        domains=model.domains,
        weights=weights,
        interval=sure.weights,
        mixture=Mixture(dict(zip(model.domains, weights.tolist(), strict=True))),
        objective=objective,
        loss=expected.mean,
        loss_interval=expected,
        gain=over.gain,
        gain_interval=over.gain_interval,
        shortfall_nats=sure.shortfall_nats,
        noise_nats=objective_noise(model, objective),
        baseline=chosen.name,
        per_target={
            name: (float(mean[0, j]), float(deviation[0, j]))
            for j, name in enumerate(model.targets)
        },
        baselines=compared,
        epochs=limits.epochs(weights),
        constraints=limits,
        verdict=verdict.text,
        action=verdict.action,
        more_proxies=verdict.more_proxies,
        guard=guard,
        guard_changes=None if guard is None else guard.changes(mean[0]),
        remarks=found.remarks,
        **rest,
    )
