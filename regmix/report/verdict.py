"""What a report says first: the verdict in a sentence, and the numbers beside it.

Enters: the facts of a study. Leaves: words and numbers with units, not yet escaped. A gain is
called measured only where models were trained; before that it is a prediction, and says so.
"""

from __future__ import annotations

from regmix.config import finite
from regmix.display import count
from regmix.report.decided import Decided
from regmix.report.estimates import Estimate
from regmix.report.facts import Facts
from regmix.report.predictions import OBJECTIVE
from regmix.report.words import change_words, error_words, joined, nats, signed, span

# What the surrogate advises, and the look of the headline that says so.
_LOOKS = {"use": "use", "keep": "keep", "train more": "train"}
# The baselines whose predicted gains are shown at the top; the table of gains has them all.
_SHOWN_GAINS = 3


def headline(facts: Facts) -> dict[str, str]:
    """Return the verdict: `text`, `support`, `badge` (the advice in few words, empty without).

    kind: "good", "mixed" or "bad" where gains are measured, "use", "keep" or "train" where the
    surrogate advises it, "open" otherwise.
    """
    if facts.gains:
        return _measured_headline(facts)
    if facts.optimum is not None and facts.decided is not None:
        return _predicted_headline(facts, facts.decided)
    num_done = len(facts.losses)
    num_drawn = len(facts.mixtures) if facts.mixtures is not None else 0
    return {
        "kind": "open",
        "badge": "",
        "text": f"No optimum yet: {num_done} of {num_drawn} proxies have their losses.",
        "support": "The report grows with the study; each part says which command makes it.",
    }


def _predicted_headline(facts: Facts, decided: Decided) -> dict[str, str]:
    verdict = _own_verdict(facts)
    support = (
        "Predicted at the proxies' scale, not yet measured."
        + (f" The surrogate's verdict: {verdict}." if verdict else "")
        + _objective_remark(facts)
    )
    kind = _LOOKS.get(decided.action or "")
    if kind is None:
        # Older studies say it in their verdict alone.
        kind = "mixed" if verdict.startswith("keep") else "open"
    baseline = decided.baseline or "natural"
    gain = decided.gains.get(baseline)
    badge, text = "", _gain_sentence(decided)
    if kind == "use":
        badge = "Use the optimum"
    elif kind == "keep":
        badge = f"Keep the {baseline} mixture"
        text = f"Keep the {baseline} mixture: the optimum is not shown to be better.{_over(gain)}"
    elif kind == "train":
        number = "" if decided.more_proxies is None else f"about {decided.more_proxies} "
        badge = f"Train {number}more proxies"
        text = f"Train {number}more proxies before choosing a mixture.{_over(gain)}"
    return {"kind": kind, "badge": badge, "text": text, "support": support}


def _gain_sentence(decided: Decided) -> str:
    parts = [
        f"{nats(decided.gains[name].mean)} nats over the {name} mixture"
        for name in dict.fromkeys((decided.baseline or "natural", "natural", "uniform"))
        if name in decided.gains
    ]
    if not parts:
        return "The optimum is found; its gain is not known."
    return "The optimum is predicted to gain " + " and ".join(parts) + "."


def _over(gain: Estimate | None) -> str:
    return "" if gain is None else f" Its predicted gain is {change_words(gain)}."


def _measured_headline(facts: Facts) -> dict[str, str]:
    gains = sorted(facts.gains, key=lambda gain: gain.baseline != "natural")
    parts: list[str] = []
    for gain in gains:
        word = "lower" if gain.mean_nats >= 0 else "higher"
        unit = "nats per token" if not parts else "nats"
        amount = f"{abs(gain.mean_nats):.4f} {unit} {word}"
        parts.append(f"{amount} than on the {gain.baseline} mixture")
    num_pairs = max(len(gain.pairs_nats) for gain in gains)
    first = "Trained on the optimum, the final model's loss is " + joined(parts) + "."
    counts = joined(
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
    return {"kind": kind, "badge": "", "text": first, "support": support}


def _own_verdict(facts: Facts) -> str:
    return str((facts.optimum or {}).get("verdict") or "").rstrip(".")


def _objective_remark(facts: Facts) -> str:
    other = facts.other_optimum_objective
    if other is None:
        return ""
    return f" The optimum was found for another objective than the study's: {other}."


def cards(facts: Facts) -> list[dict[str, str]]:
    """Return the numbers at the top: value, unit, what it is."""
    found = [
        _card(signed(gain.mean_nats), f"nats{error_words(gain)}", f"gain over {gain.baseline}")
        for gain in facts.gains
    ]
    if facts.decided is not None:
        found += _decision_cards(facts, facts.decided)
    spearman = ((facts.fit or {}).get(OBJECTIVE) or {}).get("spearman")
    if finite(spearman):
        found.append(_card(f"{float(spearman):.3f}", "", "Spearman, held out"))
    if facts.losses:
        tokens = count(facts.study.config.proxy.tokens)
        found.append(_card(str(len(facts.losses)), f"x {tokens} tokens", "proxies"))
    speed = (facts.sweep or {}).get("tokens_per_second")
    if finite(speed):
        found.append(_card(count(speed), "tokens/s", "speed of the sweep"))
    return found


def _decision_cards(facts: Facts, decided: Decided) -> list[dict[str, str]]:
    found = []
    if not facts.gains:
        order = (decided.baseline, "natural", "given prior", "uniform", "best observed")
        names = [name for name in dict.fromkeys(order) if name in decided.gains]
        for name in (names or list(decided.gains))[:_SHOWN_GAINS]:
            gain = decided.gains[name]
            unit = "nats" + ("" if gain.interval is None else f", 90%: {span(gain.interval, 3)}")
            found.append(_card(signed(gain.mean), unit, f"predicted, over {name}"))
    if decided.shortfall_nats is not None:
        what = "what a still better mixture might save"
        found.append(_card(nats(decided.shortfall_nats), "nats", what))
    noise = decided.noise_nats
    measured = facts.fitted is not None and facts.fitted.noise_measured
    if noise is None and facts.fitted is not None:
        noise = facts.fitted.noise_nats
    if noise is not None:
        how = "measured" if measured else "estimated"
        found.append(_card(nats(noise), "nats", f"noise between seeds, {how}"))
    return found


def _card(value: str, unit: str, name: str) -> dict[str, str]:
    return {"value": value, "unit": unit, "name": name}
