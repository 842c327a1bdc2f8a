"""What to do, in a sentence: use the optimum, keep the baseline, or train more proxies.

Enters: the gain over a baseline with its interval, how many runs it rests on. Leaves: a `Verdict`
with its reason. Computes no gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from regmix.decision.calibration import HALF_WIDTH
from regmix.decision.uncertainty import Interval

# The held-out error falls as runs ** -0.35: between 0.26 and 0.42 on subsets of the published runs.
ERROR_EXPONENT = 0.35
# More proxies than this many times those there are: the gain is too small to be worth the proof.
_WORTH_WHILE = 3
# Below this rank correlation of held-out losses a surrogate is not believed, whatever it predicts.
_FEWEST_RANKS_RIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """action: `use`, `keep` or `train more`; text: the sentence; more_proxies: how many."""

    action: str
    text: str
    more_proxies: int | None = None


def judge(
    *,
    gain: Interval,
    better: float,
    baseline: str,
    feasible: bool,
    num_runs: int,
    held_out_spearman: float | None,
    exponent: float | None = None,
) -> Verdict:
    """Judge an optimum by its gain over a baseline, in nats.

    better: share of the possible surfaces on which the optimum is better; feasible: whether the
    baseline respects the constraints; exponent: of the fall of the error with the runs.
    """
    interval = f"90% interval {gain.low:+.4f} to {gain.high:+.4f}"
    if held_out_spearman is None or held_out_spearman < _FEWEST_RANKS_RIGHT:
        ranks = "none" if held_out_spearman is None else f"{held_out_spearman:.2f}"
        return Verdict(
            action="train more",
            text=f"train {num_runs} more proxies: held-out losses are not predicted yet (rank "
            f"correlation {ranks} on {num_runs} runs)",
            more_proxies=num_runs,
        )
    if gain.low > 0:
        return Verdict(
            action="use",
            text=f"use the optimum: predicted {gain.mean:.4f} nats below '{baseline}' ({interval}; "
            f"better on {better:.0%} of the surfaces that the runs leave possible)",
        )
    if not feasible:
        cost = f"costs {-gain.mean:.4f} nats" if gain.mean < 0 else "costs nothing"
        return Verdict(
            action="use",
            text=f"use the optimum: '{baseline}' breaks the constraints, and keeping them {cost} "
            f"by the prediction (gain {gain.mean:+.4f} nats, {interval})",
        )
    if gain.mean <= 0:
        return Verdict(
            action="keep",
            text=f"keep '{baseline}': it respects the constraints, and the optimum is predicted "
            f"{-gain.mean:.4f} nats worse ({interval})",
        )
    needed = _runs_needed(gain, num_runs, ERROR_EXPONENT if exponent is None else exponent)
    told = (
        f"the predicted gain over '{baseline}' of {gain.mean:.4f} nats may be none ({interval}; "
        f"better on {better:.0%} of the surfaces that the runs leave possible)"
    )
    more = None if needed is None else needed - num_runs
    if more is not None and more <= _WORTH_WHILE * num_runs:
        return Verdict(
            action="train more",
            text=f"train about {more} more proxies: {told}, and with them it would show",
            more_proxies=more,
        )
    why = "more proxies would not tell" if more is None else f"about {more} more would be needed"
    return Verdict(action="keep", text=f"keep '{baseline}': {told}, and {why}")


def _runs_needed(gain: Interval, num_runs: int, exponent: float) -> int | None:
    """Return the runs at which the interval's lower end would reach 0, None where none would do."""
    sd = (gain.high - gain.low) / (2 * HALF_WIDTH)
    ratio = max(1.0, HALF_WIDTH * sd / gain.mean)
    if exponent <= 0.05 or ratio > 10:
        return None
    # At least an eighth more: an interval that all but excludes 0 still asks for a few runs.
    return max(round(num_runs * ratio ** (1 / exponent)), num_runs + max(1, num_runs // 8))
