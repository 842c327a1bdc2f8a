"""Whether another head trains the same proxies: losses in pairs, and ranks over mixtures.

Enters: a run. Leaves: records with the bounds that a loss kernel must keep before it is a default.
Every mixture is trained three times from one set of made-up domains: with the chunked head, with
the streamed one from the same seeds, and with the chunked one from other seeds, which tells what a
seed changes. Evaluation is the same for all. Times nothing. Minutes long, so it is run when asked
for: `python -m regmix_bench.gpu_suite --section agreement`.

M mixtures, D domains (each a target too), S sequences of a domain's pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from regmix.model.presets import ModelShape
from regmix_bench.gpu.run import Run
from regmix_bench.gpu.stacks import REFERENCE, TINY, Layout, make_stack

# A mean difference over all pairs beyond this is a bias, not noise.
MEAN_BOUND_NATS = 0.003
# Of a seed's standard deviation.
PAIR_BOUND = 0.5
# By how much ranks may be worse than another seed's.
RANK_BOUND = 0.002
OTHER_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes: mixtures, domains, sequences of a pool, of a validation set, of a batch; steps."""

    shape: ModelShape
    num_mixtures: int
    num_domains: int
    pool: int
    held_out: int
    batch: int
    micro: int
    steps: int
    lr: float = 1e-3


FULL = Plan(
    shape=REFERENCE,
    num_mixtures=32,
    num_domains=6,
    pool=4096,
    held_out=16,
    batch=64,
    micro=16,
    steps=122,
)
TRIAL = Plan(
    shape=TINY, num_mixtures=4, num_domains=3, pool=64, held_out=4, batch=4, micro=2, steps=6
)


def agreement(run: Run) -> None:
    """Train, compare, and emit what the bounds are about."""
    plan = TRIAL if run.tiny else FULL
    run.attempt("heads agree", lambda: _agree(run, plan), needs=0 if run.tiny else 200)


def _agree(run: Run, plan: Plan) -> None:
    # Without a GPU both are the reference: then the difference must be nothing.
    heads = ("chunked", "streamed") if run.device.type == "cuda" else ("reference", "reference")
    pools = [domain_sequences(plan, number, plan.pool) for number in range(plan.num_domains)]
    tests = [
        domain_sequences(plan, number, plan.held_out, seed=1) for number in range(plan.num_domains)
    ]
    mixtures = np.random.default_rng(0).dirichlet(np.ones(plan.num_domains), plan.num_mixtures)
    losses = {}
    for name, head, seed in (
        ("base", heads[0], 0),
        ("other head", heads[1], 0),
        ("other seed", heads[0], OTHER_SEED),
    ):
        run.say(f"{plan.num_mixtures} proxies, {name}")
        losses[name] = train_all(run, plan, head, seed, (mixtures, pools, tests))
    for metric, value, bound in figures(losses["base"], losses["other head"], losses["other seed"]):
        case = f"{heads[1]} head against {heads[0]}, {plan.num_mixtures} mixtures"
        run.record(
            case,
            metric,
            value,
            "nats" if "nats" in metric else "ratio",
            ceiling=f"bound {bound:g}",
            ratio_to_ceiling=value / bound,
        )


def domain_sequences(plan: Plan, number: int, count: int, *, seed: int = 0) -> np.ndarray:
    """Return sequences of a domain, [count, T+1] uint16: a rule of its own, and noise.

    A token follows from the one before by the domain's rule three times out of four, else it is
    drawn; domains share the words and differ in the rule and in which words are frequent.
    """
    vocab, length = plan.shape.vocab_size, plan.shape.seq_len + 1
    draw = np.random.default_rng([number, seed])
    tokens = (vocab ** draw.random((count, length))).astype(np.int64) - 1
    tokens = (tokens * (2 * number + 1)) % vocab
    follows = draw.random((count, length)) < 0.75
    for place in range(1, length):
        rule = (tokens[:, place - 1] * (2 * number + 3) + 7 * number + 1) % vocab
        tokens[:, place] = np.where(follows[:, place], rule, tokens[:, place])
    return tokens.astype(np.uint16)


def train_all(
    run: Run,
    plan: Plan,
    head: str,
    seed: int,
    data: tuple[np.ndarray, list[np.ndarray], list[np.ndarray]],
) -> np.ndarray:
    """Train a proxy on every mixture with one head, and return its losses in nats, [M, D]."""
    mixtures, pools, tests = data
    layout = Layout(
        shape=plan.shape, proxies=1, batch=plan.batch, micro=plan.micro, kernels={"head": head}
    )
    stack = make_stack(run, layout, plan.steps, lr=plan.lr)
    losses = np.zeros((len(mixtures), len(tests)))
    for row, weights in enumerate(mixtures):
        stack.reset([seed])
        draw = np.random.default_rng([row, seed])
        for step in range(plan.steps):
            domains = draw.choice(len(pools), size=plan.batch, p=weights)
            places = draw.integers(0, plan.pool, plan.batch)
            batch = np.stack([pools[d][k] for d, k in zip(domains, places, strict=True)])
            stack.train_step(batch[None], step)
        for column, held_out in enumerate(tests):
            tokens = torch.from_numpy(held_out.astype(np.int64))
            mask = torch.ones(len(held_out), plan.shape.seq_len, dtype=torch.bool)
            losses[row, column] = float(stack.evaluate(tokens, mask)[0]) / mask.sum().item()
    return losses


def figures(
    base_MD: np.ndarray, head_MD: np.ndarray, seed_MD: np.ndarray
) -> list[tuple[str, float, float]]:
    """Return (metric, value, bound): the differences by domain, their mean, and the ranks."""
    noise_D = np.sqrt(np.square(seed_MD - base_MD).mean(axis=0) / 2)
    bias_D = np.abs((head_MD - base_MD).mean(axis=0))
    tiny = np.finfo(np.float64).tiny
    loss_of_rank_D = np.array(
        [
            max(0.0, _spearman(base_D, seed_D) - _spearman(base_D, head_D))
            for base_D, seed_D, head_D in zip(base_MD.T, seed_MD.T, head_MD.T, strict=True)
        ]
    )
    return [
        (
            "largest paired difference of a domain, in standard deviations of a seed",
            float((bias_D / np.maximum(noise_D, tiny)).max()),
            PAIR_BOUND,
        ),
        (
            "mean difference over all, in nats",
            abs(float((head_MD - base_MD).mean())),
            MEAN_BOUND_NATS,
        ),
        (
            "most rank correlation lost against another seed",
            float(loss_of_rank_D.max()),
            RANK_BOUND,
        ),
    ]


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    left_ranks, right_ranks = (np.argsort(np.argsort(values)) for values in (left, right))
    return float(np.corrcoef(left_ranks, right_ranks)[0, 1])
