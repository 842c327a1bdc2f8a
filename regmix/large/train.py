"""Train the large models of a study: some mixtures, some seeds each.

Enters: a study, the mixtures by name or file, and how to train. Leaves `models/<name>/` for each
model: `model.safetensors` (parameters [1, ...]), `config.json`, `metrics.jsonl`,
`evaluation.json` and, last, `summary.json`. Models of one shape are trained as stacks by the
same engine and executor as the proxies; a model alone is a stack of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regmix.config import as_table, finite
from regmix.data.mixtures import Mixture, read_mixture_yaml
from regmix.data.npy import read_numbers
from regmix.data.sampling.sampler import ORDER_VERSION, MixtureSampler
from regmix.data.sampling.sampler import Schedule as Dealt
from regmix.data.schedules import Schedule, read_schedule_yaml
from regmix.data.shards import ShardSet
from regmix.display import count
from regmix.errors import MixtureError, ModelError, StudyError, nearest, printable
from regmix.files import atomic_open, read_table, storage_errors, write_json, write_text
from regmix.large.evaluate import evaluation_table
from regmix.provenance import environment_record
from regmix.study import Study, Training
from regmix.swarm.cost import Cost, estimate
from regmix.swarm.events import Done, Event, Failed
from regmix.swarm.executors import LocalExecutor, stack_jobs
from regmix.swarm.jobs import CHECKPOINT_SECONDS, Member, StackJob
from regmix.swarm.sweep import (
    LARGEST_STACK,
    Tally,
    remove_leftovers,
    scheduled_member,
    stack_job,
    study_member,
)

NAMED_MIXTURES = ("optimum", "natural", "uniform")
# What a model is trained on: one mixture, or one after the other.
Recipe = Mixture | Schedule


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """mixtures: name -> what is trained on; replicates: models of each, each with its own seeds.

    num_workers and threads: processes and threads of each; stack_size: None to choose;
    checkpoint_seconds: time between two checkpoints of a stack.
    """

    mixtures: Mapping[str, Recipe]
    replicates: int
    training: Training
    num_workers: int
    threads: int
    stack_size: int | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS


@dataclass(frozen=True, kw_only=True)
class DomainUse:
    """What a model reads of one domain: exact sequences, tokens, and epochs over what exists."""

    tokens: int
    epochs: float


def resolve_mixture(study: Study, name: str) -> tuple[str, Mixture]:
    """Return (name, mixture) as `resolve_recipe`; `MixtureError` where it is a schedule."""
    label, recipe = resolve_recipe(study, name)
    if isinstance(recipe, Schedule):
        number = len(recipe.segments)
        raise MixtureError(
            f"'{label}' is a schedule of {number} segments, where one mixture is needed",
            cure=f"Take one of its segments: --segment 1 to {number}",
        )
    return label, recipe


def resolve_recipe(study: Study, name: str) -> tuple[str, Recipe]:
    """Return (name, mixture or schedule) for `optimum`, `natural`, `uniform`, or a YAML file.

    A file with a section `segments` is a schedule.
    """
    config = study.config
    if name == "natural":
        return name, Mixture(config.prior)
    if name == "uniform":
        return name, Mixture({d: 1 / len(config.train_domains) for d in config.train_domains})
    if name == "optimum":
        if not study.optimum_path.is_file():
            raise StudyError(
                f"{study.path} has no optimum yet", cure="Find it with: regmix-fast optimize"
            )
        return name, _read_recipe(study.optimum_path)
    path = Path(name)
    if path.is_file():
        return _recipe_of_file(study, path)
    raise MixtureError(
        f"no mixture '{name}': neither a file nor one of {', '.join(NAMED_MIXTURES)} "
        f"({nearest(name, NAMED_MIXTURES)})",
        cure="Name a mixture or a YAML file",
    )


def _read_recipe(path: Path) -> Recipe:
    return read_schedule_yaml(path) or read_mixture_yaml(path)


def _recipe_of_file(study: Study, path: Path) -> tuple[str, Recipe]:
    recipe, known = _read_recipe(path), study.config.train_domains
    if unknown := sorted(set(recipe.domains) - set(known)):
        raise MixtureError(
            f"{path}: unknown domain '{unknown[0]}' ({nearest(unknown[0], known)})",
            cure="Name the domains as the study does",
        )
    if path.stem in NAMED_MIXTURES and path.resolve() != study.optimum_path.resolve():
        raise MixtureError(
            f"{path}: a mixture file may not be called '{path.stem}', which names the study's own",
            cure="Rename the file: its models are called after it",
        )
    return path.stem, recipe


def resolve_recipes(study: Study, names: Sequence[str]) -> dict[str, Recipe]:
    """Return name -> recipe of all `names`; `MixtureError` where two have one name."""
    resolved: dict[str, Recipe] = {}
    for given in names:
        name, recipe = resolve_recipe(study, given)
        if name in resolved and resolved[name] != recipe:
            raise MixtureError(
                f"{given}: another mixture is called '{name}' too",
                cure="Rename one of the files: models are called after them",
            )
        resolved[name] = recipe
    return resolved


def dealt(recipe: Recipe, training: Training) -> Dealt:
    """Return what the sampler deals: the mixture, or the segments from their first steps on."""
    return recipe.at_steps(training.num_steps) if isinstance(recipe, Schedule) else recipe


def plan_domains(shards: ShardSet, recipe: Dealt, training: Training) -> dict[str, DomainUse]:
    """Return what a run will read of every domain of a mixture or of segments, exactly."""
    sampler = MixtureSampler(
        shards, recipe, seq_len=training.shape.seq_len, batch_size=training.batch_size
    )
    plan = sampler.plan(training.num_steps)
    return {d: DomainUse(tokens=use.tokens, epochs=use.epochs) for d, use in plan.items()}


def budget_remarks(study: Study, names: Sequence[str], training: Training) -> list[str]:
    """Return what a person should know before training on the study's optimum.

    The optimum's limit on epochs holds for the tokens that it was found for; a longer run repeats
    domains more often. So does what proxies with pools have learned of repetition; a final model
    reads all there is of each domain, whatever its size. A verdict against the optimum is repeated.
    """
    path = study.path / "optimum.json"
    if "optimum" not in names or not path.is_file():
        return []
    table = read_table(path)
    remarks = []
    matched = study.config.target_tokens
    if matched is not None and abs(training.tokens - matched) > 0.01 * matched:
        remarks.append(
            f"The proxies repeated each domain as a run of {count(matched)} tokens would; this run "
            f"has {count(training.tokens)} and reads all there is of each domain"
        )
    verdict = table.get("verdict")
    if isinstance(verdict, str) and verdict.startswith("keep"):
        remarks.append(f"The verdict on the optimum was: {printable(verdict)}")
    budget = table.get("budget_tokens")
    if finite(budget) and training.tokens > 1.01 * budget:
        remarks.append(
            f"The optimum was found for {count(budget)} tokens and this run has "
            f"{count(training.tokens)}: its limit on epochs does not hold; find it again with "
            f"optimize --tokens {training.tokens}"
        )
    return remarks


def run_training(
    study: Study,
    request: TrainRequest,
    *,
    on_start: Callable[[Cost, Tally], None] = lambda _cost, _tally: None,
    on_event: Callable[[Event, Tally], None] = lambda _event, _tally: None,
) -> list[str]:
    """Train the models that are not trained; return the names of all that were asked for."""
    shards = study.open_shards()
    members = [
        model_member(study, f"{name}-{replicate}", recipe, request.training, replicate)
        for name, recipe in request.mixtures.items()
        for replicate in range(request.replicates)
    ]
    with study.lock() as descriptor:
        waiting = [m for m in members if not is_trained(study, m, request.training)]
        remove_leftovers(
            study.stacks_path, "train-*", keep=lambda path: (path / "job.json").is_file()
        )
        resumed = _unfinished_jobs(study, members, waiting, request.training)
        held = {member.name for job in resumed for member in job.members}
        planned = _plan(study, [m for m in waiting if m.name not in held], request)
        jobs = resumed + planned
        if not jobs:
            return [member.name for member in members]
        parameters_bytes = 4 * request.training.shape.num_parameters
        cost = estimate(jobs, shards, num_workers=request.num_workers, kept_bytes=parameters_bytes)
        tally = Tally(jobs)
        on_start(cost, tally)
        for job in planned:
            write_json(Path(job.folder) / "job.json", job.to_table())
        failures: list[str] = []
        stopped: list[Failed] = []

        def handle(event: Event) -> None:
            tally.add(event)
            if isinstance(event, Done):
                failures.extend(_collect(study, shards, event))
            elif isinstance(event, Failed):
                stopped.append(event)
            on_event(event, tally)

        LocalExecutor(
            num_workers=request.num_workers,
            threads=jobs[0].threads,
            logs=study.logs_path,
            inherited=descriptor,
            checkpoint_seconds=request.checkpoint_seconds,
        ).run(jobs, handle)
        if stopped:
            raise ModelError(stopped[0].what, cure=stopped[0].cure or "See the study's logs/")
        if failures:
            raise ModelError(failures[0], cure="Try a smaller --learning-rate; the others are kept")
    return [member.name for member in members]


def model_member(
    study: Study, name: str, recipe: Recipe, training: Training, replicate: int
) -> Member:
    """Return the member of a stack that trains on a recipe with a replicate's seeds."""
    if isinstance(recipe, Schedule):
        segments = recipe.at_steps(training.num_steps)
        return scheduled_member(study, name, segments, training.num_steps, replicate)
    return study_member(study, name, dict(recipe), replicate)


