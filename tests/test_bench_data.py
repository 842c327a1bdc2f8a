"""The benchmarks of the data path: what they deliver is what they say, on small data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from regmix_bench import pack_peers, pack_speed, sampler, sampler_order, sampler_ours, targets
from regmix_bench.harness import Record
from regmix_bench.pack_speed import Texts, Way, write_texts
from regmix_bench.sampler_damage import share_found
from regmix_bench.sampler_data import (
    BATCH,
    DOMAINS,
    LENGTH,
    PILE_PRIOR,
    WEIGHTS,
    Corpus,
    check_rows,
    domain_of,
    make_corpus,
)
from regmix_bench.sampler_peers import Reference
from regmix_bench.sampler_worker import Contender, Worker, weight_errors


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("sampler"), 12_000_000)


def record(case: str, metric: str, value: float, **more: Any) -> Record:
    return Record(suite="sampler", case=case, metric=metric, value=value, unit="", **more)


def test_weights_are_the_shares_of_17_domains() -> None:
    assert len(PILE_PRIOR) == 17
    assert sum(PILE_PRIOR.values()) == pytest.approx(1, abs=1e-6)
    assert list(DOMAINS) == sorted(DOMAINS)


def test_a_corpus_is_written_once(corpus: Corpus) -> None:
    manifest = corpus.shards / "manifest.json"
    before = manifest.stat().st_mtime_ns
    make_corpus(corpus.folder, 12_000_000)
    assert manifest.stat().st_mtime_ns == before


def test_rows_of_two_domains_are_refused() -> None:
    batch = np.array([[0, 17, 34], [1, 18, 20]])
    assert domain_of(batch).tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="several domains"):
        check_rows(batch)


def test_our_batches_keep_the_weights_within_one_sequence(corpus: Corpus) -> None:
    batches = sampler_ours.batches_of(sampler_ours.open_sampler(corpus), reuse=True)
    errors = weight_errors(next(batches), batches.__next__, 1600)
    assert [num for num, _ in errors][-1] == 1600
    assert all(error * num < 1 for num, error in errors)


def test_ring_and_batch_give_the_same_tokens(corpus: Corpus) -> None:
    batches = sampler_ours.batches_of(sampler_ours.open_sampler(corpus), reuse=False)
    ring = sampler_ours.ring_of(sampler_ours.open_sampler(corpus), "int32", 2)
    for _ in range(5):
        np.testing.assert_array_equal(next(batches), next(ring))
    ring.close()  # type: ignore[attr-defined]


def test_the_stand_in_reads_whole_blocks_of_the_corpus(corpus: Corpus) -> None:
    peer = Reference(corpus)
    peer.make()
    peer.open()
    batch = next(peer.batches()).numpy()
    assert batch.shape == (BATCH, LENGTH)
    assert batch.dtype == np.int64
    for row, number in zip(batch, domain_of(batch), strict=True):
        blocks = corpus.blocks(DOMAINS[number])
        assert (blocks == row.astype(np.uint16)).all(axis=1).any()


def test_the_stand_in_follows_the_weights_by_chance(corpus: Corpus) -> None:
    peer = Reference(corpus)
    peer.make()
    peer.open()
    batches = peer.batches()
    counts = np.zeros(len(DOMAINS))
    for _ in range(200):
        counts += np.bincount(domain_of(next(batches)), minlength=len(DOMAINS))
    assert np.abs(counts / counts.sum() - WEIGHTS).max() < 0.04


def test_the_stand_in_resumes_where_it_was(corpus: Corpus) -> None:
    undisturbed, resumed = Reference(corpus), Reference(corpus)
    undisturbed.make()
    undisturbed.open()
    resumed.open()
    batches = undisturbed.batches()
    for _ in range(7):
        next(batches)
    assert (next(resumed.resume(7)) == next(batches)).all()


def test_a_worker_measures_and_names_what_it_cannot_start(corpus: Corpus) -> None:
    worker = Worker(Contender(kind="ring", system="ring", dtype="int32", workers=1), corpus)
    assert worker.error is None
    assert worker.ask("measure", 0.05) > 0
    worker.close()
    broken = Worker(Contender(kind="ring", system="ring", workers=0), corpus)
    assert "threads" in (broken.error or "")
    broken.close()


def test_prefix_error_is_measured_and_below_one() -> None:
    assert sampler_order.worst_error(1, seed=1, num_sequences=50) == 0
    assert 0.5 < sampler_order.worst_error(9, seed=1, num_sequences=2000) < 1


def test_every_damage_of_a_few_is_found(tmp_path: Path) -> None:
    assert share_found(tmp_path, 3, "cut") == 1
    assert share_found(tmp_path, 3, "flip") == 1


def test_targets_say_met_not_met_and_not_measured() -> None:
    records = [
        record("step 1,000,000", "resume: restore, first batch", 0.2),
        record("17 domains, 1 GB", "start-up: open, sampler, first batch", 70.0),
    ]
    rows = {row[0]: row[1:] for row in (target.row(records) for target in targets.TARGETS)}
    assert rows["resume at step 1M"][:3] == ("at most 1 ms", "0.2 ms", "met")
    assert rows["start-up with 17 domains"][2] == "NOT MET"
    assert rows["int64 against litdata"][3] == "not measured in this run"


def test_a_ratio_is_taken_to_the_fastest_setting_of_a_peer() -> None:
    ours = targets.BATCH
    records = [
        record("litdata, 0 workers", "speed", 30.0),
        record(ours, "speed", 900.0, peer="litdata, 2 workers", ratio_to_peer=90.0),
        record(ours, "speed", 900.0, peer="litdata, 0 workers", ratio_to_peer=30.0),
    ]
    found = targets.against(ours, "litdata")(records)
    assert found is not None
    assert found.value == 30
    assert found.why == "900 against 30 sequences/s (litdata, 0 workers)"


def test_a_slow_stand_in_gives_no_claim() -> None:
    slow = targets.reference_note([record("reference, 0 workers", "speed", 60_000.0)])
    fair = targets.reference_note([record("reference, 0 workers", "speed", 98_000.0)])
    assert "too slow for a claim" in slow[0]
    (target,) = (t for t in targets.TARGETS if t.name.startswith("int64 batch() against"))
    ratio = record(targets.BATCH, "speed", 900_000.0, peer=targets.STAND_IN, ratio_to_peer=15.0)
    for speed, verdict in ((60_000.0, "NOT CLAIMED"), (98_000.0, "met")):
        records = [record(targets.STAND_IN, "speed", speed), ratio]
        assert target.row(records)[3] == verdict
    assert "98,000 sequences/s here, 4% above the 94,200" in fair[0]


def test_the_quick_run_is_smaller_in_every_way() -> None:
    full = sampler.Effort()
    for name in ("num_bytes", "rounds", "seconds", "error_sequences", "prefix_sequences"):
        assert getattr(sampler.QUICK, name) < getattr(full, name)


def test_a_picture_is_drawn_from_records(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from regmix_bench import chart

    records = [
        Record(suite="sampler", case=case, metric="speed", value=value, unit="sequences/s")
        for case, value in (("regmix, batch()", 8e5), ("reference, 0 workers", 9e4))
    ]
    records += [
        record("reference, 0 workers", f"worst weight error after {num:,} sequences", 0.1)
        for num in (16, 1600)
    ]
    chart.draw(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert chart.errors(records) == {"reference, 0 workers": [(16, 0.1), (1600, 0.1)]}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("pack") / "texts"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "42", "dogs\nran", "home"]
    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(words, 40)) + f" {number}" for number in range(300)]
    return Texts(folder=folder, utf8_bytes=write_texts(folder, "web-0", iter(texts)))


def test_texts_come_back_as_written(documents: Texts) -> None:
    (file,) = documents.folder.iterdir()
    texts = list(pack_peers.texts(file))
    assert len(texts) == 300
    assert sum(len(text.encode()) for text in texts) == documents.utf8_bytes


def test_pack_and_the_script_run_and_another_tokenizer_is_noticed(
    documents: Texts, tmp_path: Path
) -> None:
    tokenizer = pack_speed.train_tokenizer(documents, tmp_path / "tokenizer.json")
    for kind in ("regmix", "script"):
        way = Way(kind=kind, workers=1)
        outcome = pack_speed.run_way(way, documents, tokenizer, tmp_path / kind)
        assert outcome.seconds > 0
        assert outcome.peak_bytes > 10_000_000
    shards = tmp_path / "regmix" / "shards"
    assert pack_speed.identical(shards, documents, tokenizer) == 1
    changed = json.loads(tokenizer.read_text(encoding="utf-8"))
    changed["model"]["merges"] = changed["model"]["merges"][:20]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed), encoding="utf-8")
    assert pack_speed.identical(shards, documents, other) < 1


def test_the_script_writes_full_chunks_only(tmp_path: Path) -> None:
    builder = pack_peers.ChunkBuilder(tmp_path, "web")
    tokens = np.arange(pack_peers.CHUNK_TOKENS + 5) % 1000
    builder.add(tokens[:7])
    builder.add(tokens[7:])
    (chunk,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.fromfile(chunk, np.uint16), tokens[:-5])
