"""Generation: transformers' greedy text token by token, seeds that reproduce, errors with cures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from model_cases import SHAPES, add_model, make_study, random_parameters
from test_formats import TEXTS

from regmix.cli.generate import command, printable
from regmix.data.tokenizer import train_bpe
from regmix.errors import ConfigError, ModelError, RegmixError
from regmix.files import write_json
from regmix.large.export import export_model
from regmix.large.generate import END, LENGTH, ROOM, Choice, Writer, choose
from regmix.large.inference import LlamaForward
from regmix.model.llama import StackedLlama
from regmix.study import Study

PROMPT = "Once upon a time there"
GREEDY = Choice(temperature=0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def writer(study: Study) -> Writer:
    return Writer.of_study(study, "plain")


def ids_of(writer: Writer, prompt: str | None, num_tokens: int, choice: Choice) -> list[int]:
    return [piece.token for piece in writer.write(writer.encode(prompt), num_tokens, choice)]


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_text_is_that_of_transformers_token_by_token(
    study: Study, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored, folder = name.replace(" ", "-"), tmp_path / "model"
    export_model(study, stored, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = [Writer.of_study(study, stored), Writer.of_checkpoint(folder)]
    for prompt in ("O", "def f1(x):", "naïve wolves "):
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        room = SHAPES[name].seq_len - start.shape[1]
        expected = theirs.generate(start, max_new_tokens=room)[0, start.shape[1] :].tolist()
        for model in ours:
            assert model.encode(prompt) == start[0].tolist()
            assert ids_of(model, prompt, room, GREEDY) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_kept_keys_and_values_change_no_logits(name: str) -> None:
    shape, parameters = SHAPES[name], random_parameters(SHAPES[name])
    tokens = torch.randint(
        0, shape.vocab_size, (shape.seq_len,), generator=torch.Generator().manual_seed(2)
    )
    expected = StackedLlama(shape).logits(parameters, tokens[None, None])[0, 0]
    model = LlamaForward(shape, parameters)
    cache = model.new_cache(shape.seq_len)
    # A prompt, some more at once, then one by one.
    ends = [5, 9, *range(10, shape.seq_len + 1)]
    for first, last in zip([0, *ends], ends, strict=False):
        found = model.next_logits(tokens[first:last], cache)
        torch.testing.assert_close(found, expected[last - 1], rtol=0, atol=2e-5)


def test_the_loss_counts_what_the_mask_keeps() -> None:
    shape, parameters = SHAPES["grouped and tied"], random_parameters(SHAPES["grouped and tied"])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, shape.vocab_size, (3, shape.seq_len + 1), generator=generator)
    mask = torch.rand(3, shape.seq_len, generator=generator) > 0.3
    (expected,) = StackedLlama(shape).evaluate(parameters, tokens, mask)
    (found,) = LlamaForward(shape, parameters).evaluate(tokens, mask)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_in_bfloat16_as_on_a_gpu_the_loss_is_nearly_the_same(name: str) -> None:
    shape, parameters = SHAPES[name], random_parameters(SHAPES[name])
    tokens = torch.randint(
        0, shape.vocab_size, (4, shape.seq_len + 1), generator=torch.Generator().manual_seed(4)
    )
    mask = torch.ones(4, shape.seq_len, dtype=torch.bool)
    exact, rounded = (
        float(LlamaForward(shape, parameters, dtype=dtype).evaluate(tokens, mask)) / mask.numel()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded == pytest.approx(exact, rel=5e-3)
    assert rounded != exact


def test_one_seed_gives_one_text_and_another_seed_another(writer: Writer) -> None:
    texts = [ids_of(writer, PROMPT, 20, Choice(temperature=1.0, seed=seed)) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_samples_of_one_seed_differ_and_depend_on_their_place_alone(writer: Writer) -> None:
    ids, choice = writer.encode(PROMPT), Choice(temperature=1.0, seed=7)
    first, second = ([p.token for p in writer.write(ids, 20, choice, (0, n))] for n in (0, 1))
    assert first != second
    assert second == [p.token for p in writer.write(ids, 20, choice, (0, 1))]


def test_a_text_ends_with_its_document_and_says_so(study: Study, writer: Writer) -> None:
    (end,) = writer._ends
    made = ids_of(writer, PROMPT, 10, GREEDY)
    early = Writer(
        "early",
        SHAPES["plain"],
        random_parameters(SHAPES["plain"]),
        writer._tokenizer,
        ends=frozenset([made[3]]),
        start=end,
    )
    pieces = list(early.write(early.encode(PROMPT), 10, GREEDY))
    place = made.index(made[3])
    assert [piece.token for piece in pieces] == made[: place + 1]
    assert [piece.stopped for piece in pieces] == [None] * place + [END]
    assert pieces[-1].text == ""


def test_a_text_ends_at_the_trained_length_and_says_so(writer: Writer) -> None:
    ids = writer.encode(PROMPT)
    room = 32 - len(ids)
    exact = list(writer.write(ids, room, GREEDY))
    longer = list(writer.write(ids, room + 1, GREEDY))
    assert len(exact) == len(longer) == room
    assert (exact[-1].stopped, longer[-1].stopped) == (LENGTH, ROOM)


def test_the_pieces_are_the_text_whole_characters_at_a_time(writer: Writer) -> None:
    ids = writer.encode(PROMPT)
    for seed in range(8):
        pieces = list(writer.write(ids, 25, Choice(temperature=1.5, top_p=1.0, seed=seed)))
        made = [piece.token for piece in pieces if piece.stopped != END]
        whole = writer._tokenizer.decode(ids + made)
        assert PROMPT + "".join(piece.text for piece in pieces) == whole


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = iter(writer._tokenizer.encode("é🐺.").ids)
    monkeypatch.setattr("regmix.large.generate.choose", lambda *_: next(forced))
    pieces = [piece.text for piece in writer.write(writer.encode(PROMPT), 7, GREEDY)]
    assert pieces == ["", "é", "", "", "", "🐺", "."]


def test_choices_are_made_among_the_likeliest() -> None:
    logits = np.log([0.05, 0.5, 0.15, 0.3])
    random = np.random.default_rng(0)

    def drawn(**settings: Any) -> np.ndarray:
        choice = Choice(**{"temperature": 1.0, "top_p": 1.0, **settings})
        found = [choose(logits, choice, random) for _ in range(4000)]
        return np.bincount(found, minlength=4) / 4000

    assert drawn() == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)
    assert drawn(temperature=0.0).tolist() == [0, 1, 0, 0]
    assert drawn(top_k=1).tolist() == [0, 1, 0, 0]
    assert drawn(top_k=2) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert drawn(top_k=9) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)
    assert drawn(top_p=0.4).tolist() == [0, 1, 0, 0]
    assert drawn(top_p=0.79) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert drawn(top_p=0.81)[2] > 0
    sharper = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    assert drawn(temperature=0.5) == pytest.approx(sharper / sharper.sum(), abs=0.03)


def test_a_document_is_started_with_the_separator(study: Study, writer: Writer) -> None:
    assert writer.encode(None) == [study.open_shards().separator_id]
    assert len(list(writer.write(writer.encode(None), 5, GREEDY))) >= 1


@pytest.mark.parametrize(
    ("prompt", "says", "cure"),
    [
        ("", "the prompt is empty", "leave --prompt out"),
        ("wolves " * 40, "was trained on sequences of 32", "at most 31 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(
    writer: Writer, prompt: str, says: str, cure: str
) -> None:
    with pytest.raises(ModelError, match=says) as refused:
        writer.encode(prompt)
    assert cure in refused.value.cure


def test_the_longest_prompt_leaves_room_for_one_token(writer: Writer) -> None:
    ids = (writer.encode("wolves " * 5) * 9)[:31]
    assert [piece.stopped for piece in writer.write(ids, 5, GREEDY)] == [ROOM]


def test_an_unknown_model_names_the_nearest(study: Study) -> None:
    with pytest.raises(ModelError, match="did you mean 'plain'"):
        Writer.of_study(study, "plane")


def test_a_model_of_another_tokenizer_is_refused(study: Study) -> None:
    add_model(study, study.open_shards(), "foreign", SHAPES["plain"])
    path = study.models_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "tokenizer": {"file": "x", "hash": "0" * 16}})
    with pytest.raises(ModelError, match="another tokenizer"):
        Writer.of_study(study, "foreign")


def test_a_checkpoint_beside_a_larger_tokenizer_is_refused(study: Study, tmp_path: Path) -> None:
    export_model(study, "plain", tmp_path / "model")
    larger = train_bpe((f"{n} {text}" for n, text in enumerate(TEXTS["web"])), 340)
    (tmp_path / "model" / "tokenizer.json").write_text(larger.text, encoding="utf-8")
    model = Writer.of_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match="knows 300"):
        model.encode(larger.decode(range(300, larger.vocab_size)))


def test_a_checkpoint_may_name_several_ends(study: Study, tmp_path: Path) -> None:
    export_model(study, "plain", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    write_json(path, {"eos_token_id": [0, 17], "bos_token_id": None})
    model = Writer.of_checkpoint(tmp_path / "model")
    assert model._ends == {0, 17}
    write_json(path, {"eos_token_id": "x"})
    with pytest.raises(ModelError, match="'x' is no token id"):
        Writer.of_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Choice(**settings)


def run(*words: object) -> Any:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_command_prints_the_text_after_its_prompt(study: Study, writer: Writer) -> None:
    shown = run(study.path, "--model", "plain", "--prompt", PROMPT, "--tokens", 8)
    pieces = writer.write(writer.encode(PROMPT), 8, Choice(), (0, 0))
    assert shown.stdout == printable(PROMPT + "".join(piece.text for piece in pieces)) + "\n"
    assert "8 tokens" in shown.stderr
    assert f"Next: regmix-fast export {study.path} --model plain" in shown.stderr


def test_the_command_answers_a_program_as_json(study: Study, tmp_path: Path) -> None:
    export_model(study, "plain", tmp_path / "model")
    words = ("--prompt", "wolves", "--prompt", "def", "--samples", 2, "--seed", 3, "--tokens", 6)
    ours = json.loads(run(study.path, "--model", "plain", *words, "--json").stdout)
    theirs = json.loads(run("--hf", tmp_path / "model", *words, "--json").stdout)
    assert ours["texts"] == theirs["texts"]
    assert (ours["model"], ours["seed"], ours["temperature"]) == ("plain", 3, 0.8)
    prompts = [text["prompt"] for text in ours["texts"]]
    assert prompts == ["wolves", "wolves", "def", "def"]
    assert len({tuple(text["tokens"]) for text in ours["texts"]}) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "models"),
        (("--model", "plain", "--hf", "x"), "got both"),
        (("--model", "plane"), "did you mean 'plain'"),
        (("--model", "plain", "--prompt", ""), "the prompt is empty"),
        (("--model", "plain", "--top-p", "2"), "top_p is 2"),
    ],
)
def test_bad_words_are_refused_with_a_cure(study: Study, words: tuple[str, ...], says: str) -> None:
    with pytest.raises(RegmixError, match=says):
        run(study.path, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error(study: Study) -> None:
    with pytest.raises(ModelError, match="no GPU"):
        run(study.path, "--model", "plain", "--gpu")


def test_what_steers_a_terminal_is_shown_as_text() -> None:
    assert printable("a\x1b[2J\tb\nö\x07") == "a\\x1b[2J\tb\nö\\x07"
