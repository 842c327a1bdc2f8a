"""Mixtures in the words of other trainers, and for another tokenizer.

1. `render` turns a mixture into the file that a trainer reads: Megatron-LM, Hugging Face datasets,
   MosaicML streaming, torchtitan, OLMo-core, or RegMix itself; weights keep their exact bits.
2. `restate` turns token weights of one tokenizer into those of another, from the bytes per token of
   each domain; `measure_bytes_per_token` measures them on documents of the corpus.

Enters: a mixture, where each domain's data lies, epochs where known. Leaves: text or another
mixture. Neither reads nor converts the trainers' own data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regmix.data.mixtures import Mixture, write_mixture_yaml
from regmix.errors import MixtureError, ShardError, TokenizerError, nearest
from regmix.files import read_text, write_json, write_text

if TYPE_CHECKING:
    from regmix.data.shards import ShardSet

DOMAIN = "{domain}"
SAMPLE_TOKENS = 200_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A mixture and what a trainer should know beside its weights.

    location: where the data of a domain lies, with `{domain}` in it.
    epochs: domain -> passes over its data in the planned run, where known.
    origin: one line on where the mixture comes from.
    valid: target -> weight of the objective, for the format that has a place for it.
    """

    mixture: Mixture
    location: str = "data/{domain}"
    epochs: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""
    valid: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if DOMAIN not in self.location:
            raise MixtureError(
                f"the location '{self.location}' is the same for every domain",
                cure="Put {domain} where the domain's name goes, as in data/{domain}",
            )

    @property
    def used(self) -> dict[str, float]:
        """Domains of positive weight: the only ones these trainers accept."""
        return {domain: weight for domain, weight in self.mixture.items() if weight > 0}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Domains of weight 0, which appear in the file as a remark only."""
        return tuple(domain for domain, weight in self.mixture.items() if weight == 0)

    def path(self, domain: str) -> str:
        """Return where the data of a domain lies."""
        return self.location.replace(DOMAIN, domain)


def _remarks(plan: Plan, *more: str) -> str:
    """Return the comment lines that open a file; a name cannot break out of its line."""
    lines = ["Mixture by regmix-fast: the weight of a domain is its share of the training tokens."]
    if plan.origin:
        lines.append(plan.origin)
    lines += more
    for domain in plan.used:
        if domain in plan.epochs:
            lines.append(f"{json.dumps(domain)}: {plan.epochs[domain]:.4g} epochs")
    lines += [f"{json.dumps(domain)}: weight 0, left out" for domain in plan.left_out]
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def _megatron(plan: Plan) -> str:
    """The file of Megatron-LM's `--data-args-path`: words, weight and prefix in turn, no comments.

    `megatron/training/utils.py` splits the file at white space (`get_blend_from_list`).
    """
    lines = []
    for domain, weight in plan.used.items():
        path = plan.path(domain)
        if path.split() != [path]:
            raise MixtureError(
                f"domain '{domain}': Megatron-LM cannot read the prefix '{path}', it has a space",
                cure="Give another --location, or rename the domain's files",
            )
        lines.append(f"{weight!r} {path}\n")
    return "".join(lines)


def _dictionary(name: str, values: Mapping[str, object]) -> str:
    rows = "".join(f"    {key!r}: {value!r},\n" for key, value in values.items())
    return f"{name} = {{\n{rows}}}\n"


def _python_constants(plan: Plan) -> str:
    known = {domain: float(plan.epochs[domain]) for domain in plan.used if domain in plan.epochs}
    paths = {domain: plan.path(domain) for domain in plan.used}
    return (
        _dictionary("WEIGHTS", plan.used)
        + _dictionary("PATHS", paths)
        # What the run was planned to repeat; nothing below reads it.
        + _dictionary("EPOCHS", known)
    )


_HUGGINGFACE = '''
def mixture(domains, seed=0):
    """Return {domain: dataset of sequences} as one dataset, mixed by WEIGHTS."""
    from datasets import interleave_datasets

    return interleave_datasets(
        [domains[name] for name in WEIGHTS],
        probabilities=list(WEIGHTS.values()),
        seed=seed,
        stopping_strategy="all_exhausted",
    )
'''

_TORCHTITAN = '''
def mixture(domains):
    """Return {domain: packed dataset config} as one dataset config, mixed by WEIGHTS."""
    from torchtitan.components.data import DatasetMixConfig, WeightedDataset

    return DatasetMixConfig(
        datasets=tuple(
            WeightedDataset(dataset=domains[name], weight=weight)
            for name, weight in WEIGHTS.items()
        ),
    )
'''


def _huggingface(plan: Plan) -> str:
    """Python for `datasets.interleave_datasets`, whose probabilities count examples."""
    remark = (
        "Probabilities count examples: cut each domain into sequences of equal length first, "
        "and start again at the end of a domain that repeats."
    )
    return _remarks(plan, remark) + _python_constants(plan) + "\n" + _HUGGINGFACE


def _torchtitan(plan: Plan) -> str:
    """Python for torchtitan's Grain data path (`torchtitan/components/data`, DatasetMixConfig)."""
    remark = (
        "Weights count rows: pack each domain (ConcatThenSplitPackingConfig) before it is mixed, "
        "so that every row has seq_len tokens."
    )
    return _remarks(plan, remark) + _python_constants(plan) + "\n" + _TORCHTITAN


