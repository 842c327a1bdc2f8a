"""The Ray executor on a cluster of several nodes in this machine: the same bits as here, always.

One cluster serves all tests of this module. Nodes are added and removed in the main thread, as Ray
sets a handler of signals then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_workers import MODULE, FakeWorkers, make_fake_workers
from test_executors import ended, jobs_of

from regmix.cli.proxies import command
from regmix.data.shards import ShardSet
from regmix.errors import StudyError
from regmix.model.optim import OptimConfig
from regmix.model.presets import ModelShape
from regmix.study import Study, Training
from regmix.swarm.cluster import executor as ray_executor_module
from regmix.swarm.cluster.connection import Cluster, connect
from regmix.swarm.cluster.executor import RayExecutor
from regmix.swarm.cluster.gpus import find_ray_gpus
from regmix.swarm.drawing import SwarmRequest, make_study
from regmix.swarm.events import (
    Done,
    Event,
    Joined,
    Left,
    Progress,
    Requeued,
    Retired,
    Started,
    Stopped,
)
from regmix.swarm.executors import Executor
from regmix.swarm.shard_cache import find_copy
from regmix.swarm.sweep import SweepOptions, run_sweep

pytest.importorskip("ray", reason="needs Ray: pip install 'regmix-fast[ray]'")

NUM_PROXIES, STACK_SIZE, NUM_STEPS = 32, 8, 300


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster whose head has no CPUs, so that every place is on a node that may go."""
    from ray.cluster_utils import Cluster as Nodes

    before = signal.getsignal(signal.SIGTERM)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Else what runs on nodes stands back behind all other processes of this machine.
    patch.setenv("RAY_worker_niceness", "0")
    # Nodes hand their environment on to their workers, so the fake ones are on the path from here.
    make_fake_workers(tmp_path_factory.mktemp("fake"), patch)
    made = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()
    patch.undo()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[Cluster]:
    connected = connect(nodes.address)
    yield connected
    connected.close()


@pytest.fixture
def workers(nodes: Any) -> FakeWorkers:
    """The fake workers of the cluster's nodes, without rules, and with nothing given yet."""
    found = FakeWorkers(Path(os.environ["FAKE_RULES"]).parent)
    found.rule()
    Path(os.environ["FAKE_LOG"]).write_text("")
    return found


@pytest.fixture(autouse=True)
def _two_nodes(nodes: Any) -> Iterator[None]:
    """Give the next test two nodes beside the head again."""
    yield
    while len(nodes.list_all_nodes()) < 3:
        nodes.add_node(num_cpus=1)


def training(steps: int) -> Training:
    return Training(
        shape=ModelShape(
            num_layers=1, width=32, num_heads=2, hidden=32, vocab_size=320, seq_len=32
        ),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, total_steps=steps),
        batch_size=4,
        num_steps=steps,
        eval_tokens=2048,
    )


def new_study(shards: Path, path: Path, steps: int, num: int = NUM_PROXIES) -> Study:
    return make_study(
        path,
        ShardSet.open(shards),
        swarm=SwarmRequest(num=num),
        training=training(steps),
        objective={"animals": 1.0},
    )


def outcome(study: Study) -> dict[str, bytes]:
    files = {"losses.csv": study.losses_path.read_bytes()}
    for path in sorted(study.steps_path.glob("*.npy")):
        files[path.name] = path.read_bytes()
    return files


def sweep(
    study: Study,
    make_executor: Callable[..., Executor] | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
    **options: Any,
) -> list[Event]:
    """Train a study's proxies; returns all events."""
    events: list[Event] = []

    def handle(event: Event, _tally: object) -> None:
        events.append(event)
        on_event(event)

    chosen = {"num_workers": 2, "stack_size": STACK_SIZE, "checkpoint_seconds": 0.2, **options}
    result = run_sweep(study, SweepOptions(make_executor=make_executor, **chosen), on_event=handle)
    assert (result.num_failed, result.num_pending) == (0, 0)
    return events


def ray_executor(cluster: Cluster, **more: Any) -> Callable[..., RayExecutor]:
    return lambda **given: RayExecutor(cluster, **{**given, **more})


