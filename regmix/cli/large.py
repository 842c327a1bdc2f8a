"""What `train` has for models that several processes share: options, the plan, the live display.

Enters: click's parameters. Leaves: a plan that is shown and refused where it cannot work, and a
display of loss, speed, utilisation, gradient norm and epochs. Used with --gpus or --processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from pathlib import Path

    from regmix.display import Progress
    from regmix.large.distributed.job import TrainJob
    from regmix.large.distributed.plan import Device, Plan
    from regmix.large.train import Recipe
    from regmix.study import Study, Training

Command = TypeVar("Command", bound=Callable[..., Any])

CHECKPOINT_SECONDS = 600.0
# Parameters from which on the small models' default learning rate is too large.
_LARGE = 50_000_000
_ONLY_DISTRIBUTED = {
    "nodes": "--nodes",
    "parallel": "--parallel",
    "micro_batch": "--micro-batch",
    "dtype": "--dtype",
    "recompute": "--activation-checkpointing",
    "compiled": "--compile",
    "document_mask": "--document-mask",
    "keep_checkpoints": "--keep-checkpoints",
    "allow_changes": "--allow-changes",
    "trackers": "--track",
    "start": "--from",
}


def large_options(command: Command) -> Command:
    """Add the options of a model that several processes share."""
    for option in reversed([*_sharing_options(), *_run_options()]):
        command = option(command)
    return command


def _sharing_options() -> list[Callable[[Command], Command]]:
    return [
        click.option(
            "--global-batch-tokens",
            help="Tokens of a step, in place of --batch-size: 512k, 2M.",
        ),
        click.option(
            "--processes",
            type=click.IntRange(min=1),
            help="Processes that share each model on the CPU; for small models and trials.",
        ),
        click.option(
            "--nodes",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Machines with --gpus GPUs each: prints the command for each of them.",
        ),
        click.option(
            "--parallel",
            type=click.Choice(["auto", "ddp", "fsdp"]),
            default="auto",
            show_default=True,
            help="ddp: the whole model on every GPU; fsdp: a part; auto: ddp where it fits.",
        ),
        click.option(
            "--micro-batch",
            type=click.IntRange(min=1),
            help="Sequences that a process takes at a time; default: what fits.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["bfloat16", "float32"]),
            help="Of products; weights are float32. Default: bfloat16 on GPUs.",
        ),
        click.option(
            "--activation-checkpointing",
            "recompute",
            is_flag=True,
            help="Less memory for a third more work: layers run again in the backward.",
        ),
        click.option(
            "--compile/--no-compile",
            "compiled",
            default=None,
            help="torch.compile of each layer; default: on GPUs.",
        ),
    ]


def _run_options() -> list[Callable[[Command], Command]]:
    return [
        click.option(
            "--document-mask", is_flag=True, help="Attend within documents, not across them."
        ),
        click.option(
            "--keep-checkpoints",
            type=click.IntRange(min=1),
            default=2,
            show_default=True,
            help="Checkpoints of a run that stay.",
        ),
        click.option(
            "--allow-changes",
            is_flag=True,
            help="Go on although mixture, learning rate or length differ from the run's.",
        ),
        click.option(
            "--track",
            "trackers",
            type=click.Choice(["tensorboard", "wandb"]),
            multiple=True,
            help="Send the metrics there too.",
        ),
        click.option("--from", "start", help="A Hugging Face Llama checkpoint to start from."),
    ]


def is_distributed(gpus: int | None, processes: int | None) -> bool:
    """Return whether processes share a model; `StudyError` for options that then have no use."""
    from regmix.errors import StudyError

    if gpus is not None and processes is not None:
        raise StudyError(
            "--gpus and --processes exclude each other", cure="Give --gpus to train on GPUs"
        )
    context = click.get_current_context()
    if gpus is not None or processes is not None:
        return True
    for name, option in _ONLY_DISTRIBUTED.items():
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise StudyError(
                f"{option} has no use without --gpus or --processes",
                cure="Give --gpus N, or --processes N to share a model on the CPU",
            )
    return False


def batch_size_of(tokens: str | None, batch_size: int, seq_len: int) -> int:
    """Return the sequences of a step, from --global-batch-tokens where it is given."""
    from regmix.cli.words import parse_count
    from regmix.errors import StudyError

    if tokens is None:
        return batch_size
    context = click.get_current_context()
    if context.get_parameter_source("batch_size") == ParameterSource.COMMANDLINE:
        raise StudyError(
            "--batch-size and --global-batch-tokens both say how large a step is",
            cure="Give one of them",
        )
    wanted = parse_count(tokens)
    found = max(1, round(wanted / seq_len))
    if found * seq_len != wanted:
        click.echo(
            f"A step has {found} sequences of {seq_len}: {found * seq_len:,} tokens", err=True
        )
    return found


def learning_rate_of(learning_rate: float, num_parameters: int) -> float:
    """Return the peak learning rate; a large model's own where none is given.

    The command's default is for models of a few million parameters.
    """
    from regmix.model.optim import OptimConfig

    context = click.get_current_context()
    given = context.get_parameter_source("learning_rate") == ParameterSource.COMMANDLINE
    if given or num_parameters < _LARGE:
        return learning_rate
    own = OptimConfig().lr
    click.echo(
        f"Learning rate {own:g}, for a model of this size; choose with --learning-rate", err=True
    )
    return own


def start_shape(start: str, study: Study, seq_len: int | None) -> Any:
    """Return the shape of a checkpoint to start from; `ModelError` where it does not fit."""
    import dataclasses
    from pathlib import Path

    from regmix.errors import ModelError
    from regmix.large.importing import read_shape
    from regmix.large.vocabulary import check_same_tokens

    context = click.get_current_context()
    if context.get_parameter_source("model") == ParameterSource.COMMANDLINE:
        raise ModelError(
            "--model and --from both say which shape the model has", cure="Give one of them"
        )
    shape = read_shape(Path(start))
    check_same_tokens(Path(start), study.open_shards())
    longest = shape.seq_len
    if seq_len is not None and seq_len > longest:
        raise ModelError(
            f"--seq-len {seq_len}: {start} was made for {longest} at most",
            cure=f"Give a --seq-len of {longest} or less",
        )
    return dataclasses.replace(shape, seq_len=seq_len or min(longest, 2048))


def device_of(gpus: int | None, processes: int | None) -> Device:
    """Return what each process has; `StudyError` where there are fewer GPUs than asked for."""
    from regmix.large.distributed.plan import Device, measured_flops
    from regmix.model.peaks import peak_of
    from regmix.provenance import available_cores
    from regmix.swarm.cost import available_memory_bytes
    from regmix.swarm.gpus import find_gpus

    if gpus is None:
        assert processes is not None
        cores = available_cores()
        flops, free = measured_flops(cores) / processes, available_memory_bytes()
        return Device(
            name="cpu",
            free_bytes=None if free is None else free // processes,
            flops=flops,
            source=f"a process's {flops / 1e9:.0f} GFLOP/s, of a float32 product measured here",
        )
    found = find_gpus(gpus)
    peak = peak_of(found[0].name)
    return Device(
        name=found[0].name,
        free_bytes=min(gpu.free_bytes for gpu in found),
        flops=None if peak is None else peak.bf16_flops,
        source="" if peak is None else f"{peak.bf16_flops / 1e12:.0f} TFLOP/s, its datasheet's",
    )


def show_plan(plan: Plan, *, dry_run: bool, as_json: bool) -> None:
    """Show what a run will take; raises click's `Exit` in a dry run."""
    for line in plan.lines():
        click.echo(line, err=True)
    if dry_run:
        if as_json:
            click.echo(json.dumps(plan.to_table()))
        raise click.exceptions.Exit(0)


