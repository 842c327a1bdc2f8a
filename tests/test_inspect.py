"""`inspect`: what shards hold, what a budget takes from them, and sequences as safe text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from regmix.cli.inspect import command
from regmix.data.inventory import budget_rows, escape, sample_texts
from regmix.data.mixtures import write_mixture_yaml
from regmix.data.sampling.sampler import MixtureSampler
from regmix.data.shards import ShardSet
from regmix.errors import ConfigError, MixtureError, ShardError


def inspect(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)


def answer(*words: object) -> dict[str, Any]:
    result = inspect(*words, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_domains_documents_and_lengths_are_those_of_the_shards(
    tiny_shards_path: Path, tiny_shards: ShardSet
) -> None:
    rows = answer(tiny_shards_path)["domains"]
    places = [(s, d) for s in tiny_shards.splits for d in tiny_shards.domains(s)]
    assert [(row["split"], row["domain"]) for row in rows] == places
    for row, place in zip(rows, places, strict=True):
        stats = tiny_shards.stats(*place)
        starts = tiny_shards.document_offsets(*place).astype(int)
        lengths = np.diff([*starts, stats.tokens])
        assert (row["tokens"], row["documents"]) == (stats.tokens, stats.documents)
        assert row["bytes_per_token"] == tiny_shards.bytes_per_token(*place)
        assert row["median_tokens"] == np.median(lengths)
        assert row["mean_tokens"] == pytest.approx(stats.tokens / stats.documents)
        assert (row["files"], row["file_bytes"]) == (1, stats.files[0].bytes)


def test_the_overview_names_tokenizer_settings_and_sources(tiny_shards_path: Path) -> None:
    output = inspect(tiny_shards_path).output
    for words in (
        "320 ids",
        "separator '<|endoftext|>'",
        "Packed with:",
        "Sources: 3 files",
        "animals-0.jsonl",
        "Left out: no record",
        "Next: regmix-fast mixtures STUDY --shards",
    ):
        assert words in output, output


def test_records_left_out_are_shown_by_reason(tmp_path: Path) -> None:
    from regmix.data.packing.pack import pack

    lines = [json.dumps({"text": f"some words of document {n}"}) for n in range(40)]
    lines += ["no json", json.dumps({"text": "   "}), json.dumps({"text": ""})]
    (tmp_path / "web-0.jsonl").write_text("\n".join(lines) + "\n")
    pack([tmp_path / "web-0.jsonl"], tmp_path / "shards", train_bpe=300, valid_fraction=0.2)
    left_out = {}
    for row in answer(tmp_path / "shards")["domains"]:
        for reason, number in row["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + number
    assert left_out == {"malformed": 1, "empty": 2}
    assert "1 malformed" in inspect(tmp_path / "shards").output


def test_a_budget_is_dealt_as_the_sampler_deals_it(tiny_shards: ShardSet) -> None:
    mixture = {"animals": 0.61, "colours": 0.29, "numbers": 0.1}
    rows = budget_rows(tiny_shards, mixture, budget_tokens=7 * 64 * 32, seq_len=32)
    sampler = MixtureSampler(tiny_shards, mixture, seq_len=32, batch_size=64)
    plan = sampler.plan(7)
    assert {row.domain: row.sequences for row in rows} == {d: p.sequences for d, p in plan.items()}
    assert {row.domain: row.epochs for row in rows} == {d: p.epochs for d, p in plan.items()}
    for row in rows:
        tokens = tiny_shards.stats("train", row.domain).tokens
        assert row.available_sequences * 32 + 1 + row.tail_tokens == tokens


@pytest.mark.parametrize("sequences", [1, 65_537, 131_073, 200_003])
def test_a_budget_of_any_size_is_exact(tiny_shards: ShardSet, sequences: int) -> None:
    mixture = {"animals": 0.123457, "colours": 0.5, "numbers": 0.376543}
    rows = budget_rows(tiny_shards, mixture, budget_tokens=16 * sequences - 3, seq_len=16)
    plan = MixtureSampler(tiny_shards, mixture, seq_len=16, batch_size=1).plan(sequences)
    assert {row.domain: row.sequences for row in rows} == {d: p.sequences for d, p in plan.items()}


def test_domains_above_four_epochs_are_marked(
    tiny_shards_path: Path, tiny_shards: ShardSet
) -> None:
    tokens = tiny_shards.stats("train", "animals").tokens
    words = (tiny_shards_path, "--seq-len", 32, "--mixture", "uniform", "--budget-tokens")
    few, many = inspect(*words, tokens), inspect(*words, 20 * tokens)
    assert "above 4 epochs" not in few.output
    assert "! above 4 epochs: animals, colours, numbers" in many.output
    assert "are not trained at this length" in many.output


def test_a_mixture_file_is_planned(tiny_shards_path: Path, tmp_path: Path) -> None:
    write_mixture_yaml(tmp_path / "mine.yaml", {"animals": 0.25, "numbers": 0.75})
    plan = answer(
        *(tiny_shards_path, "--budget-tokens", "4k", "--seq-len", 20),
        *("--mixture", tmp_path / "mine.yaml"),
    )["plan"]
    assert {row["domain"]: row["sequences"] for row in plan} == {"animals": 50, "numbers": 150}


@pytest.mark.parametrize("name", ["optimal", "missing.yaml"])
def test_an_unknown_mixture_is_an_error(tiny_shards_path: Path, name: str) -> None:
    with pytest.raises(MixtureError, match=f"no mixture '{name}'"):
        inspect(tiny_shards_path, "--budget-tokens", "1k", "--mixture", name)


def test_a_mixture_of_other_domains_is_an_error(tiny_shards_path: Path, tmp_path: Path) -> None:
    write_mixture_yaml(tmp_path / "mine.yaml", {"animal": 1.0})
    with pytest.raises(MixtureError, match=r"unknown domain 'animal' \(did you mean 'animals'"):
        inspect(tiny_shards_path, "--budget-tokens", "1k", "--mixture", tmp_path / "mine.yaml")


def test_a_budget_that_is_no_number_is_an_error(tiny_shards_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lots' is not a number"):
        inspect(tiny_shards_path, "--budget-tokens", "lots")


def test_a_sample_is_what_a_run_reads_first(tiny_shards: ShardSet) -> None:
    from regmix.data.tokenizer import load_tokenizer

    texts = sample_texts(tiny_shards, "train", "animals", num=3, seq_len=200)
    sampler = MixtureSampler(tiny_shards, {"animals": 1.0}, seq_len=200, batch_size=3)
    tokenizer = load_tokenizer(tiny_shards.tokenizer_path)
    assert [number for number, _ in texts] == sampler.ids(0)[1].tolist()
    rows = sampler.batch(0)[:, :-1].tolist()
    assert [text for _, text in texts] == [tokenizer.decode(row) for row in rows]
    assert any("<|endoftext|>" in text for _, text in texts)


def test_a_sample_of_a_small_domain_holds_all_there_is(tiny_shards: ShardSet) -> None:
    tokens = tiny_shards.stats("valid", "animals").tokens
    length = tokens // 2
    assert len(sample_texts(tiny_shards, "valid", "animals", num=9, seq_len=length)) < 3
    with pytest.raises(ShardError, match=r"fewer than one sequence.*smaller --seq-len"):
        sample_texts(tiny_shards, "valid", "animals", num=9, seq_len=tokens)


def test_an_unknown_domain_of_a_sample_is_named(tiny_shards_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no domain 'animal' .*did you mean 'animals'"):
        inspect(tiny_shards_path, "--sample", 1, "--domain", "animal", "--seq-len", 8)


def test_text_cannot_steer_a_terminal() -> None:
    hostile = "red\x1b[31m\x07 \x9b2J \u202eback \u2028line\r\ud800 \x00\x7f"
    shown = escape(hostile)
    assert all(c.isprintable() for c in shown)
    assert shown.startswith("red\\x1b[31m\\x07 \\x9b2J \\u202eback \\u2028line\\x0d\\ud800")
    assert escape("two\n\tlines, é中😀") == "two\n\tlines, é中😀"


def test_the_description_of_others_files_is_printed_to_be_saved(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    (tmp_path / "valid").mkdir()
    np.save(tmp_path / "web-0.npy", np.arange(1, 300, dtype=np.uint16))
    np.save(tmp_path / "valid/web.npy", np.arange(1, 300, dtype=np.uint16))
    printed = inspect(tmp_path, "--describe").output  # before there is a tokenizer
    assert 'files = [\n    "web-0.npy",\n]' in printed
    shutil.copy(tiny_shards.tokenizer_path, tmp_path)
    (tmp_path / "tokens.toml").write_text(printed)
    found = answer(tmp_path)
    assert [(row["split"], row["domain"]) for row in found["domains"]] == [
        ("train", "web"),
        ("valid", "web"),
    ]
    assert any("Not checked" in remark for remark in found["remarks"])
    assert inspect(tmp_path, "--describe").output == printed


def test_a_folder_of_nothing_known_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no token files of another program"):
        inspect(tmp_path, "--describe")


def test_an_unknown_split_is_named(tiny_shards_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no split 'tests' \(known: train, valid\)"):
        inspect(tiny_shards_path, "--sample", 1, "--split", "tests")


@pytest.mark.parametrize(
    "words",
    [
        ("--domain", "animals"),
        ("--split", "train"),
        ("--seq-len", 8),
        ("--mixture", "uniform"),
        ("--sample", 1, "--mixture", "uniform", "--seq-len", 8),
        ("--sample", 1, "--budget-tokens", "1k", "--seq-len", 8),
        ("--describe", "--json"),
    ],
)
def test_an_option_without_effect_is_an_error(
    tiny_shards_path: Path, words: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"no effect|different things|not JSON"):
        inspect(tiny_shards_path, *words)


def test_a_sample_in_json_is_the_text_itself(tiny_shards_path: Path, tiny_shards: ShardSet) -> None:
    words = (tiny_shards_path, "--sample", 2, "--seq-len", 40, "--domain", "colours")
    found = answer(*words)
    texts = sample_texts(tiny_shards, "train", "colours", num=2, seq_len=40)
    assert [(row["sequence"], row["text"]) for row in found["sample"]] == texts
    assert (found["split"], found["domain"], found["seq_len"]) == ("train", "colours", 40)


def test_a_sample_says_when_there_are_no_more(tiny_shards_path: Path) -> None:
    output = inspect(tiny_shards_path, "--sample", 10_000, "--seq-len", 40).output
    assert "tokens: all are shown" in output
