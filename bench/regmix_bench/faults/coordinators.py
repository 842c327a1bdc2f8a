"""More than one coordinator on a study, here and on other machines; and clocks that jump.

Enters: a stage. Leaves: rows. Another machine is a process here that goes by another name, whose
`flock` reaches nobody, as over a network file system without locks.
"""

from __future__ import annotations

import random
import signal
import time

from regmix_bench.faults.fault import SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import WORKER, Rule
from regmix_bench.faults.proof import Proof
from regmix_bench.faults.stage import Case, FaultError, Stage

ELSEWHERE = Rule(
    role="any", at="import", match=r"regmix\.lease$", do="elsewhere", value="far-away", times=None
)
# So that the first is still there when the second has waited.
SLOW = Rule(role=WORKER, at="step", match=r"@100@", do="wait", value=45.0, times=2)
LEASE_SECONDS_AT_MOST = 120.0


def second_here(stage: Stage, _draw: random.Random) -> Row:
    """Start the command twice on one machine."""
    case = stage.case("second-here")
    first = case.start()
    case.in_the_middle(first, 1)
    first.send(signal.SIGSTOP)  # so that it is still there when the second has waited
    try:
        sees = case.refused(case.start(), "in use", str(first.process.pid))
    finally:
        first.send(signal.SIGCONT)
    proof = case.ends_well(first)
    sees = sees.replace(str(first.process.pid), "4711")
    return Row(injected=1, sees=sees, outcome="the second is refused, the first " + SAME_BITS,
               proof=proof)  # fmt: skip


def second_elsewhere(stage: Stage, _draw: random.Random) -> Row:
    """Start the command on another machine while one runs here."""
    case = stage.case("second-elsewhere")
    case.disturb(SLOW)
    first = case.start()
    case.in_the_middle(first, 1)
    case.disturb(ELSEWHERE)
    sees = case.refused(case.start(), "in use", str(first.process.pid))
    sees = sees.replace(str(first.process.pid), "4711")
    return Row(
        injected=1,
        sees=sees,
        outcome="the second is refused, the first " + SAME_BITS,
        proof=case.ends_well(first),
    )


def stale_lease(stage: Stage, _draw: random.Random) -> Row:
    """Kill a coordinator elsewhere: its lease is renewed no more, and is taken over here."""
    case = stage.case("stale-lease")
    case.disturb(ELSEWHERE)
    first = case.start()
    case.in_the_middle(first, 1)
    first.send(signal.SIGKILL)
    first.wait()
    case.disturb()
    run = case.start()
    proof = case.ends_well(run)
    (sees,) = [line for line in run.wait().err.splitlines() if "far-away" in line]
    sees = case.brief(sees).replace(str(first.process.pid), "4711")
    return Row(injected=1, sees=sees, outcome=SAME_BITS, proof=proof)


def fenced(stage: Stage, _draw: random.Random) -> Row:
    """Stop a coordinator until another machine has taken over, then let it go on."""
    case = stage.case("fenced")
    first = case.start()
    case.in_the_middle(first, 1)
    first.send(signal.SIGSTOP)
    case.disturb(ELSEWHERE)
    proof = _takes_over(case)
    first.send(signal.SIGCONT)
    sees = case.refused(first, "another command took the study over")
    if case.prove() != proof:
        raise FaultError(f"{case.folder}: the old coordinator has changed something")
    case.disturb()
    return Row(injected=1, sees=sees, outcome="the old one is fenced off, the new one "
               + SAME_BITS, proof=case.ends_well())  # fmt: skip


def _takes_over(case: Case) -> Proof:
    """Run the command until it no longer finds the study in use, and prove what it leaves."""
    deadline = time.monotonic() + LEASE_SECONDS_AT_MOST
    while True:
        ended = case.start().wait()
        if ended.code == 0:
            return case.prove()
        if "in use" not in ended.error or time.monotonic() > deadline:
            raise FaultError(f"{case.folder}: exit code {ended.code}\n{ended.err[-3000:]}")


def clocks_jump(stage: Stage, _draw: random.Random) -> Row:
    """Let the wall clocks of all processes jump by three days, there and back, all the time."""
    case = stage.case("clocks-jump")
    case.disturb(Rule(role="any", at="start", do="jump", times=None))
    run = case.start()
    proof = case.ends_well(run)
    broken = {k: v for k, v in case.ledger_states().items() if k != "done"}
    if broken:
        raise FaultError(f"{case.folder}: attempts were broken off: {broken}")
    jumps = case.struck("jump")
    return Row(injected=jumps, sees="nothing", outcome=SAME_BITS, proof=proof)


FAULTS = (
    Fault(name="a second coordinator on this machine", inject=second_here),
    Fault(name="a second coordinator on another machine", inject=second_elsewhere),
    Fault(name="a coordinator killed on another machine", inject=stale_lease),
    Fault(name="a coordinator that wakes up after another took over", inject=fenced),
    Fault(name="wall clocks that jump by days", inject=clocks_jump),
)
