"""What goes wrong inside a worker: losses that are no numbers, memory that runs out, noise.

Enters: a stage. Leaves: rows.
"""

from __future__ import annotations

import random
from pathlib import Path

from regmix_bench.faults.fault import REFUSED, SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import WORKER, Rule
from regmix_bench.faults.kills import log_uniform
from regmix_bench.faults.stage import FaultError, Stage

POISONED = "1"


def not_a_number(stage: Stage, _draw: random.Random) -> Row:
    """Let the weights of one proxy of a stack become NaN."""
    case = stage.case("not-a-number")
    rule = Rule(role=WORKER, at="step", match="stack-0000@100@", do="poison", value=POISONED)
    case.disturb(rule)
    sees = case.refused(case.start(), f"proxy {POISONED}", "not finite")
    others = case.prove(without=frozenset({POISONED}))
    if (case.study / "losses.csv").read_text(encoding="utf-8").count(f"\n{POISONED},"):
        raise FaultError(f"{case.folder}: losses.csv has a row of the proxy that failed")
    case.disturb()
    case.ends_well(case.start("--retry-failed"))
    outcome = f"the {others.num_compared} files and rows of the others are the undisturbed ones; "
    outcome += "with --retry-failed all are"
    return Row(injected=1, sees=sees, outcome=outcome, proof=case.prove())


def memory_runs_out(stage: Stage, _draw: random.Random) -> Row:
    """Leave a worker no more memory than it has."""
    case = stage.case("memory-runs-out")
    starve = Rule(role=WORKER, at="step", match="@100@", do="starve", value=0, times=None)
    hungry = Rule(role=WORKER, at="step", match="@101@", do="allocate", value=1 << 30, times=None)
    case.disturb(starve, hungry)
    sees = case.refused(case.start(), "memory", "--workers")
    return Row(injected=case.struck("allocate"), sees=sees, outcome=REFUSED,
               proof=case.ends_well())  # fmt: skip


def noise(stage: Stage, _draw: random.Random) -> Row:
    """Let a worker print without end, on stdout and stderr, with and without newlines."""
    case = stage.case("noise")
    fake = '{"done": "stack-0000", "result": {}}\n'
    case.disturb(
        Rule(role=WORKER, at="step", match="stack-0000@50@", do="print", value=("no newline", 99)),
        Rule(role=WORKER, at="step", match="stack-0001@50@", do="print", value=(fake, 1)),
        Rule(role=WORKER, at="step", match="@60@", do="write", value=(1, fake, 3), times=2),
        Rule(role=WORKER, at="step", match="@70@", do="write", value=(2, "x" * 999 + "\n", 50_000)),
        Rule(role=WORKER, at="step", match="@80@", do="write", value=(1, "\xff\x00", 1000)),
    )
    proof = case.ends_well(case.start())
    times = case.struck("print") + case.struck("write")
    size = sum(path.stat().st_size for path in (case.study / "logs").iterdir())
    sees = f"nothing; it is in logs/ ({size / 1e6:.0f} MB)"
    return Row(injected=times, sees=sees, outcome=SAME_BITS, proof=proof)


def damaged_checkpoints(stage: Stage, draw: random.Random) -> Row:
    """Damage checkpoints of stacks that were stopped: the newest, then all of them."""
    injected = 0
    for newest_only in (True, False):
        case = stage.half_done(f"damaged-checkpoints-{newest_only}")
        for folder in case.study.glob("stacks/*"):
            paths = sorted(folder.glob("step-*.safetensors"), reverse=True)
            for path in paths[:1] if newest_only else paths:
                _flip_or_cut(path, draw)
                injected += 1
        proof = case.ends_well()
    sees = "a line in the worker's log; the checkpoint before it is used, or none"
    return Row(injected=injected, sees=sees, outcome=SAME_BITS, proof=proof)


def _flip_or_cut(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = int(log_uniform(draw, 1, len(content))) - 1
    if draw.random() < 0.5:
        content[place] ^= 1 << draw.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


FAULTS = (
    Fault(name="weights of one proxy become NaN", inject=not_a_number, is_fast=True),
    Fault(name="memory runs out in a worker", inject=memory_runs_out),
    Fault(name="a worker that prints without end", inject=noise),
    Fault(name="damaged checkpoints", inject=damaged_checkpoints),
)
