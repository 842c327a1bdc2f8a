"""The corpus found on this machine: real text, nothing twice, the same each time."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from regmix.data import found as found_module
from regmix.data.found import MAX_CHARACTERS, MIN_CHARACTERS, FoundDomain, collect
from regmix.data.packing.corpus import find_sources
from regmix.data.problems import KINDS, problem_documents

MAX_BYTES = 250_000


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, FoundDomain]]:
    folder = tmp_path_factory.mktemp("found")
    return folder, collect(folder, max_bytes_per_domain=MAX_BYTES)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_domains_hold_what_they_say_within_their_cap(
    collected: tuple[Path, dict[str, FoundDomain]],
) -> None:
    folder, found = collected
    assert set(found) == {"cpp", "docs", "legal", "maths", "python", "readme"}
    # Text of the interpreter itself: there wherever the tests run.
    for domain in ("docs", "maths", "python"):
        assert found[domain].documents > 5
    for domain, entry in found.items():
        if entry.reason is not None:
            assert not (folder / f"{domain}-0.jsonl").exists()
            continue
        rows = texts(folder / f"{domain}-0.jsonl")
        size = sum(len(row.encode()) for row in rows)
        assert (entry.documents, entry.utf8_bytes) == (len(rows), size)
        assert MAX_BYTES / 5 < size <= MAX_BYTES
        assert all(MIN_CHARACTERS <= len(row) <= MAX_CHARACTERS for row in rows)


def test_no_text_stands_twice_in_the_corpus(
    collected: tuple[Path, dict[str, FoundDomain]],
) -> None:
    rows = [row for path in collected[0].iterdir() for row in texts(path)]
    assert len({" ".join(row.lower().split()) for row in rows}) == len(rows)


def test_the_corpus_is_read_as_one_domain_per_file(
    collected: tuple[Path, dict[str, FoundDomain]],
) -> None:
    folder, found = collected
    domains = {source.domain for source in find_sources([folder]).files}
    assert domains == {domain for domain, entry in found.items() if entry.reason is None}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = ("maths", "python")
    chosen = {domain: found_module.DOMAINS[domain] for domain in domains}
    monkeypatch.setattr(found_module, "DOMAINS", chosen)
    contents = []
    for number, seed in enumerate((3, 3, 4)):
        collect(tmp_path / str(number), max_bytes_per_domain=30_000, seed=seed)
        contents.append([(tmp_path / str(number) / f"{d}-0.jsonl").read_bytes() for d in domains])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert contents[0][1] != contents[2][1]


def test_python_sources_lose_their_docstrings_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "\"\"\"Module\ndocstring.\"\"\"\nimport os\n\n\nclass Thing:\n    '''One line.'''\n\n"
        '    def method(self):\n        r"""Only\n        this."""\n\n'
        '    def other(self): "on the same line"\n\n\nTEXT = """not a docstring"""\n'
    )
    (tmp_path / "thing.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(found_module.sysconfig, "get_path", lambda name: str(tmp_path))
    (text,) = found_module._python(Random(0))
    assert text == (
        "import os\n\n\nclass Thing:\n\n    def method(self):\n        pass\n\n"
        '    def other(self): "on the same line"\n\n\nTEXT = """not a docstring"""\n'
    )
    ast.parse(text)


def test_duplicates_short_texts_and_broken_unicode_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "\n".join(f"line {number} of a long text" for number in range(3000))

    def source(draw: Random) -> Iterator[str]:
        yield from (long, "short", long.upper(), "x" * 300 + "\ud800", "y" * 300 + "\0")

    monkeypatch.setattr(found_module, "DOMAINS", {"one": source, "two": source})
    found = collect(tmp_path, max_bytes_per_domain=100_000)
    rows = texts(tmp_path / "one-0.jsonl")
    assert "\n".join(rows) == long
    assert (found["one"].too_short, found["one"].duplicates) == (1, len(rows))
    assert found["two"].reason is not None
    assert "only 0 kB" in found["two"].reason
    assert not (tmp_path / "two-0.jsonl").exists()


def test_answers_to_problems_are_right() -> None:
    checked = 0
    for text in (next(problem_documents(Random(seed))) for seed in range(200)):
        rows = text.split("\n")
        for question, answer in zip(rows[::2], rows[1::2], strict=True):
            if question.startswith("Solve "):
                equation, letter = question[6:-1].split(" for ")
                left, right = equation.split(" = ")
                value = int(answer.split(" = ")[1])
                assert eval(left, {letter: value}) == int(right)
                checked += 1
            elif question.startswith("Expand "):
                product = question[7:-1].replace("^", "**")
                for x in (-3, 0, 2, 11):
                    assert eval(product, {"x": x}) == eval(answer.replace("^", "**"), {"x": x})
                checked += 1
            elif question.startswith("Let "):
                formula = question.split(" = ")[1].split(". Find")[0].replace("^", "**")
                x = int(question.rpartition("(")[2].removesuffix(")."))
                assert eval(formula, {"x": x}) == int(answer)
                checked += 1
            elif question.startswith("What is ") and "divisor" not in question:
                assert eval(question[8:-1]) == int(answer)
                checked += 1
    assert checked > 500


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_problem_varies(kind: object) -> None:
    draw = Random(0)
    questions = {kind(draw)[0] for _ in range(50)}  # type: ignore[operator]
    assert len(questions) > 40
