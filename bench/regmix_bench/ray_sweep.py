"""One study trained here and on Ray clusters of three nodes that are disturbed: the same bits?

Enters: an empty folder. Leaves there one study trained by the local executor, one trained on nodes
that share its disk, and, where this process may make a mount namespace (as root, on Linux), one on
nodes that see neither study nor corpus; and records of what was compared. While the others train,
one node is killed, one is added, and the coordinator is killed with `kill -9` and run again. All
nodes are on this machine (Ray's own cluster utility). The moments depend on the machine's speed.

    python -m regmix_bench.ray_sweep --out FOLDER --json FILE
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from regmix.data.found import collect
from regmix.files import checksum
from regmix.swarm.ledger import Ledger
from regmix_bench.harness import Record, append, table

NUM_PROXIES, STACK_SIZE = 32, 4
BATCH = ("--seq-len", "128", "--batch-size", "8", "--tokens")
OFTEN = ("--stack-size", str(STACK_SIZE), "--checkpoint-seconds", "2")
PATIENCE_SECONDS = 900.0

# Serves "kill" and "add" on stdin: Ray's nodes, started where the study may be hidden from them.
_NODES = """
import sys
from ray.cluster_utils import Cluster

nodes = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
)
last = [nodes.add_node(num_cpus=1) for _ in range(2)][-1]
print(nodes.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        nodes.remove_node(last, allow_graceful=False)
    else:
        last = nodes.add_node(num_cpus=1)
    print("done", flush=True)
nodes.shutdown()
"""


class Nodes:
    """A cluster of three nodes in a process of its own; `hidden` is a folder they do not see."""

    def __init__(self, hidden: Path | None = None) -> None:
        command = [sys.executable, "-c", _NODES]
        if hidden is not None:
            mount = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mount, str(hidden), *command]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.address = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            sys.exit("the nodes did not start")
        return line

    def change(self, what: str) -> None:
        """Kill the node that was added last, or add one."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._read()

    def close(self) -> None:
        """End all nodes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def command(*words: str) -> list[str]:
    """Return the command line of a `regmix-fast` command."""
    return [sys.executable, "-m", "regmix.cli", *words]


def run(*words: str) -> float:
    """Run a `regmix-fast` command to its end; return the seconds it took."""
    started = time.monotonic()
    subprocess.run(command(*words), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def workers_on_nodes() -> list[int]:
    """Return the process ids of workers whose parent is a Ray actor of ours."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            of_ray = b"ray::PlaceActor" in (Path("/proc") / parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if of_ray and b"regmix.swarm.worker" in words:
            found.append(int(entry.name))
    return found


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> float:
    """Wait for something while a process lives; return the seconds that it took."""
    started = time.monotonic()
    while not is_so():
        if process is not None and process.poll() is not None:
            sys.exit(f"the sweep ended early, with code {process.returncode}")
        if time.monotonic() - started > PATIENCE_SECONDS:
            sys.exit("nothing happens any more")
        time.sleep(0.05)
    return time.monotonic() - started


def num_done(study: Path) -> int:
    """Return how many proxies the ledger has as done."""
    if not (study / "ledger.sqlite").exists():
        return 0
    with Ledger.read(study / "ledger.sqlite") as ledger:
        return sum(row.state == "done" for row in ledger.proxies())


def num_lost(study: Path) -> int:
    """Return how many attempts ended because their machine went."""
    with Ledger.read(study / "ledger.sqlite") as ledger:
        return sum(row.state == "lost" for row in ledger.attempts())


def run_disturbed(study: Path, hidden: Path | None) -> dict[str, float]:
    """Train a study on Ray, with a node killed and one added, and the coordinator killed."""
    nodes = Nodes(hidden)
    words = ["proxies", str(study), "--engine", "ray", "--address", nodes.address, *OFTEN]
    words += ["--scratch", str(study.parent.parent / f"{study.name}-scratch")]
    measured = {}
    started = time.monotonic()
    try:
        sweep = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
        wait_until(lambda: num_done(study) >= NUM_PROXIES // 8, sweep)
        nodes.change("kill")
        measured["node_killed_to_stack_requeued"] = wait_until(lambda: num_lost(study) > 0, sweep)
        nodes.change("add")
        wait_until(lambda: num_done(study) >= NUM_PROXIES // 2, sweep)
        sweep.kill()
        sweep.wait()
        killed = wait_until(lambda: not workers_on_nodes())
        measured["coordinator_killed_to_no_worker_left"] = killed
        run(*words)
        measured["sweep"] = time.monotonic() - started
    finally:
        nodes.close()
    return measured


def outcome(study: Path) -> dict[str, str]:
    """Return the checksums of all that must not depend on who trained what."""
    paths = [study / "losses.csv", *sorted(study.glob("steps/*.npy"))]
    return {str(path.relative_to(study)): checksum(path) for path in paths}


def ledger_records(study: Path, case: str) -> list[Record]:
    """Return what the ledger says of lost and doubled proxies, and of attempts."""
    with Ledger.read(study / "ledger.sqlite") as ledger:
        done = Counter(row.index for row in ledger.proxies() if row.state == "done")
        attempts = Counter(row.state for row in ledger.attempts())
        machines = {row.machine for row in ledger.attempts()}
    counts = {
        "proxies_lost": (NUM_PROXIES - len(done), "proxies"),
        "proxies_doubled": (sum(done.values()) - len(done), "proxies"),
        "nodes_that_trained": (len(machines), "nodes"),
        **{f"attempts_{state}": (num, "attempts") for state, num in sorted(attempts.items())},
    }
    return [
        Record(suite="ray", case=case, metric=metric, value=value, unit=unit)
        for metric, (value, unit) in counts.items()
    ]


def can_hide() -> bool:
    """Whether this process may hide a folder from its children."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode == 0


def main() -> None:
    """Train the study in each way, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--proxy-tokens", default="400k")
    options = parser.parse_args()
    out = options.out.absolute()
    seen = out / "seen"
    collect(out / "corpus", max_bytes_per_domain=600_000)
    run("pack", str(out / "corpus"), "--out", str(seen / "shards"), "--train-bpe", "1024",
        "--valid-fraction", "0.1")  # fmt: skip
    cases = ["local", "shared storage", *(["own disks"] if can_hide() else [])]
    outcomes, records = {}, []
    for case in cases:
        study = seen / case.replace(" ", "-")
        run("mixtures", str(study), "--shards", str(seen / "shards"), "--num", str(NUM_PROXIES),
            "--model", "cpu-32", *BATCH, options.proxy_tokens)  # fmt: skip
        if case == "local":
            seconds = {"sweep": run("proxies", str(study), "--workers", "2", *OFTEN)}
        else:
            seconds = run_disturbed(study, seen if case == "own disks" else None)
            records += ledger_records(study, case)
        outcomes[case] = outcome(study)
        records += [
            Record(suite="ray", case=case, metric=metric, value=value, unit="s")
            for metric, value in seconds.items()
        ]
    expected, different = outcomes["local"], []
    for case in cases[1:]:
        found = outcomes[case]
        names = [name for name in expected | found if expected.get(name) != found.get(name)]
        different += [f"{case}: {name}" for name in names]
        counts = {"files_compared": len(expected), "files_different": len(names)}
        records += [
            Record(suite="ray", case=case, metric=m, value=v, unit="files", peer="local")
            for m, v in counts.items()
        ]
    print(table(records))
    if options.json:
        append(options.json, records)
    if different:
        sys.exit(f"different: {', '.join(different)}")


if __name__ == "__main__":
    main()
