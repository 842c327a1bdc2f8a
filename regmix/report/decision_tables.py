"""The tables of a decision: gains, what the limits held, what one target costs the others.

Enters: the facts of a study. Leaves: rows for the page's template, not yet escaped.
"""

from __future__ import annotations

from typing import Any

from regmix.report.facts import Facts
from regmix.report.words import NONE, error_words, nats, percent, signed, span


def gain_rows(facts: Facts) -> list[dict[str, str]]:
    """Return a row a baseline: its predicted gain, and the one measured on final models."""
    decided = facts.decided
    if decided is None:
        return []
    measured = {gain.baseline: gain for gain in facts.gains}
    rows = []
    for name in [*decided.gains, *(name for name in measured if name not in decided.gains)]:
        predicted, found = decided.gains.get(name), measured.get(name)
        better, feasible = decided.better.get(name), decided.feasible.get(name)
        rows.append(
            {
                "baseline": name,
                "gain": signed(None if predicted is None else predicted.mean),
                "interval": span(None if predicted is None else predicted.interval),
                "better": percent(better, 0),
                "feasible": NONE if feasible is None else "yes" if feasible else "no",
                "measured": NONE
                if found is None
                else f"{signed(found.mean_nats)}{error_words(found)}",
                "pairs": NONE
                if found is None
                else f"{found.num_better} of {len(found.pairs_nats)}",
            }
        )
    return rows


def guard_rows(facts: Facts) -> list[dict[str, str]]:
    """Return a row a target: its loss at the guard's reference and at the optimum."""
    if facts.decided is None:
        return []
    return [
        {
            "target": row.target,
            "reference": nats(row.reference),
            "optimum": nats(row.optimum),
            "change": signed(row.optimum - row.reference),
            "tolerance": nats(row.tolerance),
            "state": "binds" if row.binds else "holds",
        }
        for row in facts.decided.guard
    ]


def bound_rows(facts: Facts) -> list[dict[str, str]]:
    """Return a row a domain whose weight is at a limit: the weight, and which limit."""
    decided, weights = facts.decided, facts.optimum_weights
    if decided is None or weights is None:
        return []
    return [
        {"domain": domain, "weight": percent(weights[domain]), "limit": decided.bound[domain]}
        for domain in facts.ordered_domains
        if domain in decided.bound
    ]


def payoff_columns(facts: Facts) -> list[str]:
    """Return the targets of the table of trade-offs."""
    return [] if facts.traded is None else list(facts.traded.targets)


def payoff_rows(facts: Facts) -> list[dict[str, Any]]:
    """Return a row a target: what its own best mixture changes on every target, in nats."""
    traded = facts.traded
    if traded is None:
        return []
    rows = []
    for target, changes in traded.payoff.items():
        cells = []
        for column in (None, *traded.targets):
            change = changes.get(column)
            interval = None if change is None else change.interval
            cells.append(
                {
                    "text": signed(None if change is None else change.mean, 3),
                    "title": "" if interval is None else f"90% interval {span(interval)} nats",
                    "open": change is not None and change.includes_zero,
                    "own": column == target,
                }
            )
        rows.append({"target": target, "cells": cells})
    return rows
