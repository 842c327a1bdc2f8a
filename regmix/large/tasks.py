"""Downstream tasks of a model, by lm-eval, which is an extra.

Enters: a model of a study or a Hugging Face checkpoint, and the names of tasks. Leaves: a score by
task and number of examples in the prompt. lm-eval downloads the data of its own tasks where they
are not in its cache; a task in a folder of one's own may bring its data. Writes no task.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.errors import ConfigError, ModelError, nearest
from regmix.files import storage_errors
from regmix.large.evaluate import pick_device
from regmix.large.export import export_model, model_folder
from regmix.large.importing import check_files
from regmix.large.scores import TaskScore, read_results, read_scores, write_scores

if TYPE_CHECKING:
    from regmix.study import Study

# The 13 tasks of RegMix (arXiv 2407.01492), by the names in the authors' own script
# (sail-sg/regmix, evaluation/eval_lm_eval_harness.sh), which asks each with 0 to 5 examples.
PAPER = (
    *("social_iqa", "hellaswag", "piqa", "openbookqa", "lambada_standard", "sciq", "arc_easy"),
    *("copa", "race", "logiqa", "qqp", "winogrande", "multirc"),
)
PRESETS = {"paper": PAPER}
_CPU_BATCH = 16


def expand_tasks(words: Iterable[str]) -> tuple[str, ...]:
    """Return the names that words such as `piqa,copa` or the preset `paper` mean, each once."""
    names: list[str] = []
    for word in ",".join(words).split(","):
        names += PRESETS.get(word.strip(), (word.strip(),))
    found = tuple(dict.fromkeys(name for name in names if name))
    if not found:
        raise ConfigError("no task is named", cure="Give --tasks paper, or names of lm-eval's")
    return found


class TaskRunner:
    """lm-eval with the tasks that were asked for; all of their data is there once it is made."""

    def __init__(
        self, tasks: Sequence[str], *, folder: Path | None = None, limit: int | None = None
    ) -> None:
        """Find the tasks and their data; `ModelError` names a task that is unknown or has none.

        folder: of tasks of one's own, YAML files for lm-eval. limit: questions of a task at most.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ModelError(
                "lm-eval is not installed", cure="Install it: pip install 'regmix-fast[lm-eval]'"
            )
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder} is no folder", cure="Name the folder of the tasks' YAML")
        self.tasks, self.limit = tuple(tasks), limit
        self.version = importlib.metadata.version("lm-eval")
        self._manager = TaskManager(include_path=None if folder is None else str(folder))
        known = set(self._manager.all_tasks)
        for name in self.tasks:
            if name not in known:
                raise ModelError(
                    f"lm-eval {self.version} has no task '{name}' ({nearest(name, known)})",
                    cure="Correct the name; `lm-eval ls tasks` lists them",
                )
        for name in self.tasks:
            self._load(name)

    def _load(self, name: str) -> None:
        try:
            self._manager.load([name])
        except Exception as error:  # of the data's own reader; any kind
            raise ModelError(
                f"the task '{name}' cannot be loaded ({_words(error)})",
                cure="Its data is downloaded at its first use: run this once where there is a "
                "network, or correct the task's YAML",
            ) from error

    def waiting(
        self, shots: Sequence[int], known: Iterable[TaskScore] = ()
    ) -> list[tuple[str, int]]:
        """Return the (task, examples) that `known` does not answer, in the order of `run`."""
        answered = {(*score.key, score.version) for score in known}
        return [
            (name, number)
            for number in shots
            for name in self.tasks
            if (name, number, self.limit, self.version) not in answered
        ]

    def run(
        self, checkpoint: Path, waiting: Iterable[tuple[str, int]], *, gpu: bool = False
    ) -> Iterator[list[TaskScore]]:
        """Yield the scores of a checkpoint on one (task, examples) after the other.

        More than one score where the name is that of several tasks.
        """
        check_files(checkpoint)
        model = self._model(checkpoint, gpu)
        for name, number in waiting:
            yield self._ask(model, name, number)

    def _model(self, checkpoint: Path, gpu: bool) -> Any:
        from lm_eval.models.huggingface import HFLM

        device, dtype = pick_device(gpu)
        return HFLM(
            pretrained=str(checkpoint),
            device=device,
            dtype=dtype,
            batch_size="auto" if gpu else _CPU_BATCH,
            use_safetensors=True,
        )

    def _ask(self, model: Any, name: str, shots: int) -> list[TaskScore]:
        from lm_eval import simple_evaluate

        with _counted_cuts() as cuts:
            try:
                results = simple_evaluate(
                    model=model,
                    tasks=[name],
                    num_fewshot=shots,
                    limit=self.limit,
                    log_samples=False,
                    task_manager=self._manager,
                )
            except Exception as error:  # of a task's own code and data; any kind
                raise ModelError(
                    f"the task '{name}' failed, {shots}-shot ({_words(error)})",
                    cure="See its traceback with lm-eval itself, on an export of the model: "
                    f"lm-eval run --model hf --model_args pretrained=FOLDER --tasks {name}",
                ) from error
        return read_results(
            results, shots=shots, limit=self.limit, num_cut=cuts.number, version=self.version
        )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


class _Cuts(logging.Filter):
    """Counts what lm-eval says of prompts that it cuts, and lets nothing but errors pass."""

    number = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.number += record.getMessage().startswith("Combined length of context")
        return record.levelno >= logging.ERROR


@contextlib.contextmanager
def _counted_cuts() -> Iterator[_Cuts]:
    logger, cuts = logging.getLogger("lm_eval.models.huggingface"), _Cuts()
    before = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(cuts)
    try:
        yield cuts
    finally:
        logger.removeFilter(cuts)
        logger.setLevel(before)


def run_on_model(
    study: Study, name: str, runner: TaskRunner, shots: Sequence[int], *, gpu: bool = False
) -> Iterator[list[TaskScore]]:
    """Yield the new scores of a study's model, each in its `tasks.json` by then.

    What that file answers is not asked again. The model is exported into a temporary folder of
    the system, which `TMPDIR` names.
    """
    folder = model_folder(study, name)
    waiting = runner.waiting(shots, read_scores(folder))
    if not waiting:
        return
    with storage_errors(tempfile.gettempdir()):
        temporary = tempfile.TemporaryDirectory(prefix="regmix-tasks-")
    with temporary as place:
        checkpoint = Path(place) / name
        export_model(study, name, checkpoint)
        for scores in runner.run(checkpoint, waiting, gpu=gpu):
            write_scores(folder, scores)
            yield scores
