"""Where faults happen: a packed corpus, a study of small proxies, and what it gives undisturbed.

Enters: an empty folder and a size. Leaves: `Case`s, each a fresh copy of corpus and study whose
commands can be started, disturbed and awaited. Everything goes through the command line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regmix.swarm.processes import worker_processes
from regmix_bench.faults import hooks
from regmix_bench.faults.proof import Proof, prove, snapshot

# Longer than any command here takes, on a busy machine as well: past it, it hangs.
PATIENCE_SECONDS = 240.0
# What a command may make before it refuses.
_OF_ANY_COMMAND = {"ledger.sqlite", "ledger.backup.sqlite", "progress.json"}
OFTEN_SECONDS = "0.1"  # between two checkpoints
_WORDS = {
    "animals": "cat dog horse sheep goat cow hen duck goose mouse rat fox wolf bear deer hare",
    "colours": "red green blue white black grey brown pink purple orange yellow violet cyan",
    "numbers": "one two three four five six seven eight nine ten eleven twelve twenty thirty",
}


class FaultError(Exception):
    """A fault did what none may do, or could not be injected."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """num_proxies of num_steps steps each, stack_size trained together, by `workers` workers."""

    num_proxies: int = 6
    num_steps: int = 400
    stack_size: int = 3
    workers: int = 2


@dataclass(frozen=True)
class Ended:
    """A command that ended: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what is wrong and how to cure it; empty where there is none."""
        return next((line for line in self.err.splitlines() if line.startswith("Error: ")), "")

    @property
    def reasons(self) -> str:
        """What the command says of its failures: the line above and those that belong to it."""
        lines = [line.strip() for line in self.err.splitlines() if line.startswith("  ")]
        return " ".join([*lines, self.error])


class Run:
    """A command that is running; its output goes to files, so that no pipe can fill up."""

    def __init__(self, words: Sequence[str], folder: Path, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("out-*")))
        self._paths = folder / f"out-{number}", folder / f"err-{number}"
        with open(self._paths[0], "wb") as out, open(self._paths[1], "wb") as err:
            self.process = subprocess.Popen(words, stdout=out, stderr=err, **options)

    @property
    def workers(self) -> list[int]:
        """The processes of its living workers."""
        return worker_processes(self.process.pid)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command itself."""
        self.process.send_signal(number)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> Ended:
        """Return how it ended; `FaultError` where it does not."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in [*self.workers, self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
            raise FaultError(
                f"a command hangs: no end after {seconds:.0f} s\n{self._tail}"
            ) from None
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._paths)
        return Ended(code, out, err)

    @property
    def _tail(self) -> str:
        return self._paths[1].read_text(encoding="utf-8", errors="replace")[-2000:]

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        """Return what the condition gives once it is true; `FaultError` where that never is."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            if found := condition():
                return found
            if not self.is_running:
                raise FaultError(f"the command ended before {what}\n{self._tail}")
            time.sleep(0.005)
        raise FaultError(f"a command hangs before {what}\n{self._tail}")


