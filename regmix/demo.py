"""The demo: the whole pipeline on text found on this machine, command by command.

Enters: an empty folder, or one where the demo was stopped. Leaves: a corpus, shards, a study with
its report, and a comparison of final models. Every step but the first is a command that a person
could type, and is shown before it runs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regmix.data.found import FoundDomain, collect
from regmix.errors import CorpusError
from regmix.files import read_table, write_json
from regmix.large.comparison import Gain, MixtureResult, compare_models, gains_of
from regmix.study import Study

# The objective is the equal-weight mean of three: a single domain would make the answer trivial.
OBJECTIVE = ("docs", "legal", "readme")
BASELINES = ("natural", "uniform")
FEWEST_DOMAINS = 3


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does; the default takes about four minutes on two cores.

    tokens: training tokens of one model.
    """

    max_bytes_per_domain: int = 2_500_000
    vocab_size: int = 2048
    num_mixtures: int = 32
    proxy_model: str = "cpu-32"
    proxy_tokens: int = 262_144
    final_model: str = "cpu-64"
    final_tokens: int = 524_288
    seeds: int = 3
    batch_size: int = 8


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """results: final models by mixture, best first; gains: of the optimum over each baseline."""

    study: Path
    results: list[MixtureResult]
    gains: list[Gain]

    @property
    def verdict(self) -> str:
        """One sentence: win or not."""
        if not self.gains:
            return "There is nothing to compare the optimum with: no other model was evaluated."
        words = " and ".join(str(gain) for gain in self.gains)
        won = all(gain.mean_nats > 0 for gain in self.gains)
        start = "The optimum wins" if won else "The optimum does not win everywhere"
        return f"{start}: it is {words} (loss on the objective, mean of the seeds)."


def run_demo(
    folder: Path,
    size: DemoSize,
    *,
    run: Callable[[Sequence[str]], None],
    say: Callable[[str], None],
) -> DemoResult:
    """Run every step that is not done; `run` executes one command line, `say` shows a line."""
    say("1. Collect text that is on this machine")
    corpus, objective = collect_corpus(folder, size, say)
    study = folder / "study"
    for number, step in enumerate(commands(folder, corpus, objective, size), start=2):
        if step[0] == "mixtures" and (study / "study.toml").exists():
            continue
        say(f"{number}. regmix-fast {shlex.join(step)}")
        run(step)
    results = compare_models(Study.open(study))
    return DemoResult(study=study, results=results, gains=gains_of(results))


def collect_corpus(
    folder: Path, size: DemoSize, say: Callable[[str], None]
) -> tuple[Path, list[str]]:
    """Return the corpus's folder and the objective's targets; collects the text once.

    The text depends on the packages installed, so a demo that goes on keeps what it found.
    """
    corpus, record = folder / "corpus", folder / "corpus.json"
    if not record.exists():
        found = collect(corpus, max_bytes_per_domain=size.max_bytes_per_domain)
        write_json(record, {name: _describe(domain) for name, domain in found.items()})
    domains = read_table(record)
    for name, words in domains.items():
        say(f"   {name}: {words}")
    there = {path.name for path in corpus.glob("*-0.jsonl")}
    usable = [name for name in domains if f"{name}-0.jsonl" in there]
    if len(usable) < FEWEST_DOMAINS:
        raise CorpusError(
            f"only {len(usable)} kinds of text were found on this machine",
            cure="Pack documents of your own: regmix-fast pack CORPUS --out SHARDS",
        )
    return corpus, [name for name in OBJECTIVE if name in usable] or usable[:FEWEST_DOMAINS]


def _describe(domain: FoundDomain) -> str:
    if domain.reason is not None:
        return f"left out: {domain.reason}"
    return f"{domain.documents:,} documents, {domain.utf8_bytes / 1e6:.2f} MB"


def commands(
    folder: Path, corpus: Path, objective: Sequence[str], size: DemoSize
) -> list[list[str]]:
    """Return the demo's command lines, in order."""
    shards, study = str(folder / "shards"), str(folder / "study")
    batch = ["--seq-len", "128", "--batch-size", str(size.batch_size)]
    mixtures = [word for name in ("optimum", *BASELINES) for word in ("--mixture", name)]
    return [
        ["pack", str(corpus), "--out", shards, "--train-bpe", str(size.vocab_size),
         "--valid-fraction", "0.1"],
        ["mixtures", study, "--shards", shards, "--num", str(size.num_mixtures),
         "--target", ",".join(objective), "--model", size.proxy_model,
         "--tokens", str(size.proxy_tokens), *batch, "--learning-rate", "1e-2",
         "--eval-tokens", "8k"],
        ["proxies", study],
        ["fit", study],
        ["optimize", study, "--tokens", str(size.final_tokens), "--max-epochs", "4"],
        ["train", study, "--model", size.final_model, *mixtures, "--seeds", str(size.seeds),
         "--tokens", str(size.final_tokens), *batch, "--learning-rate", "6e-3"],
        ["report", study],
    ]  # fmt: skip