def _dump(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)


def _mosaicml(plan: Plan) -> str:
    """YAML of LLM Foundry's text loader: one `streaming.Stream` a domain, with its proportion."""
    remark = "Proportions count samples: write MDS samples of equal length (--concat_tokens)."
    streams = {
        domain: {"local": plan.path(domain), "split": "train", "proportion": weight}
        for domain, weight in plan.used.items()
    }
    content = {"train_loader": {"name": "text", "dataset": {"streams": streams}}}
    return _remarks(plan, remark) + _dump(content)


def _olmo(plan: Plan) -> str:
    """YAML of OLMo-core's `SourceMixtureList`; a source used more than once must be allowed to."""
    sources = []
    for domain, weight in plan.used.items():
        source: dict[str, Any] = {
            "source_name": domain,
            "target_ratio": weight,
            "paths": [plan.path(domain)],
        }
        if plan.epochs.get(domain, 0.0) > 1:
            source["max_repetition_ratio"] = math.ceil(plan.epochs[domain] * 100) / 100
        sources.append(source)
    return _remarks(plan) + _dump({"sources": sources})


@dataclass(frozen=True)
class Format:
    """A trainer's format: what the file is for, its usual ending, and how it is rendered.

    `render` is None for RegMix's own format, which `write_mixture_yaml` writes.
    """

    about: str
    ending: str
    render: Callable[[Plan], str] | None


FORMATS = {
    "megatron": Format("Megatron-LM: --data-args-path FILE", ".txt", _megatron),
    "huggingface": Format(
        "Hugging Face datasets: import it, mixture(domains)", ".py", _huggingface
    ),
    "mosaicml": Format("MosaicML streaming: streams of LLM Foundry's loader", ".yaml", _mosaicml),
    "torchtitan": Format("torchtitan: import it, mixture(domains)", ".py", _torchtitan),
    "olmo": Format("OLMo-core: a SourceMixtureList", ".yaml", _olmo),
    "regmix": Format("RegMix and regmix-fast: a mixture file", ".yaml", None),
}


def write_format(path: Path | str, plan: Plan, name: str) -> tuple[Path, ...]:
    """Write a mixture in the format `name`, atomically; return the files written.

    Megatron-LM's file has no room for remarks, so they go into a second file beside it.
    Raises `MixtureError` for an unknown format or a name the format cannot hold.
    """
    if name not in FORMATS:
        raise MixtureError(
            f"unknown format '{name}' ({nearest(name, FORMATS)})",
            cure=f"Use one of: {', '.join(FORMATS)}",
        )
    path = Path(path)
    render = FORMATS[name].render
    if render is None:
        sections: dict[str, Any] = {"origin": plan.origin} if plan.origin else {}
        if plan.epochs:
            sections["epochs"] = {domain: float(e) for domain, e in plan.epochs.items()}
        write_mixture_yaml(path, plan.mixture, valid=plan.valid, sections=sections)
        return (path,)
    text = render(plan)
    if name != "megatron":
        write_text(path, text)
        return (path,)
    remarks = path.with_name(path.name + ".remarks.json")
    write_json(
        remarks,
        {
            "origin": plan.origin,
            "weights": dict(plan.mixture),
            "epochs": dict(plan.epochs),
            "left_out": list(plan.left_out),
        },
    )
    write_text(path, text)
    return path, remarks