class LargeDisplay:
    """A live line for each model: loss, speed, utilisation, gradient norm, epochs.

    stopped: what to say where the command is stopped now.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._name: str | None = None
        self._epochs: Mapping[str, float] = {}
        self.stopped = ""

    def on_line(self, job: TrainJob, numbers: Mapping[str, Any]) -> None:
        """Show the numbers of a step."""
        from regmix.display import Progress, count

        if job.name != self._name:
            self.close()
            self._name = job.name
            self._progress = Progress(f"train {job.name}", total=job.training.tokens, unit="tokens")
            self._progress.__enter__()
        assert self._progress is not None
        self.stopped = (
            f"{job.name}: stopped after step {numbers['step']} of {job.training.num_steps}; its "
            f"checkpoint is in {job.folder}"
        )
        self._epochs = numbers.get("epochs", self._epochs)
        fields: dict[str, str] = {
            "loss": f"{numbers['loss_nats']:.3f} nats",
            "speed": f"{count(numbers['tokens_per_second'])} tokens/s",
            "gradient_norm": f"{numbers['gradient_norm']:.2f}",
        }
        if "mfu" in numbers:
            fields["MFU"] = f"{numbers['mfu']:.1%}"
        if self._epochs:
            shown = sorted(self._epochs.items(), key=lambda item: -item[1])[:3]
            fields["epochs"] = ", ".join(f"{domain} {epochs:.2f}" for domain, epochs in shown)
        self._progress.update(numbers["tokens"], **fields)

    def close(self) -> None:
        """End the line."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


