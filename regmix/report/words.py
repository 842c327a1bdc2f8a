"""Numbers of the report in words: losses, shares, gains and intervals.

Enters: numbers, None where they are not known. Leaves: text with a true minus sign, with a unit
where the name says so; not yet escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regmix.config import finite
from regmix.large.comparison import Gain
from regmix.report.estimates import Estimate, Interval

NONE = "–"


def nats(value: object, digits: int = 4) -> str:
    """Return a loss without its unit, or a dash for what is no finite number."""
    if not finite(value):
        return NONE
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """Return a change of loss with its sign and without its unit, or a dash."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:+.{digits}f}".replace("-", "−")
    # Nothing is left of it at these digits, so neither is its sign.
    return text[1:] if float(text[1:]) == 0 else text


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share as a percentage, or a dash."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def span(interval: Interval | None, digits: int = 4) -> str:
    """Return an interval of changes, signed and without their unit, or a dash."""
    if interval is None:
        return NONE
    return f"{signed(interval[0], digits)} to {signed(interval[1], digits)}"


def percent_span(interval: Interval | None) -> str:
    """Return an interval of shares as percentages, or a dash."""
    return NONE if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def change_words(change: Estimate, digits: int = 4) -> str:
    """Return a change with its 90% interval, where there is one."""
    words = f"{signed(change.mean, digits)} nats"
    if change.interval is None:
        return words
    return f"{words} (90% interval {span(change.interval, digits)})"


def error_words(gain: Gain) -> str:
    """Return a measured gain's standard error, empty for a single pair."""
    return "" if gain.error_nats is None else f" ± {gain.error_nats:.4f}"


def gain_words(gain: Gain) -> str:
    """Return a gain with its standard error and in how many pairs the optimum was better."""
    better = f"better in {gain.num_better} of {len(gain.pairs_nats)}"
    return f"{nats(gain.mean_nats)}{error_words(gain)} nats, {better}"


def scores_words(scores: Mapping[str, Any]) -> str:
    """Return a target's held-out Spearman, RMSE and coverage, as far as they are known."""
    words = []
    if finite(scores.get("spearman")):
        words.append(f"Spearman {float(scores['spearman']):.3f}")
    if finite(scores.get("rmse_nats")):
        words.append(f"RMSE {float(scores['rmse_nats']):.4f} nats")
    if finite(scores.get("coverage")):
        words.append(f"{float(scores['coverage']):.0%} inside their 90% interval")
    return ", ".join(words)


def joined(parts: list[str]) -> str:
    """Return parts as a list in a sentence."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def heaviest(weights: Mapping[str, float], number: int = 4) -> str:
    """Return the largest weights of a mixture, for a remark beside a point."""
    order = sorted(weights, key=lambda domain: (-weights[domain], domain))[:number]
    return ", ".join(f"{domain} {weights[domain]:.0%}" for domain in order if weights[domain] > 0)
