"""What fuzzing has found, each as one file: it is refused with a word on why, or read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from material import Material
from readers import READERS
from test_fuzz_readers import WRITERS, try_one
from watching import watched

from regmix.data.packing.documents import Refusal, line_documents
from regmix.data.tokenizer import Tokenizer, train_bpe
from regmix.errors import RegmixError, TokenizerError

BY_NAME = {row.name: row for row in READERS}
LONG_NUMBER = b"9" * 5000
# NumPy parses a header as Python; this one ends inside a bracket.
OPEN_BRACKET = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (9,".ljust(
    128
)


@dataclass(frozen=True)
class Found:
    """A file: the valid one of a reader, changed, or `content`; match: the refusal, if any."""

    reader: str
    match: str | None
    change: Callable[[Any], Any] | None = None
    content: bytes = b""


def put(*path: Any, value: Any) -> Callable[[Any], Any]:
    """A change that sets one place of a tree."""

    def change(tree: Any) -> Any:
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return tree

    return change


def drop(*path: Any) -> Callable[[Any], Any]:
    """A change that removes one place of a tree."""

    def change(tree: Any) -> Any:
        at = tree
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return tree

    return change


FOUND = [
    # Names that would start a line, or steer the terminal that the error is shown on.
    Found("manifest", r"'two\\nlines'", put("splits", "train", "web", "two\nlines", value=1)),
    Found("manifest", "do not hold what is said", put("splits", "train", "web", "tokens", value=0)),
    Found("model.toml", r"'\\x1b\[2J'", put("\x1b[2J", value=1)),
    Found("study.toml", r"'\\u202eright'", put("proxy", "shape", "\u202eright", value=1)),
    Found("losses.csv", r"\\x9b31m", content="index,metric/\x9b31m\n1,2\n".encode()),
    Found("parquet", "damaged or cut short", content=b"PAR1" + b"\x15" * 60 + b"\x20\0\0\0PAR1"),
    # 200 kB of these would take 40 GB in the parser.
    Found("study.toml", "a key of more than 64 parts", content=b"a" + b".a" * 300 + b" = 1"),
    Found("model.toml", "a key of more than 64 parts", content=b"[a" + b'."a"' * 300 + b"]"),
    Found("model.toml", "at most 10,000", put("num_layers", value=10**12)),
    Found("config.json", "at most 2,147,483,648", put("shape", "vocab_size", value=10**30)),
    Found("config.json of Hugging Face", None, put("max_position_embeddings", value=10**8)),
    # The library writes a row for every id up to the largest, and ends the process.
    Found(
        "corpus tokenizer", "ids up to 4,294,967,295", put("model", "vocab", "zz", value=2**32 - 1)
    ),
    Found("generation_config.json", "starts with token -4886", put("bos_token_id", value=-4886)),
    Found(
        "safetensors index",
        "not a safetensors file",
        put("weight_map", "model.norm.weight", value="m" * 300 + ".safetensors"),
    ),
    Found("sharded index", None, drop("shards", 0, "file")),
    Found("npy", "no .npy file", content=OPEN_BRACKET),
    Found("steps.npy", "no .npy file", content=OPEN_BRACKET),
    Found("packing.json", "not a table", content=b"null"),
    Found("packing.json", "expected int", put("records", value="many")),
    Found(
        "trajectories.csv",
        "is no number",
        content=b"index,step,metric/a_val_loss\n1," + LONG_NUMBER + b",2\n",
    ),
    Found(
        "schedules.csv",
        "its domains are not those",
        content=b"index,first_step,train_a\n1000001,0,1\n",
    ),
    Found("rounds.json", "expected float", put("rounds", 0, "weights", 0, 0, value={})),
    Found("rounds.json", "1 mixtures and other numbers", put("rounds", 0, "indices", value=[6, 7])),
    Found("rounds.json", "not of the domains", put("rounds", 0, "domains", value=["a", "b"])),
    Found("rounds.json", "no list of rounds", put("rounds", value=3)),
    # A report reads much that others have written.
    Found("fit.json", "'choice' is not a table", put("choice", value=[1])),
    Found("fit.json", "no list of runs", put("dropped", value=[{"reason": "none"}])),
    Found("fit.json", "'targets' is not a table", put("targets", "code", value=[1])),
    Found("fit.json", None, put("targets", "code", "spearman", value=[1])),
    Found("optimum.json", "no name, or there twice", put("domains", 1, value=[])),
    Found("optimum.json", "no name, or there twice", put("domains", 1, value="code")),
    Found("optimum.json", "from 0 to 1", put("weights", 1, value=-0.5)),
    Found(
        "optimum.json", "no list of numbers", put("baselines", "natural", "weights", value=[[1], 2])
    ),
    Found("optimum.json", "'budget_tokens' is not a number", put("budget_tokens", value=[1])),
    Found("optimum-tradeoffs.json", "no trade-offs", put("points", "weights", 0, 0, value=10**400)),
    Found("sweep.json", None, put("environment", "versions", value=[1])),
    Found("sweep.json", None, put("environment", "system", value="\ud800")),
    Found("summary.json", "'replicate' or 'tokens'", put("replicate", value=None)),
    Found("summary.json", "'replicate' or 'tokens'", put("tokens", value="x" * 5000)),
    Found("summary.json", "'training' is not a table", put("training", value=["x"])),
    Found("summary.json", "'member' is not a table", put("member", value=[])),
    Found("evaluation.json", None, put("targets", "code", "loss_nats", value=1e308)),
    Found("optimum.json of the commands", "no numbers", put("epochs", "code", value=10**400)),
    Found("optimum.json of the commands", "no numbers", put("epochs", value=[1])),
    Found("evaluation.json of export", "is damaged", drop("targets")),
    Found("evaluation.json of export", None, put("targets", "\ud800", value={"loss_nats": 1.0})),
    Found("summary.json of export", "is damaged", drop("member", "weights")),
    Found("corpus.json of the demo", None, put("x" * 5000, value="\ud800")),
    Found("corpus.json of the demo", "not a table", content=b"[]"),
    # Runs that were stopped.
    Found("outcome.json", "damaged", put("failed", value=None)),
    Found(
        "metrics of a run", None, content=b'{"step": 1, "loss_nats": 2}\n\xff\n{"step"}\n[]\n7\n'
    ),
    Found(
        "sharded index",
        None,
        put("shards", 0, "pieces", "stray", value={"offset": [], "shape": []}),
    ),
    Found("sharded index", None, put("shards", 0, "pieces", "weight", "offset", 0, value=[1])),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    here = Path.cwd()
    root = tmp_path_factory.mktemp("found")
    made = Material(root)
    os.chdir(root)
    yield made
    os.chdir(here)


@pytest.mark.parametrize("found", FOUND, ids=lambda found: f"{found.reader}: {found.match}")
def test_what_was_found_stays_mended(found: Found, files: Material) -> None:
    row = BY_NAME[found.reader]
    path = files.root / row.file
    valid, content = path.read_bytes(), found.content
    if found.change is not None:
        tree = found.change(row.tree_of(files))
        content = WRITERS[row.form](tree) if row.sign is None else row.sign(files, tree)
    try:
        if found.match is None:
            try_one(row, files, content)
        else:
            with pytest.raises(RegmixError, match=found.match):
                try_one(row, files, content)
    finally:
        path.write_bytes(valid)


def test_a_long_line_of_bytes_that_no_character_begins_with_is_malformed() -> None:
    """A text was cut before such bytes, however far back that was: without end, in `pack`."""
    line = b'{"text": "' + b"a" * (9 << 20) + b"\x80" * (2 << 20) + b'"}\n'
    with watched():
        (found,) = line_documents(line, first=False, text_field="text", max_bytes=1 << 30)
    assert found == (1, Refusal("malformed", "not UTF-8"))


def test_a_tokenizer_that_is_no_json_is_refused_though_the_library_reads_it() -> None:
    text = train_bpe(["a b"], 258).text.replace('"version": "1.0"', '"ver1.0"', 1)
    with pytest.raises(TokenizerError, match="not a Hugging Face tokenizer"):
        Tokenizer(text, where="tokenizer.json")
