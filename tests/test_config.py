"""Settings, files and words: what goes wrong is named, with its cure."""

from __future__ import annotations

import dataclasses
import errno
import pickle
from pathlib import Path

import pytest

from regmix.cli.words import parse_count, parse_objective, parse_pairs, training_from
from regmix.config import build
from regmix.display import count, duration, size
from regmix.errors import ConfigError, RegmixError, ShardError, StorageError, nearest
from regmix.files import atomic_open, checksum, read_json, read_text, write_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    limit: int | None = None


def test_nested_tables_become_nested_settings() -> None:
    table = {"name": "a", "inner": {"rate": 1}, "sizes": [1, 2], "weights": {"x": 1}}
    outer = build(Outer, table, where="t")
    assert outer == Outer(name="a", inner=Inner(rate=1.0), sizes=(1, 2), weights={"x": 1.0})
    assert isinstance(outer.inner.rate, float)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "a"}, "missing setting 'inner'"),
        ({"name": 3, "inner": {"rate": 1.0}}, "expected str"),
        ({"name": "a", "inner": 4}, "expected a table"),
        ({"name": "a", "inner": {"rate": "fast"}}, "expected float"),
        ({"name": "a", "inner": {"rate": 1.0}, "sizes": 4}, "expected a list"),
        ({"name": "a", "inner": {"rate": 1.0}, "weights": 4}, "expected a table"),
        ({"name": "a", "inner": {"rate": 1.0}, "limit": True}, "expected int"),
        ({"name": "a", "inner": {"rate": 1.0}, "limits": 1}, "did you mean 'limit'"),
    ],
)
def test_a_wrong_setting_is_named(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(Outer, table, where="t")


def test_an_error_keeps_its_kind_and_its_cure_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ShardError("broken", cure="Pack again")))
    assert isinstance(error, ShardError)
    assert str(error) == "broken. Pack again."


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), atomic_open(path, "w") as stream:
        stream.writelines(["new", 4])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_left_is_named_with_its_cure(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"No space left.*Free some space"),
        atomic_open(tmp_path / "file.txt", "w"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_unwritable_folder_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        write_text(tmp_path / "file" / "inside.txt", "x")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(StorageError, match="byte 3"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_malformed_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(tmp_path / "x.json")


def test_a_checksum_sees_one_bit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00" * 3_000_000)
    (tmp_path / "b").write_bytes(b"\x00" * 2_999_999 + b"\x01")
    assert checksum(tmp_path / "a") != checksum(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [("250", 250), ("40k", 40_000), ("0.25B", 250_000_000), ("1e9", 10**9), ("2M", 2_000_000)],
)
def test_counts_are_read_with_their_suffix(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "3 apples", "1e400", "1e18B"])
def test_what_is_not_a_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_count(text)


def test_pairs_and_objectives_are_read() -> None:
    assert parse_pairs(("a=0.5,b=1", "c=2")) == {"a": 0.5, "b": 1.0, "c": 2.0}
    assert parse_pairs(()) is None
    assert parse_objective("mean", ("a", "b")) == {"a": 0.5, "b": 0.5}
    assert parse_objective("a,b", ("a", "b", "c")) == {"a": 0.5, "b": 0.5}
    assert parse_objective("a=0.9,b=0.1", ("a", "b")) == {"a": 0.9, "b": 0.1}
    for word in ("a", "a=", "=1", "a=x", "a=nan"):
        with pytest.raises(ConfigError, match="NAME=NUMBER"):
            parse_pairs((word,))


@pytest.mark.parametrize("words", [("a=1,a=2",), ("a=1", "b=1", " a =2")])
def test_a_name_given_twice_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        parse_pairs(words)


@pytest.mark.parametrize("text", ["a,a", "a=1,a=2"])
def test_a_target_given_twice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        parse_objective(text, ("a", "b"))


def test_a_model_comes_from_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text("num_layers = 1\nwidth = 48\nnum_heads = 4\nhidden = 64\nseq_len = 32\n")
    training = training_from(
        model=str(path),
        vocab_size=320,
        seq_len=None,
        batch_size=4,
        tokens=1000,
        learning_rate=1e-3,
        warmup_steps=50,
        schedule="cosine",
    )
    assert training.shape.width == 48
    assert training.shape.vocab_size == 320
    # The smallest number of steps that reaches the tokens; never more warm-up than steps.
    assert training.num_steps == 8
    assert training.optim.warmup_steps == 8


def test_numbers_are_shown_as_a_person_says_them() -> None:
    assert [duration(s) for s in (4.2, 190, 7500)] == ["4 s", "3 min 10 s", "2 h 05 min"]
    assert [size(b) for b in (12, 1234, 2.5e9)] == ["12 B", "1.2 kB", "2.5 GB"]
    assert [count(n) for n in (950, 12_300, 999_700, 1.05e9)] == [
        "950",
        "12.3k",
        "1M",
        "1.05B",
    ]
    assert nearest("wab", ["web", "books"]) == "did you mean 'web'?"
    assert nearest("zzz", ["web", "books"]) == "known: books, web"
    assert issubclass(ConfigError, RegmixError)


def test_an_error_is_one_line_that_steers_no_terminal() -> None:
    error = ShardError("a\nb\x1b[2J\u202e\ud800.", cure="cut" + "t" * 10**6)
    assert str(error).isprintable()
    assert str(error).startswith(r"a\nb\x1b[2J\u202e\ud800. cut")
    assert len(str(error)) < 6000
