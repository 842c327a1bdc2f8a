"""Processes that stand still: stopped by a signal, or with training that does not go on.

Enters: a stage. Leaves: rows. Limits that are minutes for users are set to seconds here.
"""

from __future__ import annotations

import os
import random
import signal
import time

from regmix_bench.faults.fault import SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import COORDINATOR, WORKER, Rule
from regmix_bench.faults.stage import Case, FaultError, Stage

BEAT_PATIENCE_SECONDS, STALL_SECONDS = 8.0, 30.0
# Longer than any limit above and than a lease lasts.
STANDSTILL_SECONDS = 25.0
IMPATIENT = Rule(
    role=COORDINATOR,
    at="import",
    match=r"swarm\.executors$",
    do="set",
    value={"BEAT_PATIENCE_SECONDS": BEAT_PATIENCE_SECONDS, "STALL_SECONDS": STALL_SECONDS},
    times=None,
)


def worker_stopped(stage: Stage, draw: random.Random) -> Row:
    """Stop a worker in the middle of its stack: its heart beats no more."""
    case = stage.case("worker-stopped")
    case.disturb(IMPATIENT)
    run = case.start()
    case.in_the_middle(run)
    os.kill(draw.choice(run.workers), signal.SIGSTOP)
    proof = case.ends_well(run)
    _refuse_other_than(case, "hung", 1)
    sees = "a line: no sign of life; its stack goes on in a new worker from its last checkpoint"
    return Row(injected=1, sees=sees, outcome=SAME_BITS, proof=proof)


def training_hangs(stage: Stage, _draw: random.Random) -> Row:
    """Let the training of one stack hang while its worker's heart goes on beating."""
    case = stage.case("training-hangs")
    # Past the first steps: only then is known how long one takes.
    hang = Rule(role=WORKER, at="step", match=r"stack-0000@200@", do="hang")
    slow = Rule(role=WORKER, at="step", match=r"stack-0000@\d+@", do="wait", value=0.03, times=None)
    case.disturb(IMPATIENT, hang, slow)
    proof = case.ends_well(case.start())
    _refuse_other_than(case, "hung", 1)
    sees = "a line: its training stood still; its stack goes on in a new worker"
    return Row(injected=case.struck("hang"), sees=sees, outcome=SAME_BITS, proof=proof)


def coordinator_stopped(stage: Stage, _draw: random.Random) -> Row:
    """Stop the coordinator for longer than any patience, then let it go on."""
    case = stage.case("coordinator-stopped")
    case.disturb(IMPATIENT)
    run = case.start()
    case.in_the_middle(run)
    run.send(signal.SIGSTOP)
    time.sleep(STANDSTILL_SECONDS)
    run.send(signal.SIGCONT)
    proof = case.ends_well(run)
    _refuse_other_than(case, "hung", 0)
    return Row(injected=1, sees="nothing: no worker is blamed", outcome=SAME_BITS, proof=proof)


def everything_stopped(stage: Stage, _draw: random.Random) -> Row:
    """Stop the coordinator and all workers, as a machine that is suspended, then go on."""
    case = stage.case("everything-stopped")
    case.disturb(IMPATIENT)
    run = case.start()
    case.in_the_middle(run)
    stopped = [*run.workers, run.process.pid]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in stopped:
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(STANDSTILL_SECONDS)
    proof = case.ends_well(run)
    _refuse_other_than(case, "hung", 0)
    return Row(injected=1, sees="nothing: no worker is blamed", outcome=SAME_BITS, proof=proof)


def _refuse_other_than(case: Case, state: str, count: int) -> None:
    """Raise where the ledger counts another number of attempts that ended so."""
    found = case.ledger_states().get(state, 0)
    if found != count:
        raise FaultError(f"{case.folder}: {found} attempts are '{state}', not {count}")


FAULTS = (
    Fault(name="SIGSTOP of a worker", inject=worker_stopped),
    Fault(name="training hangs, heartbeat goes on", inject=training_hangs),
    Fault(name="SIGSTOP of the coordinator, then SIGCONT", inject=coordinator_stopped),
    Fault(name="SIGSTOP of all, as a suspended machine", inject=everything_stopped),
)