def is_trained(study: Study, member: Member, training: Training) -> bool:
    """Return whether a model is there; `ModelError` where one of other settings has its name."""
    summary = study.models_path / member.name / "summary.json"
    if not summary.is_file():
        return False
    found = read_table(summary)
    # Through JSON, so that both sides have the same types.
    asked = json.loads(json.dumps({"member": as_table(member), "training": as_table(training)}))
    # A run whose mixture was changed on the way says beside what it read what was asked for.
    member_found = found.get("asked", found.get("member"))
    if member_found == asked["member"] and found.get("training") == asked["training"]:
        return True
    raise ModelError(
        f"{summary.parent} holds a model of other settings (mixture, seeds, shape or tokens)",
        cure="Move that folder away, or train with the same settings",
    )


def _unfinished_jobs(
    study: Study, members: Sequence[Member], waiting: Sequence[Member], training: Training
) -> list[StackJob]:
    """Return the stacks that were begun and hold a waiting model; one may be half collected."""
    asked = {member.name: member for member in members}
    missing = {member.name for member in waiting}
    jobs = []
    for path in sorted(study.stacks_path.glob("train-*/job.json")):
        stored = StackJob.from_table(read_table(path))
        same = all(asked.get(member.name) == member for member in stored.members)
        if same and stored.training == training and missing & {m.name for m in stored.members}:
            jobs.append(
                stack_job(study, stored.name, stored.members, stored.training, stored.threads)
            )
    return jobs


