"""Processes that are killed: at random moments, and at the moments that matter most.

Enters: a stage. Leaves: rows. Moments are drawn log-uniformly, so that starting up, resuming and
collecting are hit as well as training; what lies there at that moment depends on the machine.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Sequence

from regmix_bench.faults.fault import SAME_BITS, Fault, Row
from regmix_bench.faults.hooks import COORDINATOR, WORKER, Rule
from regmix_bench.faults.proof import Proof
from regmix_bench.faults.stage import Case, FaultError, Run, Stage

# Moments between two kills: from before the first import is done to far into a stack.
COORDINATOR_SECONDS = (0.05, 12.0)
WORKER_SECONDS = (1.0, 10.0)
# Where a process dies between two steps that must not come apart.
COORDINATOR_PLACES = (
    ("open", r"ledger\.sqlite|logs/"),
    ("rename", r"steps/\d+\.npy$"),
    ("open", r"losses\.csv"),
    ("rename", r"losses\.csv$"),
    ("open", r"sweep\.json"),
)
WORKER_PLACES = (
    ("step", r"stack-0000@0@"),
    ("open", r"step-\d+\.safetensors"),
    ("rename", r"step-\d+\.safetensors$"),
    ("open", r"\d\.npy"),
    ("open", r"result\.json"),
    ("rename", r"result\.json$"),
)


def log_uniform(draw: random.Random, shortest: float, longest: float) -> float:
    """Draw from the log-uniform distribution."""
    return float(shortest * (longest / shortest) ** draw.random())


def coordinators_killed(stage: Stage, draw: random.Random, *, kills: int) -> Row:
    """Kill the coordinator at random moments, and run the same command again each time."""
    done = sweeps = 0
    proof: Proof | None = None
    while done < kills or proof is None:
        case = stage.case(f"coordinators-killed-{sweeps}")
        while True:
            run = case.start()
            if done < kills and _killed(run, log_uniform(draw, *COORDINATOR_SECONDS)):
                done += 1
                continue
            proof = case.ends_well(run)
            sweeps += 1
            break
    sees = "nothing but the end; the same command goes on from the last checkpoints"
    outcome = f"{sweeps} sweeps: {SAME_BITS}"
    return Row(injected=done, sees=sees, outcome=outcome, proof=proof)


def _killed(run: Run, seconds: float) -> bool:
    """Kill a run after some seconds; whether it lived that long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and run.is_running:
        time.sleep(0.01)
    if not run.is_running:
        return False
    run.send(signal.SIGKILL)
    run.wait()
    return True


def workers_killed(
    stage: Stage, draw: random.Random, *, kills: int, number: signal.Signals = signal.SIGKILL
) -> Row:
    """Kill workers at random moments while one coordinator goes on."""
    done = sweeps = given_up = 0
    proof: Proof | None = None
    while done < kills or proof is None:
        case = stage.case(f"workers-{number.name}-{sweeps}")
        while True:
            run = case.start()
            done += _kill_workers(run, draw, kills - done, number)
            ended = run.wait()
            if ended.code == 0:
                break
            if "died" not in ended.reasons:
                raise FaultError(f"{case.folder}: exit code {ended.code}\n{ended.err[-3000:]}")
            given_up += 1
        proof = case.prove()
        sweeps += 1
    sees = "a line for each; its stack goes on in a new worker from its last checkpoint"
    outcome = f"{sweeps} sweeps, {given_up} given up on the way: {SAME_BITS}"
    return Row(injected=done, sees=sees, outcome=outcome, proof=proof)


def _kill_workers(run: Run, draw: random.Random, most: int, number: signal.Signals) -> int:
    done = 0
    while run.is_running and done < most:
        deadline = time.monotonic() + log_uniform(draw, *WORKER_SECONDS)
        while time.monotonic() < deadline and run.is_running:
            time.sleep(0.01)
        if workers := run.workers:
            try:
                os.kill(draw.choice(workers), number)
            except ProcessLookupError:
                continue
            done += 1
    return done


def killed_at_places(
    stage: Stage, _draw: random.Random, *, role: str, places: Sequence[tuple[str, str]]
) -> Row:
    """Kill a process as it does one thing after another, each once, in one study."""
    case = stage.case(f"{role}-killed-at-places")
    rules = [Rule(role=role, at=at, match=match, do="kill") for at, match in places]
    case.disturb(*rules)
    most = len(places) + 2
    for _ in range(most):
        ended = case.start().wait()
        if ended.code == 0:
            break
        if ended.code == 1 and "died" not in ended.reasons:
            raise FaultError(f"{case.folder}: exit code {ended.code}\n{ended.err[-3000:]}")
    struck = case.struck("kill")
    if struck < len(places):
        raise FaultError(f"{case.folder}: {struck} of {len(places)} kills happened")
    proof = _after(case)
    sees = "as above"
    return Row(injected=struck, sees=sees, outcome=SAME_BITS, proof=proof)


def _after(case: Case) -> Proof:
    """Prove the study as it is, and again after one more run, which must train nothing."""
    case.prove()
    return case.ends_well()


def stopped_and_resumed(stage: Stage, draw: random.Random, *, times: int) -> Row:
    """Stop the coordinator as Ctrl-C and a batch system do, at random moments."""
    case = stage.case("stopped-and-resumed")
    done = 0
    while done < times:
        run = case.start()
        number = draw.choice((signal.SIGINT, signal.SIGTERM))
        seconds = log_uniform(draw, *COORDINATOR_SECONDS)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and run.is_running:
            time.sleep(0.01)
        if not run.is_running:
            break
        run.send(number)
        ended = run.wait()
        # Before its handlers are there, a signal ends the interpreter as any program.
        if ended.code not in (0, 130, -number) and "KeyboardInterrupt" not in ended.err:
            raise FaultError(f"{number.name}: exit code {ended.code}\n{ended.err[-3000:]}")
        done += 1
    return Row(
        injected=done,
        sees="Stopped. Run the same command again to go on.",
        outcome=SAME_BITS,
        proof=case.ends_well(),
    )


def _both_places() -> tuple[Fault, ...]:
    return tuple(
        Fault(
            name=f"kill -9 of the {role}, at the moments that matter",
            inject=functools.partial(killed_at_places, role=role, places=places),
        )
        for role, places in ((COORDINATOR, COORDINATOR_PLACES), (WORKER, WORKER_PLACES))
    )


FAULTS = (
    Fault(
        name="kill -9 of the coordinator, at random",
        inject=functools.partial(coordinators_killed, kills=50),
        is_long=True,
    ),
    Fault(
        name="kill -9 of a worker, at random",
        inject=functools.partial(workers_killed, kills=55),
        is_long=True,
    ),
    *_both_places(),
    Fault(
        name="SIGTERM to a worker (preemption), at random",
        inject=functools.partial(workers_killed, kills=10, number=signal.SIGTERM),
        is_long=True,
    ),
    Fault(
        name="Ctrl-C or SIGTERM to the coordinator, at random",
        inject=functools.partial(stopped_and_resumed, times=10),
        is_long=True,
    ),
)
