"""Kill a sweep and a training at random moments: do they end with the same bits?

Enters: an empty folder. Leaves there one undisturbed study and one whose `proxies` and `train`
were killed with `kill -9` ten times each, and records of what was compared. Half of the
kills hit the coordinator; the others a worker, where one lives, and the coordinator a second later.
Seeds are fixed; the moments depend on the machine's speed.

    python -m regmix_bench.kills --out FOLDER --json FILE
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from regmix.data.found import collect
from regmix.files import checksum
from regmix.swarm.processes import worker_processes
from regmix_bench.harness import Record, append, table

KILLS = 10
SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 25.0
BATCH = ("--seq-len", "128", "--batch-size", "8", "--tokens")
OFTEN = ("--checkpoint-seconds", "2")
MODELS = ("--mixture", "optimum", "--mixture", "natural", "--model", "cpu-128")


def command(*words: str) -> list[str]:
    """Return the command line of a `regmix-fast` command."""
    return [sys.executable, "-m", "regmix.cli", *words]


def run(*words: str) -> None:
    """Run a `regmix-fast` command to its end."""
    subprocess.run(command(*words), check=True, stdout=subprocess.DEVNULL)


def run_killed(words: Sequence[str], draw: random.Random) -> tuple[int, int]:
    """Run a command, killed `KILLS` times at random moments, to its end.

    Returns how many kills hit the coordinator and how many a worker.
    """
    hits = [0, 0]
    for number in range(KILLS):
        process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
        # Log-uniform: starting up and writing checkpoints are hit as well as training.
        delay = SHORTEST_SECONDS * (LONGEST_SECONDS / SHORTEST_SECONDS) ** draw.random()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            workers = worker_processes(process.pid)
            if number % 2 and workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
                hits[1] += 1
                time.sleep(1.0)
            else:
                hits[0] += 1
            process.kill()
            process.wait()
    run(*words)
    return hits[0], hits[1]


def outcome(study: Path) -> dict[str, str]:
    """Return the checksums of all that must not depend on a kill."""
    names = ["mixtures.csv", "losses.csv", "optimum.yaml", "optimum.json"]
    paths = [study / name for name in names]
    paths += sorted(study.glob("steps/*.npy")) + sorted(study.glob("models/*/model.safetensors"))
    paths += sorted(study.glob("models/*/evaluation.json"))
    return {str(path.relative_to(study)): checksum(path) for path in paths}


def main() -> None:
    """Run the undisturbed and the disturbed study, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--proxy-tokens", default="400k")
    parser.add_argument("--final-tokens", default="1M")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    collect(options.out / "corpus", max_bytes_per_domain=600_000)
    shards = str(options.out / "shards")
    run("pack", str(options.out / "corpus"), "--out", shards, "--train-bpe", "1024",
        "--valid-fraction", "0.1")  # fmt: skip
    records, outcomes = [], []
    for name, disturbed in (("undisturbed", False), ("killed", True)):
        study = str(options.out / name)
        run("mixtures", study, "--shards", shards, "--num", "24", "--model", "cpu-32", *BATCH,
            options.proxy_tokens)  # fmt: skip
        proxies = ["proxies", study, "--workers", "2", "--stack-size", "12", *OFTEN]
        train = ["train", study, *MODELS, *BATCH, options.final_tokens, *OFTEN]
        for stage, words in (("proxies", proxies), ("train", train)):
            if stage == "train":
                run("fit", study)
                run("optimize", study, "--tokens", options.final_tokens)
            if not disturbed:
                run(*words)
                continue
            coordinator, worker = run_killed(words, draw)
            records += [
                Record(suite="kills", case=stage, metric=metric, value=value, unit="kills")
                for metric, value in (("coordinator", coordinator), ("worker", worker))
            ]
        outcomes.append(outcome(Path(study)))
    whole, killed = outcomes
    different = sorted(name for name in whole | killed if whole.get(name) != killed.get(name))
    for metric, value in (("files_compared", len(whole)), ("files_different", len(different))):
        records.append(Record(suite="kills", case="all", metric=metric, value=value, unit="files"))
    print(table(records))
    if options.json:
        append(options.json, records)
    if different:
        sys.exit(f"different after the kills: {', '.join(different)}")


if __name__ == "__main__":
    main()
