"""Files of others are data: nothing runs, no path leaves its folder, no bomb goes off."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from material import Material, sign_json
from test_fuzz_readers import files  # noqa: F401 - a fixture
from watching import RESIDENT_BYTES, watched

from regmix.config import read_toml
from regmix.data.packing.readers import Meter, read_blocks
from regmix.data.packing.replacement import heal
from regmix.data.packing.sources import find_sources
from regmix.data.shards import ShardSet
from regmix.display import console
from regmix.errors import ConfigError, MixtureError, ModelError, RegmixError, ShardError
from regmix.large.train import resolve_recipe
from regmix.study import Study

ROOT = Path(__file__).parents[2]
SOURCES = ("regmix", "bench/regmix_bench", "kernels/regmix_kernels")
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
HOSTILE_PATHS = ("../outside", "/etc/hostname", "train/../../outside", "a\x00b", "..")


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# Nothing is unpickled


def offences(source: str) -> list[str]:
    """The calls and imports of a module that could run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [n.name for n in node.names if n.name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(str(node.module))
        if not isinstance(node, ast.Call):
            continue
        words = ast.unparse(node.func)
        options = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if words in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"):
            found.append(words)
        if words == "torch.load" and options.get("weights_only") != "True":
            found.append(words)
        if words in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
            found.append(words)
        if words == "yaml.load" and options.get("Loader") != "strict_loader()":
            found.append(words)
    return found


def test_no_module_can_run_what_is_in_a_file() -> None:
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 200
    found = {str(path): offences(path.read_text()) for path in paths}
    assert {path: words for path, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_what_could_run_a_file_is_seen(source: str) -> None:
    assert offences(source)


def test_a_pickle_is_not_run_whatever_file_it_is_put_in(
    files: Material,  # noqa: F811
    tmp_path: Path,
) -> None:
    from readers import READERS

    made = tmp_path / "made"
    array = np.array([Bomb(made)], dtype=object)
    saved = io.BytesIO()
    np.save(saved, array, allow_pickle=True)
    stored = io.BytesIO()
    torch.save(Bomb(made), stored)
    for content in (pickle.dumps(Bomb(made)), saved.getvalue(), stored.getvalue()):
        for row in READERS:
            path = files.root / row.file
            valid = path.read_bytes()
            path.write_bytes(content)
            try:
                row.read(files)
            except RegmixError:
                pass
            finally:
                path.write_bytes(valid)
            assert not made.exists(), row.name
    pickle.loads(pickle.dumps(Bomb(made)))
    assert made.exists()


# Paths stay inside


def signed(folder: Path, change: Any) -> None:
    """Change a manifest and give it the checksum that it asks for."""
    table = json.loads((folder / "manifest.json").read_text())
    change(table)
    (folder / "manifest.json").write_bytes(sign_json(table))


@pytest.mark.parametrize("name", HOSTILE_PATHS)
@pytest.mark.parametrize("which", ["tokenizer", "shard"])
def test_a_manifest_cannot_name_a_file_outside_its_folder(
    files: Material,  # noqa: F811
    tmp_path: Path,
    name: str,
    which: str,
) -> None:
    def change(table: Any) -> None:
        if which == "tokenizer":
            table["tokenizer"]["file"] = name
        else:
            table["splits"]["train"]["web"]["files"][0]["path"] = name

    shutil.copytree(files.shards, tmp_path / "shards")
    (tmp_path / "outside").write_bytes((files.shards / "train/web-0.tokens").read_bytes())
    signed(tmp_path / "shards", change)
    with pytest.raises(ShardError, match=r"leaves the folder.*made by hand"):
        ShardSet.open(tmp_path / "shards")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(
    files: Material,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copytree(files.shards, tmp_path / "shards")
    shard = tmp_path / "shards/train/web-0.tokens"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ShardError, match="leaves the folder"):
        ShardSet.open(tmp_path / "shards")


@pytest.mark.parametrize("name", HOSTILE_PATHS)
def test_a_replacement_writes_nothing_outside_its_folder(
    files: Material,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    def change(table: Any) -> None:
        table["splits"]["train"]["web"]["files"][0]["path"] = name

    folder = tmp_path / "corpus"
    shutil.copytree(files.replaced, folder)
    signed(folder / ".replacement", change)
    (folder / "outside").write_text("a target for the link")
    before = sorted(path for path in tmp_path.iterdir())
    with pytest.raises(ShardError, match="leaves the folder"):
        heal(folder)
    assert sorted(path for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_of_weights_cannot_name_a_file_elsewhere(
    files: Material,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    from regmix.large.importing import load_hugging_face

    shutil.copytree(files.parts, tmp_path / "model")
    shutil.copy(files.export / "model.safetensors", tmp_path / "other.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = next(iter(table["weight_map"]))
    table["weight_map"][first] = name
    index.write_text(json.dumps(table))
    with pytest.raises(ModelError, match="not a safetensors file of its folder"):
        load_hugging_face(tmp_path / "model")


def test_an_index_of_a_sharded_checkpoint_cannot_name_its_files() -> None:
    from regmix.large.distributed.checkpoint_index import Index, _digest, _text, parse, render
    from regmix.large.distributed.checkpoint_index import ShardRecord as Shard

    text = render(Index(3, {}, (Shard(1, "0", {}),), {}))
    table = json.loads(text)
    del table["checksum"]
    table["shards"][0]["file"] = "../../shard"
    forged = _text({**table, "checksum": _digest(table)})
    with pytest.raises(ValueError, match="not those of a checkpoint"):
        parse(forged, 3)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", "a/b", ""])
def test_a_stored_job_cannot_name_a_path(files: Material, name: str) -> None:  # noqa: F811
    from regmix.swarm.jobs import StackJob

    stack, member = files.job.to_table(), files.job.to_table()
    stack["name"] = name
    member["members"][0]["name"] = name
    for table in (stack, member):
        with pytest.raises(RegmixError, match="cannot name"):
            StackJob.from_table(table)


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "..", "a/b", ""])
def test_a_job_of_a_large_model_cannot_name_a_path(files: Material, name: str) -> None:  # noqa: F811
    from regmix.large.distributed.job import TrainJob

    table = {**files.large_job.to_table(), "name": name}
    both = {**table, "member": {**table["member"], "name": name}}
    for forged in (table, both):
        with pytest.raises(RegmixError, match="cannot name"):
            TrainJob.from_table(forged)


def test_a_study_may_read_a_corpus_elsewhere_and_only_reads_it(
    files: Material,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The corpus is named by the study's owner; who copies a study of others gets its checksum."""
    corpus = tmp_path / "corpus"
    shutil.copytree(files.shards, corpus)
    shutil.copytree(files.study.path, tmp_path / "study")
    settings = tmp_path / "study" / "study.toml"
    settings.write_text(settings.read_text().replace("../shards", str(corpus)))
    for path in corpus.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}
    assert Study.open(tmp_path / "study").open_shards().path == corpus
    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before
    signed_elsewhere = tmp_path / "other"
    shutil.copytree(files.shards, signed_elsewhere)
    (signed_elsewhere / "manifest.json").chmod(0o644)
    signed(signed_elsewhere, lambda table: table["settings"].update(strict="other"))
    settings.write_text(settings.read_text().replace(str(corpus), str(signed_elsewhere)))
    with pytest.raises(RegmixError, match="the corpus has changed"):
        Study.open(tmp_path / "study").open_shards()


# Bombs


def lines_of(path: Path, max_bytes: int = 1_000_000) -> tuple[int, int]:
    """Bytes of text, and records left out for their length."""
    (source,) = find_sources([path]).files
    blocks = list(read_blocks(source, Meter(), max_bytes=max_bytes))
    return sum(b.num_bytes for b in blocks), sum(b.kind == "skipped" for b in blocks)


@pytest.mark.parametrize("kind", ["zst", "gz"])
@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_what_unpacks_to_much_without_a_line_is_left_out_in_little_memory(
    tmp_path: Path, kind: str, ending: str
) -> None:
    path = tmp_path / f"web-0.{ending}.{kind}"
    chunk = bytes(1 << 24)
    num = 32 if kind == "zst" else 20
    with open(path, "wb") as stream:
        if kind == "zst":
            packed: Any = zstandard.ZstdCompressor(level=1).stream_writer(stream)
        else:
            packed = gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1)
        with packed:
            for _ in range(num):
                packed.write(chunk)
    assert path.stat().st_size < num * len(chunk) / 200
    with watched():
        assert lines_of(path) == (0, 1)


def test_a_parquet_value_repeated_is_not_unpacked_for_many_rows_at_once(tmp_path: Path) -> None:
    path = tmp_path / "web-0.parquet"
    table = pyarrow.table({"text": pyarrow.array(["a" * 15_000_000] * 24)})
    options = {"dictionary_pagesize_limit": 1 << 30, "data_page_size": 1 << 16}
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    del table
    assert path.stat().st_size < 10_000
    with watched():
        assert lines_of(path) == (0, 24)


def test_a_frame_that_asks_for_a_window_of_4_gb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web-0.jsonl.zst"
    # Magic; a descriptor without size; a window of 2^32 bytes; one raw block of a byte, the last.
    frame = bytes.fromhex("28b52ffd") + bytes([0x00, (32 - 10) << 3]) + b"\x09\x00\x00a"
    path.write_bytes(frame)
    with watched(), pytest.raises(RegmixError, match="damaged or cut short"):
        lines_of(path)


def laughs(depth: int) -> str:
    """YAML whose last anchor stands for 9^depth leaves."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "end",
    [
        "train: {web: *a19}",
        "train: *a19",
        "train: {web: 1}\nsegments: [{share: *a19, train: {web: 1}}]",
        "train: {web: 1}\nsegments: *a19",
        "train: {web: 1}\nsegments: [*a19]",
        "? *a19\n: 1\ntrain: {web: 1}",
        "train: {<<: *a19}",
    ],
)
def test_yaml_that_stands_for_more_than_any_memory_holds_is_refused_at_once(
    files: Material,  # noqa: F811
    tmp_path: Path,
    end: str,
) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text(f"{laughs(20)}\n{end}\n")
    with watched(), pytest.raises(MixtureError, match=r"mixture\.yaml"):
        resolve_recipe(files.study, str(path))


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " * 50_000, "- " * 100_000, "{a: " * 50_000])
def test_deep_yaml_is_refused(files: Material, tmp_path: Path, text: str) -> None:  # noqa: F811
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    with watched(), pytest.raises(MixtureError, match="not valid YAML"):
        resolve_recipe(files.study, str(path))


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 100_000 + " = 1",
        "a = " + "[" * 100_000,
        "a = " + "{b = " * 50_000,
        "[[a" * 9999,
    ],
)
def test_deep_toml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with watched(), pytest.raises(ConfigError, match=r"study\.toml"):
        read_toml(path)


def test_the_watchdog_sees_what_it_is_for() -> None:
    from watching import TookTooMuch

    with pytest.raises(TookTooMuch), watched():
        bytearray(RESIDENT_BYTES + (64 << 20))


# The terminal, the page and the network


def test_a_table_shows_names_as_they_are_and_steers_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.table import Table

    table = Table("[bold]head[/bold]", title="[red]title")
    table.add_row("[red]x[/red] [/none] :smile: \x1b[2J\x9b31m")
    console().print(table)
    shown = capsys.readouterr().out
    for text in ("[bold]head[/bold]", "[red]title", r"[red]x[/red] [/none] :smile: \x1b[2J\x9b31m"):
        assert text in shown
    assert "\x1b" not in shown


def test_names_that_cannot_be_shown_are_refused_where_they_are_read(tmp_path: Path) -> None:
    from regmix.data.mixtures import MixtureTable, read_mixture_yaml

    (tmp_path / "mixtures.csv").write_text("index,train_\x1b[2J\n1,1\n")
    with pytest.raises(MixtureError, match="cannot be shown"):
        MixtureTable.read_csv(tmp_path / "mixtures.csv")
    (tmp_path / "mixture.yaml").write_text('train: {"\\x1b[2J": 1}\n')
    with pytest.raises(MixtureError, match="cannot be shown"):
        read_mixture_yaml(tmp_path / "mixture.yaml")


def test_every_word_of_a_study_stays_text_in_its_report(tmp_path: Path) -> None:
    import report_cases

    from regmix.report.page import render_report

    study = report_cases.make_study(tmp_path / "study")
    kept = {*study.config.train_domains, *study.config.targets, "natural", "optimum", "uniform"}
    for path in study.path.rglob("*.json"):
        table = json.loads(path.read_text())
        path.write_text(json.dumps(_hostile(table, kept | set(table))))
    page = report_cases.Page(render_report(study))
    assert [attributes for attributes, _ in page.scripts] == [
        {},
        {"type": "application/json", "id": "charts"},
        {},
    ]
    assert not {"img", "b", "iframe"} & set(page.tags)
    assert page.text.count("<img src=x onerror=alert(1)>") > 10


def _hostile(value: Any, kept: set[str]) -> Any:
    """A tree with an element at the end of every text, names that others point to aside."""
    if isinstance(value, dict):
        return {key: _hostile(item, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item, kept) for item in value]
    if isinstance(value, str) and value not in kept:
        return f"{value}</script><img src=x onerror=alert(1)>"
    return value


NO_NETWORK = """
import os, socket

def refuse(self, address, *_):
    if self.family != socket.AF_UNIX:
        with open(os.environ["ASKED"], "a") as stream:
            stream.write(f"{address}\\n")
        raise OSError("no network here")

def unknown(host, *_, **__):
    with open(os.environ["ASKED"], "a") as stream:
        stream.write(f"{host}\\n")
    raise socket.gaierror("no network here")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.gethostbyname = unknown
"""
COMMANDS = """
pack CORPUS --out shards --train-bpe 300 --valid-fraction 0.2 --workers 1
verify shards
inspect shards
mixtures study --shards shards --num 8 --target web --model shape.toml --tokens 512 --batch-size 2
proxies study --workers 1
status study
fit study
optimize study
train study --model shape.toml --mixture optimum --tokens 512 --batch-size 2 --workers 1
evaluate study
generate study --tokens 3 --prompt document
export study --format olmo --out out.yaml
export study --model optimum-0 --out exported
report study
"""


def test_no_command_asks_the_network(tmp_path: Path) -> None:
    """The commands run one after another in one process; their workers have no network either."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(NO_NETWORK)
    (tmp_path / "corpus").mkdir()
    for name in ("web", "code", "maths"):
        lines = [json.dumps({"text": f"{name} document {n} " * 9}) for n in range(60)]
        (tmp_path / "corpus" / f"{name}-0.jsonl").write_text("\n".join(lines))
    (tmp_path / "shape.toml").write_text(
        "num_layers = 1\nwidth = 16\nnum_heads = 1\nhidden = 16\nvocab_size = 300\nseq_len = 16\n"
    )
    lines = [line.replace("CORPUS", "corpus").split() for line in COMMANDS.strip().splitlines()]
    program = f"from regmix.cli import cli\nfor words in {lines!r}:\n"
    program += "    print('$', *words, flush=True)\n    cli(words, standalone_mode=False)\n"
    asked = tmp_path / "asked"
    paths = [str(tmp_path / "patch"), str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ASKED": str(asked)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert not asked.exists(), asked.read_text()
    check = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"]
    environment = {**os.environ, "PYTHONPATH": paths[0], "ASKED": str(asked)}
    assert subprocess.run(check, env=environment, capture_output=True).returncode == 1
    assert asked.exists()