def plan_for(training: Training, options: Mapping[str, Any], folder: Path) -> Plan:
    """Return the plan of a run with the command's options; raises where it cannot work."""
    from regmix.large.distributed.plan import plan_run

    on_gpus = options["gpus"] is not None
    return plan_run(
        training,
        device_of(options["gpus"], options["processes"]),
        num_ranks=(options["gpus"] or options["processes"]) * options["nodes"],
        folder=folder,
        parallel=None if options["parallel"] == "auto" else options["parallel"],
        micro_batch=options["micro_batch"],
        dtype=options["dtype"] or ("bfloat16" if on_gpus else "float32"),
        recompute=options["recompute"],
        keep_checkpoints=options["keep_checkpoints"],
    )


def train_shared(
    study: Study,
    recipes: Mapping[str, Recipe],
    replicates: int,
    plan: Plan,
    options: Mapping[str, Any],
) -> list[str]:
    """Train the models of a plan; return the names of all, or exit where machines start them."""
    from pathlib import Path

    from regmix.large.distributed.launch import LargeRequest, prepare, run_large
    from regmix.large.distributed.metrics import refuse_missing_trackers
    from regmix.provenance import available_cores

    refuse_missing_trackers(options["trackers"])
    context = click.get_current_context()
    given = context.get_parameter_source("checkpoint_seconds") == ParameterSource.COMMANDLINE
    on_gpus, start = options["gpus"] is not None, options["start"]
    compiled = options["compiled"]
    share = plan.sharing.num_ranks // options["nodes"]
    request = LargeRequest(
        mixtures=recipes,
        replicates=replicates,
        plan=plan,
        num_nodes=options["nodes"],
        threads=max(1, available_cores() // share),
        compiled=on_gpus if compiled is None else compiled,
        within_documents=options["document_mask"],
        start=None if start is None else str(Path(start).absolute()),
        keep_checkpoints=options["keep_checkpoints"],
        checkpoint_seconds=options["checkpoint_seconds"] if given else CHECKPOINT_SECONDS,
        allow_changes=options["allow_changes"],
        trackers=options["trackers"],
    )
    if options["nodes"] > 1:
        click.echo("Run on every machine, with the first one's name; the study on a shared disk:")
        click.echo("\n".join(prepare(study, request)))
        raise click.exceptions.Exit(0)
    display = LargeDisplay()
    try:
        return run_large(study, request, on_line=display.on_line)
    except KeyboardInterrupt:
        display.close()
        if display.stopped:
            click.echo(display.stopped, err=True)
        raise
    finally:
        display.close()
