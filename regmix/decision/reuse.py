"""Fit and optimum where some domains keep their ratios: in the short space, told in the long one.

Enters: runs whose frozen domains have one ratio, and these ratios (`Groups`). Leaves: runs over
[kept, free domains...] for any regressor, and an `Optimum` over all domains. Constraints are
translated exactly; a baseline that does not have the frozen ratios lies outside what was learned,
and is named as not comparable instead of being predicted.

Old runs of the study that is reused are no runs here: they varied the frozen ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from regmix.data.groups import KEPT, Groups, find_groups
from regmix.data.mixtures import Mixture, normalised, read_mixture_yaml
from regmix.decision.baselines import SWARM_MEAN
from regmix.decision.comparison import Compared
from regmix.decision.optimum import Optimum, optimize
from regmix.decision.runs import NamedArray, Runs, resolve
from regmix.decision.searching.constraints import Constraints, PerDomain, make_constraints
from regmix.decision.surrogate import Surrogate
from regmix.errors import ConfigError, ConstraintError

if TYPE_CHECKING:
    from regmix.study import Study

REUSED = "reused"
# The natural totals of the short space's domains, with the frozen ratios inside the kept one.
NATURAL_TOTALS = "natural totals"
_OF_RUNS = ("best observed", SWARM_MEAN)


def groups_of(study: Study | None, runs: Runs) -> Groups | None:
    """Return the frozen domains of a study, or those that bare tables show; None without any."""
    if study is not None:
        return study.config.groups
    return find_groups(np.asarray(runs.weights), runs.domains)


def reduce_runs(runs: Runs, groups: Groups | None) -> Runs:
    """Return the runs over [kept, free domains...], the same runs where nothing is frozen.

    Raises `MixtureError` that names the run and the domain where a frozen ratio is broken.
    """
    if groups is None:
        return runs
    columns = [runs.domains.index(resolve(name, runs.domains, "domain")) for name in groups.domains]
    reduced = groups.reduce(np.asarray(runs.weights)[:, columns], runs.indices)
    return replace(runs, weights=NamedArray.of(reduced, groups.names), domains=groups.names)


def reused_baseline(study: Study | None) -> dict[str, Mixture]:
    """Return the old optimum that a study starts from as `reused`; empty where it reuses none."""
    if study is None or not study.reused_path.is_file():
        return {}
    return {REUSED: read_mixture_yaml(study.reused_path)}


def optimize_frozen(
    model: Surrogate,
    groups: Groups | None,
    *,
    prior: Mapping[str, float] | Sequence[float] | str | None = None,
    lower: PerDomain = None,
    upper: PerDomain = None,
    available_tokens: PerDomain = None,
    budget_tokens: float | None = None,
    max_epochs: float | None = 4,
    kl: float = 0.0,
    guard: str | Mapping[str, float] | None = None,
    baseline: str | Mapping[str, float] = "prior",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
    **options: Any,
) -> tuple[Optimum, list[str]]:
    """Return the optimum over all domains, and what a person should know of the comparison.

    `model` was fitted on reduced runs. All arguments speak of the long space and are those of
    `optimize`, which serves where nothing is frozen. With a baseline `reused` the verdict is about
    it, unless another one is named. A prior counts by its totals, in the KL penalty too: the
    ratios are decided.
    """
    bounds: dict[str, Any] = {"budget_tokens": budget_tokens, "max_epochs": max_epochs}
    if groups is None:
        bounds |= {"lower": lower, "upper": upper, "available_tokens": available_tokens}
        whole: dict[str, Any] = {"prior": prior, "baseline": baseline, "baselines": baselines}
        return optimize(model, kl=kl, guard=guard, **bounds, **whole, **options), []
    limits = make_constraints(
        groups.domains, lower=lower, upper=upper, available_tokens=available_tokens, **bounds
    )
    bounds |= _short_bounds(groups, lower, upper, limits)
    shares = _weights(prior, groups.domains)
    given, strangers = _representable(groups, baselines or {})
    natural = NATURAL_TOTALS
    if shares is not None and groups.representable(shares)[0]:
        natural = "natural"
    best = optimize(
        model,
        prior=None if shares is None else _named(groups, groups.totals(shares)),
        kl=kl,
        guard=None if guard is None else _chosen(groups, guard, given, natural, "guard"),
        baseline=_default(baseline, given) or _chosen(groups, baseline, given, natural, "baseline"),
        baselines=given,
        **bounds,
        **options,
    )
    names = {entry.name: _told_as(entry.name, groups, given) for entry in best.baselines}
    if shares is not None:
        names[best.baselines[0].name] = natural  # the prior comes first
        strangers += ["natural"] if natural == NATURAL_TOTALS else []
    strangers += [name for name, told in names.items() if told is None]
    notes = []
    if strangers:
        notes.append(f"Not comparable, outside the frozen ratios: {', '.join(strangers)}")
    if kl > 0:
        notes.append("The KL penalty compares the kept domains together, and each free one")
    return _expanded(best, groups, limits, names), notes


def _short_bounds(
    groups: Groups, lower: PerDomain, upper: PerDomain, limits: Constraints
) -> dict[str, Any]:
    low = groups.reduce_lower(_per_domain(lower, groups.domains))
    high = groups.reduce_upper(_per_domain(upper, groups.domains))
    if low.get(KEPT, 0.0) > high.get(KEPT, 1.0) + 1e-12:
        raise ConstraintError(
            f"the lower bounds need at least {low[KEPT]:.4g} of the domains with frozen ratios "
            f"({', '.join(groups.frozen)}), the upper bounds allow {high[KEPT]:.4g}",
            cure="Loosen the bounds of these domains, or draw a study in which they are free",
        )
    tokens = None
    if limits.available_tokens is not None:
        pairs = zip(groups.domains, limits.available_tokens.tolist(), strict=True)
        tokens = groups.reduce_tokens(dict(pairs))
    return {"lower": low or None, "upper": high or None, "available_tokens": tokens}


def _per_domain(bounds: PerDomain, domains: tuple[str, ...]) -> dict[str, float]:
    if bounds is None:
        return {}
    if isinstance(bounds, Mapping):
        return {resolve(str(n), domains, "domain"): float(bound) for n, bound in bounds.items()}
    every = np.broadcast_to(np.asarray(bounds, dtype=np.float64), (len(domains),))
    return dict(zip(domains, every.tolist(), strict=True))


def _weights(
    prior: Mapping[str, float] | Sequence[float] | str | None, domains: tuple[str, ...]
) -> np.ndarray | None:
    """Return a prior over all domains, [1, D]."""
    if prior is None:
        return None
    if isinstance(prior, str):
        if prior != "uniform":
            raise ConfigError(f"unknown prior '{prior}'", cure="Give weights, or 'uniform'")
        return np.full((1, len(domains)), 1 / len(domains))
    if not isinstance(prior, Mapping):
        if len(prior) != len(domains):
            raise ConfigError(
                f"prior: {len(prior)} weights for {len(domains)} domains", cure="Give one each"
            )
        prior = dict(zip(domains, prior, strict=True))
    named = {resolve(str(name), domains, "domain"): weight for name, weight in prior.items()}
    return Mixture(named, where="prior").array(domains)[None]


def _named(groups: Groups, reduced: np.ndarray) -> dict[str, float]:
    return dict(zip(groups.names, reduced[0].tolist(), strict=True))


def _representable(
    groups: Groups, baselines: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the baselines that have the frozen ratios, reduced, and the names of the others."""
    given: dict[str, dict[str, float]] = {}
    strangers = []
    for name, weights in baselines.items():
        mixture = weights if isinstance(weights, Mixture) else Mixture(weights, where=name)
        whole = mixture.array(groups.domains)[None]
        if groups.representable(whole)[0]:
            given[name] = _named(groups, groups.reduce(whole))
        else:
            strangers.append(name)
    return given, strangers