def restate(
    mixture: Mapping[str, float],
    bytes_per_token_ours: Mapping[str, float],
    bytes_per_token_theirs: Mapping[str, float],
) -> Mixture:
    """Return the mixture that reads the same text with another tokenizer.

    The same bytes of domain d are ours_d / theirs_d tokens for each of ours, so its weight is
    proportional to w_d * ours_d / theirs_d. Raises `MixtureError` where a domain was not measured.
    """
    weights = {}
    for domain, weight in mixture.items():
        pair = (bytes_per_token_ours.get(domain), bytes_per_token_theirs.get(domain))
        if weight == 0:
            weights[domain] = 0.0
            continue
        if any(value is None or not math.isfinite(value) or value <= 0 for value in pair):
            raise MixtureError(
                f"domain '{domain}': bytes per token are {pair[0]} and {pair[1]}, not both known",
                cure="Measure them on text of that domain with both tokenizers",
            )
        weights[domain] = weight * float(pair[0] or 0) / float(pair[1] or 1)
    return Mixture(weights, normalise=True, where="restated mixture")


def _load_backend(path: Path | str) -> Any:
    """Load a tokenizer of another trainer, whatever its separator is."""
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{path}: not a Hugging Face tokenizer ({str(error)[:200]})",
            cure="Name a tokenizer.json as saved by the tokenizers library",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    # As `pack` does: a special token spelled out in a text is text.
    backend.encode_special_tokens = True
    return backend


def measure_bytes_per_token(
    shards: ShardSet,
    tokenizer: Path | str,
    *,
    split: str = "train",
    sample_tokens: int = SAMPLE_TOKENS,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return UTF-8 bytes per token of each domain, with our tokenizer and with another one.

    Both are measured on the same whole documents, evenly spaced over the domain, about
    `sample_tokens` of ours. The separator after a document counts as a token on both sides.
    """
    from regmix.data.tokenizer import load_tokenizer

    other = _load_backend(tokenizer)
    own = load_tokenizer(shards.tokenizer_path, separator=shards.manifest.tokenizer.separator)
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for domain in shards.domains(split):
        rows = _sample_documents(shards, split, domain, sample_tokens)
        texts = [own.decode(row[:-1]) for row in rows]
        num_bytes = sum(len(text.encode()) for text in texts)
        if num_bytes == 0:
            raise ShardError(
                f"{shards.path}: domain '{domain}' has no text to measure a tokenizer on",
                cure="Pack more text of that domain",
            )
        encodings = other.encode_batch_fast(texts, add_special_tokens=False)
        ours[domain] = num_bytes / sum(len(row) for row in rows)
        theirs[domain] = num_bytes / sum(len(encoding.ids) + 1 for encoding in encodings)
    return ours, theirs


def _sample_documents(
    shards: ShardSet, split: str, domain: str, sample_tokens: int
) -> list[list[int]]:
    """Return token ids of evenly spaced whole documents, each with its separator."""
    import numpy as np

    parts = shards.arrays(split, domain)
    starts = shards.document_offsets(split, domain).astype(np.int64)
    bounds = np.cumsum([0, *(len(part) for part in parts)])
    ends = np.append(starts[1:], bounds[-1])
    wanted = max(1, min(len(starts), round(len(starts) * sample_tokens / max(1, bounds[-1]))))
    rows = []
    for number in np.unique(np.arange(wanted) * len(starts) // wanted).tolist():
        part = int(np.searchsorted(bounds, starts[number], side="right")) - 1
        first = starts[number] - bounds[part]
        rows.append(parts[part][first : first + ends[number] - starts[number]].tolist())
    return rows
