"""The report's tables: rows of words and numbers, by domain, target, model and setting.

Enters: the facts of a study. Leaves: rows for the page's template, not yet escaped.
"""

from __future__ import annotations

from typing import Any

from regmix.config import finite
from regmix.data.mixtures import coverage
from regmix.display import count
from regmix.large.comparison import display_order
from regmix.report.facts import Facts
from regmix.report.predictions import OBJECTIVE
from regmix.report.words import NONE, nats, percent, percent_span


def domain_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return a row a domain: its weight in each mixture, its 90% interval, change, epochs."""
    if facts.optimum_weights is None:
        return []
    epochs, intervals = facts.epochs, facts.decided.intervals if facts.decided else {}
    available = facts.study.config.available_tokens
    rows = []
    for domain in facts.ordered_domains:
        natural = facts.study.config.prior.get(domain, 0.0)
        weight = facts.optimum_weights.get(domain, 0.0)
        rows.append(
            {
                "domain": domain,
                "weights": [w.get(domain, 0.0) for w in facts.known_mixtures.values()],
                "interval": percent_span(intervals.get(domain)),
                "factor": f"{weight / natural:.2f} x" if natural > 0 else "–",
                "epochs": f"{epochs[domain]:.3g}" if domain in epochs else "–",
                "available": count(available[domain]) if domain in available else "–",
            }
        )
    return rows


def target_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return a row a target: held-out Spearman and RMSE, and how often its interval held."""
    if facts.fit is None:
        return []
    objective = facts.study.config.objective
    rows = []
    scores = [(OBJECTIVE, facts.objective_scores), *facts.fit["targets"].items()]
    for name, row in scores:
        if not row:
            continue
        rows.append(
            {
                "target": f"objective {facts.other_fit_objective or ''}".rstrip()
                if name == OBJECTIVE
                else name,
                "share": "" if name == OBJECTIVE else percent(objective.get(name, 0.0)),
                "spearman": nats(row.get("spearman"), 3),
                "rmse": nats(row.get("rmse_nats")),
                "coverage": percent(row["coverage"], 0) if finite(row.get("coverage")) else NONE,
            }
        )
    return rows


def model_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return a row a final model: seeds, tokens, objective, loss by target."""
    rows = []
    targets = facts.study.config.targets
    for model in sorted(facts.models, key=lambda m: (*display_order(m.mixture), m.replicate)):
        member = model.summary.get("member") or {}
        rows.append(
            {
                "name": model.name,
                "mixture": model.mixture,
                "seeds": f"{member.get('data_seed', '–')} / {member.get('init_seed', '–')}",
                "tokens": count(float(model.summary.get("tokens") or 0)),
                "objective": nats(model.objective),
                "losses": [nats(model.losses.get(target)) for target in targets],
                "bits": [nats(model.bits_per_byte.get(target), 3) for target in targets],
            }
        )
    return rows


def swarm_rows(facts: Facts) -> list[dict[str, str]]:
    if facts.mixtures is None:
        return []
    rows = {row.domain: row for row in coverage(facts.mixtures, facts.study.config.prior)}
    return [
        {
            "domain": domain,
            "prior": percent(rows[domain].prior),
            "present": f"{100 * rows[domain].present:.0f} %",
            "median": percent(rows[domain].median),
            "maximum": percent(rows[domain].maximum),
        }
        for domain in facts.ordered_domains
        if domain in rows
    ]


def settings(facts: Facts) -> list[tuple[str, str]]:
    """Return what the results depend on, as name and value."""
    config = facts.study.config
    shape, optim = config.proxy.shape, config.proxy.optim
    rows = [
        ("objective", ", ".join(f"{t} {w:.3g}" for t, w in config.objective.items())),
        ("corpus checksum", config.shards_checksum),
        (
            "proxy",
            f"{count(shape.num_parameters)} parameters: {shape.num_layers} layers, width "
            f"{shape.width}, {shape.num_heads} heads, vocabulary {shape.vocab_size}",
        ),
        (
            "proxy training",
            f"{config.proxy.num_steps} steps of {config.proxy.batch_size} x {shape.seq_len} "
            f"tokens, learning rate {optim.lr:g}, {optim.schedule}",
        ),
        ("seeds", f"data {config.data_seed}, initial weights {config.init_seed}"),
    ]
    rows += [(f"swarm: {name}", value) for name, value in config.swarm.items()]
    if facts.fit is not None:
        rows.append(("regressor", f"{facts.fit.get('regressor')}, seed {facts.fit.get('seed')}"))
    for name in ("method", "budget_tokens", "max_epochs"):
        value = (facts.optimum or {}).get(name)
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            rows.append((f"optimum: {name.replace('_', ' ')}", shown))
    for name, value in (facts.sweep or {}).items():
        if finite(value):
            shown = f"{value:,.0f}" if float(value) >= 100 else f"{value:g}"
            rows.append((f"sweep: {name.replace('_', ' ')}", shown))
    return rows


def environments(facts: Facts) -> list[tuple[str, str]]:
    """Return machines and versions by what was made there, each once."""
    found: dict[str, list[str]] = {}
    sources = [("proxies", facts.sweep or {}), ("surrogate", facts.fit or {})]
    sources += [("final models", model.summary) for model in facts.models]
    for what, table in sources:
        environment = table.get("environment")
        if not isinstance(environment, dict):
            continue
        versions = environment.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        words = [f"{package} {version}" for package, version in versions.items()]
        words.append(f"revision {environment.get('revision', 'unknown')}")
        words += [str(environment.get("system", "")), f"{environment.get('cores', '?')} cores"]
        text = ", ".join(word for word in words if word)
        if what not in found.setdefault(text, []):
            found[text].append(what)
    return [(", ".join(what), text) for text, what in found.items()]