def done_once(events: list[Event]) -> list[str]:
    return sorted(event.job.name for event in events if isinstance(event, Done))


@pytest.fixture(scope="module")
def local(tiny_shards_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the local executor makes of the study that the others train too."""
    study = new_study(tiny_shards_path, tmp_path_factory.mktemp("local") / "study", NUM_STEPS)
    sweep(study)
    return outcome(study)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def node_of(event: Started | Joined | Left) -> str:
    place = event.worker if isinstance(event, Started) else event.place.id
    return place.split("/")[0]


def test_a_node_that_dies_and_one_that_joins_change_no_bit(
    nodes: Any, cluster: Cluster, tiny_shards_path: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    study = new_study(tiny_shards_path, tmp_path / "study", NUM_STEPS)
    last: dict[str, str] = {}
    changed: list[str] = []

    def disturb(event: Event) -> None:
        if isinstance(event, Started):
            last[event.job.name] = node_of(event)
        elif isinstance(event, Done) and not changed:
            # The other node is in the middle of its stack.
            done = last.pop(event.job.name)
            dead = next(node for node in last.values() if node != done)
            changed.append(dead)
            victim = next(n for n in nodes.list_all_nodes() if n.node_id.startswith(dead))
            nodes.remove_node(victim, allow_graceful=False)
            changed.append(nodes.add_node(num_cpus=1).node_id[:8])
            # So that it comes before all is done; meanwhile the other node waits for work.
            wait_until(lambda: changed[1] in [p.id.split("/")[0] for p in executors[0].places])

    executors: list[RayExecutor] = []

    def make(**given: Any) -> RayExecutor:
        executors.append(RayExecutor(cluster, **given))
        return executors[0]

    events = sweep(study, make, disturb)
    assert outcome(study) == local
    assert len(done_once(events)) == len(set(done_once(events))) == NUM_PROXIES // STACK_SIZE
    dead, new = changed
    assert [node_of(event) for event in events if isinstance(event, Left)] == [dead]
    assert [node_of(event) for event in events if isinstance(event, Joined)] == [new]
    assert [event.outcome for event in events if isinstance(event, Requeued)] == ["lost"]
    assert new in [node_of(event) for event in events if isinstance(event, Started)]


def own_workers() -> list[int]:
    """The worker processes on the nodes of this module's cluster."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"FAKE_RULES={os.environ['FAKE_RULES']}".encode()
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if ours in (entry / "environ").read_bytes() and b"regmix.swarm.worker" in words:
                found.append(int(entry.name))
    return sorted(found)


def test_workers_that_die_or_hang_or_are_stopped_change_no_bit_on_nodes_with_own_disks(
    cluster: Cluster, tiny_shards_path: Path, tmp_path: Path, local: dict[str, bytes]
) -> None:
    study = new_study(tiny_shards_path, tmp_path / "study", NUM_STEPS)
    scratch = tmp_path / "scratch"
    made = ray_executor(cluster, is_shared=False, scratch=scratch, beat_patience_seconds=6.0)
    events: list[Event] = []
    hit: list[int] = []

    def disturb(event: Event) -> None:
        events.append(event)
        saved = list(study.stacks_path.glob("*/step-*.safetensors"))
        if not hit and len({path.parent for path in saved}) == 2:
            hit.extend(own_workers())
            os.kill(hit[0], signal.SIGKILL)
            os.kill(hit[1], signal.SIGSTOP)
        # They go on where they were, from what the study's folder holds; then comes Ctrl-C.
        gone_on = [event for event in events if isinstance(event, Started) and event.step]
        if len(gone_on) == 2 and isinstance(event, Progress):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(study, made, disturb)
    outcomes = [event.outcome for event in events if isinstance(event, Requeued)]
    assert sorted(outcomes) == ["died", "hung"]
    stopped = [event.job for event in events if isinstance(event, Stopped)]
    assert stopped
    assert all(list(Path(job.folder).glob("step-*.safetensors")) for job in stopped)
    wait_until(lambda: not own_workers())
    assert list(scratch.glob("actor-*")) == []
    sweep(study, made)
    assert outcome(study) == local


def test_a_worker_on_a_machine_that_is_taken_away_writes_a_checkpoint_first(
    cluster: Cluster, tiny_shards_path: Path, tmp_path: Path
) -> None:
    study = new_study(tiny_shards_path, tmp_path / "study", 3000, num=1)
    made = ray_executor(cluster, is_shared=False, scratch=tmp_path / "scratch")
    told_at: list[int] = []

    def disturb(event: Event) -> None:
        if isinstance(event, Progress) and event.step and not told_at:
            told_at.append(event.step)
            (worker,) = own_workers()
            stat = (Path("/proc") / str(worker) / "stat").read_text()
            actor = int(stat.rpartition(")")[2].split()[1])
            os.kill(actor, signal.SIGTERM)

    # So rare that no other checkpoint is written on the way.
    events = sweep(study, made, disturb, checkpoint_seconds=1000.0)
    first, second = (event for event in events if isinstance(event, Started))
    (left,) = (event for event in events if isinstance(event, Left))
    assert node_of(left) == node_of(first) != node_of(second)
    assert "about to be shut down" in left.why
    assert second.step is not None
    assert told_at[0] <= second.step < 3000
    assert len(done_once(events)) == 1


def test_the_command_trains_from_copies_of_the_corpus_on_either_engine(
    cluster: Cluster, tiny_shards_path: Path, tmp_path: Path
) -> None:
    outcomes = []
    for engine in (["local"], ["ray", "--address", cluster.address]):
        study = new_study(tiny_shards_path, tmp_path / engine[0], 12, num=4)
        cache = tmp_path / f"cache-{engine[0]}"
        words = ["--engine", *engine, "--shard-cache", str(cache), "--stack-size", "2"]
        done = CliRunner().invoke(command, [str(study.path), "--workers", "2", *words])
        assert done.exit_code == 0, done.output
        checksum = ShardSet.open(tiny_shards_path).checksum
        assert find_copy(cache, checksum) is not None
        outcomes.append(outcome(study))
    assert outcomes[0] == outcomes[1]


def test_work_is_given_to_gpus_that_ray_assigns_and_a_lost_one_is_retired(
    nodes: Any,
    cluster: Cluster,
    workers: FakeWorkers,
    tiny_shards_path: Path,
    tiny_training: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both GPUs take part from the start, however slow this machine is.
    monkeypatch.setattr(ray_executor_module, "MORE_SECONDS", 60.0)
    workers.rule(lost=["1"], slow={"0": 0.2})
    node = nodes.add_node(num_cpus=0, num_gpus=2)
    with pytest.raises(StudyError, match=r"--gpus 3: .* has 2 GPUs\. Use --gpus 2"):
        find_ray_gpus(cluster, 3)
    jobs = [
        dataclasses.replace(job, shards=str(tiny_shards_path))
        for job in jobs_of(tiny_training, tmp_path)
    ]
    events: list[Event] = []
    executor = fake_executor(cluster, tmp_path, gpus=["any", "any"])
    executor.run(jobs, events.append)
    nodes.remove_node(node)
    assert ended(events) == {job.name: "Done" for job in jobs}
    assert [event.gpu for event in events if isinstance(event, Retired)] == ["1"]
    assert {entry["gpu"] for entry in workers.given} == {"0", "1"}
    places = {event.worker for event in events if isinstance(event, Started)}
    assert places == {f"{node.node_id[:8]}/gpu-0", f"{node.node_id[:8]}/gpu-1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine whose GPUs do not work")
def test_a_gpu_that_does_not_work_is_named_with_its_node(nodes: Any, cluster: Cluster) -> None:
    node = nodes.add_node(num_cpus=0, num_gpus=1)
    with pytest.raises(StudyError, match=rf"GPU 0 of .*{node.node_id[:8]}\) does not work: .*CUDA"):
        find_ray_gpus(cluster, 1)
    nodes.remove_node(node)


def fake_executor(cluster: Cluster, tmp_path: Path, **more: Any) -> RayExecutor:
    chosen = {"num_workers": 2, "threads": 1, "logs": tmp_path / "logs", **more}
    return RayExecutor(cluster, worker_module=MODULE, probes_gpus=False, **chosen)


_NOT_INSTALLED = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("regmix"):
            raise ModuleNotFoundError("No module named 'regmix'")

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("wrong", ["another torch", "no regmix-fast"])
def test_a_node_that_is_not_installed_alike_is_refused_and_the_others_train(
    nodes: Any,
    cluster: Cluster,
    workers: FakeWorkers,
    tiny_shards_path: Path,
    tiny_training: Training,
    tmp_path: Path,
    wrong: str,
) -> None:
    if wrong == "another torch":
        (tmp_path / "torch-9.9.dist-info").mkdir()
        (tmp_path / "torch-9.9.dist-info" / "METADATA").write_text("Name: torch\nVersion: 9.9\n")
        said = "it has torch 9.9 and this machine .* Install the same there."
    else:
        (tmp_path / "sitecustomize.py").write_text(_NOT_INSTALLED)
        said = "No module named 'regmix': install regmix-fast there, of this version"
    path = f"{tmp_path}:{os.environ['PYTHONPATH']}"
    node = nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    jobs = [
        dataclasses.replace(job, shards=str(tiny_shards_path))
        for job in jobs_of(tiny_training, tmp_path, device="cpu")
    ]
    remarks: list[str] = []
    events: list[Event] = []
    fake_executor(cluster, tmp_path, num_workers=3, on_remark=remarks.append).run(
        jobs, events.append
    )
    nodes.remove_node(node)
    assert ended(events) == {job.name: "Done" for job in jobs}
    used = {node_of(event) for event in events if isinstance(event, Started)}
    assert used
    assert node.node_id[:8] not in used
    (remark,) = (remark for remark in remarks if node.node_id[:8] in remark)
    assert re.search(said, remark)


_SLEEPER = """
import json, os, pathlib, sys, time
folder = pathlib.Path(json.loads(sys.stdin.readline())["job"]["folder"])
folder.mkdir(parents=True)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(600)
"""

_COORDINATOR = """
import json, sys
from pathlib import Path
from regmix.swarm.jobs import StackJob
from regmix.swarm.cluster.connection import connect
from regmix.swarm.cluster.executor import RayExecutor
from regmix.swarm.cluster.gpus import find_ray_gpus
address, table, logs = sys.argv[1:]
executor = RayExecutor(
    connect(address), num_workers=1, threads=1, logs=Path(logs), worker_module="sleeper"
)
executor.run([StackJob.from_table(json.loads(table))], lambda _: None)
"""


def test_a_killed_coordinator_leaves_no_worker(
    cluster: Cluster,
    workers: FakeWorkers,
    tiny_shards_path: Path,
    tiny_training: Training,
    tmp_path: Path,
) -> None:
    (workers.folder / "sleeper.py").write_text(_SLEEPER)
    (job,) = jobs_of(tiny_training, tmp_path, num=1, device="cpu")
    job = dataclasses.replace(job, shards=str(tiny_shards_path))
    arguments = [cluster.address, json.dumps(job.to_table()), str(tmp_path / "logs")]
    process = subprocess.Popen([sys.executable, "-c", _COORDINATOR, *arguments])
    pid_file = Path(job.folder) / "pid"
    wait_until(lambda: pid_file.is_file() and bool(pid_file.read_text()))
    worker = Path("/proc") / pid_file.read_text()
    assert worker.exists()
    process.kill()
    process.wait()
    wait_until(lambda: not worker.exists())


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        StudyError, match=r"Ray is not installed\. pip install 'regmix-fast\[ray\]'"
    ):
        connect()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at '127.0.0.1:1'.* `ray start --head`"),
        ("nowhere", "no HOST:PORT"),
        ("ray://127.0.0.1:10001", "Ray's client is not supported"),
    ],
)
def test_an_address_without_a_cluster_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(StudyError, match=words):
        connect(address)
