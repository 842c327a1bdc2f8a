"""What a report says first: the verdict in a sentence, and the numbers beside it.

Enters: the facts of a study. Leaves: words and numbers with units, not yet escaped. A gain is
called measured only where models were trained; before that it is a prediction, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from regmix.display import count
from regmix.large.comparison import Gain
from regmix.report.facts import OBJECTIVE, Facts, finite


def nats(value: float | None, digits: int = 4) -> str:
    """Return a loss without its unit, or a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return "–" if value is None else f"{100 * value:.2f} %"


def gain_words(gain: Gain) -> str:
    """Return a gain with its standard error and in how many pairs the optimum was better."""
    better = f"better in {gain.num_better} of {len(gain.pairs_nats)}"
    return f"{nats(gain.mean_nats)}{_error_words(gain)} nats, {better}"


def _error_words(gain: Gain) -> str:
    return "" if gain.error_nats is None else f" ± {gain.error_nats:.4f}"


def headline(facts: Facts) -> dict[str, str]:
    """Return the verdict: one sentence, what supports it, and "good", "mixed", "bad" or "open"."""
    if facts.gains:
        return _measured_headline(facts)
    if facts.optimum is not None:
        gains = facts.optimum.get("gain_nats") or {}
        parts = [
            f"{float(gains[name]):.4f} nats over the {name} mixture"
            for name in ("natural", "uniform")
            if finite(gains.get(name))
        ]
        text = "The optimum is predicted to gain " + " and ".join(parts) + "."
        if not parts:
            text = "The optimum is found; its gain is not known."
        verdict = _own_verdict(facts)
        return {
            # The surrogate itself advises against the optimum.
            "kind": "mixed" if verdict.startswith("keep") else "open",
            "text": text.replace(" -", " −"),
            "support": "Predicted at the proxies' scale, not yet measured."
            + (f" The surrogate's verdict: {verdict}." if verdict else "")
            + _objective_remark(facts),
        }
    num_done = len(facts.losses)
    num_drawn = len(facts.mixtures) if facts.mixtures is not None else 0
    return {
        "kind": "open",
        "text": f"No optimum yet: {num_done} of {num_drawn} proxies have their losses.",
        "support": "The report grows with the study; each part says which command makes it.",
    }


def _measured_headline(facts: Facts) -> dict[str, str]:
    gains = sorted(facts.gains, key=lambda gain: gain.baseline != "natural")
    parts: list[str] = []
    for gain in gains:
        word = "lower" if gain.mean_nats >= 0 else "higher"
        unit = "nats per token" if not parts else "nats"
        amount = f"{abs(gain.mean_nats):.4f} {unit} {word}"
        parts.append(f"{amount} than on the {gain.baseline} mixture")
    num_pairs = max(len(gain.pairs_nats) for gain in gains)
    first = "Trained on the optimum, the final model's loss is " + _joined(parts) + "."
    counts = _joined(
        [f"{g.num_better} of {len(g.pairs_nats)} pairs against {g.baseline}" for g in gains]
    )
    verdict = _own_verdict(facts)
    support = (
        f"Measured on held-out text, mean of {num_pairs} "
        f"{'pairs of models' if num_pairs > 1 else 'pair of models'} with the same seeds; "
        f"the optimum is better in {counts}."
    )
    if verdict:
        support += f" The surrogate's verdict before, at the proxies' scale: {verdict}."
    support += _objective_remark(facts)
    all_better = all(gain.num_better == len(gain.pairs_nats) for gain in gains)
    none_better = all(gain.mean_nats <= 0 for gain in gains)
    kind = "good" if all_better else "bad" if none_better else "mixed"
    return {"kind": kind, "text": first, "support": support}


def _own_verdict(facts: Facts) -> str:
    return str((facts.optimum or {}).get("verdict") or "").rstrip(".")


def _objective_remark(facts: Facts) -> str:
    other = facts.other_optimum_objective
    if other is None:
        return ""
    return f" The optimum was found for another objective than the study's: {other}."


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def cards(facts: Facts) -> list[dict[str, str]]:
    """Return the numbers at the top: value, unit, what it is."""
    found: list[dict[str, str]] = []
    for gain in facts.gains:
        value = f"{gain.mean_nats:+.4f}".replace("-", "−")
        unit = f"nats{_error_words(gain)}"
        found.append({"value": value, "unit": unit, "name": f"gain over {gain.baseline}"})
    for baseline, value in ((facts.optimum or {}).get("gain_nats") or {}).items():
        if finite(value) and not facts.gains:
            text = f"{float(value):+.4f}".replace("-", "−")
            found.append({"value": text, "unit": "nats", "name": f"predicted, over {baseline}"})
    spearman = ((facts.fit or {}).get(OBJECTIVE) or {}).get("spearman")
    if finite(spearman):
        found.append({"value": f"{float(spearman):.3f}", "unit": "", "name": "Spearman, held out"})
    if facts.losses:
        tokens = count(facts.study.config.proxy.tokens)
        found.append(
            {"value": str(len(facts.losses)), "unit": f"x {tokens} tokens", "name": "proxies"}
        )
    speed = (facts.sweep or {}).get("tokens_per_second")
    if finite(speed):
        found.append({"value": count(speed), "unit": "tokens/s", "name": "speed of the sweep"})
    return found


def scores_words(scores: Mapping[str, Any]) -> str:
    """Return a target's held-out Spearman and RMSE, as far as they are known."""
    words = []
    if finite(scores.get("spearman")):
        words.append(f"Spearman {float(scores['spearman']):.3f}")
    if finite(scores.get("rmse_nats")):
        words.append(f"RMSE {float(scores['rmse_nats']):.4f} nats")
    return ", ".join(words)
