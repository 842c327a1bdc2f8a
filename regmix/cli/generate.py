"""`regmix-fast generate`: text that a model writes, so that a person sees that it speaks."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from regmix.large.generate import Choice, Writer
    from regmix.study import Study


@click.command()
@click.argument("study", required=False)
@click.option("--model", help="A model's name; may be left out where there is one.")
@click.option(
    "--hf",
    type=click.Path(path_type=Path),
    help="A Hugging Face Llama checkpoint instead of a model of a study.",
)
@click.option(
    "--prompt", "prompts", multiple=True, help="Text to go on with; default: start a document."
)
@click.option("--tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    show_default=True,
    help="How freely it chooses; 0 takes the likeliest token always.",
)
@click.option("--top-k", type=int, help="Choose among so many of the likeliest; default: all.")
@click.option(
    "--top-p",
    type=float,
    default=0.95,
    show_default=True,
    help="Choose among the likeliest that have this probability together.",
)
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--gpu", is_flag=True, help="Compute on the GPU, in bfloat16; default: the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print texts and token ids as JSON.")
def command(
    study: str | None,
    model: str | None,
    hf: Path | None,
    prompts: tuple[str, ...],
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    samples: int,
    seed: int,
    gpu: bool,
    as_json: bool,
) -> None:
    """Let a model of STUDY go on with a text. The same seed gives the same text.

    \b
    Examples:
      regmix-fast generate study --model optimum-0 --prompt 'The first law of'
      regmix-fast generate --hf my-model --prompt 'def main(' --temperature 0
    """
    from regmix.large.generate import Choice

    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    writer, next_command = _load(study, model, hf, gpu)
    # All are checked before the first is written.
    asked = [(prompt, writer.encode(prompt)) for prompt in prompts or (None,)]
    texts: list[dict[str, Any]] = []
    for place, (prompt, ids) in enumerate(asked):
        for sample in range(samples):
            if not as_json and len(asked) * samples > 1:
                click.echo(f"[{writer.name}, text {len(texts) + 1} of {len(asked) * samples}]")
            text = _write(writer, prompt, ids, tokens, choice, (place, sample), show=not as_json)
            texts.append(text)
    if as_json:
        click.echo(json.dumps({"model": writer.name, **vars(choice), "texts": texts}))
        return
    click.echo(f"Next: {next_command}", err=True)


def _load(study: str | None, model: str | None, hf: Path | None, gpu: bool) -> tuple[Writer, str]:
    from regmix.errors import ConfigError
    from regmix.large.generate import Writer
    from regmix.study import Study, find_study

    if hf is not None:
        if study is not None or model is not None:
            raise ConfigError(
                "generate takes a model of a study or --hf, and got both",
                cure="Leave the study and --model out, or --hf",
            )
        return Writer.of_checkpoint(hf, gpu=gpu), f"regmix-fast evaluate STUDY --hf {hf}"
    opened = Study.open(find_study(study))
    name = model or _only_model(opened)
    words = f"regmix-fast export {study or ''} --model {name} --out FOLDER"
    return Writer.of_study(opened, name, gpu=gpu), " ".join(words.split())


def _only_model(study: Study) -> str:
    from regmix.errors import ModelError

    known = sorted(path.parent.name for path in study.models_path.glob("*/summary.json"))
    if not known:
        raise ModelError(
            f"{study.path} has no trained model", cure="Train one with: regmix-fast train"
        )
    if len(known) > 1:
        raise ModelError(
            f"{study.path} has {len(known)} models", cure=f"Name one with --model {known[0]}"
        )
    return known[0]


def _write(
    writer: Writer,
    prompt: str | None,
    ids: list[int],
    tokens: int,
    choice: Choice,
    sample: tuple[int, int],
    *,
    show: bool,
) -> dict[str, Any]:
    from regmix.display import duration

    if show:
        click.echo(printable(prompt or ""), nl=False)
    started = time.monotonic()
    made = []
    for piece in writer.write(ids, tokens, choice, sample):
        made.append(piece)
        if show:
            click.echo(printable(piece.text), nl=False)
    stopped = made[-1].stopped
    if show:
        seconds = time.monotonic() - started
        click.echo()
        words = f"{len(made)} tokens in {duration(seconds)}; stopped: {stopped}"
        click.echo(f"({words})", err=True)
    return {
        "prompt": prompt,
        "prompt_tokens": ids,
        "text": "".join(piece.text for piece in made),
        "tokens": [piece.token for piece in made],
        "stopped": stopped,
        "sample": list(sample),
    }


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control characters are shown as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) == "Cc" and character not in "\n\t"
        else character
        for character in text
    )
