"""The README's commands run as they stand there, on a tiny corpus and with fewer tokens."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from regmix.errors import RegmixError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Only sizes are changed, so that the whole pipeline takes seconds.
SMALLER = {
    "--train-bpe 4096": "--train-bpe 320 --valid-fraction 0.15",
    "--num 64 --tokens 2M": "--num 24 --tokens 20k --batch-size 4",
    "optimize study --tokens 10M": "optimize study --tokens 40k",
    "--guard-tolerance 0.2 --tokens 10M": "--guard-tolerance 0.2 --tokens 40k",
    "--rounds 1 --per-round 8": "--rounds 1 --per-round 3",
    "--model cpu-128 --tokens 10M": "--model cpu-32 --tokens 40k --seq-len 128",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("regmix-fast")]


def commands_for_gpus_name_what_is_there(cli: click.Group) -> None:
    lines = [line for block in blocks("gpu") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["doctor", "proxies", "train"]
    found = torch.cuda.device_count()
    if found >= 8:
        return
    doctor, *training = (shlex.split(line)[1:] for line in lines)
    assert CliRunner().invoke(cli, doctor).exit_code == 1
    for words in training:
        refused = CliRunner().invoke(cli, words)
        assert isinstance(refused.exception, RegmixError)
        assert f"this machine has {found} GPU" in str(refused.exception)


def commands_for_clusters_say_what_is_missing(cli: click.Group) -> None:
    (block,) = blocks("cluster")
    start, command = block.splitlines()
    assert start == "ray start --head"
    refused = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert isinstance(refused.exception, RegmixError)
    assert "Ray" in str(refused.exception)


def test_every_command_of_the_readme_runs(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regmix.cli import cli

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_corpus, "corpus")
    used = set()
    for line in commands():
        if "mixtures.csv" in line and not Path("mixtures.csv").exists():
            shutil.copy("study/mixtures.csv", "mixtures.csv")
            shutil.copy("study/losses.csv", "losses.csv")
        for large, small in SMALLER.items():
            if large in line:
                used.add(large)
                line = line.replace(large, small)
        result = CliRunner().invoke(cli, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert used == set(SMALLER), "a size in the README is no longer replaced"
    for name in ("optimum.yaml", "report.html", "surrogate/fit.json"):
        assert (Path("study") / name).stat().st_size > 0
    assert Path("blend.txt").stat().st_size > 0
    assert (Path("optimum-hf") / "config.json").exists()
    commands_for_gpus_name_what_is_there(cli)
    commands_for_clusters_say_what_is_missing(cli)
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local
    for link in local:
        assert (ROOT / link).exists(), link