def _default(baseline: str | Mapping[str, float], given: Mapping[str, object]) -> str | None:
    """Return what the verdict is about where nobody named a baseline: the reused mixture."""
    return REUSED if baseline == "prior" and REUSED in given else None


def _chosen(
    groups: Groups,
    wanted: str | Mapping[str, float],
    given: Mapping[str, Mapping[str, float]],
    natural: str,
    kind: str,
) -> str | dict[str, float]:
    """Return the baseline, or what the guard is about, as the short space knows it."""
    if not isinstance(wanted, str):
        mixture = wanted if isinstance(wanted, Mixture) else Mixture(wanted, where=kind)
        return _named(groups, groups.reduce(mixture.array(groups.domains)[None], [f"'{kind}'"]))
    if wanted in (natural, "prior"):
        return "prior"
    if _told_as(wanted, groups, given) is None:
        raise ConfigError(
            f"{kind} '{wanted}' is unknown, or lies outside the frozen ratios",
            cure=f"Name '{natural}', '{REUSED}' or a mixture that has these ratios",
        )
    return wanted


def _told_as(name: str, groups: Groups, given: Mapping[str, object]) -> str | None:
    """Return what a baseline of the short space is called in the long one; None where it is none.

    With one frozen domain both spaces are the same.
    """
    known = len(groups.ratios) == 1 or name in given or name in (*_OF_RUNS, "baseline")
    return name if known else None


def _expanded(
    best: Optimum, groups: Groups, limits: Constraints, names: Mapping[str, str | None]
) -> Optimum:
    weights = normalised(groups.expand(best.weights[None])[0])
    compared = tuple(
        replace(entry, name=told, weights=_over_all(entry, groups))
        for entry in best.baselines
        if (told := names[entry.name]) is not None
    )
    chosen = names[best.baseline] or best.baseline
    guard = best.guard
    if guard is not None:
        told = names.get(guard.name) or guard.name
        guard = replace(guard, name=told, weights=groups.expand(guard.weights[None])[0])
    edge = set(best.at_edge)
    if KEPT in edge:
        edge |= {name for name, ratio in groups.ratios.items() if ratio > 0}
    return replace(
        best,
        domains=groups.domains,
        weights=weights,
        interval=groups.expand(best.interval.T).T,
        mixture=Mixture(dict(zip(groups.domains, weights.tolist(), strict=True))),
        baseline=chosen,
        baselines=compared,
        epochs=limits.epochs(weights),
        constraints=limits,
        at_edge=tuple(name for name in groups.domains if name in edge),
        guard=guard,
        verdict=best.verdict.replace(f"'{best.baseline}'", f"'{chosen}'"),
    )


def _over_all(entry: Compared, groups: Groups) -> dict[str, float]:
    reduced = np.array([[entry.weights[name] for name in groups.names]])
    return dict(zip(groups.domains, groups.expand(reduced)[0].tolist(), strict=True))
