"""Mixtures in other trainers' formats: read back as those trainers read them, weights are exact."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from regmix.data.formats import FORMATS, Plan, measure_bytes_per_token, restate, write_format
from regmix.data.mixtures import Mixture, read_mixture_yaml
from regmix.data.shards import (
    MANIFEST_FORMAT,
    VERSION,
    Manifest,
    ShardSet,
    ShardStats,
    ShardWriter,
    TokenizerRecord,
    dtype_for,
    write_manifest,
)
from regmix.data.tokenizer import Tokenizer, train_bpe
from regmix.errors import MixtureError, StorageError, TokenizerError

# Weights that no short decimal holds, one of them tiny, one zero, and an awkward name.
MIXTURE = Mixture({"web": 2 / 3, "code": 1 / 3 - 1e-7, "maths": 1e-7, "yes": 0.0}, normalise=True)
USED = {domain: weight for domain, weight in MIXTURE.items() if weight > 0}
PLAN = Plan(mixture=MIXTURE, epochs={"web": 0.5, "code": 2.345, "maths": 1.0}, origin="A study")


def written(tmp_path: Path, name: str, plan: Plan = PLAN) -> Path:
    return write_format(tmp_path / f"mixture{FORMATS[name].ending}", plan, name)[0]


def read_megatron(path: Path) -> dict[str, float]:
    # As megatron/training/utils.py: split at white space, weights and prefixes in turn.
    words = path.read_text().split()
    return dict(zip(words[1::2], map(float, words[::2]), strict=True))


def imported(path: Path) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope


def test_megatron_reads_the_same_weights(tmp_path: Path) -> None:
    read = read_megatron(written(tmp_path, "megatron"))
    assert read == {f"data/{domain}": weight for domain, weight in USED.items()}


def test_megatron_remarks_lie_in_a_second_file(tmp_path: Path) -> None:
    files = write_format(tmp_path / "blend.txt", PLAN, "megatron")
    remarks = json.loads(files[1].read_text())
    assert remarks["epochs"] == dict(PLAN.epochs)
    assert remarks["left_out"] == ["yes"]
    assert remarks["weights"] == dict(MIXTURE)


def test_megatron_refuses_a_prefix_with_a_space(tmp_path: Path) -> None:
    plan = Plan(mixture=Mixture({"web text": 1.0}))
    with pytest.raises(MixtureError, match=r"'data/web text'.*has a space"):
        write_format(tmp_path / "blend.txt", plan, "megatron")
    assert list(tmp_path.iterdir()) == []


def test_huggingface_interleaves_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("datasets")
    calls: list[dict[str, Any]] = []
    fake.interleave_datasets = lambda parts, **options: calls.append(  # type: ignore[attr-defined]
        {"parts": parts, **options}
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    scope = imported(written(tmp_path, "huggingface"))
    scope["mixture"]({domain: f"<{domain}>" for domain in MIXTURE}, seed=3)
    assert calls[0]["parts"] == [f"<{domain}>" for domain in USED]
    assert calls[0]["probabilities"] == list(USED.values())
    assert calls[0]["seed"] == 3
    assert scope["EPOCHS"] == {"code": 2.345, "maths": 1.0, "web": 0.5}


def test_torchtitan_mixes_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = types.ModuleType("torchtitan.components.data")
    fake.DatasetMixConfig = lambda datasets: datasets  # type: ignore[attr-defined]
    fake.WeightedDataset = lambda dataset, weight: (dataset, weight)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchtitan", types.ModuleType("torchtitan"))
    monkeypatch.setitem(
        sys.modules, "torchtitan.components", types.ModuleType("torchtitan.components")
    )
    monkeypatch.setitem(sys.modules, "torchtitan.components.data", fake)
    scope = imported(written(tmp_path, "torchtitan"))
    assert dict(scope["mixture"]({domain: domain for domain in MIXTURE})) == USED
    assert scope["PATHS"] == {domain: f"data/{domain}" for domain in USED}


def test_mosaicml_streams_have_the_same_proportions(tmp_path: Path) -> None:
    content = yaml.safe_load(written(tmp_path, "mosaicml").read_text())
    streams = content["train_loader"]["dataset"]["streams"]
    assert {name: stream["proportion"] for name, stream in streams.items()} == USED
    # The arguments of streaming.Stream; any other is an error there.
    assert all(set(s) <= {"remote", "local", "split", "proportion"} for s in streams.values())


def test_olmo_sources_have_the_same_ratios_and_may_repeat_enough(tmp_path: Path) -> None:
    sources = yaml.safe_load(written(tmp_path, "olmo").read_text())["sources"]
    assert {source["source_name"]: source["target_ratio"] for source in sources} == USED
    repeated = {s["source_name"]: s.get("max_repetition_ratio", 1.0) for s in sources}
    assert repeated == {"code": 2.35, "maths": 1.0, "web": 1.0}
    known = {"source_name", "target_ratio", "paths", "max_repetition_ratio"}
    assert all(set(source) <= known for source in sources)


def test_regmix_reads_the_same_mixture_with_its_zeros(tmp_path: Path) -> None:
    plan = Plan(mixture=MIXTURE, epochs=PLAN.epochs, valid={"web": 1.0})
    path = written(tmp_path, "regmix", plan)
    assert read_mixture_yaml(path) == MIXTURE
    assert yaml.safe_load(path.read_text())["epochs"] == dict(PLAN.epochs)


@pytest.mark.parametrize("name", ["huggingface", "torchtitan", "mosaicml", "olmo"])
def test_epochs_and_left_out_domains_are_in_the_file(tmp_path: Path, name: str) -> None:
    text = written(tmp_path, name).read_text()
    assert '# "code": 2.345 epochs' in text
    assert '# "yes": weight 0, left out' in text
    assert "# A study" in text


@pytest.mark.parametrize("name", ["huggingface", "torchtitan"])
def test_a_hostile_domain_name_stays_a_string(tmp_path: Path, name: str) -> None:
    domain = "a'\n}\nraise SystemExit('out')\n#\"\"\""
    plan = Plan(mixture=Mixture({domain: 1.0}), epochs={domain: 1.0}, origin="one\ntwo = 2")
    path = written(tmp_path, name, plan)
    assert imported(path)["WEIGHTS"] == {domain: 1.0}
    assigned = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    assert len(assigned) == 3


@pytest.mark.parametrize("name", ["mosaicml", "olmo", "regmix"])
def test_a_hostile_domain_name_does_not_break_the_yaml(tmp_path: Path, name: str) -> None:
    domain = "no: [x\n# -"
    plan = Plan(mixture=Mixture({domain: 0.5, "1e-3": 0.5}), epochs={domain: 1.0})
    text = yaml.safe_load(written(tmp_path, name, plan).read_text())
    assert "no: [x" in str(text)
    assert "1e-3" in str(text)


def test_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match="did you mean 'megatron'"):
        write_format(tmp_path / "x", PLAN, "megatorn")


def test_location_without_domain_is_refused() -> None:
    with pytest.raises(MixtureError, match=r"same for every domain.*\{domain\}"):
        Plan(mixture=MIXTURE, location="/data/all")


def test_restating_keeps_the_bytes_of_each_domain_in_proportion() -> None:
    mixture = Mixture({"web": 0.5, "code": 0.3, "none": 0.2})
    ours = {"web": 4.0, "code": 2.0, "none": 3.0}
    theirs = {"web": 4.5, "code": 3.1, "none": 1.0}
    moved = restate(mixture, ours, theirs)
    before = {d: w * ours[d] for d, w in mixture.items()}
    after = {d: w * theirs[d] for d, w in moved.items()}
    ratios = [after[d] / before[d] for d in mixture]
    assert ratios == pytest.approx([ratios[0]] * 3)
    back = restate(moved, theirs, ours)
    assert dict(back) == pytest.approx(dict(mixture))


def test_restating_for_the_same_tokenizer_changes_nothing() -> None:
    same = dict.fromkeys(MIXTURE, 3.7)
    assert dict(restate(MIXTURE, same, same)) == pytest.approx(dict(MIXTURE), rel=1e-12)


def test_restating_an_unmeasured_domain_is_refused() -> None:
    with pytest.raises(MixtureError, match=r"domain 'code'.*not both known"):
        restate(MIXTURE, {"web": 1.0}, {"web": 1.0})


TEXTS = {
    "code": [f"def f{n}(x):\n    return x + {n}\n" for n in range(40)],
    "web": [f"Once upon a time there were {n} naïve wolves." for n in range(40)],
}


def pack(folder: Path, tokenizer: Tokenizer, splits: tuple[str, ...] = ("train",)) -> ShardSet:
    (folder / "tokenizer.json").parent.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer.text, encoding="utf-8")
    record = TokenizerRecord(
        file="tokenizer.json",
        xxh3=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        separator_id=tokenizer.separator_id,
    )
    manifest = Manifest(
        format=MANIFEST_FORMAT,
        version=VERSION,
        dtype=dtype_for(tokenizer.vocab_size),
        tokenizer=record,
    )
    for split in splits:
        domains = {}
        for domain, texts in TEXTS.items():
            files = []
            for number, part in enumerate((texts[:25], texts[25:])):
                with ShardWriter(folder, manifest, split, domain, number) as writer:
                    writer.write(*tokenizer.encode(part))
                assert writer.record is not None
                files.append(writer.record)
            domains[domain] = ShardStats(
                documents=len(texts),
                tokens=sum(file.tokens for file in files),
                utf8_bytes=sum(len(text.encode()) for text in texts),
                files=tuple(files),
            )
        manifest.splits[split] = domains
    write_manifest(folder, manifest)
    return ShardSet.open(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    tokenizer = train_bpe((text for texts in TEXTS.values() for text in texts), 300)
    return pack(tmp_path_factory.mktemp("corpus") / "shards", tokenizer)


def test_our_own_tokenizer_measures_as_the_manifest_says(shards: ShardSet) -> None:
    ours, theirs = measure_bytes_per_token(shards, shards.tokenizer_path)
    for domain in TEXTS:
        assert ours[domain] == shards.bytes_per_token("train", domain)
        assert theirs[domain] == ours[domain]


def test_another_tokenizer_is_measured_on_the_same_text(shards: ShardSet, tmp_path: Path) -> None:
    other = train_bpe(TEXTS["code"], 290)
    (tmp_path / "other.json").write_text(other.text, encoding="utf-8")
    _, theirs = measure_bytes_per_token(shards, tmp_path / "other.json")
    for domain, texts in TEXTS.items():
        _, lengths = other.encode(texts)
        expected = sum(len(text.encode()) for text in texts) / int(lengths.sum())
        assert theirs[domain] == pytest.approx(expected)


def test_a_sample_holds_whole_documents_from_all_files(shards: ShardSet) -> None:
    from regmix.data.formats import _sample_documents

    rows = _sample_documents(shards, "train", "web", sample_tokens=300)
    assert 2 <= len(rows) < len(TEXTS["web"])
    own = Tokenizer(shards.tokenizer_path.read_text(encoding="utf-8"), where="test")
    texts = [own.decode(row[:-1]) for row in rows]
    assert all(row[-1] == shards.separator_id for row in rows)
    assert set(texts) <= set(TEXTS["web"])
    assert any(TEXTS["web"].index(text) >= 25 for text in texts)


def test_a_file_that_is_no_tokenizer_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a Hugging Face tokenizer"):
        measure_bytes_per_token(shards, tmp_path / "other.json")


def test_a_missing_tokenizer_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.json"):
        measure_bytes_per_token(shards, tmp_path / "absent.json")