def _plan(study: Study, members: Sequence[Member], request: TrainRequest) -> list[StackJob]:
    stacks = stack_jobs(
        members,
        num_workers=request.num_workers,
        stack_size=request.stack_size,
        largest=LARGEST_STACK,
    )
    jobs = []
    for stack in stacks:
        text = json.dumps([as_table(member) for member in stack] + [as_table(request.training)])
        name = f"train-{xxhash.xxh3_64_hexdigest(text.encode())}"
        jobs.append(stack_job(study, name, tuple(stack), request.training, request.threads))
    return jobs


def _collect(study: Study, shards: ShardSet, event: Done) -> list[str]:
    """Move each model of a trained stack to its folder; return what failed."""
    folder, training = Path(event.job.folder), event.job.training
    failures = []
    for position, member in enumerate(event.job.members):
        target = study.models_path / member.name
        if (target / "summary.json").is_file():
            continue
        if event.result["failed"][position] or None in event.result["losses"][position]:
            failures.append(f"{member.name}: its gradient or its validation loss is not finite")
            continue
        losses = dict(zip(event.job.targets, event.result["losses"][position], strict=True))
        curve = _read_losses(folder / f"{member.name}.npy")
        write_json(target / "config.json", model_config(shards, training))
        write_json(target / "evaluation.json", evaluation_table(study, shards, losses))
        write_text(target / "metrics.jsonl", _metrics(curve, training))
        parameters = folder / f"{member.name}.safetensors"
        with (
            storage_errors(parameters),
            open(parameters, "rb") as source,
            atomic_open(target / "model.safetensors") as copy,
        ):
            shutil.copyfileobj(source, copy)
        summary = model_summary(shards, member, training, event.result, curve)
        write_json(target / "summary.json", summary)
    shutil.rmtree(folder, ignore_errors=True)
    return failures


def _read_losses(path: Path) -> np.ndarray:
    """Return the training losses [S] that a worker left."""
    try:
        with storage_errors(path):
            return read_numbers(path)
    except ValueError as error:
        raise ModelError(
            f"{path}: {error}", cure="Remove its folder to train the stack again"
        ) from error


def model_config(shards: ShardSet, training: Training) -> dict[str, Any]:
    """Return a model's `config.json`: its shape and its tokenizer."""
    return {
        "shape": as_table(training.shape),
        "tokenizer": {
            "file": shards.tokenizer_path.name,
            "hash": shards.tokenizer_hash,
            "vocab_size": shards.vocab_size,
        },
    }


def _metrics(curve: np.ndarray, training: Training) -> str:
    per_step = training.batch_size * training.shape.seq_len
    lines = [
        json.dumps({"step": step, "tokens": step * per_step, "loss_nats": float(loss)})
        for step, loss in enumerate(curve.tolist(), start=1)
    ]
    return "\n".join(lines) + "\n"


def model_summary(
    shards: ShardSet, member: Member, training: Training, result: dict[str, Any], curve: np.ndarray
) -> dict[str, Any]:
    """Return a model's `summary.json`.

    result: the `seconds` and `tokens` of its training; curve: its training losses [S].
    """
    mixture_name, _, replicate = member.name.rpartition("-")
    plan = plan_domains(shards, member.dealt, training)
    seconds = result["seconds"]
    return {
        "name": member.name,
        "mixture": mixture_name,
        "replicate": int(replicate),
        "member": as_table(member),
        "training": as_table(training),
        "tokens": training.tokens,
        "epochs": {domain: use.epochs for domain, use in plan.items()},
        "final_train_loss_nats": float(np.mean(curve[-20:])),
        "stack_seconds": seconds,
        "stack_tokens_per_second": result["tokens"] / seconds if seconds else 0.0,
        "order_version": ORDER_VERSION,
        "environment": environment_record(),
    }