class Case:
    """One copy of the corpus and the study, for one fault."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.folder, self.stage = folder, stage
        self.study, self.shards = folder / "study", folder / "shards"
        self._rules: list[hooks.Rule] = []

    def disturb(self, *rules: hooks.Rule) -> None:
        """Let the next commands meet these rules, in place of those before."""
        self._rules = list(rules)
        shutil.rmtree(self.folder / "hooks", ignore_errors=True)

    def struck(self, do: str) -> int:
        """Return how often the rules that do `do` have struck; `FaultError` where none has."""
        if times := hooks.times_struck(self.folder / "hooks", do):
            return times
        raise FaultError(f"{self.folder}: the fault was never injected")

    def start(self, *options: str, **popen: Any) -> Run:
        """Start `regmix-fast proxies` on the study."""
        size = self.stage.size
        words = ["proxies", str(self.study), "--stack-size", str(size.stack_size)]
        words += ["--workers", str(size.workers), "--checkpoint-seconds", OFTEN_SECONDS, *options]
        return self.command(*words, **popen)

    def command(self, *words: str, **popen: Any) -> Run:
        """Start another command."""
        extra = hooks.environment(self._rules, self.folder / "hooks") if self._rules else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra, **popen.pop("env", {})}
        line = [sys.executable, "-m", "regmix.cli", *words]
        return Run(line, self.folder / "output", env=environment, **popen)

    def in_the_middle(self, run: Run, checkpoints: int = 2) -> None:
        """Wait until a run has written some more checkpoints: its stacks are in training."""
        pattern = "stacks/*/step-*.safetensors"
        before = set(self.study.glob(pattern))
        seen: set[Path] = set()

        def written() -> bool:
            seen.update(self.study.glob(pattern))
            return len(seen - before) >= checkpoints

        run.until("it wrote a checkpoint", written)

    def prove(self, *, without: frozenset[str] = frozenset()) -> Proof:
        """Compare the study with the undisturbed one; `FaultError` where they differ."""
        proof = prove(self.stage.whole, self.study, without=without)
        if not proof.is_clean:
            raise FaultError(f"{self.folder}: {proof}")
        return proof

    def ends_well(self, run: Run | None = None) -> Proof:
        """Wait for a run, or for one more that nothing disturbs, and prove what the study has."""
        if run is None:
            self.disturb()
        ended = (run or self.start()).wait()
        if ended.code != 0:
            raise FaultError(f"exit code {ended.code}, not 0\n{ended.err[-3000:]}")
        return self.prove()

    def refused(self, run: Run, *words: str) -> str:
        """Return what the user sees of a run that must end with an error that names `words`."""
        ended = run.wait()
        what = f"{self.folder}: exit code {ended.code}\n{ended.err[-3000:]}"
        if ended.code != 1:
            raise FaultError(f"this must be refused with exit code 1. {what}")
        if "Traceback" in ended.err or not ended.error:
            raise FaultError(f"a traceback, or no line that says what is wrong. {what}")
        if missing := [word for word in words if word not in ended.reasons]:
            raise FaultError(f"the message does not name {missing}. {what}")
        return self.brief(ended.reasons)

    def brief(self, text: str) -> str:
        """Return a message with paths from the case's folder on."""
        return text.replace(f"{self.folder}/", "")

    def snapshot(self) -> dict[str, bytes]:
        """Return all that the study and the corpus hold."""
        return {**snapshot(self.study), **snapshot(self.shards)}

    def refuse_changes(
        self, before: dict[str, bytes], *, without: frozenset[str] = frozenset()
    ) -> None:
        """Raise `FaultError` where a refusal has changed what was there; a new ledger may be.

        without: files that may have changed all the same.
        """
        after = self.snapshot()
        names = (before.keys() | (after.keys() - _OF_ANY_COMMAND)) - without
        if changed := sorted(name for name in names if before.get(name) != after.get(name)):
            raise FaultError(f"{self.folder}: the refusal has changed {', '.join(changed)}")

    def ledger_states(self) -> dict[str, int]:
        """Return how many attempts ended in each state; empty where a ledger counts none."""
        import sqlite3

        path = self.study / "ledger.sqlite"
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
            rows = database.execute("SELECT state, count(*) FROM attempts GROUP BY state")
            found = {str(state): int(count) for state, count in rows}
        database.close()
        return found


class Stage:
    """The corpus, the study as drawn, and the study as it ends undisturbed."""

    def __init__(self, folder: Path, size: Size | None = None) -> None:
        self.folder, self.size = folder.absolute(), size or Size()
        self.whole = self.folder / "whole" / "study"
        self._drawn = self.folder / "drawn"
        self._corpus_and_study()
        first = self.case("whole", folder=self.whole.parent)
        ended = first.start().wait()
        if ended.code != 0:
            raise FaultError(f"the undisturbed run fails\n{ended.err[-3000:]}")

    def _corpus_and_study(self) -> None:
        from regmix.data.packing.pack import pack
        from regmix.data.shards import ShardSet
        from regmix.model.optim import OptimConfig
        from regmix.model.presets import ModelShape
        from regmix.study import Training
        from regmix.swarm.drawing import SwarmRequest, make_study

        write_corpus(self._drawn / "corpus")
        pack([self._drawn / "corpus"], self._drawn / "shards", train_bpe=320, valid_fraction=0.15)
        steps = self.size.num_steps
        training = Training(
            shape=ModelShape(
                num_layers=2, width=32, num_heads=2, hidden=64, vocab_size=320, seq_len=32
            ),
            optim=OptimConfig(lr=3e-3, warmup_steps=2, total_steps=steps),
            batch_size=8,
            num_steps=steps,
        )
        make_study(
            self._drawn / "study",
            ShardSet.open(self._drawn / "shards"),
            swarm=SwarmRequest(num=self.size.num_proxies),
            training=training,
            objective={"animals": 1.0},
        )

    def case(self, name: str, *, folder: Path | None = None) -> Case:
        """Return a fresh copy, in `folder` or in one of the stage's own."""
        folder = folder or self.folder / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for part in ("shards", "study"):
            shutil.copytree(self._drawn / part, folder / part)
        return Case(folder, self)

    def half_done(self, name: str) -> Case:
        """Return a copy of a case whose sweep was stopped when some stacks were done."""
        half = self.folder / "half"
        if not half.exists():
            case = self.case("half", folder=half)
            run = case.start("--workers", "1")
            run.until("a stack was done", lambda: any(case.study.glob("steps/*")))
            case.in_the_middle(run, 1)
            run.send(signal.SIGTERM)
            if run.wait().code != 130:
                raise FaultError(f"{half}: the sweep did not stop as told")
        copy = self.folder / "cases" / name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(half, copy)
        return Case(copy, self)


def write_corpus(folder: Path) -> None:
    """Write three domains of generated sentences as JSON lines."""
    folder.mkdir(parents=True)
    for domain, words in _WORDS.items():
        draw, vocabulary = random.Random(domain), words.split()
        with open(folder / f"{domain}-0.jsonl", "w", encoding="utf-8") as stream:
            for number in range(200):
                text = f"{domain} {number}: " + " ".join(draw.choices(vocabulary, k=80))
                stream.write(json.dumps({"text": text}) + "\n")
