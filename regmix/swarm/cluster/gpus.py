"""The GPUs of a Ray cluster, each asked by a process on its node.

Enters: a cluster, and how many GPUs a person wants. Leaves: what each of them is and has free, for
planning. The processes end before it returns. Starts no training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regmix.errors import StudyError
from regmix.swarm.cluster.actor import PlaceActor
from regmix.swarm.cluster.connection import Cluster, Node
from regmix.swarm.gpus import LEAST_CAPABILITY, Gpu
from regmix.swarm.processes import WORKER_MODULE

# A GPU that others use now may be free in a moment; a probe itself takes some seconds.
ANSWER_SECONDS = 180.0


def find_ray_gpus(cluster: Cluster, wanted: int) -> tuple[Gpu, ...]:
    """Return `wanted` GPUs of a cluster, those of all nodes in turn.

    `StudyError` where it has fewer, or where one does not work or is not free.
    """
    nodes = cluster.nodes()
    found = sum(node.num_gpus for node in nodes)
    if wanted > found:
        noun = "GPU" if found == 1 else "GPUs"
        raise StudyError(
            f"--gpus {wanted}: the Ray cluster at {cluster.address} has {found} {noun}",
            cure=f"Use --gpus {found}" if found else "Leave --gpus out to train on its CPUs",
        )
    actors = [(node, _ask_for(cluster, node)) for node in _in_turn(nodes, wanted)]
    try:
        asked = [(actor.describe.remote(), actor.ask.remote("describe")) for _, actor in actors]
        return tuple(
            _gpu(node, *_answers(cluster, node, references))
            for (node, _), references in zip(actors, asked, strict=True)
        )
    finally:
        for _, actor in actors:
            cluster.kill(actor)


def _in_turn(nodes: list[Node], wanted: int) -> Iterator[Node]:
    number = 0
    while wanted > 0:
        for node in nodes:
            if number < node.num_gpus and wanted > 0:
                wanted -= 1
                yield node
        number += 1


def _ask_for(cluster: Cluster, node: Node) -> Any:
    return cluster.start_actor(
        node,
        PlaceActor,
        num_cpus=0,
        num_gpus=1,
        device="cuda",
        threads=1,
        module=WORKER_MODULE,
        scratch=None,
    )


def _answers(cluster: Cluster, node: Node, references: tuple[Any, Any]) -> tuple[Any, Any]:
    from ray.exceptions import GetTimeoutError, RayError

    try:
        facts, answer = cluster.ray.get(list(references), timeout=ANSWER_SECONDS)
    except GetTimeoutError as error:
        raise StudyError(
            f"{node.name}: one of its GPUs is not free, or does not answer",
            cure="`ray status` shows who uses it; give a smaller --gpus",
        ) from error
    except RayError as error:
        raise StudyError(
            f"{node.name}: {str(error).strip().splitlines()[-1]}",
            cure="Install the same regmix-fast there as here; see Ray's logs on that machine",
        ) from error
    return facts, answer


def _gpu(node: Node, facts: dict[str, Any], answer: dict[str, Any]) -> Gpu:
    name = f"GPU {facts['gpu']} of {node.name}"
    if "error" in answer:
        raise StudyError(
            f"{name} does not work: {answer['error']}",
            cure="Take it out of the cluster (ray start --num-gpus), or give a smaller --gpus",
        )
    capability = tuple(answer["capability"])
    if capability < LEAST_CAPABILITY:
        needed = ".".join(map(str, LEAST_CAPABILITY))
        raise StudyError(
            f"{name} ({answer['name']}) has compute capability "
            f"{'.'.join(map(str, capability))}; the engine needs {needed} or more",
            cure="Leave --gpus out to train on the CPU, or use an A100 or a newer GPU",
        )
    return Gpu(id=f"{node.short_id}/{facts['gpu']}", **{**answer, "capability": capability})
