"""The stacked Llama is transformers' Llama, P times over, and every proxy is on its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from regmix.errors import ModelError
from regmix.model import llama, ops
from regmix.model.llama import StackedLlama, init_parameters, transformers_state
from regmix.model.optim import OptimConfig, StackedAdamW
from regmix.model.presets import ModelShape, make_shape

# Relative Frobenius error against transformers. Its RMSNorm and rotary tables are float32 in any
# dtype, so float64 agrees to float32 rounding of those two only.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 2e-6}

PRESET = make_shape("cpu-64", vocab_size=256, seq_len=32)
ODD = ModelShape(
    num_layers=2, width=30, num_heads=3, hidden=37, vocab_size=123, seq_len=19, rope_base=500.0
)
GROUPED = ModelShape(
    num_layers=1, width=24, num_heads=4, hidden=37, vocab_size=123, seq_len=19, num_kv_heads=2
)
TIED = ModelShape(
    num_layers=1, width=24, num_heads=2, hidden=33, vocab_size=123, seq_len=19, tied=True
)
SHAPES = {"preset": PRESET, "odd": ODD, "grouped": GROUPED, "tied": TIED}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens_of(shape: ModelShape, *size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape.vocab_size, size, generator=generator)


def busy_parameters(shape: ModelShape, num_proxies: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in which no norm is all ones and logits are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    params = init_parameters(shape, range(num_proxies))
    for name, value in params.items():
        value.mul_(1.0 + 0.3 * torch.randn(value.shape, generator=generator))
        if name in ("head", "embedding"):
            value.mul_(3.0)
    return {name: value.to(dtype) for name, value in params.items()}


def poisoned(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(value, float("nan")) for name, value in params.items()}


def transformers_model(shape: ModelShape, state: dict[str, Tensor]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.kv_heads,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.seq_len,
        rope_theta=shape.rope_base,
    )
    model = LlamaForCausalLM(config).to(state["model.norm.weight"].dtype)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_loss_and_gradients_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    params, tokens = busy_parameters(shape, 3, dtype), tokens_of(shape, 3, 2, shape.seq_len + 1)
    grads, model = poisoned(params), StackedLlama(shape, group=2)
    losses = model.loss_and_grads(params, grads, tokens)
    logits = model.logits(params, tokens[:, :, :-1])
    for row in range(3):
        theirs = transformers_model(shape, transformers_state(params, row, shape))
        expected = theirs(input_ids=tokens[row, :, :-1]).logits
        loss = functional.cross_entropy(expected.flatten(0, 1), tokens[row, :, 1:].flatten())
        loss.backward()
        assert relative(logits[row], expected.detach()) < TOLERANCE[dtype]
        assert float(losses[row]) == pytest.approx(float(loss.detach()), abs=2e-6)
        ours = transformers_state(grads, row, shape)
        errors = {n: relative(ours[n], p.grad) for n, p in theirs.named_parameters()}
        worst = max(errors, key=lambda n: errors[n])
        assert errors[worst] < TOLERANCE[dtype], f"{worst}: {errors[worst]:.2e}"


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def train(
    shape: ModelShape, seeds: list[int], tokens: Tensor, *, nan_row: int | None = None
) -> tuple[dict[str, Tensor], Tensor, StackedAdamW]:
    """Train on tokens [steps, P, B, T+1]; return parameters, losses and optimizer."""
    params = init_parameters(shape, seeds)
    if nan_row is not None:
        params["head"][nan_row, 0, 0] = float("nan")
    optimizer = StackedAdamW(params, OptimConfig(lr=3e-3, warmup_steps=5))
    model, losses = StackedLlama(shape), []
    for step, batch in enumerate(tokens):
        losses.append(model.train_step(params, optimizer, batch, step)[0])
    return params, torch.stack(losses), optimizer


def test_stack_of_8_equals_single_proxies_bit_for_bit_beside_a_failed_one() -> None:
    tokens = tokens_of(PRESET, 50, 8, 1, 17)
    params, losses, optimizer = train(PRESET, list(range(8)), tokens, nan_row=3)
    assert optimizer.failed.tolist() == [row == 3 for row in range(8)]
    for row in (0, 4, 7):
        alone, own_losses, _ = train(PRESET, [row], tokens[:, row : row + 1])
        assert torch.equal(losses[:, row], own_losses[:, 0])
        assert all(torch.equal(params[name][row], alone[name][0]) for name in params)
    fresh = init_parameters(PRESET, [3])
    fresh["head"][0, 0, 0] = float("nan")
    for name, value in params.items():
        torch.testing.assert_close(value[3], fresh[name][0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_group_size_does_not_change_a_bit_at_a_preset(group: int) -> None:
    params, tokens = busy_parameters(PRESET, 8, torch.float32), tokens_of(PRESET, 8, 2, 33)
    expected, grads = poisoned(params), poisoned(params)
    losses = StackedLlama(PRESET).loss_and_grads(params, expected, tokens)
    assert torch.equal(
        losses, StackedLlama(PRESET, group=group).loss_and_grads(params, grads, tokens)
    )
    assert all(torch.equal(grads[name], expected[name]) for name in params)


def test_stack_equals_single_proxies_within_rounding_at_an_odd_shape() -> None:
    params, tokens = busy_parameters(ODD, 5, torch.float32), tokens_of(ODD, 5, 3, 18)
    grads = poisoned(params)
    losses = StackedLlama(ODD, group=5).loss_and_grads(params, grads, tokens)
    for row in range(5):
        single = {name: value[row : row + 1] for name, value in params.items()}
        own = poisoned(single)
        loss = StackedLlama(ODD).loss_and_grads(single, own, tokens[row : row + 1])
        assert float(loss) == pytest.approx(float(losses[row]), rel=1e-6)
        assert all(relative(grads[name][row], own[name][0]) < 2e-6 for name in params)


def test_train_step_is_loss_and_grads_then_optimizer() -> None:
    tokens = tokens_of(PRESET, 4, 3, 2, 33)
    params, losses, _ = train(PRESET, [5, 6, 7], tokens)
    other = init_parameters(PRESET, [5, 6, 7])
    grads, optimizer = poisoned(other), StackedAdamW(other, OptimConfig(lr=3e-3, warmup_steps=5))
    for step, batch in enumerate(tokens):
        assert torch.equal(StackedLlama(PRESET).loss_and_grads(other, grads, batch), losses[step])
        optimizer.step(grads, step)
    assert all(torch.equal(params[name], other[name]) for name in params)


def test_gradients_repeat_bit_for_bit_with_repeated_tokens() -> None:
    params, tokens = busy_parameters(PRESET, 2, torch.float32), tokens_of(PRESET, 2, 4, 33) % 5
    first, second = poisoned(params), poisoned(params)
    StackedLlama(PRESET).loss_and_grads(params, first, tokens)
    StackedLlama(PRESET).loss_and_grads(params, second, tokens)
    assert all(torch.equal(first[name], second[name]) for name in params)


def test_training_lowers_the_loss() -> None:
    tokens = (torch.arange(33) % 7).expand(30, 2, 2, 33)
    _, losses, _ = train(PRESET, [0, 1], tokens)
    assert bool((losses[-1] < losses[0] - 1.0).all())


def test_initial_loss_is_that_of_a_guess() -> None:
    shape = make_shape("cpu-64", seq_len=64)
    params, tokens = init_parameters(shape, [0, 1]), tokens_of(shape, 2, 2, 65)
    losses = StackedLlama(shape).loss_and_grads(params, poisoned(params), tokens)
    assert losses.tolist() == pytest.approx([math.log(shape.vocab_size)] * 2, abs=0.3)


def test_parameters_of_a_row_depend_on_its_seed_alone() -> None:
    stacked, other = init_parameters(PRESET, [11, 12, 13]), init_parameters(PRESET, [13, 99])
    for name, value in stacked.items():
        assert torch.equal(value[2], other[name][0])
        assert name.endswith("norm") or not torch.equal(value[0], value[1])


def test_parameters_have_the_published_spread() -> None:
    shape = make_shape("cpu-128")
    params = init_parameters(shape, [0])
    expected = (2 / (5 * shape.width)) ** 0.5
    for name in ("embedding", "head", "layers.0.qkv", "layers.3.attention_out", "layers.1.gate_up"):
        assert float(params[name].std()) == pytest.approx(expected, rel=0.03), name
    down = shape.hidden**-0.5 / shape.num_layers
    assert float(params["layers.2.down"].std()) == pytest.approx(down, rel=0.03)
    assert bool((params["norm"] == 1).all())


def test_evaluate_sums_the_loss_of_the_same_tokens() -> None:
    params, tokens = busy_parameters(PRESET, 3, torch.float32), tokens_of(PRESET, 4, 33)
    mask = torch.ones(4, 32, dtype=torch.bool)
    model = StackedLlama(PRESET)
    sums = model.evaluate(params, tokens, mask)
    losses = model.loss_and_grads(params, poisoned(params), tokens.expand(3, -1, -1))
    assert sums.dtype == torch.float64
    torch.testing.assert_close((sums / mask.sum()).float(), losses)


def test_evaluate_ignores_the_masked_end_of_the_last_window() -> None:
    params, tokens = busy_parameters(PRESET, 3, torch.float32), tokens_of(PRESET, 2, 33)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, 20:] = False
    sums = StackedLlama(PRESET).evaluate(params, tokens, mask)
    padded = tokens.clone()
    padded[1, 21:] = 0
    assert torch.equal(StackedLlama(PRESET).evaluate(params, padded, mask), sums)
    whole = StackedLlama(PRESET).evaluate(params, tokens[:1], mask[:1])
    part = StackedLlama(PRESET).evaluate(params, tokens[1:, :21], mask[1:, :20])
    torch.testing.assert_close(sums, whole + part, rtol=1e-6, atol=0)


def test_evaluate_of_a_proxy_does_not_depend_on_the_stack() -> None:
    params, tokens = busy_parameters(PRESET, 3, torch.float32), tokens_of(PRESET, 2, 33)
    mask = torch.ones(2, 32)
    sums = StackedLlama(PRESET).evaluate(params, tokens, mask)
    alone = {name: value[1:2] for name, value in params.items()}
    assert torch.equal(StackedLlama(PRESET).evaluate(alone, tokens, mask), sums[1:2])


def test_loss_stays_exact_when_logits_are_huge() -> None:
    params, tokens = busy_parameters(PRESET, 2, torch.float64), tokens_of(PRESET, 2, 1, 17)
    params["head"][1] *= 200.0
    grads = poisoned(params)
    losses = StackedLlama(PRESET).loss_and_grads(params, grads, tokens)
    logits = StackedLlama(PRESET).logits(params, tokens[:, :, :-1])
    assert float(logits[1].max()) > 100
    expected = functional.cross_entropy(logits[1, 0], tokens[1, 0, 1:])
    assert float(losses[1]) == pytest.approx(float(expected), rel=1e-6)
    assert all(bool(grad.isfinite().all()) for grad in grads.values())


def test_head_in_many_chunks_gives_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    params, tokens = busy_parameters(ODD, 2, torch.float64), tokens_of(ODD, 2, 5, 20)
    whole, chunked = poisoned(params), poisoned(params)
    losses = StackedLlama(ODD).loss_and_grads(params, whole, tokens)
    monkeypatch.setattr(ops, "_LOGIT_FLOATS", 1)
    again = StackedLlama(ODD).loss_and_grads(params, chunked, tokens)
    torch.testing.assert_close(again, losses)
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value)


def test_token_outside_the_vocabulary_is_refused() -> None:
    params, tokens = init_parameters(PRESET, [0]), tokens_of(PRESET, 1, 1, 9)
    tokens[0, 0, 4] = 256
    with pytest.raises(ModelError, match="Token 256 with a vocabulary of 256"):
        StackedLlama(PRESET).loss_and_grads(params, poisoned(params), tokens)


def test_tokens_of_another_stack_are_refused() -> None:
    params = init_parameters(PRESET, [0, 1])
    with pytest.raises(ModelError, match="2 proxies"):
        StackedLlama(PRESET).loss_and_grads(params, poisoned(params), tokens_of(PRESET, 3, 1, 9))


def test_stack_of_none_is_refused() -> None:
    with pytest.raises(ModelError, match="no proxies"):
        init_parameters(PRESET, [])


def test_every_parameter_is_exported_once() -> None:
    params = init_parameters(GROUPED, [0])
    state = transformers_state(params, 0, GROUPED)
    assert sum(value.numel() for value in state.values()) == GROUPED.num_parameters
    assert set(llama.parameter_shapes(GROUPED)) == set(params)
